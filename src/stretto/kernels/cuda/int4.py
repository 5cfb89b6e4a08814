"""How kernels read int4 weights: as operands of tensor cores, or streamed through registers for one row.

The bits of a level, in a byte, are those of an e4m3 number: level / 512. Weights are as `weights.Int4` holds
them: a byte has the level of a row and, in its upper four bits, that of the row `half` further.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stretto.kernels.cuda.launch import INTERPRETED, wait

INTERPRETER = tl.constexpr(INTERPRETED)  # it knows no inline assembly
ZEROS_AT_ONCE = tl.constexpr(32)


@triton.jit
def int4_levels(packed):
    """The lower and the upper four bits of bytes, as bytes."""
    if INTERPRETER:
        return packed & 15, packed >> 4
    # Four bytes at once; the compiler would take each one by itself.
    return tl.inline_asm_elementwise(
        "and.b32 $0, $2, 0x0f0f0f0f; shr.b32 $1, $2, 4; and.b32 $1, $1, 0x0f0f0f0f;",
        "=&r,=r,r", [packed], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _floats(packed):
    """128 more than the lower and than the upper four bits of bytes, in float32."""
    if INTERPRETER:
        return (packed & 15).to(tl.float32) + 128.0, (packed >> 4).to(tl.float32) + 128.0
    # A level is put into the bits of 128, because a device does few conversions at once.
    return tl.inline_asm_elementwise(
        """{ .reg .b32 low, high;
        and.b32 low, $8, 0x0f0f0f0f; shr.b32 high, $8, 4; and.b32 high, high, 0x0f0f0f0f;
        prmt.b32 $0, low, 0x43000000, 0x7044; prmt.b32 $1, low, 0x43000000, 0x7144;
        prmt.b32 $2, low, 0x43000000, 0x7244; prmt.b32 $3, low, 0x43000000, 0x7344;
        prmt.b32 $4, high, 0x43000000, 0x7044; prmt.b32 $5, high, 0x43000000, 0x7144;
        prmt.b32 $6, high, 0x43000000, 0x7244; prmt.b32 $7, high, 0x43000000, 0x7344; }""",
        "=r,=r,=r,=r,=r,=r,=r,=r,r", [packed], dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def int4_values(nibbles, like):
    """level - 8 for four-bit levels, in the dtype of `like`."""
    if like.dtype.element_ty == tl.bfloat16:
        # The bits are put into those of 128, because a device does few conversions at once.
        return (nibbles.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    return nibbles.to(like.dtype.element_ty) - 8.0


@triton.jit
def _zero_points(zeros, place, scales, row, half, m, begin, end, lows, highs):
    """Add to sums of levels what their zero point takes away: the scales of each row times `zeros`, a product
    over the groups. A float32 is the sum of two float16, and scales are float16, so it is exact enough."""
    group = tl.arange(0, ZEROS_AT_ONCE)
    for start in tl.range(begin, end, ZEROS_AT_ONCE, num_stages=1):
        inside = start + group < end
        spot = scales + (start + group)[None] * 2 * half + row[:, None]
        low = tl.load(spot, (row < half)[:, None] & inside[None], 0.0)
        high = tl.load(spot + half, (row < half)[:, None] & inside[None], 0.0)
        zero = tl.load(zeros + (start + group)[:, None] * m + place[None], inside[:, None], 0.0)
        most = zero.to(tl.float16)
        rest = (zero - most.to(tl.float32)).to(tl.float16)
        lows = tl.dot(low, rest, acc=tl.dot(low, most, acc=lows))
        highs = tl.dot(high, rest, acc=tl.dot(high, most, acc=highs))
    return lows, highs


@triton.jit
def int4_products(
    x, levels, zeros, place, held, weights, scales, row, half, m, k, stored, begin, end,
    TILE: tl.constexpr, N_BLOCK: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The rows `row` of int4 weights, and those `half` further, times the rows `place` of x over the groups
    from `begin` to `end`: [N_BLOCK, TILE] each. Weights are multiplied without their scales; the sums of each
    group are scaled, also by the scales of x in `levels` if there are any.

    Beside e4m3 rows no level is converted, and the result is to be multiplied by 512. What levels from 0 to
    15 instead of -8 to 7 add is subtracted by a product with the constant -8 / 512, or by `_zero_points` if
    the sums of the groups of x are given in `zeros` [groups, m]."""
    column, groups, near = tl.arange(0, GROUP), stored // GROUP, tl.minimum(row, half - 1)
    at = weights + near.to(tl.int64)[:, None] * stored + column[None]
    across = x + place[None] * k + column[:, None]
    first = tl.minimum(begin, groups - 1)  # a part may be empty
    spot = scales + near
    low, high = tl.load(spot + first * 2 * half), tl.load(spot + (first * 2 + 1) * half)
    if levels is not None:
        level = tl.load(levels + place * groups + first, held, 0.0)
    lows = tl.zeros((N_BLOCK, TILE), tl.float32)
    highs = tl.zeros((N_BLOCK, TILE), tl.float32)
    if zeros is not None:
        lows, highs = _zero_points(zeros, place, scales, row, half, m, begin, end, lows, highs)
    for group in range(begin, end):
        inside = group * GROUP + column < k
        packed = tl.load(at + group * GROUP, eviction_policy="evict_first")
        if held is None:
            values = tl.load(across + group * GROUP, inside[:, None], 0.0)
        else:
            values = tl.load(across + group * GROUP, held[None] & inside[:, None], 0.0)
        # The next scales are requested before these products need their own.
        further = tl.minimum(group + 1, groups - 1)
        next_low = tl.load(spot + further * 2 * half)
        next_high = tl.load(spot + (further * 2 + 1) * half)
        if x.dtype.element_ty == tl.float8e4nv:
            below, above = int4_levels(packed)
            if zeros is None:
                zero = tl.full((N_BLOCK, GROUP), 0x88, tl.uint8).to(tl.float8e4nv, bitcast=True)
                base = tl.dot(zero, values)
            below = tl.dot(below.to(tl.float8e4nv, bitcast=True), values)
            if zeros is None:
                below += base
            if levels is not None:
                below *= level[None]
            lows += below * low.to(tl.float32)[:, None]
            above = tl.dot(above.to(tl.float8e4nv, bitcast=True), values)
            if zeros is None:
                above += base
            if levels is not None:
                above *= level[None]
                level = tl.load(levels + place * groups + further, held, 0.0)
            highs += above * high.to(tl.float32)[:, None]
        else:
            below = tl.dot(int4_values(packed & 15, x), values, input_precision="ieee" if EXACT else "tf32")
            lows += below * low.to(tl.float32)[:, None]
            above = tl.dot(int4_values(packed >> 4, x), values, input_precision="ieee" if EXACT else "tf32")
            highs += above * high.to(tl.float32)[:, None]
        low, high = next_low, next_high
    return lows, highs


