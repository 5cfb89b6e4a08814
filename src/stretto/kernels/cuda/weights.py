"""The weight formats of a CUDA device: what each holds, how weights are packed, and how they are widened.

A format is a class with the members of `CudaWeights`. If `skinny_gemm` has to decode its weights, it also has
a branch on `format` in that kernel. All experts of a layer are held together, in a class of `CudaExperts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels import Activation
from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait
from stretto.kernels.cuda.rows import (
    FP8,
    FP8_MAX,
    GROUP,
    ZERO_POINT,
    Operand,
    quantise_and_sum_rows,
    quantise_rows,
)
from stretto.kernels.reference import Dense, DenseExperts

SKINNY_ROWS = 64
WIDE = 8192  # with this many outputs or more, the vendor's product of 16-bit weights is the faster one

# So many rows are rounded to e4m3 in front of int4 weights, if the device has fp8. Fewer keep their dtype;
# for more, the weights are widened. The first is at most SKINNY_ROWS + 1.
ROUNDED_ROWS = range(5, 2**20)
# Smaller matrices are widened for more than SKINNY_ROWS rows all the same, because that takes less time.
ROUNDED_WEIGHTS = 2**24
# The largest magnitude of a group is represented by the lowest level, or is this much beyond it.
CLIP_RATIOS = tuple(1.0 - i * 0.04 for i in range(8))
ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Tiling:
    """How `skinny_gemm` divides the weights: blocks of stored rows by blocks of columns.

    `k_block` counts 16-bit columns; `group`, if not zero, is a fixed number of columns instead. Columns are
    split over programs until there are `programs` of them. A tile has at most `m_block` rows of x.
    """

    n_block: int
    k_block: int
    stages: int
    programs: int
    warps: int = 4
    group: int = 0
    m_block: int = SKINNY_ROWS


FLAT = Tiling(64, 256, 3, 132)
TALL = Tiling(128, 128, 3, 264)
TALL_FROM = 132 * 128
GROUPED = Tiling(64, GROUP, 4, 528, group=GROUP)
GROUPED_TALL = Tiling(128, GROUP, 3, 132, warps=8, group=GROUP, m_block=128)


class CudaWeights(Protocol):
    """The weights [N, K] of a linear layer, and how they are best multiplied with."""

    format: ClassVar[str]
    has_gemv: ClassVar[bool]
    """Whether `gemv` can read them."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def outputs(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

    def shares(self, weight: Tensor) -> bool: ...

    def skinny_rows(self, dtype: torch.dtype) -> int:
        """Up to how many rows of x, in `dtype`, `skinny_gemm` is faster than `gemm`."""
        ...

    def tiling(self, rows: int) -> Tiling:
        """How `skinny_gemm` divides them for so many rows of x."""
        ...

    def activations(self, x: Tensor) -> Operand:
        """x as `skinny_gemm` multiplies it."""
        ...

    def gemm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x @ weight.T + bias for any number of rows, by the vendor's library; in `dtype`, which is that of x
        or float32."""
        ...

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights that these represent, [N, K]."""
        ...


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if x.is_cuda and bias is None and dtype != x.dtype:
        return torch.mm(x, weight.t(), out_dtype=dtype)  # the CPU cannot do it
    return F.linear(x, weight, bias).to(dtype)


def _dense_tiling(outputs: int) -> Tiling:
    return TALL if outputs >= TALL_FROM else FLAT


