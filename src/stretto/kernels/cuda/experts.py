"""Mixtures of experts that the host does not wait for.

A few tokens stream the weights of their experts, pick by pick. More tokens are sorted by expert on the
device, and each tile of one expert's tokens is a small matrix product. The grid has programs for every
expert, because the host does not know the routing; programs without a tile return at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.cuda.int4 import int4_products
from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait
from stretto.kernels.cuda.routing import ExpertRows, PickOrder, choose, choose_and_quantise, sort
from stretto.kernels.cuda.rows import FP8, FP8_MAX, activate
from stretto.kernels.cuda.streaming import stream
from stretto.kernels.cuda.weights import (
    GROUP,
    CudaExperts,
    Int4Experts,
    expert_scales,
    expert_width,
    rounds_rows,
)

# Up to so many tokens stream: more of them have experts in common, which then are read once for all.
FEW_TOKENS = 4
SLOTS = 2  # programs that share the tiles of an expert
COMBINE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class GroupTiling:
    """How a grouped product divides the work: the tokens of a tile, its rows of the weights (of gates, and as
    many of ups), the bytes of a row in one stage, and the warps and stages of a program."""

    tokens: int
    rows: int = GROUP
    row_bytes: int = 128
    warps: int = 4
    stages: int = 3

    def options(self, x: Tensor, packed: CudaExperts) -> dict[str, Any]:
        """The compile-time options of a kernel that multiplies x. A stage of int4 weights is a group."""
        int4 = isinstance(packed, Int4Experts)
        return {
            "INT4": int4,
            "TILE": self.tokens,
            "N_BLOCK": self.rows,
            "K_BLOCK": GROUP if int4 else self.row_bytes // x.itemsize,
            "EXACT": x.dtype == torch.float32,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **OPTIONS,
        }


def tile_tokens(picks: int, experts: int) -> int:
    """The tokens of a tile: twice the picks that an expert has on average."""
    return min(max(pow2(2 * picks // experts), 16), 128)


# float32 is multiplied without tensor cores, in code that grows with the tile.
PLAIN = GroupTiling(16, rows=64, stages=2)


def gate_up_tiling(tokens: int, dtype: torch.dtype, packed: CudaExperts) -> GroupTiling:
    if dtype == torch.float32:
        return PLAIN
    if isinstance(packed, Int4Experts):
        return _int4_tiling(tokens, GROUP if dtype == FP8 else GROUP // 2)
    return GroupTiling(tokens, warps=4 if tokens < 64 else 8)


def down_tiling(tokens: int, dtype: torch.dtype, packed: CudaExperts) -> GroupTiling:
    if dtype == torch.float32:
        return PLAIN
    if isinstance(packed, Int4Experts):
        return _int4_tiling(tokens, GROUP // 2)
    tokens = min(tokens, 64)  # more need more registers than there are
    return GroupTiling(tokens, warps=4 if tokens < 64 else 8, stages=4)


def _int4_tiling(tokens: int, rows: int) -> GroupTiling:
    """Sums of lower and of upper levels take twice the registers."""
    tokens = min(tokens, 64)
    return GroupTiling(tokens, rows, warps=4 if tokens < 64 else 8, stages=3 if tokens == 32 else 4)


@triton.jit
def _grouped_gate_up(
    x, x_scales, weights, scales, order, starts, out, out_scales, n, k, stored, share,
    KIND: tl.constexpr, MAX: tl.constexpr, INT4: tl.constexpr, TILE: tl.constexpr, N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """N_BLOCK values behind the activation, for the tiles of one expert. They are stored in the order of the
    picks; in e4m3 the N_BLOCK values of a pick have one scale."""
    release()
    expert, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row, column = group * N_BLOCK + tl.arange(0, N_BLOCK), tl.arange(0, K_BLOCK)
    there = row < n
    wait()
    first, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    above = expert * 2 * n
    gate_at = weights + above * k + row[:, None] * k + column[None]
    up_at = gate_at + n * k
    for begin in range(first + tl.program_id(0) * TILE, end, tl.num_programs(0) * TILE):
        place = begin + tl.arange(0, TILE)
        held = place < end
        token = tl.load(order + place, held, 0) // share
        if INT4:
            gates, ups = int4_products(
                x, None, None, token, held, weights + expert * n * stored,
                scales + above * (stored // K_BLOCK), row, n, 0, k, stored, 0, stored // K_BLOCK,
                TILE, N_BLOCK, K_BLOCK, EXACT,
            )  # fmt: skip
        else:
            across = x + token[None] * k + column[:, None]
            gates = tl.zeros((N_BLOCK, TILE), tl.float32)
            ups = tl.zeros((N_BLOCK, TILE), tl.float32)
            for start in range(0, k, K_BLOCK):
                inside = start + column < k
                within = there[:, None] & inside[None]
                gate = tl.load(gate_at + start, within, 0.0, eviction_policy="evict_first")
                up = tl.load(up_at + start, within, 0.0, eviction_policy="evict_first")
                values = tl.load(across + start, held[None] & inside[:, None], 0.0)
                gates = tl.dot(gate, values, acc=gates, input_precision="ieee" if EXACT else "tf32")
                ups = tl.dot(up, values, acc=ups, input_precision="ieee" if EXACT else "tf32")
            if scales is not None:
                gates *= tl.load(scales + above + row, there, 0.0)[:, None]
                ups *= tl.load(scales + above + n + row, there, 0.0)[:, None]
        if x_scales is not None:
            unit = tl.load(x_scales + token, held, 0.0)[None] * (512.0 if INT4 else 1.0)
            gates *= unit
            ups *= unit
        made = activate(gates, KIND) * ups
        if out_scales is not None:
            level = tl.maximum(tl.max(tl.abs(made), 0), 1e-12) / MAX
            tl.store(out_scales + place * tl.num_programs(1) + group, level, held)
            made = made / level[None]
        tl.store(
            out + place[None] * n + row[:, None],
            made.to(out.dtype.element_ty),
            there[:, None] & held[None],
        )


@triton.jit
def _grouped_down(
    hidden, levels, weights, scales, order, starts, out, n, half, k, stored, groups,
    INT4: tl.constexpr, TILE: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """N_BLOCK outputs for the tiles of one expert, stored by pick; of int4 weights also those `half` further.
    In e4m3 the sums of each K_BLOCK columns are scaled, because a pick has a scale for so many."""
    release()
    expert = tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(1) * N_BLOCK + tl.arange(0, N_BLOCK), tl.arange(0, K_BLOCK)
    there = row < half
    wait()
    first, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    at = weights + expert * n * k + row[:, None] * k + column[None]
    for begin in range(first + tl.program_id(0) * TILE, end, tl.num_programs(0) * TILE):
        place = begin + tl.arange(0, TILE)
        held = place < end
        spot = out + tl.load(order + place, held, 0)[None] * n + row[:, None]
        if INT4:
            sums, highs = int4_products(
                hidden, levels, None, place, held, weights + expert * half * stored,
                scales + expert * groups * 2 * half, row, half, 0, k, stored, 0, groups,
                TILE, N_BLOCK, K_BLOCK, EXACT,
            )  # fmt: skip
            if levels is not None:
                sums *= 512.0
                highs *= 512.0
            within = (row < n - half)[:, None] & held[None]
            tl.store(spot + half, highs.to(out.dtype.element_ty), within)
        else:
            across = hidden + place[None] * k + column[:, None]
            sums = tl.zeros((N_BLOCK, TILE), tl.float32)
            if scales is not None:
                level = tl.load(levels + place * groups, held, 0.0)
            for start in range(0, k, K_BLOCK):
                inside = start + column < k
                within = there[:, None] & inside[None]
                weight = tl.load(at + start, within, 0.0, eviction_policy="evict_first")
                values = tl.load(across + start, held[None] & inside[:, None], 0.0)
                if scales is not None:
                    # The next scale is requested before this product needs its own.
                    further = start // K_BLOCK + 1
                    until = tl.where(further < groups, end, 0)
                    following = tl.load(levels + place * groups + further, place < until, 0.0)
                    sums += tl.dot(weight, values) * level[None]
                    level = following
                else:
                    sums = tl.dot(weight, values, acc=sums, input_precision="ieee" if EXACT else "tf32")
            if scales is not None:
                sums *= tl.load(scales + expert * n + row, there, 0.0)[:, None]
        tl.store(spot, sums.to(out.dtype.element_ty), there[:, None] & held[None])


@triton.jit
def _combine(made, shares, out, width, TOP: tl.constexpr, TOP_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a token's picks, weighted by their shares."""
    release()
    token, choice = tl.program_id(0), tl.arange(0, TOP_BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pick, inside = token * TOP + choice, column < width
    wait()
    share = tl.load(shares + pick, choice < TOP, 0.0)
    rows = tl.load(made + pick[:, None] * width + column[None], (choice < TOP)[:, None] & inside[None], 0.0)
    total = tl.sum(rows.to(tl.float32) * share[:, None], 0)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), inside)


