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

from stretto.kernels import Activation
from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait
from stretto.kernels.cuda.linear import Norm, dot_rows, row_options
from stretto.kernels.cuda.routing import ExpertChoice, PickOrder, choose, choose_and_quantise, sort
from stretto.kernels.cuda.rows import FP8, FP8_MAX, activate, quantise_rows
from stretto.kernels.reference import DenseExperts

# Up to so many tokens stream: more of them have experts in common, which then are read once for all.
FEW_TOKENS = 4
# What a program of `_stream_down` requests at once: columns, and bytes for each thread.
STREAMED_COLUMNS, STREAMED_BYTES = 1024, 64
GROUP = 128  # values behind the activation that share a scale in e4m3
SLOTS = 2  # programs that share the tiles of an expert
COMBINE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Fp8Experts:
    """All experts of a layer in e4m3: `gate_up` [E, 2F, H] and `down` [E, H, F]. A row is multiplied by its
    float32 scale, in `gate_up_scales` [E, 2F] or `down_scales` [E, H]."""

    gate_up: Tensor
    gate_up_scales: Tensor
    down: Tensor
    down_scales: Tensor
    activation: Activation

    @classmethod
    def pack(cls, gate_up: Tensor, down: Tensor, activation: Activation) -> Fp8Experts:
        return cls(*_rounded(gate_up), *_rounded(down), activation)

    @property
    def nbytes(self) -> int:
        held = self.gate_up, self.gate_up_scales, self.down, self.down_scales
        return sum(tensor.nbytes for tensor in held)

    def shares(self, weight: Tensor) -> bool:
        return False


CudaExperts = DenseExperts | Fp8Experts


