"""Linear layers by number of rows of x: `gemv` for one, `skinny_gemm` for some, a format's `gemm` for many.

`gemv` streams the weights and may apply a norm, an activation, a residual sum or the rotary embedding on the
way. `skinny_gemm` feeds tensor cores at the speed of memory. Both read weights in any format they know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels import Activation, Attention
from stretto.kernels.cuda.int4 import int4_dot_rows, int4_products
from stretto.kernels.cuda.launch import OPTIONS, is_loading, pow2, release, wait
from stretto.kernels.cuda.rows import SPARE_ROWS, activate
from stretto.kernels.cuda.weights import GROUP, CudaWeights, Int4, Tiling

GEMV_ROWS = 1
UNIT, WORTHWHILE = 64, 0.8  # products are padded to multiples of UNIT rows, if that saves a fifth of the time
LEAST_PADDED = 2**22  # weights; the products of smaller matrices are too short to be measured
ROUNDS, PRODUCTS = 3, 4  # of a measurement; the first product also loads its kernel
L2_BYTES = 60_000_000


@triton.jit
def _finish(sums, scales, bias, row, there):
    """Apply the scale and the bias of each row of the weights."""
    if scales is not None:
        sums *= tl.load(scales + row, there, 0.0)
    if bias is not None:
        sums += tl.load(bias + row, there, 0.0).to(tl.float32)
    return sums


@triton.jit
def dot_rows(
    x, weight, gains, row, other, there, k, eps,
    SPAN: tl.constexpr, LOOPS: tl.constexpr, LANE: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """The dot products of x with the rows `row` of the weights and, if BOTH, the rows `other`.

    With gains, x is read through its RMS norm, whose scale is applied to the sums at the end. The first
    weights are loaded before x is awaited, and each later span before the one in front of it is summed: LANE
    adjacent columns at once, all lanes at the end."""
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
def _gemv(
    x, weight, scales, bias, gains, residual, out, n, half, k, stored, eps,
    ROWS: tl.constexpr, SPAN: tl.constexpr, LOOPS: tl.constexpr, LANE: tl.constexpr, GATED: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """ROWS of n outputs. If GATED names an activation, they are gates, and the rows `half` further their ups.
    Of int4 weights, with groups of GROUP and rows of `stored` columns, also the outputs `half` further."""
    release()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < half
    if GROUP is not None:
        sums, ups = int4_dot_rows(
            x + tl.arange(0, SPAN)[None], weight + row.to(tl.int64) * stored, scales + row, gains,
            half, there, k, stored, eps, SPAN, LOOPS, LANE, GROUP,
        )  # fmt: skip
        sums = _finish(sums, None, bias, row, there)
        ups = _finish(ups, None, bias, half + row, half + row < n)
    else:
        sums, ups = dot_rows(
            x, weight, gains, row, half + row, there, k, eps, SPAN, LOOPS, LANE, GATED is not None
        )  # fmt: skip
        sums = _finish(sums, scales, bias, row, there)
        if GATED is not None:
            ups = _finish(ups, scales, bias, half + row, there)
    if GATED is not None:
        sums = activate(sums, GATED) * ups
    elif GROUP is not None:
        _add_and_store(ups, residual, out, half + row, half + row < n)
    _add_and_store(sums, residual, out, row, there)


@triton.jit
def _add_and_store(sums, residual, out, row, there):
    if residual is not None:
        sums += tl.load(residual + row, there, 0.0).to(tl.float32)
    tl.store(out + row, sums.to(out.dtype.element_ty), there)


@triton.jit
def _dimensions(pair, PAIRS: tl.constexpr, DIM: tl.constexpr):
    """The two dimensions of a pair. The pairs that are rotated come first."""
    first, second = pair, pair + PAIRS
    if 2 * PAIRS < DIM:
        first = tl.where(pair < PAIRS, first, 2 * pair)
        second = tl.where(pair < PAIRS, second, 2 * pair + 1)
    return first, second


@triton.jit
def _rotation(cos_sin, head, pair, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """The cosine and the sine by which a pair of dimensions of a head is rotated."""
    rotated = (pair < PAIRS) & (head < HEADS + KV_HEADS)
    return tl.load(cos_sin + pair, rotated, 1.0), tl.load(cos_sin + PAIRS + pair, rotated, 0.0)


@triton.jit
def _store_rotated(
    a, b, turn, head, first, second, there, slot, out, layer, blocks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Rotate the dimensions `first` and `second` of heads; store queries, and keys and values in a slot."""
    cosine, sine = turn
    page = ((head - HEADS) // KV_HEADS * blocks + slot // SIZE) * KV_HEADS + (head - HEADS) % KV_HEADS
    spot = tl.where(head < HEADS, out + head * DIM, layer + (page * SIZE + slot % SIZE) * DIM)
    kind = out.dtype.element_ty
    tl.store(spot + first, (a * cosine - b * sine).to(kind), there)
    tl.store(spot + second, (b * cosine + a * sine).to(kind), there)


@triton.jit
def _gemv_rope_and_cache(
    x, weight, scales, bias, gains, cos_sin, slots, out, layer, blocks, half, k, stored, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, LOOPS: tl.constexpr, LANE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """ROWS pairs of dimensions of queries, keys or values. The first PAIRS of a query's or key's head are
    rotated. Queries go to `out`, keys and values to their slot of the cache. Of int4 weights also the pairs
    `half` rows further, which are the same pairs of other heads."""
    release()
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, pair = number // (DIM // 2), number % (DIM // 2)
    there = head * DIM < half
    first, second = _dimensions(pair, PAIRS, DIM)
    turn, slot = _rotation(cos_sin, head, pair, HEADS, KV_HEADS, PAIRS), tl.load(slots)
    row = head * DIM + first
    if GROUP is not None:
        # All first dimensions, then all second ones, so that the scales of adjacent rows are read at once.
        line = tl.arange(0, 2 * ROWS)
        numbers = tl.program_id(0) * ROWS + line % ROWS
        firsts, seconds = _dimensions(numbers % (DIM // 2), PAIRS, DIM)
        lines = numbers // (DIM // 2) * DIM + tl.where(line < ROWS, firsts, seconds)
        if 2 * PAIRS == DIM and PAIRS % ROWS == 0:
            lines = tl.max_contiguous(tl.multiple_of(lines, ROWS), ROWS)
        lows, highs = int4_dot_rows(
            x + tl.arange(0, SPAN)[None], weight + lines.to(tl.int64) * stored, scales + lines, gains, half,
            lines < half, k, stored, eps, SPAN, LOOPS, LANE, GROUP,
        )  # fmt: skip
        a, b = tl.split(tl.trans(tl.reshape(highs, (2, ROWS))))
        a = _finish(a, None, bias, half + row, there)
        b = _finish(b, None, bias, half + row + second - first, there)
        further = head + half // DIM
        turned = _rotation(cos_sin, further, pair, HEADS, KV_HEADS, PAIRS)
        _store_rotated(
            a, b, turned, further, first, second, there, slot, out, layer, blocks, HEADS, KV_HEADS, DIM, SIZE
        )
        a, b = tl.split(tl.trans(tl.reshape(lows, (2, ROWS))))
        a = _finish(a, None, bias, row, there)
        b = _finish(b, None, bias, row + second - first, there)
    else:
        a, b = dot_rows(x, weight, gains, row, row + second - first, there, k, eps, SPAN, LOOPS, LANE, True)
        a = _finish(a, scales, bias, row, there)
        b = _finish(b, scales, bias, row + second - first, there)
    _store_rotated(
        a, b, turn, head, first, second, there, slot, out, layer, blocks, HEADS, KV_HEADS, DIM, SIZE
    )


@triton.jit
def _dot_dense(
    x, weight, row, place, begin, end, m, n, k,
    M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """weight[row, begin:end] @ x[place, begin:end].T, [N_BLOCK, M_BLOCK]."""
    column = tl.arange(0, K_BLOCK)
    at = weight + row.to(tl.int64)[:, None] * k + column[None]
    across = x + place[None] * k + column[:, None]
    sums = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
    wait()
    for start in range(begin, end, K_BLOCK):
        inside = start + column < end
        weights = tl.load(at + start, (row < n)[:, None] & inside[None], 0.0, eviction_policy="evict_first")
        values = tl.load(across + start, (place < m)[None] & inside[:, None], 0.0)
        sums = tl.dot(weights, values, acc=sums, input_precision="ieee" if EXACT else "tf32")
    return sums


@triton.jit
def _store(sums, x_scales, scales, bias, out, row, end, place, m, n):
    """Scale the sums and add the bias; write those of the rows before `end`."""
    if x_scales is not None:
        sums *= tl.load(x_scales + place, place < m, 0.0)[None]
    if scales is not None:
        sums *= tl.load(scales + row, row < end, 0.0)[:, None]
    if bias is not None:
        sums += tl.load(bias + row, row < end, 0.0).to(tl.float32)[:, None]
    there = (row < end)[:, None] & (place < m)[None]
    tl.store(out + place[None] * n + row[:, None], sums.to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["m"])
def _skinny_gemm(
    x, weight, x_scales, zeros, scales, bias, out, parts, arrived,
    m, n, k, stored_rows, stored_columns, reach,
    M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    EXACT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """N_BLOCK stored rows of the weights by M_BLOCK rows of x, over one of SPLITS parts of the columns.

    Weights are the left operand, so that they fill the tensor cores however few the rows of x are. The last
    program of a tile adds the parts up. A stored row of int4 weights holds two outputs."""
    release()
    split, tile = tl.program_id(1), tl.program_id(2)
    row = tile * N_BLOCK + tl.arange(0, N_BLOCK)
    place = tl.program_id(0) * M_BLOCK + tl.arange(0, M_BLOCK)
    begin = split * reach
    end = tl.minimum(begin + reach, stored_columns)
    if FORMAT == "int4":
        wait()
        sums, highs = int4_products(
            x, None, zeros, tl.minimum(place, m - 1), None, weight, scales, row, stored_rows, m, k,
            stored_columns, begin // K_BLOCK, end // K_BLOCK, M_BLOCK, N_BLOCK, K_BLOCK, EXACT,
        )  # fmt: skip
        if x_scales is not None:
            sums *= 512.0
            highs *= 512.0
        width = 2 * stored_rows
    else:
        sums = _dot_dense(x, weight, row, place, begin, end, m, n, k, M_BLOCK, N_BLOCK, K_BLOCK, EXACT)
        width = n
    there = (row < stored_rows)[:, None] & (place < m)[None]
    if SPLITS > 1:
        own = parts + (place[None] * SPLITS).to(tl.int64) * width + row[:, None]
        tl.store(own + split * width, sums, there)
        if FORMAT == "int4":
            tl.store(own + split * width + stored_rows, highs, there)
        tl.debug_barrier()
        counter = arrived + tile * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") != SPLITS - 1:
            return
        sums = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
        if FORMAT == "int4":
            highs = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
        for other in tl.static_range(SPLITS):
            sums += tl.load(own + other * width, there, 0.0, cache_modifier=".cg")
            if FORMAT == "int4":
                highs += tl.load(own + other * width + stored_rows, there, 0.0, cache_modifier=".cg")
        tl.store(counter, 0)
    if FORMAT == "int4":
        _store(sums, x_scales, None, bias, out, row, stored_rows, place, m, n)
        _store(highs, x_scales, None, bias, out, row + stored_rows, n, place, m, n)
    else:
        _store(sums, x_scales, scales, bias, out, row, n, place, m, n)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm: gains [K] and epsilon."""

    gains: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class GemvShape:
    """How `gemv` divides the weights: the longest span of columns, the rows that a program loads at once, and
    its warps for the longest span; a shorter span has fewer."""

    longest: int
    rows: int
    warps: int


GEMV_SHAPES = {
    (16, True): GemvShape(4096, 2, 4),
    (16, False): GemvShape(2048, 4, 8),
    (8, True): GemvShape(2048, 8, 4),
    (8, False): GemvShape(1024, 4, 2),
    (4, True): GemvShape(1024, 8, 4),
    (4, False): GemvShape(1024, 4, 4),
    (32, True): GemvShape(2048, 8, 8),
    (32, False): GemvShape(2048, 8, 8),
}
"""By the bits of a weight, and whether x is read through a norm. A row of 4 bits is one of bytes."""
# 16-bit weights of few outputs are divided among more programs.
FEW_OUTPUTS, FINER = 2048, GemvShape(2048, 2, 2)


def row_options(k: int, bits: int, normed: bool, both: bool, fine: bool = False) -> dict[str, int]:
    """The compile-time options of a kernel that streams stored rows of k weights, or of k bytes if a weight
    has four bits. With `both`, a program reads twice ROWS rows. `fine`: among more programs."""
    shape = FINER if fine else GEMV_SHAPES[bits, normed]
    span = min(pow2(k, 32), shape.longest)
    if triton.cdiv(k, span) * span > triton.cdiv(k, span // 2) * (span // 2):
        span //= 2  # a shorter span leaves fewer columns unused
    return {
        "ROWS": max(shape.rows // (2 if both else 1), 1),
        "SPAN": span,
        "LOOPS": triton.cdiv(k, span),
        "LANE": 8 if bits == 4 else 128 // bits,
        "num_warps": max(shape.warps * span // shape.longest, 1),
    }


def _gemv_options(packed: CudaWeights, normed: bool, both: bool) -> dict[str, Any]:
    """`both`: results are made of two rows, which one stored row of int4 weights holds."""
    n, k = packed.weight.shape
    if isinstance(packed, Int4):
        return {**row_options(k, 4, normed, False), "GROUP": GROUP}
    bits = 8 * packed.weight.itemsize
    fine = (bits, normed) == (16, False) and n <= FEW_OUTPUTS
    return {**row_options(k, bits, normed, both, fine), "GROUP": None}


def gemv(
    x: Tensor,
    packed: CudaWeights,
    activation: Activation | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One row [1, K] -> [1, N], in `dtype` or that of x.

    With an activation, the weights are gates and ups, and the result is [1, N / 2]. `norm` is applied to x
    first; `residual` [1, N] is added last.
    """
    n, (half, stored) = packed.outputs, packed.weight.shape
    options = _gemv_options(packed, norm is not None, activation is not None)
    if activation is not None:
        half = n // 2  # as it is of int4 weights
    out = x.new_empty(1, n if activation is None else half, dtype=dtype or x.dtype)
    _gemv[(triton.cdiv(half, options["ROWS"]),)](
        x, packed.weight, packed.scales, packed.bias, None if norm is None else norm.gains, residual, out,
        n, half, x.shape[1], stored, 0.0 if norm is None else norm.eps,
        GATED=activation, **options, **OPTIONS,
    )  # fmt: skip
    return out


def rotates(packed: CudaWeights, kind: Attention) -> bool:
    """Whether `gemv_rope_and_cache` can read these. The halves of int4 weights must be whole heads."""
    return not isinstance(packed, Int4) or kind.heads % 2 == 0


def gemv_rope_and_cache(
    x: Tensor,
    packed: CudaWeights,
    norm: Norm,
    attention: Attention,
    layer: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
) -> Tensor:
    """One row [1, K] through its norm -> rotated queries [1, heads, head_dim]; its key and value are
    written to their slot of the cache layer. `cos_sin` as `rows.cos_sin_table` makes it. Queries and keys
    have no norm. `packed` must be weights that it `rotates`."""
    kind, options, (half, stored) = attention, _gemv_options(packed, True, True), packed.weight.shape
    if isinstance(packed, Int4):
        options["ROWS"] //= 2
    out = x.new_empty(1, kind.heads, kind.head_dim)
    _gemv_rope_and_cache[(triton.cdiv(half // 2, options["ROWS"]),)](
        x, packed.weight, packed.scales, packed.bias, norm.gains, cos_sin, slots, out, layer, layer.shape[1],
        half, x.shape[1], stored, norm.eps, HEADS=kind.heads, KV_HEADS=kind.kv_heads, DIM=kind.head_dim,
        PAIRS=cos_sin.shape[2], SIZE=layer.shape[3], **options, **OPTIONS,
    )  # fmt: skip
    return out


def skinny_gemm(
    x: Tensor,
    packed: CudaWeights,
    arrived: Tensor,
    tiling: Tiling | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[M, K] -> [M, N], in `dtype` or that of x, for up to `packed.skinny_rows` rows. `arrived`: int32 zeros,
    one for each tile of outputs and rows, which are zero again afterwards."""
    (m, k), n, (stored_rows, stored_columns) = x.shape, packed.outputs, packed.weight.shape
    tiling = tiling or packed.tiling(m)
    out, operand = x.new_empty(m, n, dtype=dtype or x.dtype), packed.activations(x)
    values = operand.values
    k_block = tiling.group or min(tiling.k_block * 2 // values.itemsize, pow2(k, 32))
    m_block = min(pow2(m, 16), tiling.m_block)
    blocks, tiles = triton.cdiv(m, m_block), triton.cdiv(stored_rows, tiling.n_block)
    splits, steps = 1, triton.cdiv(stored_columns, k_block)
    while blocks * tiles * splits * 2 <= tiling.programs and splits * 4 <= steps:
        splits *= 2
    parts = out.new_empty((m, splits, n + n % 2) if splits > 1 else 0, dtype=torch.float32)
    _skinny_gemm[(blocks, splits, tiles)](
        values, packed.weight, operand.scales, operand.zeros, packed.scales, packed.bias, out, parts, arrived,
        m, n, k, stored_rows, stored_columns, triton.cdiv(steps, splits) * k_block,
        M_BLOCK=m_block, N_BLOCK=tiling.n_block, K_BLOCK=k_block, SPLITS=splits,
        EXACT=values.dtype == torch.float32, FORMAT=packed.format,
        num_warps=tiling.warps, num_stages=tiling.stages, **OPTIONS,
    )  # fmt: skip
    return out


class PaddedRows:
    """To how many rows the vendor's products are padded.

    For some numbers of rows its library chooses a kernel that takes longer than the one it chooses for more
    rows. Then a product has as many rows as take the least time, if that saves enough. `measure` gives the
    microseconds of a product of so many rows with a matrix [N, K] and a bias [N] or None. It is called only
    while kernels are loaded.
    """

    def __init__(self, measure: Callable[[int, Tensor, Tensor | None], float]) -> None:
        self._measure = measure
        self._best: dict[tuple[object, ...], int] = {}

    def pad(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [M, K], or with rows of any values behind it, if that makes its product with `weight` faster and
        x has room for them, as `new_rows` leaves it."""
        rows, key = x.shape[0], (x.shape[0], *weight.shape, bias is None)
        if is_loading() and key not in self._best:
            self._best[key] = self._fastest(rows, weight, bias)
        best = self._best.get(key, rows)
        room = (x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()) // x.stride(0)
        return x.as_strided((best, x.shape[1]), x.stride()) if rows < best <= room else x

    def _fastest(self, rows: int, weight: Tensor, bias: Tensor | None) -> int:
        if weight.numel() < LEAST_PADDED:
            return rows
        above = range(rows // UNIT * UNIT + UNIT, rows + SPARE_ROWS + 1, UNIT)
        times = {more: self._measure(more, weight, bias) for more in above}
        best = min(times, key=times.__getitem__)
        return best if times[best] < WORTHWHILE * self._measure(rows, weight, bias) else rows


def product_us(rows: int, weight: Tensor, bias: Tensor | None) -> float:
    """Microseconds of the vendor's product of so many random rows with `weight` [N, K] on its device. Copies
    of a small matrix take turns, so that the L2 cache does not hold it."""
    x, took = weight.new_empty(rows, weight.shape[1]).normal_(), list[float]()
    weights = [weight, *(weight.clone() for _ in range(L2_BYTES // weight.nbytes))]
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for number in range(PRODUCTS):
            F.linear(x, weights[number % len(weights)], bias)
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / PRODUCTS)
    return min(took)