def grouped_gate_up(
    rows: ExpertRows, order: PickOrder, packed: CudaExperts, dtype: torch.dtype, tiling: GroupTiling
) -> ExpertRows:
    """Rows [T, H] -> what is behind the activation, [picks, F] in the order of the picks: in `dtype`, or from
    e4m3 rows in e4m3 with a scale for each GROUP columns. The tile then has GROUP rows."""
    picks, experts, inner, x = order.picks.shape[0], packed.down.shape[0], expert_width(packed), rows.values
    hidden = torch.empty((picks, inner), dtype=dtype if rows.scales is None else FP8, device=x.device)
    groups = triton.cdiv(inner, tiling.rows)
    levels = None if rows.scales is None else rows.scales.new_empty(picks, groups)
    slots = min(triton.cdiv(order.most, tiling.tokens), SLOTS)
    _grouped_gate_up[(slots, groups, experts)](
        x, rows.scales, packed.gate_up, expert_scales(packed)[0], order.picks, order.starts, hidden, levels,
        inner, x.shape[1], packed.gate_up.shape[2], picks // x.shape[0],
        KIND=packed.activation, MAX=FP8_MAX, **tiling.options(x, packed),
    )  # fmt: skip
    return ExpertRows(hidden, levels)


def grouped_down(
    rows: ExpertRows, order: PickOrder, packed: CudaExperts, made: Tensor, tiling: GroupTiling
) -> None:
    """What `grouped_gate_up` made -> `made` [picks, H], by pick. With e4m3 rows a stage of the tile has
    GROUP columns."""
    experts, half, stored = packed.down.shape
    slots, inner = min(triton.cdiv(order.most, tiling.tokens), SLOTS), rows.values.shape[1]
    _grouped_down[(slots, triton.cdiv(half, tiling.rows), experts)](
        rows.values, rows.scales, packed.down, expert_scales(packed)[1], order.picks, order.starts, made,
        made.shape[1], half, inner, stored, triton.cdiv(inner, GROUP), **tiling.options(rows.values, packed),
    )  # fmt: skip


