"""Linear layers by number of rows: a stream of weights for few, tensor cores fed at memory speed for some,
and the vendor's matrix product for many.

FP8 weights have a scale per row (e4m3, largest magnitude at 448). With few rows they are widened and the
activations stay as they are; with more these are scaled to FP8 too, row by row.
"""
# Triton's kernels are no Python a type checker knows.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportPrivateImportUsage=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels import Activation, Attention
from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait
from stretto.kernels.cuda.rows import activate
from stretto.kernels.reference import Dense

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
FEW = 1
SOME = 64
MANY = 1024  # up to here the vendor's FP8 product costs the host more than it saves the device
WIDE = 8192  # from so many outputs on the vendor's product of 16-bit weights is the better one


@dataclass(frozen=True, slots=True)
class Fp8:
    """`weight` e4m3 [N, K], of which row n counts `scales[n]` times (float32)."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def shares(self, weight: Tensor) -> bool:
        return False

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights that these stand for."""
        return (self.weight.float() * self.scales[:, None]).to(dtype)


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[R, K] -> e4m3 [R, K] and the float32 scale of each row."""
    scales = weight.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / FP8_MOST
    return (weight.float() / scales).clamp(-FP8_MOST, FP8_MOST).to(FP8), scales[:, 0]


@triton.jit
def _finish(sums, scales, bias, row, there):
    """Row by row."""
    if scales is not None:
        sums *= tl.load(scales + row, there, 0.0)
    if bias is not None:
        sums += tl.load(bias + row, there, 0.0).to(tl.float32)
    return sums


@triton.jit
def _sweep(
    x, weight, gains, row, other, there, k, eps,
    SPAN: tl.constexpr, LOOPS: tl.constexpr, LANE: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """What the rows `row` of the weights, and if BOTH `other`, make of x, read through its RMS norm if there
    are gains; its scale is known when the sums are. The first weights are on their way before x is known, and
    each later lot before the one in front is summed: LANE neighbours at once, all at the end."""
    column = tl.arange(0, SPAN)
    at = weight + row.to(tl.int64)[:, None] * k + column[None]
    above = weight + other.to(tl.int64)[:, None] * k + column[None]
    inside = there[:, None] & (column < k)[None]
    held = tl.load(at, inside, 0.0, eviction_policy="evict_first")
    sums = tl.zeros((row.shape[0], SPAN // LANE), tl.float32)
    ups = tl.zeros((row.shape[0], SPAN // LANE), tl.float32)
    squares = tl.zeros((SPAN // LANE,), tl.float32)
    if gains is not None:
        gain = tl.load(gains + column, column < k, 0.0)
    if BOTH:
        held_up = tl.load(above, inside, 0.0, eviction_policy="evict_first")
    wait()
    for loop in tl.static_range(LOOPS):
        now, left = held.to(tl.float32), k - loop * SPAN
        if gains is not None:
            now_gain = gain.to(tl.float32)
        if BOTH:
            now_up = held_up.to(tl.float32)
        if loop + 1 < LOOPS:
            inside = there[:, None] & (column < left - SPAN)[None]
            held = tl.load(at + (loop + 1) * SPAN, inside, 0.0, eviction_policy="evict_first")
            if gains is not None:
                gain = tl.load(gains + (loop + 1) * SPAN + column, column < left - SPAN, 0.0)
            if BOTH:
                held_up = tl.load(above + (loop + 1) * SPAN, inside, 0.0, eviction_policy="evict_first")
        values = tl.load(x + loop * SPAN + column, column < left, 0.0).to(tl.float32)
        if gains is not None:
            squares += tl.sum(tl.reshape(values * values, (SPAN // LANE, LANE)), 1)
            values *= now_gain
        sums += tl.sum(tl.reshape(now * values[None], (row.shape[0], SPAN // LANE, LANE)), 2)
        if BOTH:
            ups += tl.sum(tl.reshape(now_up * values[None], (row.shape[0], SPAN // LANE, LANE)), 2)
    unit = 1.0
    if gains is not None:
        unit = tl.rsqrt(tl.sum(squares, 0) / k + eps)
    return tl.sum(sums, 1) * unit, tl.sum(ups, 1) * unit


@triton.jit
def _stream(
    x, weight, scales, bias, gains, residual, out, n, k, eps,
    ROWS: tl.constexpr, SPAN: tl.constexpr, LOOPS: tl.constexpr, LANE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """ROWS outputs; if GATED those n further on, too, which they gate. A residual is added."""
    release()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < n
    sums, ups = _sweep(x, weight, gains, row, n + row, there, k, eps, SPAN, LOOPS, LANE, GATED is not None)
    sums = _finish(sums, scales, bias, row, there)
    if GATED is not None:
        sums = activate(sums, GATED) * _finish(ups, scales, bias, n + row, there)
    if residual is not None:
        sums += tl.load(residual + row, there, 0.0).to(tl.float32)
    tl.store(out + row, sums.to(out.dtype.element_ty), there)


@triton.jit
def _placed(
    x, weight, scales, bias, gains, turns, slots, out, layer, blocks, k, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, LOOPS: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """ROWS pairs of dimensions of queries, keys or values. The first PAIRS of a head are turned; then queries
    are put into `out`, keys and values into their slot of the cache."""
    release()
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, pair = number // (DIM // 2), number % (DIM // 2)
    there = head < HEADS + 2 * KV_HEADS
    first = tl.where(pair < PAIRS, pair, 2 * pair)
    second = tl.where(pair < PAIRS, pair + PAIRS, 2 * pair + 1)
    turning = (pair < PAIRS) & (head < HEADS + KV_HEADS)
    cosine = tl.load(turns + pair, turning, 1.0)
    sine = tl.load(turns + PAIRS + pair, turning, 0.0)
    slot, pool = tl.load(slots), (head - HEADS) // KV_HEADS
    page = (pool * blocks + slot // SIZE) * KV_HEADS + (head - HEADS) % KV_HEADS
    row = head * DIM + first
    a, b = _sweep(x, weight, gains, row, row + second - first, there, k, eps, SPAN, LOOPS, LANE, True)
    a = _finish(a, scales, bias, row, there)
    b = _finish(b, scales, bias, row + second - first, there)
    spot = tl.where(head < HEADS, out + head * DIM, layer + (page * SIZE + slot % SIZE) * DIM)
    kind = out.dtype.element_ty
    tl.store(spot + first, (a * cosine - b * sine).to(kind), there)
    tl.store(spot + second, (b * cosine + a * sine).to(kind), there)


@triton.jit
def _tile(
    x, weight, x_scales, scales, bias, out, parts, arrived, m, n, k, reach,
    M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """N_BLOCK outputs of M_BLOCK rows of x, over a share of the columns. Weights stand on the left, so that
    they fill the tensor cores however few the rows. The last share to end adds the parts up; there are shares
    only where all rows are in one block."""
    release()
    split, tile = tl.program_id(1), tl.program_id(2)
    row, column = tile * N_BLOCK + tl.arange(0, N_BLOCK), tl.arange(0, K_BLOCK)
    place = tl.program_id(0) * M_BLOCK + tl.arange(0, M_BLOCK)
    at = weight + row.to(tl.int64)[:, None] * k + column[None]
    across = x + place[None] * k + column[:, None]
    begin = split * reach
    end = tl.minimum(begin + reach, k)
    sums = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
    wait()
    for start in range(begin, end, K_BLOCK):
        inside = start + column < end
        weights = tl.load(at + start, (row < n)[:, None] & inside[None], 0.0, eviction_policy="evict_first")
        values = tl.load(across + start, (place < m)[None] & inside[:, None], 0.0)
        sums = tl.dot(weights, values, acc=sums, input_precision="ieee" if EXACT else "tf32")
    there = (row < n)[:, None] & (place < m)[None]
    if SPLITS > 1:
        own = parts + (place[None] * SPLITS).to(tl.int64) * n + row[:, None]
        tl.store(own + split * n, sums, there)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") != SPLITS - 1:
            return
        sums = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
        for other in tl.static_range(SPLITS):
            sums += tl.load(own + other * n, there, 0.0, cache_modifier=".cg")
        tl.store(arrived + tile, 0)
    if x_scales is not None:
        sums *= tl.load(x_scales + place, place < m, 0.0)[None]
    if scales is not None:
        sums *= tl.load(scales + row, row < n, 0.0)[:, None]
    if bias is not None:
        sums += tl.load(bias + row, row < n, 0.0).to(tl.float32)[:, None]
    tl.store(out + place[None] * n + row[:, None], sums.to(out.dtype.element_ty), there)


@triton.jit
def _quantise(x, out, scales, k, MOST: tl.constexpr, BLOCK: tl.constexpr):
    release()
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wait()
    value = tl.load(x + row * k + column, column < k, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / MOST
    tl.store(scales + row, scale)
    tl.store(out + row * k + column, (value / scale).to(out.dtype.element_ty), column < k)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> e4m3 [M, K] and the float32 scale of each row."""
    out, scales = torch.empty_like(x, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)
    block = pow2(x.shape[1])
    _quantise[(x.shape[0],)](
        x,
        out,
        scales,
        x.shape[1],
        MOST=FP8_MOST,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        **OPTIONS,
    )
    return out, scales


