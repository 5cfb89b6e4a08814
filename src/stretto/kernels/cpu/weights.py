"""Packed weights: panels of 32 outputs in float32, bfloat16, int8 or int4.

Owns the packing and the memory. `stretto.kernels.cpu.table` multiplies with them.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stretto.kernels.cpu.native import BF16, F32, FORMATS, Native, NativeWeights

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
TYPES = {torch.float32: F32, torch.bfloat16: BF16}
LARGE_PAGE = 2**21
LONGEST_ROW = 65536
STEP = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}


class Form(NamedTuple):
    """How weights [n, k] are packed. `group` weights of a row share a scale."""

    format: WeightFormat
    n: int
    k: int
    group: int


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Weights [n, k] and a bias [n] as the kernels read them. `address` is the address of `struct`, which
    points into `data` and `bias`."""

    format: WeightFormat
    n: int
    k: int
    group: int
    data: Tensor
    bias: Tensor | None
    struct: NativeWeights
    address: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def shares(self, weight: Tensor) -> bool:
        """Always False, because packing copies."""
        return False


def pack(
    native: Native, weight: Tensor, bias: Tensor | None, format: WeightFormat, group: int = 0
) -> PackedLinear:
    """Pack `weight` [N, K], float32 or bfloat16, and `bias` [N] or None.

    `group` weights of a row share a scale (0: the whole row). It must divide K and be a multiple of 4 (int8)
    or 8 (int4). An int8 scale maps the largest magnitude to 127. An int4 scale is searched for the smallest
    squared error. Raises ValueError for another shape or dtype.
    """
    if weight.dim() != 2 or weight.dtype not in TYPES:
        raise ValueError(f"cannot pack weights of shape {tuple(weight.shape)}, {weight.dtype}")
    n, k = weight.shape
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit weights of shape {(n, k)}")
    form = Form(format, n, k, group or -(-k // STEP[format]) * STEP[format])
    data = memory(packed_bytes(native, form))
    packed = adopt(native, form, data, None if bias is None else bias.float().contiguous())
    weight = weight.contiguous()
    native.pack(packed.address, weight.data_ptr(), TYPES[weight.dtype], data.data_ptr())
    return packed


def packed_bytes(native: Native, form: Form) -> int:
    """The bytes of weights of this form. Raises ValueError for a form that no kernel reads."""
    format, n, k, group = form
    step = STEP[format]
    if n < 1 or k < 1:
        raise ValueError(f"cannot pack weights of shape {(n, k)}")
    if group < 1 or -(-k // step) * step % group or group % step:
        raise ValueError(f"{format} groups of {group} do not divide rows of {k} into multiples of {step}")
    if step > 2 and k > LONGEST_ROW:
        raise ValueError(f"{format} weights of shape {(n, k)}: rows beyond {LONGEST_ROW} are not supported")
    shape = NativeWeights(0, 0, n, k, group, FORMATS[format])  # a name, so that it lives until it was read
    return native.packed_bytes(ctypes.addressof(shape))


def adopt(native: Native, form: Form, data: Tensor, bias: Tensor | None) -> PackedLinear:
    """The weights that are packed at `data` (uint8, aligned to 64 bytes), with a bias [n], float32, or None.
    Raises ValueError when their sizes do not fit the form."""
    format, n, k, group = form
    if data.nbytes != (size := packed_bytes(native, form)) or data.data_ptr() % 64:
        raise ValueError(f"{data.nbytes} bytes are not the {size} packed ones, or not aligned to 64")
    if bias is not None and (bias.shape != (n,) or bias.dtype != torch.float32):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit weights of shape {(n, k)}")
    struct = NativeWeights(
        data.data_ptr(), 0 if bias is None else bias.data_ptr(), n, k, group, FORMATS[format]
    )
    return PackedLinear(format, n, k, group, data, bias, struct, ctypes.addressof(struct))


def unpack(native: Native, packed: PackedLinear) -> Tensor:
    """The weights [N, K], float32, that the kernels multiply with."""
    out = torch.empty(packed.n, packed.k)
    native.unpack(packed.address, out.data_ptr())
    return out


def memory(size: int) -> Tensor:
    """A uint8 tensor of `size` bytes, aligned to 64 bytes.

    It is in large pages when it fills at least one: fewer address look-ups give a fifth more bandwidth.
    """
    if size < LARGE_PAGE:
        spare = torch.empty(size + 64, dtype=torch.uint8)
        start = -spare.data_ptr() % 64
        return spare[start : start + size]
    region = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass
    spare = torch.frombuffer(region, dtype=torch.uint8)
    start = -spare.data_ptr() % LARGE_PAGE
    return spare[start : start + size]


def exact_in_bfloat16(weight: Tensor) -> bool:
    """Whether `weight` is bfloat16, or float32 that bfloat16 represents exactly."""
    return weight.dtype == torch.bfloat16 or not bool((weight.contiguous().view(torch.int32) & 0xFFFF).any())
