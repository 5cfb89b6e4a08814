"""Mixtures of experts for a few tokens: each pick streams the weights of its expert through registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.cuda.int4 import int4_dot_rows
from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait
from stretto.kernels.cuda.linear import Norm, dot_rows, row_options
from stretto.kernels.cuda.routing import ExpertChoice
from stretto.kernels.cuda.rows import activate
from stretto.kernels.cuda.weights import (
    GROUP,
    CudaExperts,
    Int4Experts,
    expert_scales,
    expert_width,
)

# What a program of `_stream_down` requests at once: columns, and bytes for each thread.
STREAMED_COLUMNS, STREAMED_BYTES = 1024, 64
INT4_COLUMNS = 256  # more leave more columns unused, and more warps to add up


@triton.jit
def _stream_gate_up(
    x, weights, scales, gains, chosen, out, n, k, stored, share, eps,
    KIND: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, LOOPS: tl.constexpr, LANE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """ROWS values behind the activation, for one pick. Int4 weights have groups of GROUP columns, and rows
    of `stored` columns."""
    release()
    pick, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < n
    wait()
    expert = tl.load(chosen + pick).to(tl.int64)
    if GROUP is not None:
        gates, ups = int4_dot_rows(
            x + (pick // share) * k + tl.arange(0, SPAN)[None], weights + (expert * n + row) * stored,
            scales + expert * (stored // GROUP) * 2 * n + row, gains, n, there, k, stored, eps,
            SPAN, LOOPS, LANE, GROUP,
        )  # fmt: skip
    else:
        first = expert * 2 * n
        gates, ups = dot_rows(
            x + (pick // share) * k, weights + first * k, gains, row, n + row, there, k, eps,
            SPAN, LOOPS, LANE, True,
        )  # fmt: skip
        if scales is not None:
            gates *= tl.load(scales + first + row, there, 0.0)
            ups *= tl.load(scales + first + n + row, there, 0.0)
    tl.store(out + pick * n + row, (activate(gates, KIND) * ups).to(out.dtype.element_ty), there)


@triton.jit
def _add_picks(sums, share, residual, out, place, inside, ROWS: tl.constexpr, TOP_BLOCK: tl.constexpr):
    """Store ROWS outputs of a token, each the sum of its lines by their shares, plus the residual."""
    total = tl.sum(tl.reshape(sums * share, (ROWS, TOP_BLOCK)), 1)
    if residual is not None:
        total += tl.load(residual + place, inside, 0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


@triton.jit
def _stream_down(
    hidden, weights, scales, chosen, shares, residual, out, n, half, k, stored,
    TOP: tl.constexpr, TOP_BLOCK: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, LOOPS: tl.constexpr,
    LANE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one token, over all its experts: a line is one expert's row of an output. Of int4
    weights, with groups of GROUP and rows of `stored` columns, also those `half` further."""
    release()
    line = tl.arange(0, ROWS * TOP_BLOCK)
    row, known = tl.program_id(0) * ROWS + line // TOP_BLOCK, line % TOP_BLOCK < TOP
    pick = tl.program_id(1) * TOP + tl.minimum(line % TOP_BLOCK, TOP - 1)
    there, column = (row < half) & known, tl.arange(0, SPAN)
    made = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * n + made
    across = hidden + pick[:, None] * k + column[None]
    wait()
    expert = tl.load(chosen + pick).to(tl.int64)
    share = tl.load(shares + pick, there, 0.0)
    if GROUP is not None:
        sums, highs = int4_dot_rows(
            across, weights + (expert * half + row) * stored,
            scales + expert * (stored // GROUP) * 2 * half + row, None, half, there, k, stored, 0.0,
            SPAN, LOOPS, LANE, GROUP,
        )  # fmt: skip
        _add_picks(highs, share, residual, out, place + half, made < n - half, ROWS, TOP_BLOCK)
    else:
        at = weights + (expert * n + row)[:, None] * k + column[None]
        held = tl.load(at, there[:, None] & (column < k)[None], 0.0, eviction_policy="evict_first")
        if scales is not None:
            share *= tl.load(scales + expert * n + row, there, 0.0)
        lanes = tl.zeros((ROWS * TOP_BLOCK, SPAN // LANE), tl.float32)
        for loop in tl.static_range(LOOPS):
            now, left = held.to(tl.float32), k - loop * SPAN
            if loop + 1 < LOOPS:
                inside = there[:, None] & (column < left - SPAN)[None]
                held = tl.load(at + (loop + 1) * SPAN, inside, 0.0, eviction_policy="evict_first")
            values = tl.load(across + loop * SPAN, there[:, None] & (column < left)[None], 0.0).to(tl.float32)
            lanes += tl.sum(tl.reshape(now * values, (ROWS * TOP_BLOCK, SPAN // LANE, LANE)), 2)
        sums = tl.sum(lanes, 1)
    _add_picks(sums, share, residual, out, place, made < half, ROWS, TOP_BLOCK)


def stream(
    x: Tensor,
    choice: ExpertChoice,
    packed: CudaExperts,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The mixture of a few rows x [T, H] -> [T, H]. `norm` is applied to x first; `residual` [T, H] is
    added last."""
    (tokens, top), n, k, size = choice.experts.shape, x.shape[1], expert_width(packed), packed.down.itemsize
    gate_up_scales, down_scales = expert_scales(packed)
    hidden, group = x.new_empty(tokens * top, k), GROUP if isinstance(packed, Int4Experts) else None
    bits = 8 * size if group is None else 4
    options = row_options(packed.gate_up.shape[2], bits, norm is not None, group is None)
    _stream_gate_up[(triton.cdiv(k, options["ROWS"]), tokens * top)](
        x, packed.gate_up, gate_up_scales, None if norm is None else norm.gains, choice.experts, hidden,
        k, n, packed.gate_up.shape[2], top, 0.0 if norm is None else norm.eps,
        KIND=packed.activation, GROUP=group, **options, **OPTIONS,
    )  # fmt: skip
    out, lines, half = torch.empty_like(x), max(8, pow2(top)), packed.down.shape[1]
    span = min(pow2(packed.down.shape[2], 32), STREAMED_COLUMNS if group is None else INT4_COLUMNS)
    _stream_down[(triton.cdiv(half, lines // pow2(top)), tokens)](
        hidden, packed.down, down_scales, choice.experts, choice.shares, residual, out, n, half, k,
        packed.down.shape[2], TOP=top, TOP_BLOCK=pow2(top), ROWS=lines // pow2(top), SPAN=span,
        LOOPS=triton.cdiv(packed.down.shape[2], span), LANE=16 // size, GROUP=group,
        num_warps=min(max(lines * span * size // (32 * STREAMED_BYTES), 1), 8), **OPTIONS,
    )  # fmt: skip
    return out