@dataclass(frozen=True, slots=True)
class Unquantised(Dense):
    """Weights in the model's own dtype."""

    format: ClassVar[str] = "dense"
    has_gemv: ClassVar[bool] = True

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None) -> Unquantised:
        return cls(weight, bias)

    @property
    def scales(self) -> None:
        return None

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    def skinny_rows(self, dtype: torch.dtype) -> int:
        return SKINNY_ROWS if self.outputs < WIDE and dtype != torch.float32 else 0

    def tiling(self, rows: int) -> Tiling:
        return _dense_tiling(self.outputs)

    def activations(self, x: Tensor) -> Operand:
        return Operand(x)

    def gemm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _gemm(x, self.weight, self.bias, dtype)

    def widened(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


@dataclass(frozen=True, slots=True)
class Fp8:
    """`weight` e4m3 [N, K]; row n is multiplied by `scales[n]` (float32), which brings its largest magnitude
    to 448. `gemv` widens the weights; with more rows, activations are quantised to FP8 too, row by row."""

    format: ClassVar[str] = "dense"
    has_gemv: ClassVar[bool] = True

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None) -> Fp8:
        scales = weight.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / FP8_MAX
        return cls((weight.float() / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales[:, 0], bias)

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        return _bytes(self.weight, self.scales, self.bias)

    def shares(self, weight: Tensor) -> bool:
        return False

    def skinny_rows(self, dtype: torch.dtype) -> int:
        return SKINNY_ROWS

    def tiling(self, rows: int) -> Tiling:
        return _dense_tiling(self.outputs)

    def activations(self, x: Tensor) -> Operand:
        return Operand(*quantise_rows(x))

    def has_product(self, dtype: torch.dtype) -> bool:
        """Whether the tensor cores multiply activations in `dtype`, once quantised, with these weights."""
        return dtype == torch.bfloat16 and not (self.weight.shape[0] % 16 or self.weight.shape[1] % 16)

    def gemm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.has_product(x.dtype):
            return _gemm(x, self.widened(x.dtype), self.bias, dtype)
        return self.product(*quantise_rows(x), x.dtype).to(dtype)

    def product(self, x: Tensor, x_scales: Tensor, dtype: torch.dtype) -> Tensor:
        """As `gemm`, for rows that `quantise_rows` or a kernel that fuses it has quantised; in `dtype`, which
        is bfloat16. Fast sums save 3 to 10 % of the time; their error is a tenth of that of the rounding."""
        return torch._scaled_mm(
            x, self.weight.t(), x_scales[:, None], self.scales[None], bias=self.bias, out_dtype=dtype,
            use_fast_accum=True,
        )  # fmt: skip

    def widened(self, dtype: torch.dtype) -> Tensor:
        return (self.weight.float() * self.scales[:, None]).to(dtype)


@dataclass(frozen=True, slots=True)
class Int4:
    """Weights of four bits. `weight` uint8 [half, K padded to groups]: a byte holds row n, and in its upper
    four bits row n + half. `scales` float16 [groups, 2 * half]: one for GROUP columns of a row. A weight is
    scale * (level - 8).

    `rounds`: whether activations are quantised to e4m3, in steps of ROUNDED_ROWS."""

    format: ClassVar[str] = "int4"
    has_gemv: ClassVar[bool] = True

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    outputs: int
    columns: int
    rounds: bool

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, rounds: bool) -> Int4:
        """Round weights [N, K]. Each group gets the scale, of several, that leaves the least
        squared error."""
        packed, scales = _paired(weight[None])
        return cls(packed[0], scales[0], bias, weight.shape[0], weight.shape[1], rounds)

    @property
    def nbytes(self) -> int:
        return _bytes(self.weight, self.scales, self.bias)

    def shares(self, weight: Tensor) -> bool:
        return False

    def skinny_rows(self, dtype: torch.dtype) -> int:
        large = self.rounds and self.outputs * self.columns >= ROUNDED_WEIGHTS
        return max(SKINNY_ROWS, ROUNDED_ROWS.stop - 1) if large else SKINNY_ROWS

    def tiling(self, rows: int) -> Tiling:
        return GROUPED if rows <= SKINNY_ROWS else GROUPED_TALL

    def activations(self, x: Tensor) -> Operand:
        if not self.rounds or x.shape[0] not in ROUNDED_ROWS:
            return Operand(x)
        return Operand(*quantise_rows(x)) if x.shape[0] <= SKINNY_ROWS else quantise_and_sum_rows(x)

    def gemm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _gemm(x, self.widened(x.dtype), self.bias, dtype)

    def widened(self, dtype: torch.dtype) -> Tensor:
        half, padded = self.weight.shape
        out = torch.empty((self.outputs, self.columns), dtype=dtype, device=self.weight.device)
        block = min(pow2(padded), 4096)
        _widen_int4[(half, triton.cdiv(padded, block))](
            self.weight, self.scales, out, self.outputs, self.columns, half, padded,
            GROUP=GROUP, BLOCK=block, **OPTIONS,
        )  # fmt: skip
        return out


