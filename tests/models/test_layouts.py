"""Checkpoints that other programs wrote in another layout load as transformers loads them."""

# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false
from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stretto.errors import CheckpointError
from tests.models.checkpoints import expected, make, rewrite
from tests.models.stepping import Driver
from tests.models.test_families import close, prompt
from tests.models.test_load import read, retensor


def without_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_decoder_without_its_prefix(family: str, tmp_path: Path) -> None:
    model = make(family, tmp_path)
    retensor(tmp_path, without_prefix)
    close(Driver(read(tmp_path)).read(prompt(9), 9), expected(model, prompt(9)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_moe-step"])
def test_experts_in_one_tensor(family: str, tmp_path: Path) -> None:
    model = make(family, tmp_path)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = list(model.state_dict())
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    close(Driver(read(tmp_path / "fused")).read(prompt(9), 9), expected(model, prompt(9)))


def test_a_tied_model_of_which_only_the_head_is_stored(tmp_path: Path) -> None:
    model = make("qwen3", tmp_path, tie_word_embeddings=True)
    retensor(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    close(Driver(read(tmp_path)).read(prompt(9), 9), expected(model, prompt(9)))


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_that_differs_from_the_embedding_is_not_tied(differs: bool, tmp_path: Path) -> None:
    model = make("qwen3", tmp_path, tie_word_embeddings=True)
    head = model.get_input_embeddings().weight.detach().clone() * (2.0 if differs else 1.0)
    retensor(tmp_path, lambda t: t.update({"lm_head.weight": head}))
    decoder = read(tmp_path)
    assert decoder.spec.tied is not differs
    if differs:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)  # type: ignore[assignment]
    close(Driver(decoder).read(prompt(9), 9), expected(model, prompt(9)))


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.k_scale",
        "model.layers.1.self_attn.attn.v_scale",
        "v_head.summary.weight",
        "mtp.layers.0.input_layernorm.weight",
        "model.mtp_layers.0.weight",
        "model.layers.9.eh_proj.weight",
    ],
)
def test_tensors_that_the_decoder_does_not_use_are_passed_over(extra: str, tmp_path: Path) -> None:
    model = make("llama", tmp_path)
    retensor(tmp_path, lambda t: t.update({extra: torch.ones(2)}))
    close(Driver(read(tmp_path)).read(prompt(9), 9), expected(model, prompt(9)))


def test_what_would_change_the_numbers_is_still_refused(tmp_path: Path) -> None:
    make("llama", tmp_path)
    retensor(tmp_path, lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="lora_A"):
        read(tmp_path)


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")


def four_bit_float(path: Path) -> None:
    entry = {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: rewrite(path, quantization={"group_size": 64, "bits": 4}), "is quantised (mlx)"),
        (lambda path: (path / "quantize_config.json").write_text('{"bits": 4}'), "is quantised (gptq)"),
        (lambda path: (path / "quant_config.json").write_text('{"w_bit": 4}'), "is quantised (awq)"),
        (lambda path: pointer(path / "model.safetensors"), "git lfs pull"),
        (lambda path: pointer(path / "config.json"), "git lfs pull"),
        (four_bit_float, "'F4'; only F32, BF16, F16 are read"),
    ],
)
def test_weights_of_another_kind_are_named(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    make("llama", tmp_path, num_hidden_layers=1)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read(tmp_path)