@triton.jit
def _lane_sums(values, LANE: tl.constexpr):
    """The sums of values [R, SPAN] over LANE adjacent columns."""
    return tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // LANE, LANE)), 2)


@triton.jit
def int4_dot_rows(
    across, at, scale_at, gains, half, there, k, stored, eps,
    SPAN: tl.constexpr, LOOPS: tl.constexpr, LANE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The dot products of x with rows of int4 weights -> (those of lower, those of upper levels).

    A line has pointers to its row's levels in `at` and to its first scale in `scale_at`. `across` points to
    SPAN columns of x, [lines or 1, SPAN]. With gains, x is read through its RMS norm, as in `dot_rows`, and
    as there each span of weights is loaded before the one in front of it, or x, is awaited."""
    # A thread then loads as many levels as it loads columns of x, and keeps both.
    column, lane = (
        tl.max_contiguous(tl.arange(0, SPAN), LANE)[None],
        (tl.arange(0, SPAN // LANE) * LANE)[None],
    )
    at, scale_at, known = at[:, None] + column, scale_at[:, None] + lane // GROUP * 2 * half, there[:, None]
    step = (SPAN // GROUP) * 2 * half
    held = tl.load(at, known & (column < stored), 0, eviction_policy="evict_first")
    low = tl.load(scale_at, known & (lane < stored), 0.0)
    high = tl.load(scale_at + half, known & (lane < stored), 0.0)
    lows = tl.zeros((at.shape[0], SPAN // LANE), tl.float32)
    highs = tl.zeros((at.shape[0], SPAN // LANE), tl.float32)
    squares = tl.zeros((1, SPAN // LANE), tl.float32)
    if gains is not None:
        gain = tl.load(gains + column, column < k, 0.0)
    wait()
    for loop in tl.static_range(LOOPS):
        now, now_low, now_high, left = held, low.to(tl.float32), high.to(tl.float32), k - loop * SPAN
        if gains is not None:
            now_gain = gain.to(tl.float32)
        if loop + 1 < LOOPS:
            rest = stored - (loop + 1) * SPAN
            held = tl.load(at + (loop + 1) * SPAN, known & (column < rest), 0, eviction_policy="evict_first")
            low = tl.load(scale_at + (loop + 1) * step, known & (lane < rest), 0.0)
            high = tl.load(scale_at + (loop + 1) * step + half, known & (lane < rest), 0.0)
            if gains is not None:
                gain = tl.load(gains + (loop + 1) * SPAN + column, column < left - SPAN, 0.0)
        values = tl.load(across + loop * SPAN, column < left, 0.0).to(tl.float32)
        if gains is not None:
            squares += _lane_sums(values * values, LANE)
            values *= now_gain
        # What 128 and the zero point of 8 add.
        zero = 136.0 * _lane_sums(values, LANE)
        below, above = _floats(now)
        lows += (_lane_sums(below * values, LANE) - zero) * now_low
        highs += (_lane_sums(above * values, LANE) - zero) * now_high
    lows, highs = tl.sum(lows, 1), tl.sum(highs, 1)
    if gains is not None:
        scale = tl.rsqrt(tl.sum(squares) / k + eps)
        lows, highs = lows * scale, highs * scale
    return lows, highs