Held = Dense | Fp8


def _scales(packed: Held) -> Tensor | None:
    return packed.scales if isinstance(packed, Fp8) else None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm: gains [K] and epsilon."""

    gains: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Flow:
    """How a stream of weights is cut: columns at a time, rows that a program has on their way at once, and
    its warps, fewer where a row is shorter."""

    longest: int
    rows: int
    warps: int


FLOWS = {
    (2, True): Flow(4096, 2, 4),
    (2, False): Flow(2048, 4, 8),
    (1, True): Flow(2048, 8, 4),
    (1, False): Flow(1024, 4, 2),
    (4, True): Flow(2048, 8, 8),
    (4, False): Flow(2048, 8, 8),
}
"""By the bytes of a weight, and whether x is read through a norm."""
FEW_OUTPUTS, FINER = 2048, Flow(2048, 2, 2)  # 16-bit weights of few outputs are shared out further


def _cut(packed: Held, normed: bool, both: bool) -> dict[str, int]:
    """How a kernel that streams these weights is compiled; a program has twice ROWS of them if `both`."""
    (n, k), size = packed.weight.shape, packed.weight.itemsize
    flow = FINER if (size, normed) == (2, False) and n <= FEW_OUTPUTS else FLOWS[size, normed]
    span = min(pow2(k, 32), flow.longest)
    if triton.cdiv(k, span) * span > triton.cdiv(k, span // 2) * (span // 2):
        span //= 2  # fewer columns that are none
    return {
        "ROWS": max(flow.rows // (2 if both else 1), 1),
        "SPAN": span,
        "LOOPS": triton.cdiv(k, span),
        "LANE": 16 // size,
        "num_warps": max(flow.warps * span // flow.longest, 1),
    }


def stream(
    x: Tensor,
    packed: Held,
    activation: Activation | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """For one row [1, K]: [1, N], or [1, N / 2] with an activation, when the weights are gates and ups; in
    `dtype`, or x's. `norm`: of x, first; `residual` [1, N] is added last."""
    n, k = packed.weight.shape
    if activation is not None:
        n //= 2
    cut = _cut(packed, norm is not None, activation is not None)
    out = x.new_empty(1, n, dtype=dtype or x.dtype)
    _stream[(triton.cdiv(n, cut["ROWS"]),)](
        x, packed.weight, _scales(packed), packed.bias,
        None if norm is None else norm.gains, residual, out, n, k, 0.0 if norm is None else norm.eps,
        GATED=activation, **cut, **OPTIONS,
    )  # fmt: skip
    return out


