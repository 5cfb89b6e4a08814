"""What the kernels for Hopper share: the size of the card, and the names of the bulk copy engine."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

PROGRAMS = 132  # one for each multiprocessor of a Hopper card
REGISTERS = 168  # of a thread at the launch: twelve warps share 65,536
# Triton 3.6 has other names for these than later versions.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
