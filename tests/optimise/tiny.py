"""A tiny model and data for it: which digit of a short list is the first, the last or the largest."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

TASKS: dict[str, Callable[[list[str]], str]] = {
    "first": lambda digits: digits[0],
    "last": lambda digits: digits[-1],
    "max": max,
}
PAD, END = "<|pad|>", "<|end|>"
RULES = {"layers": 4, "hidden": 64, "intermediate": 128}


def tokenizer() -> Tokenizer:
    """One token for each byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate([PAD, END, *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([PAD, END])
    return made


def checkpoint(path: Path, *, seed: int = 0, **sizes: int) -> Path:
    """A random checkpoint. `sizes` are layers, hidden and intermediate."""
    size = RULES | sizes
    torch.manual_seed(seed)
    made = tokenizer()
    config = LlamaConfig(
        vocab_size=made.get_vocab_size(),
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "pad_token": PAD}))
    return path


def lines(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different samples, as the data of a recipe has them."""
    rng = Random(seed)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        task, length = rng.choice(list(TASKS)), rng.choice((3, 4))
        digits = [str(rng.randint(0, 9)) for _ in range(length)]
        prompt = f"{task} {' '.join(digits)}:"
        found[prompt] = {"prompt": prompt, "answer": TASKS[task](digits), "task": task, "level": length}
    return list(found.values())


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path