def _paired(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices [E, N, K] -> the `weight` and the `scales` of `Int4` of each: [E, half, padded] and
    [E, groups, 2 * half]."""
    count, outputs = weights.shape[:2]
    parts = [_rounded(some) for some in weights.flatten(0, 1).split(ROWS_AT_ONCE)]
    levels, scales = (torch.cat(each).view(count, outputs, -1) for each in zip(*parts, strict=True))
    levels, scales = (F.pad(each, (0, 0, 0, outputs % 2)) for each in (levels, scales))
    low, high = levels.chunk(2, 1)
    return low | (high << 4), scales.mT.contiguous()


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels from 0 to 15, uint8 [N, padded], and scales [N, groups]."""
    groups = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.full_like(peak, torch.inf)
    kept, scales = torch.zeros_like(groups), torch.zeros_like(peak)
    for ratio in CLIP_RATIOS:
        step = peak * (-ratio / ZERO_POINT)
        levels = (groups / torch.where(step == 0, 1.0, step)).round_().clamp_(-ZERO_POINT, ZERO_POINT - 1)
        norm = levels.square().sum(-1, keepdim=True).clamp_min_(1.0)
        scale = ((levels * groups).sum(-1, keepdim=True) / norm).half().float()
        error = (groups - scale * levels).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        kept = torch.where(better, levels, kept)
    return (kept + ZERO_POINT).to(torch.uint8).flatten(1), scales[..., 0].half()


@triton.jit
def _widen_int4(weight, scales, out, n, k, half, padded, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    release()
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = tl.load(weight + row * padded + column, column < padded, 0)
    spot = scales + (column // GROUP).to(tl.int64) * 2 * half + row
    low = tl.load(spot, column < padded, 0.0).to(tl.float32)
    high = tl.load(spot + half, column < padded, 0.0).to(tl.float32)
    wait()
    kind = out.dtype.element_ty
    tl.store(out + row * k + column, (((held & 15).to(tl.float32) - 8.0) * low).to(kind), column < k)
    if row + half < n:
        further = out + (row + half) * k + column
        tl.store(further, (((held >> 4).to(tl.float32) - 8.0) * high).to(kind), column < k)


def _by_row(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [E, N, K] in e4m3, and the scale of each row, [E, N]."""
    values, scales = quantise_rows(weights.flatten(0, 1).contiguous())
    return values.view(weights.shape), scales.view(weights.shape[:2])


@dataclass(frozen=True, slots=True)
class Fp8Experts:
    """All experts of a layer in e4m3: `gate_up` [E, 2F, H] and `down` [E, H, F]. A row is multiplied by its
    float32 scale, in `gate_up_scales` [E, 2F] or `down_scales` [E, H]. Activations are quantised too, where
    there are more than a few rows."""

    gate_up: Tensor
    gate_up_scales: Tensor
    down: Tensor
    down_scales: Tensor
    activation: Activation

    @classmethod
    def pack(cls, gate_up: Tensor, down: Tensor, activation: Activation) -> Fp8Experts:
        return cls(*_by_row(gate_up), *_by_row(down), activation)

    @property
    def nbytes(self) -> int:
        return _bytes(self.gate_up, self.gate_up_scales, self.down, self.down_scales)

    def shares(self, weight: Tensor) -> bool:
        return False

    def widened(self, dtype: torch.dtype) -> DenseExperts:
        """The weights that these represent."""
        gate_up = self.gate_up.float() * self.gate_up_scales[..., None]
        down = self.down.float() * self.down_scales[..., None]
        return DenseExperts(gate_up.to(dtype), down.to(dtype), self.activation)


@dataclass(frozen=True, slots=True)
class Int4Experts:
    """All experts of a layer, the matrices of each as `Int4` holds one: `gate_up` uint8 [E, F, H padded], in
    which a byte holds a gate's weight and its up's; `down` uint8 [E, half of H, F padded]; and float16
    `gate_up_scales` [E, groups, 2F] and `down_scales` [E, groups, H or one more].

    `rounds`: whether activations are quantised to e4m3, where there are more than a few rows."""

    gate_up: Tensor
    gate_up_scales: Tensor
    down: Tensor
    down_scales: Tensor
    activation: Activation
    hidden: int
    rounds: bool

    @classmethod
    def pack(cls, gate_up: Tensor, down: Tensor, activation: Activation, rounds: bool) -> Int4Experts:
        return cls(*_paired(gate_up), *_paired(down), activation, gate_up.shape[2], rounds)

    @property
    def inner(self) -> int:
        """F."""
        return self.gate_up.shape[1]

    @property
    def nbytes(self) -> int:
        return _bytes(self.gate_up, self.gate_up_scales, self.down, self.down_scales)

    def shares(self, weight: Tensor) -> bool:
        return False

    def widened(self, dtype: torch.dtype) -> DenseExperts:
        """The weights that these represent."""
        inner, hidden = self.inner, self.hidden
        first = zip(self.gate_up, self.gate_up_scales, strict=True)
        gate_up = [
            Int4(held, scales, None, 2 * inner, hidden, False).widened(dtype) for held, scales in first
        ]
        second = zip(self.down, self.down_scales, strict=True)
        down = [Int4(held, scales, None, hidden, inner, False).widened(dtype) for held, scales in second]
        return DenseExperts(torch.stack(gate_up), torch.stack(down), self.activation)


CudaExperts = DenseExperts | Fp8Experts | Int4Experts


def expert_scales(packed: CudaExperts) -> tuple[Tensor | None, Tensor | None]:
    """The scales of `gate_up` and of `down`."""
    if isinstance(packed, DenseExperts):
        return None, None
    return packed.gate_up_scales, packed.down_scales


def expert_width(packed: CudaExperts) -> int:
    """F, the width of an expert."""
    return packed.inner if isinstance(packed, Int4Experts) else packed.down.shape[2]


def rounds_rows(packed: CudaExperts) -> bool:
    """Whether rows, where there are more than a few, are quantised to e4m3 in front of these weights."""
    return packed.rounds if isinstance(packed, Int4Experts) else isinstance(packed, Fp8Experts)