def _rounded(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [E, N, K] in e4m3, and the scale of each row, [E, N]."""
    values, scales = quantise_rows(weights.flatten(0, 1).contiguous())
    return values.view(weights.shape), scales.view(weights.shape[:2])


def _scales(packed: CudaExperts) -> tuple[Tensor | None, Tensor | None]:
    """The scales of `gate_up` and of `down`."""
    return (packed.gate_up_scales, packed.down_scales) if isinstance(packed, Fp8Experts) else (None, None)


@triton.jit
def _stream_gate_up(
    x, weights, scales, gains, chosen, out, n, k, share, eps,
    KIND: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, LOOPS: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """ROWS values behind the activation, for one pick."""
    release()
    pick, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < n
    wait()
    first = tl.load(chosen + pick).to(tl.int64) * 2 * n
    gates, ups = dot_rows(
        x + (pick // share) * k, weights + first * k, gains, row, n + row, there, k, eps,
        SPAN, LOOPS, LANE, True,
    )  # fmt: skip
    if scales is not None:
        gates *= tl.load(scales + first + row, there, 0.0)
        ups *= tl.load(scales + first + n + row, there, 0.0)
    tl.store(out + pick * n + row, (activate(gates, KIND) * ups).to(out.dtype.element_ty), there)


@triton.jit
def _stream_down(
    hidden, weights, scales, chosen, shares, residual, out, n, k,
    TOP: tl.constexpr, TOP_BLOCK: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, LOOPS: tl.constexpr,
    LANE: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one token, over all its experts: a line is one expert's row of an output."""
    release()
    line = tl.arange(0, ROWS * TOP_BLOCK)
    row, choice = tl.program_id(0) * ROWS + line // TOP_BLOCK, line % TOP_BLOCK
    pick, column = tl.program_id(1) * TOP + choice, tl.arange(0, SPAN)
    there = (row < n) & (choice < TOP)
    wait()
    stored = tl.load(chosen + pick, choice < TOP, 0).to(tl.int64) * n + row
    at, across = weights + stored[:, None] * k + column[None], hidden + pick[:, None] * k + column[None]
    held = tl.load(at, there[:, None] & (column < k)[None], 0.0, eviction_policy="evict_first")
    share = tl.load(shares + pick, there, 0.0)
    if scales is not None:
        share *= tl.load(scales + stored, there, 0.0)
    sums = tl.zeros((ROWS * TOP_BLOCK, SPAN // LANE), tl.float32)
    for loop in tl.static_range(LOOPS):
        now, left = held.to(tl.float32), k - loop * SPAN
        if loop + 1 < LOOPS:
            inside = there[:, None] & (column < left - SPAN)[None]
            held = tl.load(at + (loop + 1) * SPAN, inside, 0.0, eviction_policy="evict_first")
        values = tl.load(across + loop * SPAN, there[:, None] & (column < left)[None], 0.0).to(tl.float32)
        sums += tl.sum(tl.reshape(now * values, (ROWS * TOP_BLOCK, SPAN // LANE, LANE)), 2)
    total = tl.sum(tl.reshape(tl.sum(sums, 1) * share, (ROWS, TOP_BLOCK)), 1)
    made = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    spot = tl.program_id(1) * n + made
    if residual is not None:
        total += tl.load(residual + spot, made < n, 0.0).to(tl.float32)
    tl.store(out + spot, total.to(out.dtype.element_ty), made < n)


def stream(
    x: Tensor,
    choice: ExpertChoice,
    packed: CudaExperts,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The mixture of a few rows x [T, H] -> [T, H]. `norm` is applied to x first; `residual` [T, H] is
    added last."""
    (tokens, top), (n, k), size = choice.experts.shape, packed.down.shape[1:], packed.down.itemsize
    gate_up_scales, down_scales = _scales(packed)
    hidden = x.new_empty(tokens * top, k)
    options = row_options(n, size, norm is not None, True)
    _stream_gate_up[(triton.cdiv(k, options["ROWS"]), tokens * top)](
        x, packed.gate_up, gate_up_scales, None if norm is None else norm.gains, choice.experts, hidden,
        k, n, top, 0.0 if norm is None else norm.eps, KIND=packed.activation, **options, **OPTIONS,
    )  # fmt: skip
    out, lines, span = torch.empty_like(x), max(8, pow2(top)), min(pow2(k, 32), STREAMED_COLUMNS)
    _stream_down[(triton.cdiv(n, lines // pow2(top)), tokens)](
        hidden, packed.down, down_scales, choice.experts, choice.shares, residual, out, n, k,
        TOP=top, TOP_BLOCK=pow2(top), ROWS=lines // pow2(top), SPAN=span, LOOPS=triton.cdiv(k, span),
        LANE=16 // size, num_warps=min(max(lines * span * size // (32 * STREAMED_BYTES), 1), 8), **OPTIONS,
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class GroupTiling:
    """How a grouped product divides the work: the tokens of a tile, its rows of the weights (of gates, and as
    many of ups), the bytes of a row in one stage, and the warps and stages of a program."""

    tokens: int
    rows: int = GROUP
    row_bytes: int = 128
    warps: int = 4
    stages: int = 3

    def options(self, x: Tensor) -> dict[str, Any]:
        """The compile-time options of a kernel that multiplies x."""
        return {
            "TILE": self.tokens,
            "N_BLOCK": self.rows,
            "K_BLOCK": self.row_bytes // x.itemsize,
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


def gate_up_tiling(tokens: int, dtype: torch.dtype) -> GroupTiling:
    if dtype == torch.float32:
        return PLAIN
    return GroupTiling(tokens, warps=4 if tokens < 64 else 8)


def down_tiling(tokens: int, dtype: torch.dtype) -> GroupTiling:
    if dtype == torch.float32:
        return PLAIN
    tokens = min(tokens, 64)  # more need more registers than there are
    return GroupTiling(tokens, warps=4 if tokens < 64 else 8, stages=4)


@triton.jit
def _grouped_gate_up(
    x, x_scales, weights, scales, order, starts, out, out_scales, n, k, share,
    KIND: tl.constexpr, MAX: tl.constexpr, TILE: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """N_BLOCK values behind the activation, for the tiles of one expert. They are stored in the order of the
    picks; in e4m3 the N_BLOCK values of a pick have one scale."""
    release()
    expert, group = tl.program_id(2), tl.program_id(1)
    row, column = group * N_BLOCK + tl.arange(0, N_BLOCK), tl.arange(0, K_BLOCK)
    there = row < n
    wait()
    first, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    stored = expert.to(tl.int64) * 2 * n
    gate_at = weights + stored * k + row[:, None] * k + column[None]
    up_at = gate_at + n * k
    for begin in range(first + tl.program_id(0) * TILE, end, tl.num_programs(0) * TILE):
        place = begin + tl.arange(0, TILE)
        held = place < end
        token = tl.load(order + place, held, 0) // share
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
            unit = tl.load(x_scales + token, held, 0.0)[None]
            gates *= tl.load(scales + stored + row, there, 0.0)[:, None] * unit
            ups *= tl.load(scales + stored + n + row, there, 0.0)[:, None] * unit
        made = activate(gates, KIND) * ups
        if scales is not None:
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
    hidden, levels, weights, scales, order, starts, out, n, k, groups,
    TILE: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """N_BLOCK outputs for the tiles of one expert, stored by pick. In e4m3 the sums of each K_BLOCK columns
    are scaled, because a pick has a scale for so many."""
    release()
    expert = tl.program_id(2)
    row, column = tl.program_id(1) * N_BLOCK + tl.arange(0, N_BLOCK), tl.arange(0, K_BLOCK)
    there = row < n
    wait()
    first, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    stored = expert.to(tl.int64) * n
    at = weights + stored * k + row[:, None] * k + column[None]
    for begin in range(first + tl.program_id(0) * TILE, end, tl.num_programs(0) * TILE):
        place = begin + tl.arange(0, TILE)
        held = place < end
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
            sums *= tl.load(scales + stored + row, there, 0.0)[:, None]
        pick = tl.load(order + place, held, 0)
        spot = out + pick[None] * n + row[:, None]
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
    x: Tensor,
    x_scales: Tensor | None,
    order: PickOrder,
    packed: CudaExperts,
    dtype: torch.dtype,
    tiling: GroupTiling,
) -> tuple[Tensor, Tensor | None]:
    """Rows x [T, H] -> what is behind the activation, [picks, F] in the order of the picks, in `dtype`. With
    e4m3 weights x is e4m3 with `x_scales` [T], and so is the result, with a float32 scale for each GROUP
    columns: [picks, groups]. The tile then has GROUP rows."""
    picks, (experts, n, k) = order.picks.shape[0], packed.down.shape
    scales, groups = _scales(packed)[0], triton.cdiv(k, tiling.rows)
    hidden = torch.empty((picks, k), dtype=dtype if scales is None else FP8, device=x.device)
    levels = None if scales is None else torch.empty((picks, groups), device=x.device)
    slots = min(triton.cdiv(order.most, tiling.tokens), SLOTS)
    _grouped_gate_up[(slots, groups, experts)](
        x, x_scales, packed.gate_up, scales, order.picks, order.starts, hidden, levels,
        k, n, picks // x.shape[0], KIND=packed.activation, MAX=FP8_MAX, **tiling.options(x),
    )  # fmt: skip
    return hidden, levels


def grouped_down(
    hidden: Tensor,
    levels: Tensor | None,
    order: PickOrder,
    packed: CudaExperts,
    made: Tensor,
    tiling: GroupTiling,
) -> None:
    """What `grouped_gate_up` made -> `made` [picks, H], by pick. With e4m3 weights a stage of the tile has
    GROUP columns."""
    experts, n, k = packed.down.shape
    slots = min(triton.cdiv(order.most, tiling.tokens), SLOTS)
    _grouped_down[(slots, triton.cdiv(n, tiling.rows), experts)](
        hidden, levels, packed.down, _scales(packed)[1], order.picks, order.starts, made,
        n, k, triton.cdiv(k, GROUP), **tiling.options(hidden),
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
    """As `Kernels.experts`. Up to FEW_TOKENS rows stay in their dtype; of more, those that e4m3 weights
    multiply are quantised."""
    x, (tokens, width) = x.contiguous(), x.shape
    if not tokens:
        return x
    if tokens <= FEW_TOKENS:
        return stream(x, choose(logits, k, normalise), packed)
    if isinstance(packed, Fp8Experts):
        choice, rows, scales = choose_and_quantise(logits, k, normalise, x)
    else:
        choice, rows, scales = choose(logits, k, normalise), x, None
    order, tile = sort(choice, logits.shape[1]), tile_tokens(tokens * k, logits.shape[1])
    hidden, levels = grouped_gate_up(rows, scales, order, packed, x.dtype, gate_up_tiling(tile, rows.dtype))
    made = x.new_empty(tokens * k, width)
    grouped_down(hidden, levels, order, packed, made, down_tiling(tile, rows.dtype))
    return combine(made, choice.shares, torch.empty_like(x))
