"""The desk's tokenizer: byte-level BPE, digits one by one, five chat tokens. Any text goes in and comes out.

`build` trains it on the training split; `save` writes the files that `transformers` and the server read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.desk.example import Example, Message, pick
from recipes.desk.tasks import LEVELS, TASKS, draw

PAD, END, SYSTEM, USER, ASSISTANT = SPECIALS = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
PAD_ID, END_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID = range(5)
VOCABULARY = 2048
CONTEXT = 2048
# A word with the space before it, one digit, a run of signs, line ends, spaces. No token spans two of these.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('desk knows the roles system, user and assistant, not ' + message['role']) }}"
    "{%- endif -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def render(messages: Iterable[Message], *, prompt: bool = False) -> str:
    """The text that TEMPLATE renders. `prompt` adds the start of the assistant's turn."""
    text = "".join(f"<|{message['role']}|>{message['content'].strip()}{END}" for message in messages)
    return text + ASSISTANT if prompt else text


def conversation(example: Example) -> str:
    """An example with its reply, as one string of the training data."""
    return render((*example.messages, {"role": "assistant", "content": example.reply}))


def build(seed: int = 0, examples: int = 40_000) -> Tokenizer:
    """A tokenizer trained on `examples` prompts of the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, examples), trainer)
    return tokenizer


def _texts(seed: int, examples: int) -> Iterator[str]:
    rng = Random(f"tokenizer {seed}")
    names = tuple(TASKS)
    for _ in range(examples):
        example = draw("train", pick(rng, names), pick(rng, LEVELS[:3]), rng)
        yield from (message["content"] for message in example.messages)
        yield example.reply


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of rendered conversations. Chat tokens in the text are recognised."""
    return [row.ids for row in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which contains the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "extra_special_tokens": [SYSTEM, USER, ASSISTANT],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
