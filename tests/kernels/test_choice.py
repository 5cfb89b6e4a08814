"""Which table runs where, and what is refused."""

from __future__ import annotations

import pytest
import torch

from stretto.errors import StartError
from stretto.kernels.choice import choose_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")


def test_a_cpu_has_no_fp8() -> None:
    with pytest.raises(StartError, match=r"--quantise fp8: only CUDA devices .* use int8 or int4"):
        choose_kernels(CPU, torch.float32, "fp8")


def test_a_gpu_has_no_int8(card: None) -> None:
    with pytest.raises(StartError, match="--quantise int8: a CUDA device holds weights in fp8 or int4"):
        choose_kernels(CUDA, torch.bfloat16, "int8")


def test_an_older_card_has_no_fp8(card: None) -> None:
    with pytest.raises(StartError, match=r"A Card has compute capability 8\.0, and fp8 needs 8\.9; use int4"):
        choose_kernels(CUDA, torch.bfloat16, "fp8")