def combine(made: Tensor, shares: Tensor, out: Tensor) -> Tensor:
    """The rows of a token's picks [T * k, H], weighted by their shares [T, k] -> `out` [T, H]."""
    (tokens, top), width = shares.shape, made.shape[1]
    block = min(pow2(width), COMBINE_BLOCK)
    _combine[(tokens, triton.cdiv(width, block))](
        made, shares, out, width, TOP=top, TOP_BLOCK=pow2(top), BLOCK=block, **OPTIONS
    )
    return out


def experts(x: Tensor, logits: Tensor, packed: CudaExperts, k: int, normalise: bool) -> Tensor:
    """As `Kernels.experts`. Up to FEW_TOKENS rows stay in their dtype; of more, those that weights in e4m3 or
    int4 multiply are quantised, if the device can do so."""
    x, (tokens, width) = x.contiguous(), x.shape
    if not tokens:
        return x
    if tokens <= FEW_TOKENS:
        return stream(x, choose(logits, k, normalise), packed)
    if rounds_rows(packed):
        choice, rows = choose_and_quantise(logits, k, normalise, x)
    else:
        choice, rows = choose(logits, k, normalise), ExpertRows(x)
    order, tile = sort(choice, logits.shape[1]), tile_tokens(tokens * k, logits.shape[1])
    dtype, made = rows.values.dtype, x.new_empty(tokens * k, width)
    hidden = grouped_gate_up(rows, order, packed, x.dtype, gate_up_tiling(tile, dtype, packed))
    grouped_down(hidden, order, packed, made, down_tiling(tile, dtype, packed))
    return combine(made, choice.shares, torch.empty_like(x))
