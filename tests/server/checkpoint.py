"""Tiny tokenizers with chat templates, saved with the file names of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, world! What is the answer to everything? 42.",
    "Grüße aus Köln, señor. El niño comió mañana. 世界你好 こんにちは 😀 🎉 naïve café",
    '{"name": "weather", "arguments": {"city": "Paris", "days": 3}} [1, 2, 3] true false null',
    "def add(a, b):\n    return a + b\n\n<b>bold</b> & friends",
] * 4
SPECIAL = ["<|begin|>", "<|end|>", "<|start|>", "<|stop|>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CHATML = """{%- if tools %}
<|start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}

Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call><|stop|>
{% endif %}
{%- for message in messages %}
<|start|>{{ message.role }}
{{ message.content or '' }}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|stop|>
{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def byte_level(template: str | None = CHATML, extra: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """A tokenizer like that of Llama 2: blanks become U+2581, one is prepended, bytes are the fallback."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, "\u2581"])}
    for character in sorted(set("".join(CORPUS)) - {" ", "世"}):
        vocabulary.setdefault(character, len(vocabulary))
    merges: list[tuple[str, str]] = []
    for word in ("\u2581the", "\u2581Hello", "world"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write(
    path: Path, tokenizer: Tokenizer, template: str | None, *, eos: str, bos: str | None = None
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    if bos is not None:
        config["bos_token"] = bos
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.token_to_id(eos)], "temperature": 0.1})
    )
    return path
