"""Matrices that are left out of quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stretto.errors import CheckpointError
from stretto.kernels.choice import choose_kernels, choose_wider
from stretto.kernels.cpu import native
from stretto.models.load import MixedKernels, load
from tests.models.checkpoints import make

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(native.load() is None, reason="the C kernels were not built")


def mixed(*names: str) -> MixedKernels:
    kernels, _ = choose_kernels(CPU, torch.float32, "int4")
    return MixedKernels(kernels, choose_wider(CPU, torch.float32, "int4"), frozenset(names))


def test_the_named_matrices_are_in_the_wider_format_and_no_others(tmp_path: Path) -> None:
    make("llama", tmp_path, hidden_size=256, intermediate_size=256)
    names = ("model.layers.0.mlp.gate_proj", "model.layers.2.self_attn.o_proj")
    decoder = load(tmp_path, dtype=torch.float32, device=CPU, kernels=mixed(*names))
    layers: list[Any] = list(decoder.weights.stack.layers)
    found: dict[str, str] = {
        f"{number} {part}": matrix.format
        for number, layer in enumerate(layers)
        for part, matrix in (("gate", layer.feed_forward.gate_up), ("out", layer.out))
    }
    assert found == {f"{number} {part}": "int4" for number in range(4) for part in ("gate", "out")} | {
        "0 gate": "int8",
        "2 out": "int8",
    }


def test_a_matrix_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    make("llama", tmp_path)
    with pytest.raises(CheckpointError, match=r"has no matrix model\.layers\.9\.mlp\.down_proj"):
        load(tmp_path, dtype=torch.float32, device=CPU, kernels=mixed("model.layers.9.mlp.down_proj"))
