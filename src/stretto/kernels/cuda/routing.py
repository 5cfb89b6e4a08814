"""Which experts a token takes, and the order that puts the tokens of one expert beside each other.

A pick is a token's choice of an expert: pick p is choice p % k of token p // k. The host never learns what
tokens choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait
from stretto.kernels.cuda.rows import FP8, FP8_MAX, quantised

LEAST_SCAN, MOST_SCAN = 128, 2048


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """What each of T tokens chose: the experts int32 [T, k], the likeliest first, and their shares float32
    [T, k]."""

    experts: Tensor
    shares: Tensor


@dataclass(frozen=True, slots=True)
class PickOrder:
    """The picks sorted by expert, int32 [T * k]. Those of expert e begin at `starts[e]` and end at
    `starts[e + 1]`; `starts` is int32 [E + 1]. No expert has more than `most`."""

    picks: Tensor
    starts: Tensor
    most: int


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Rows that experts multiply, [M, K]. Those in e4m3 have float32 scales: one a row, [M], or one for each
    128 columns, [M, groups]."""

    values: Tensor
    scales: Tensor | None = None


@triton.jit
def _choose(
    logits, chosen, shares, x, rounded, scales, experts, k,
    TOP: tl.constexpr, TOP_BLOCK: tl.constexpr, EXPERT_BLOCK: tl.constexpr, NORMALISE: tl.constexpr,
    ROW_BLOCK: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """The choice of one token. If `rounded` is given, its row of x is also quantised."""
    release()
    token = tl.program_id(0).to(tl.int64)
    expert, place = tl.arange(0, EXPERT_BLOCK), tl.arange(0, TOP_BLOCK)
    known = expert < experts
    wait()
    scores = tl.load(logits + token * experts + expert, known, float("-inf")).to(tl.float32)
    scores = tl.exp(scores - tl.max(scores, 0))
    left = tl.where(known, scores, -1.0)
    found = tl.zeros((TOP_BLOCK,), tl.int32)
    kept = tl.zeros((TOP_BLOCK,), tl.float32)
    for number in tl.static_range(TOP):
        most, best = tl.max(left, 0, return_indices=True)
        found = tl.where(place == number, best, found)
        kept = tl.where(place == number, most, kept)
        left = tl.where(expert == best, -1.0, left)
    kept = kept / tl.sum(kept if NORMALISE else scores, 0)
    # A row that is not a number must not lead to an expert that does not exist.
    tl.store(chosen + token * TOP + place, tl.minimum(found, experts - 1), place < TOP)
    tl.store(shares + token * TOP + place, kept, place < TOP)
    if rounded is not None:
        column = tl.arange(0, ROW_BLOCK)
        value = tl.load(x + token * k + column, column < k, 0.0).to(tl.float32)
        value = quantised(value, scales + token, MAX)
        tl.store(rounded + token * k + column, value.to(rounded.dtype.element_ty), column < k)


def _launch_choose(
    logits: Tensor, top: int, normalise: bool, x: Tensor | None, rows: ExpertRows | None
) -> ExpertChoice:
    tokens, experts = logits.shape
    chosen = torch.empty((tokens, top), dtype=torch.int32, device=logits.device)
    shares = torch.empty((tokens, top), dtype=torch.float32, device=logits.device)
    width = 1 if x is None else x.shape[1]
    rounded, scales = (None, None) if rows is None else (rows.values, rows.scales)
    _choose[(tokens,)](
        logits.contiguous(), chosen, shares, x, rounded, scales, experts, width,
        TOP=top, TOP_BLOCK=pow2(top), EXPERT_BLOCK=pow2(experts), NORMALISE=normalise,
        ROW_BLOCK=pow2(width), MAX=FP8_MAX, num_warps=1 if x is None else 4, **OPTIONS,
    )  # fmt: skip
    return ExpertChoice(chosen, shares)


def choose(logits: Tensor, top: int, normalise: bool) -> ExpertChoice:
    """The `top` likeliest experts by the softmax of logits [T, E], at the same logit the one with the lower
    number. With `normalise` their shares are made to sum to 1."""
    return _launch_choose(logits, top, normalise, None, None)


def choose_and_quantise(
    logits: Tensor, top: int, normalise: bool, x: Tensor
) -> tuple[ExpertChoice, ExpertRows]:
    """`choose`, and the rows x [T, K] as `quantise_rows` rounds them."""
    rows = ExpertRows(torch.empty_like(x, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32))
    return _launch_choose(logits, top, normalise, x, rows), rows


@triton.jit(do_not_specialize=["picks"])
def _sort(chosen, order, starts, picks, BLOCK: tl.constexpr):
    """Program e places the picks of expert e behind those of the experts before it."""
    release()
    own, place = tl.program_id(0), tl.arange(0, BLOCK)
    fewer = tl.zeros((BLOCK,), tl.int32)
    wait()
    for start in range(0, picks, BLOCK):
        expert = tl.load(chosen + start + place, start + place < picks, own)
        fewer += (expert < own).to(tl.int32)
    first = tl.sum(fewer, 0)
    tl.store(starts + own, first)
    if own == tl.num_programs(0) - 1:
        tl.store(starts + own + 1, picks)
    for start in range(0, picks, BLOCK):
        expert = tl.load(chosen + start + place, start + place < picks, -1)
        same = (expert == own).to(tl.int32)
        tl.store(order + first + tl.cumsum(same, 0) - 1, start + place, same > 0)
        first += tl.sum(same, 0)


def sort(choice: ExpertChoice, experts: int) -> PickOrder:
    """The picks of all tokens, by expert and then by token."""
    picks = choice.experts.numel()
    order = choice.experts.new_empty(picks)
    starts = choice.experts.new_empty(experts + 1)
    block = min(pow2(picks, LEAST_SCAN), MOST_SCAN)
    _sort[(experts,)](
        choice.experts, order, starts, picks, BLOCK=block, num_warps=4 if block <= 1024 else 8, **OPTIONS
    )
    return PickOrder(order, starts, choice.experts.shape[0])
