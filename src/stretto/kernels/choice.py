"""Which table runs where: Triton's kernels on a CUDA device, the C kernels on a CPU they were built for, and
torch everywhere else."""

from __future__ import annotations

from importlib import import_module

import torch

from stretto.errors import StartError
from stretto.kernels import Kernels
from stretto.kernels.cpu import native
from stretto.kernels.cpu.table import Quantise, table
from stretto.kernels.cpu.weights import TYPES
from stretto.kernels.reference import REFERENCE

# Triton comes with torch for CUDA alone, so its table is imported only where there is a device for it.
CUDA = "stretto.kernels.cuda.table"


def choose_kernels(
    device: torch.device, dtype: torch.dtype, quantise: Quantise | None = None
) -> tuple[Kernels, str]:
    """The table for a model computed in `dtype` on `device`, and the sentence that says why.

    Raises StartError when weights are to be quantised and only torch's table can be had.
    """
    if device.type == "cuda" and quantise is None:
        return import_module(CUDA).table(device), "Triton's kernels, for CUDA devices"
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


def use_threads(count: int) -> None:
    """Compute on `count` threads. The C kernels bring their own; torch's would spin on the same cores beside
    them, so it then has one. Raises OSError when they cannot be had.
    """
    library = native.load()
    if library is not None:
        library.threads(count)
    torch.set_num_threads(count if library is None else 1)
