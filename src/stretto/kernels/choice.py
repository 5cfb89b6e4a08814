"""Chooses the kernels table: Triton's on a CUDA device, the C kernels on a CPU, and torch everywhere else."""

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

# Imported on demand: it needs Triton, which is only installed with torch for CUDA.
CUDA = "stretto.kernels.cuda.table"
FP8_FROM = (8, 9)
# The format of a matrix that is left out of quantisation. None: as it is in the checkpoint.
WIDER: dict[Quantise, Quantise | None] = {"int4": "int8", "int8": None, "fp8": None}


def choose_kernels(
    device: torch.device, dtype: torch.dtype, quantise: Quantise | None = None
) -> tuple[AnyKernels, str]:
    """The table for a model that computes in `dtype` on `device`, and a phrase that says why it was chosen.

    Raises StartError when the device has no kernels for weights quantised as asked.
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
            "the C kernels are missing or were built from other sources: install gcc, then reinstall Stretto",
        )
    else:
        return table(library, quantise), f"the C kernels, for {library.level}"
    if quantise is not None:
        raise StartError(
            f"--quantise {quantise}: only the C kernels on a CPU read quantised weights, and {why}"
        )
    return kernels, why


def choose_wider(device: torch.device, dtype: torch.dtype, quantise: Quantise) -> AnyKernels:
    """The table that packs the matrices which a model quantised so leaves in a wider format."""
    wider = WIDER[quantise] if device.type == "cpu" else None
    return choose_kernels(device, dtype, wider)[0]


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
    """Compute on `count` threads. The C kernels have a pool of their own. Torch then gets a single thread,
    because its threads would spin on the same cores. Raises OSError when the threads cannot be started.
    """
    library = native.load()
    if library is not None:
        library.threads(count)
    torch.set_num_threads(count if library is None else 1)
