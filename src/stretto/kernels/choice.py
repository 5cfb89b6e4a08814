"""Which table runs where: Triton's kernels on a CUDA device, the C kernels on a CPU they were built for, and
torch everywhere else."""

from __future__ import annotations

from importlib import import_module

import torch

from stretto.config import Quantise
from stretto.errors import StartError
from stretto.kernels import AnyKernels
from stretto.kernels.cpu import native
from stretto.kernels.cpu.table import table
from stretto.kernels.cpu.weights import TYPES
from stretto.kernels.reference import REFERENCE

# Triton comes with torch for CUDA alone, so its table is imported only where there is a device for it.
CUDA = "stretto.kernels.cuda.table"
FP8_FROM = (8, 9)


def choose_kernels(
    device: torch.device, dtype: torch.dtype, quantise: Quantise | None = None
) -> tuple[AnyKernels, str]:
    """The table for a model computed in `dtype` on `device`, and the sentence that says why.

    Raises StartError when weights are to be quantised in a way that the device has no kernels for.
    """
    if device.type == "cuda":
        _check_cuda(device, quantise)
        return import_module(CUDA).table(device, quantise), "Triton's kernels, for CUDA devices"
    if quantise == "fp8":
        raise StartError("--quantise fp8: only CUDA devices compute with fp8; on a CPU use int8 or int4")
    library = native.load()
    if device.type != "cpu":
        kernels, why = REFERENCE, f"torch's own kernels run on {device.type}"
    elif dtype not in TYPES:
        kernels, why = REFERENCE, f"the C kernels compute in float32 and bfloat16, not in {dtype}"
    elif library is None:
        kernels, why = (
            REFERENCE,
            "the C kernels are not there, or of other sources: install gcc, then install Stretto again",
        )
    else:
        return table(library, quantise), f"the C kernels, for {library.level}"
    if quantise is not None:
        raise StartError(
            f"--quantise {quantise}: only the C kernels on a CPU read quantised weights, and {why}"
        )
    return kernels, why


def _check_cuda(device: torch.device, quantise: Quantise | None) -> None:
    if quantise == "int8":
        raise StartError("--quantise int8: a CUDA device holds weights in fp8 or int4; use one of these")
    capability = torch.cuda.get_device_capability(device)
    if quantise == "fp8" and capability < FP8_FROM:
        raise StartError(
            f"--quantise fp8: {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and fp8 needs {FP8_FROM[0]}.{FP8_FROM[1]}; use int4"
        )


def use_threads(count: int) -> None:
    """Compute on `count` threads. The C kernels bring their own; torch's would spin on the same cores beside
    them, so it then has one. Raises OSError when they cannot be had.
    """
    library = native.load()
    if library is not None:
        library.threads(count)
    torch.set_num_threads(count if library is None else 1)
