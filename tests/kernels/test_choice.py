"""The choice of a kernels table by device and dtype, and the formats that are refused."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from stretto.errors import StartError
from stretto.kernels.choice import choose_kernels
from stretto.kernels.cpu import native
from stretto.kernels.reference import REFERENCE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantise", [None, "int8", "int4"])
def test_a_cpu_gets_the_c_kernels_when_they_are_built(
    dtype: torch.dtype, quantise: Literal["int8", "int4"] | None
) -> None:
    library = native.load()
    if library is None:
        pytest.skip("the C kernels are not built: no compiler at install time")
    kernels, why = choose_kernels(CPU, dtype, quantise)
    assert kernels.name == f"cpu-{library.level}" + (f"-{quantise}" if quantise else "")
    assert why == f"the C kernels, for {library.level}"


def test_a_dtype_without_c_kernels_gets_the_torch_table() -> None:
    kernels, why = choose_kernels(CPU, torch.float16)
    assert kernels is REFERENCE
    assert "not in torch.float16" in why


def test_fp8_is_refused_on_a_cpu() -> None:
    with pytest.raises(StartError, match=r"--quantise fp8: only CUDA devices .* use int8 or int4"):
        choose_kernels(CPU, torch.float32, "fp8")


def test_int8_is_refused_on_a_gpu(card: None) -> None:
    with pytest.raises(StartError, match="--quantise int8: a CUDA device holds weights in fp8 or int4"):
        choose_kernels(CUDA, torch.bfloat16, "int8")


def test_fp8_is_refused_on_an_older_gpu(card: None) -> None:
    with pytest.raises(StartError, match=r"A Card has compute capability 8\.0, and fp8 needs 8\.9; use int4"):
        choose_kernels(CUDA, torch.bfloat16, "fp8")
