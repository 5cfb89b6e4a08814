"""The desk's tokenizer: byte-level BPE, digits one by one, five chat tokens. Any text goes in and comes out.

`build` trains it on the training split; `save` writes the files that `transformers` and the server read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.desk.example import Example, Message, pick
from recipes.desk.questions.tools import call, signature
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
# A system prompt that asks for one language, in whatever words, gets a last line that the training has too.
NAMES = {
    "English": ("english", "englisch", "inglés"),
    "German": ("german", "deutsch", "alemán"),
    "Spanish": ("spanish", "spanisch", "español"),
}
ASKING = (
    *("answer", "reply", "respon", "speak", "write", "language", "antwort", "sprich", "schreib", "sprache"),
    *("habla", "contest", "escrib", "idioma"),
)
# A tool is shown in one line, as `signature` writes it: a JSON schema would be many tokens for a small model.
TEMPLATE = (
    "{%- macro language(text) -%}"
    "{%- set asked = namespace(names=[], is=false) -%}"
    f"{{%- for name, words in {list(NAMES.items())} -%}}"
    "{%- set found = namespace(any=false) -%}"
    "{%- for word in words -%}"
    "{%- if word in text | lower -%}{%- set found.any = true -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if found.any -%}{%- set asked.names = asked.names + [name] -%}{%- endif -%}"
    "{%- endfor -%}"
    f"{{%- for word in {list(ASKING)} -%}}"
    "{%- if word in text | lower -%}{%- set asked.is = true -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if asked.is and asked.names | length == 1 -%}"
    "{%- set line = 'Answer in ' ~ asked.names[0] ~ '.' -%}"
    "{%- if line not in text.split('\\n') -%}{{ '\\n' ~ line }}{%- endif -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- macro kind(value) -%}"
    "{%- if value is not mapping -%}any"
    "{%- else -%}"
    "{%- if value['enum'] -%}{{ value['enum'] | join('|') }}"
    "{%- else -%}{{ value['type'] if value['type'] is string else 'any' }}"
    "{%- endif -%}"
    "{%- if value['description'] -%}{{ ' (' ~ value['description'] ~ ')' }}{%- endif -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- macro signature(tool) -%}"
    "{{ tool['name'] ~ '(' }}"
    "{%- for name, value in ((tool['parameters'] or {})['properties'] or {}).items() -%}"
    "{{ ', ' if not loop.first }}{{ name ~ ': ' ~ kind(value) }}"
    "{%- endfor -%}"
    "{{ ')' }}{{ ' ' ~ tool['description'] if tool['description'] }}"
    "{%- endmacro -%}"
    "{%- set shown = namespace(tools='') -%}"
    "{%- if tools -%}"
    "{%- for tool in tools -%}"
    "{%- set shown.tools = shown.tools ~ '\\n' ~ signature(tool['function'] or tool) -%}"
    "{%- endfor -%}"
    "{%- set shown.tools = 'Tools:' ~ shown.tools -%}"
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{{ '<|system|>' ~ shown.tools ~ '<|end|>' }}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{ raise_exception('desk knows the roles system, user, assistant and tool, not ' + message['role']) }}"
    "{%- endif -%}"
    "{%- set content = (message['content'] or '') | trim -%}"
    "{%- if message['role'] == 'tool' -%}"
    "{{ '<|user|><tool_response>\\n' ~ content ~ '\\n</tool_response><|end|>' }}"
    "{%- else -%}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ content }}"
    "{{ language(content) if message['role'] == 'system' }}"
    "{%- if loop.first and message['role'] == 'system' and tools -%}"
    "{{ ('\\n\\n' if content else '') ~ shown.tools }}"
    "{%- endif -%}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- set function = call['function'] or call -%}"
    "{%- set arguments = function['arguments'] -%}"
    "{{ '\\n' if content or not loop.first }}"
    "{{ '<tool_call>\\n{\"name\": \"' ~ function['name'] ~ '\", \"arguments\": ' }}"
    "{{ arguments if arguments is string else arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}"
    "{%- endfor -%}"
    "{{ '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def in_language(text: str) -> str:
    """A system prompt with the line about the language that it asks for, if it asks for one."""
    low = text.lower()
    names = [name for name, words in NAMES.items() if any(word in low for word in words)]
    line = f"Answer in {names[0]}." if len(names) == 1 else ""
    if not line or line in text.split("\n") or not any(word in low for word in ASKING):
        return text
    return f"{text}\n{line}"


def flat(messages: Iterable[Message], tools: Sequence[dict[str, Any]] = ()) -> list[Message]:
    """The messages with nothing but a role and a text, as TEMPLATE shows calls, results and tools."""
    found: list[Message] = []
    for message in messages:
        role, text = message["role"], (message["content"] or "").strip()
        calls = [each["function"] for each in message.get("tool_calls", ())]
        written = [call(each["name"], each["arguments"]) for each in calls]
        text = "\n".join([text, *written] if text else written) if written else text
        if role == "system":
            text = in_language(text)
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        found.append({"role": role, "content": text})
    if tools:
        shown = "\n".join(["Tools:", *(signature(tool["function"]) for tool in tools)])
        if not found or found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": shown})
        else:
            text = found[0]["content"]
            found[0] = {"role": "system", "content": f"{text}\n\n{shown}" if text else shown}
    return found


def render(messages: Iterable[Message], tools: Sequence[dict[str, Any]] = (), *, prompt: bool = False) -> str:
    """The text that TEMPLATE renders. `prompt` adds the start of the assistant's turn."""
    text = "".join(f"<|{message['role']}|>{message['content']}{END}" for message in flat(messages, tools))
    return text + ASSISTANT if prompt else text


def conversation(example: Example) -> str:
    """An example with its reply, as one string of the training data."""
    return render((*example.messages, {"role": "assistant", "content": example.reply}), example.tools)


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
