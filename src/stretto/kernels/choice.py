"""Which table runs where: the C kernels on a CPU they were built for, torch everywhere else."""

from __future__ import annotations

import torch

from stretto.kernels import Kernels
from stretto.kernels.cpu import native
from stretto.kernels.cpu.table import table
from stretto.kernels.reference import REFERENCE

IN_C = (torch.float32, torch.bfloat16)


def choose_kernels(device: torch.device, dtype: torch.dtype) -> tuple[Kernels, str]:
    """The table for a model held as `dtype` on `device`, and the sentence that says why."""
    if device.type != "cpu":
        return REFERENCE, f"torch's own kernels run on {device.type}"
    if dtype not in IN_C:
        return REFERENCE, f"the C kernels compute in float32 and bfloat16, not in {dtype}"
    library = native.load()
    if library is None:
        return REFERENCE, "the C kernels were not built: install gcc, then install Stretto again"
    return table(library), f"the C kernels, for {library.level}"


def use_threads(count: int) -> None:
    """Compute on `count` threads, in torch and in the C kernels. Raises OSError when they cannot be had."""
    torch.set_num_threads(count)
    library = native.load()
    if library is not None:
        library.threads(count)