def placed(
    x: Tensor, packed: Held, norm: Norm, kind: Attention, layer: Tensor, turns: Tensor, slots: Tensor
) -> Tensor:
    """For one row [1, K]: its queries [1, heads, head_dim], turned, with its keys and values put into their
    slot of the cache's `layer`. `turns` as `rows.turn` gives them; the kind has no norm."""
    cut = _cut(packed, True, True)
    out = x.new_empty(1, kind.heads, kind.head_dim)
    pairs = (kind.heads + 2 * kind.kv_heads) * kind.head_dim // 2
    _placed[(triton.cdiv(pairs, cut["ROWS"]),)](
        x, packed.weight, _scales(packed), packed.bias, norm.gains, turns, slots, out, layer, layer.shape[1],
        x.shape[1], norm.eps, HEADS=kind.heads, KV_HEADS=kind.kv_heads, DIM=kind.head_dim,
        PAIRS=turns.shape[2], SIZE=layer.shape[3], **cut, **OPTIONS,
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Tiling:
    """Of the outputs by the columns in 16-bit weights; `programs` to aim at by sharing columns out."""

    n_block: int
    k_block: int
    stages: int
    programs: int
    warps: int = 4


FLAT = Tiling(64, 256, 3, 132)
TALL = Tiling(128, 128, 3, 264)
TALL_FROM = 132 * 128
DEEP = Tiling(128, 64, 4, 0, 8)
DEEP_ROWS = 128


def tiled(x: Tensor, packed: Held, arrived: Tensor, tiling: Tiling | None = None) -> Tensor:
    """For at most MANY rows. `arrived`: int32 zeros, one for each tile of outputs, left as they were."""
    (m, k), n = x.shape, packed.weight.shape[0]
    if tiling is None:
        tiling = DEEP if m > SOME else TALL if n >= TALL_FROM else FLAT
    out = x.new_empty(m, n)
    x_scales = None
    if isinstance(packed, Fp8):
        x, x_scales = quantised(x)
    k_block = min(tiling.k_block * 2 // x.itemsize, pow2(k, 32))
    tiles, steps = triton.cdiv(n, tiling.n_block), triton.cdiv(k, k_block)
    splits = 1
    while tiles * splits * 2 <= tiling.programs and splits * 4 <= steps:
        splits *= 2
    reach = triton.cdiv(steps, splits) * k_block
    parts = out.new_empty((m, splits, n) if splits > 1 else 0, dtype=torch.float32)
    m_block = min(pow2(m, 16), DEEP_ROWS)
    _tile[(triton.cdiv(m, m_block), splits, tiles)](
        x, packed.weight, x_scales, _scales(packed), packed.bias, out, parts, arrived, m, n, k, reach,
        M_BLOCK=m_block, N_BLOCK=tiling.n_block, K_BLOCK=k_block, SPLITS=splits,
        EXACT=x.dtype == torch.float32, num_warps=tiling.warps, num_stages=tiling.stages, **OPTIONS,
    )  # fmt: skip
    return out


def product(x: Tensor, packed: Held) -> Tensor:
    """For any number of rows, by the vendor's library."""
    if isinstance(packed, Dense):
        return F.linear(x, packed.weight, packed.bias)
    if x.dtype != torch.bfloat16 or packed.weight.shape[0] % 16 or packed.weight.shape[1] % 16:
        return F.linear(x, packed.widened(x.dtype), packed.bias)
    narrow, scales = quantised(x)
    return torch._scaled_mm(
        narrow, packed.weight.t(), scales[:, None], packed.scales[None], bias=packed.bias, out_dtype=x.dtype
    )
