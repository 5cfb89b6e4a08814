"""Draws the tokens of a step on the device, so that the host need not wait.

Sampling inverts the cumulative sum, in the vocabulary's order, over the tokens that top_k, top_p and min_p
keep. Tokens as likely as the last one kept are kept too. A first kernel goes through all parts of all rows at
once. What it learns of them bounds the smallest logit that is kept, so that a second kernel, which has one
program for each row, need only search the logits above that bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait
from stretto.kernels.cuda.step_inputs import ORDER, SETTINGS, TO

IN_PROMPT, IN_OUTPUT = 1, 2
"""What a token's count is made of: 1 if the prompt has it, and 2 for each time it was sampled."""
MOST_SEEN = tl.constexpr(2**15 - 4)

PART = 2048
LOT = 8192
HALVINGS = 26
LEVELS, DEPTH = 16, 32  # halvings of the probability that are known of a part, and looked at in a row
FAR = 100.0  # exp(-FAR) is too small a weight to matter
EXACT = tl.constexpr(2.0**20)  # whole numbers below it, and their sums, are exact in float32
LOG2_E = tl.constexpr(1.4426950408889634)
COLDEST = tl.constexpr(1e-30)


@triton.jit
def _penalties(settings):
    """Repetition, frequency and presence penalty of a row of inputs, and whether any of them has
    an effect."""
    repetition, frequency, presence = tl.load(settings + 4), tl.load(settings + 5), tl.load(settings + 6)
    return repetition, frequency, presence, (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)


@triton.jit
def _limited(top_k, vocab):
    """Whether top_k has an effect."""
    return (top_k > 0) & (top_k < vocab)


@triton.jit
def _half(heat):
    """How much lower a logit has half the weight."""
    return tl.maximum(heat, COLDEST) / LOG2_E


@triton.jit
def _store_levels(levels, value, amount, peak, heat, LEVELS: tl.constexpr):
    """Sums of `amount` over the logits of a part that are at least a multiple of `_half`: the highest one
    that is not above the peak, and those below it."""
    half = _half(heat)
    top = tl.floor(peak / half)
    for level in range(LEVELS):
        tl.store(levels + level, tl.sum(tl.where(value >= (top - level) * half, amount, 0.0), 0))


@triton.jit
def _penalise_and_sum_parts(
    logits, peaks, columns, masses, levels, inputs, settings, seen, vocab,
    ORDER: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The largest logit of a part of a row, and its first column; NaN counts as infinite. Above temperature
    0 also the sum of exp((logit - peak) / temperature), with the peak of the part. With top_k also how many
    logits reach each level, or with top_p alone what part of that sum. Penalties are applied first, to the
    logits of tokens that have a count."""
    release()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * PART + tl.arange(0, PART)
    wait()
    spot = logits + row * vocab + column
    value = tl.load(spot, column < vocab, -float("inf"))
    heat = tl.load(settings + row * ORDER + SETTINGS)
    repetition, frequency, presence, penalised = _penalties(settings + row * ORDER + SETTINGS)
    if penalised:
        slot = tl.load(inputs + row * ORDER + TO).to(tl.int64)
        times = tl.load(seen + slot * vocab + column, column < vocab, 0).to(tl.int32)
        changed = tl.where(value > 0, value / repetition, value * repetition)
        drawn = times // 2
        changed -= frequency * drawn.to(tl.float32) + tl.where(drawn > 0, presence, 0.0)
        value = tl.where(times > 0, changed, value)
        tl.store(spot, value, column < vocab)
    value = tl.where(value == value, value, float("inf"))
    peak = tl.max(value, 0)
    place = row * PARTS + part
    tl.store(peaks + place, peak)
    tl.store(columns + place, tl.min(tl.where(value == peak, column, vocab), 0))
    if heat > 0:
        sound = (peak < float("inf")) & (peak > -float("inf"))
        weights = tl.exp2((value - tl.where(sound, peak, 0.0)) * (LOG2_E / tl.maximum(heat, COLDEST)))
        tl.store(masses + place, tl.where(sound, tl.sum(weights, 0), 0.0))
        top_k, top_p = tl.load(inputs + row * ORDER + 4), tl.load(settings + row * ORDER + SETTINGS + 1)
        min_p, limited = tl.load(settings + row * ORDER + SETTINGS + 2), _limited(top_k, vocab)
        if limited | ((top_p < 1) & (min_p <= 0)):
            amount = tl.where(sound, tl.where(limited, 1.0, weights), 0.0)
            _store_levels(levels + place * LEVELS, value, amount, peak, heat, LEVELS)


@triton.jit
def _reaches(peaks, start, vocab, floor, LOT: tl.constexpr, PART: tl.constexpr):
    """Whether any of LOT logits from column `start` is at least `floor`. `peaks`: of the parts of the row."""
    part = start // PART + tl.arange(0, LOT // PART if LOT > PART else 1)
    return tl.max(tl.load(peaks + part, part * PART < vocab, -float("inf")), 0) >= floor


@triton.jit
def _running_sums(amount):
    """The cumulative sums of a block: those of rows of 32, and of the sums of these rows."""
    rows = tl.reshape(amount, (amount.shape[0] // 32, 32))
    sums = tl.sum(rows, 1)
    within = tl.cumsum(rows, 1) + (tl.cumsum(sums, 0) - sums)[:, None]
    return tl.reshape(within, (amount.shape[0],))


@triton.jit
def _amounts(
    logits, peaks, vocab, first, second, third, peak, rate, counted, LOT: tl.constexpr, PART: tl.constexpr
):
    """How many logits of a row are at least as large as each of three floors, of which the first is the
    lowest, or, if not `counted`, the sums of their weights."""
    above_first, above_second, above_third = 0.0, 0.0, 0.0
    for start in range(0, vocab, LOT):
        if _reaches(peaks, start, vocab, first, LOT, PART):
            column = start + tl.arange(0, LOT)
            value = tl.load(logits + column, column < vocab, -float("inf"))
            amount = tl.where(counted, 1.0, tl.exp2((value - peak) * rate))
            above_first += tl.sum(tl.where(value >= first, amount, 0.0), 0)
            above_second += tl.sum(tl.where(value >= second, amount, 0.0), 0)
            above_third += tl.sum(tl.where(value >= third, amount, 0.0), 0)
    return above_first, above_second, above_third


@triton.jit
def _collect(logits, peaks, columns, vocab, low, high, LOT: tl.constexpr, PART: tl.constexpr):
    """How many logits of a row are from `low` up to below `high`. The columns of the first LOT of them are
    stored, in order."""
    tl.debug_barrier()
    found = 0
    for start in range(0, vocab, LOT):
        if _reaches(peaks, start, vocab, low, LOT, PART):
            column = start + tl.arange(0, LOT)
            value = tl.load(logits + column, column < vocab, -float("inf"))
            kept = (value >= low) & (value < high)
            place = found + _running_sums(kept.to(tl.int32)) - 1
            tl.store(columns + place, column, kept & (place < LOT))
            found += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    return found


@triton.jit
def _narrow(value, amount, low, high, goal, HALVINGS: tl.constexpr):
    """The largest floor from `low` up to `high` above which the amounts of these logits reach `goal`."""
    for _ in range(HALVINGS):
        middle = low + (high - low) * 0.5
        if tl.sum(tl.where(value >= middle, amount, 0.0), 0) >= goal:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _floor(
    logits, peaks, columns, vocab, low, high, peak, rate, goal, counted,
    LOT: tl.constexpr, PART: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """The largest floor from `low` up that keeps an amount of at least `goal` of a row. First the range below
    `high` is searched. Once its logits fit a lot, only those are read."""
    found, base = LOT + 1, 0.0
    for _ in range(HALVINGS // 2):
        if found > LOT:
            third = (high - low) / 3
            first, second = low + third, high - third
            above_first, above_second, above_high = _amounts(
                logits, peaks, vocab, first, second, high, peak, rate, counted, LOT, PART
            )
            risen = above_high >= goal
            if risen:
                low, high, base = high, peak, 0.0
            elif above_second >= goal:
                low, base = second, above_high
            elif above_first >= goal:
                low, high, base = first, second, above_second
            else:
                high, base = first, above_first
            # What is at the peak is counted in the next turn, unless it is all that is left.
            if (not risen) | (low >= peak):
                found = _collect(logits, peaks, columns, vocab, low, high, LOT, PART)
    if found <= LOT:
        place = tl.arange(0, LOT)
        value = tl.load(logits + tl.load(columns + place, place < found, 0), place < found, -float("inf"))
        amount = tl.where(counted, 1.0, tl.exp2((value - peak) * rate))
        low = _narrow(value, amount, low, high, goal - base, HALVINGS)
    return low


@triton.jit
def _bounds(
    levels, tops, scales, goal, heat, peak,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, LEVELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The highest level above which the amounts of all parts, times their scales, are known to be at least
    `goal`, and the next higher one; -inf and the peak if none is. A part knows nothing below its lowest
    level, so the floor that is sought may lie above the second value."""
    half, part, depth = _half(heat), tl.arange(0, PARTS_BLOCK), tl.arange(0, DEPTH)
    index = tl.floor(tops / half)
    top = tl.max(index, 0)
    level = depth[None] - tl.minimum(top - index, DEPTH).to(tl.int32)[:, None]
    known = levels + part[:, None] * LEVELS + tl.minimum(level, LEVELS - 1)
    amounts = tl.load(known, (level >= 0) & (part < PARTS)[:, None], 0.0) * scales[:, None]
    first = tl.min(tl.where(tl.sum(amounts, 0) >= goal, depth, DEPTH), 0)
    found = (first < DEPTH) & (tl.abs(top) < EXACT)
    low = tl.where(found, (top - first) * half, -float("inf"))
    high = tl.where(found, (top - first + 1) * half, peak)
    return tl.minimum(low, peak), tl.minimum(high, peak)  # both may be rounded up


@triton.jit
def _invert_collected(
    logits, columns, found, mass, floor, vocab, peak, rate, top_k, top_p, min_p, fraction,
    LOT: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """As `_invert_kept`, of `found` collected logits, all of which are at least `floor`."""
    place, limited = tl.arange(0, LOT), _limited(top_k, vocab)
    value = tl.load(logits + tl.load(columns + place, place < found, 0), place < found, -float("inf"))
    weights = tl.exp2((value - peak) * rate)
    if limited:
        floor = _narrow(value, tl.full((LOT,), 1.0, tl.float32), floor, peak, top_k, HALVINGS)
        weights = tl.where(value >= floor, weights, 0.0)
    if (min_p > 0) | limited:
        mass = tl.sum(weights, 0)
    if top_p < 1:
        floor = _narrow(value, weights, floor, peak, mass * top_p, HALVINGS)
        weights = tl.where(value >= floor, weights, 0.0)
    until = _running_sums(weights)
    passed = (weights > 0) & (until > tl.max(until, 0) * fraction)
    last = tl.max(tl.where(weights > 0, place, 0), 0)
    return tl.load(columns + tl.minimum(tl.min(tl.where(passed, place, LOT), 0), last))


@triton.jit
def _invert_row(logits, peaks, vocab, goal, floor, peak, rate, LOT: tl.constexpr, PART: tl.constexpr):
    """The token at which the cumulative sum of the weights of logits from `floor` up passes `goal`, or the
    last one of them."""
    token, last, passed = vocab, 0, 0.0
    for start in range(0, vocab, LOT):
        if _reaches(peaks, start, vocab, floor, LOT, PART):
            column = start + tl.arange(0, LOT)
            value = tl.load(logits + column, column < vocab, -float("inf"))
            weights = tl.where(value >= floor, tl.exp2((value - peak) * rate), 0.0)
            until = passed + _running_sums(weights)
            token = tl.minimum(token, tl.min(tl.where((weights > 0) & (until > goal), column, vocab), 0))
            last = tl.maximum(last, tl.max(tl.where(weights > 0, column, 0), 0))
            passed += tl.sum(weights, 0)
    return tl.minimum(token, last)


@triton.jit
def _invert_kept(
    logits, peaks, columns, vocab, mass, floor, low, high, peak, rate, top_k, top_p, min_p, fraction,
    LOT: tl.constexpr, PART: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """The token at which the cumulative sum of what top_k, top_p and min_p keep of a row passes `fraction`
    of it, or the last one that is kept. `mass`: the sum of all weights. What is kept is at least `floor`, by
    min_p, and at least `low`. If no more than a lot of logits are, only these are read again."""
    limited = _limited(top_k, vocab)
    floor = tl.maximum(floor, low)
    found = _collect(logits, peaks, columns, vocab, floor, float("inf"), LOT, PART)
    if found <= LOT:
        token = _invert_collected(
            logits, columns, found, mass, floor, vocab, peak, rate, top_k, top_p, min_p, fraction, LOT,
            HALVINGS,
        )  # fmt: skip
    else:
        high = tl.maximum(high, floor)
        if limited:
            floor = _floor(logits, peaks, columns, vocab, floor, high, peak, rate, top_k.to(tl.float32), True,
                           LOT, PART, HALVINGS)  # fmt: skip
        if (min_p > 0) | limited:
            mass, _, _ = _amounts(logits, peaks, vocab, floor, floor, floor, peak, rate, False, LOT, PART)
            high = peak
        if top_p < 1:
            floor = _floor(logits, peaks, columns, vocab, floor, high, peak, rate, mass * top_p, False, LOT,
                           PART, HALVINGS)  # fmt: skip
            mass, _, _ = _amounts(logits, peaks, vocab, floor, floor, floor, peak, rate, False, LOT, PART)
        token = _invert_row(logits, peaks, vocab, mass * fraction, floor, peak, rate, LOT, PART)
    return token


@triton.jit
def _invert_part(logits, vocab, part, peak, rate, goal, PART: tl.constexpr):
    """The token at which the cumulative sum of a part passes `goal`. Rounding may leave none; then the last
    one with a weight is taken."""
    column = part * PART + tl.arange(0, PART)
    value = tl.load(logits + column, column < vocab, -float("inf"))
    weights = tl.exp2((value - peak) * rate)
    passed = (weights > 0) & (tl.cumsum(weights, 0) > goal)
    last = tl.max(tl.where(weights > 0, column, 0), 0)
    return tl.minimum(tl.min(tl.where(passed, column, vocab), 0), last)


@triton.jit
def _draw(
    logits, peaks, columns, masses, levels, collected, inputs, settings, drawn, seen, out, vocab,
    ORDER: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr, DEPTH: tl.constexpr, LOT: tl.constexpr, HALVINGS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """The token of a row. Without top_k, top_p and min_p only one part of the logits is read: that in which
    the cumulative sum of the parts passes the goal."""
    release()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_BLOCK)
    row_inputs, settings = inputs + row * ORDER, settings + row * ORDER + SETTINGS
    peaks, own = peaks + row * PARTS, logits + row * vocab
    wait()
    tops = tl.load(peaks + part, part < PARTS, -float("inf"))
    firsts = tl.load(columns + row * PARTS + part, part < PARTS, vocab)
    sums = tl.load(masses + row * PARTS + part, part < PARTS, 0.0)
    top_k, heat = tl.load(row_inputs + 4), tl.load(settings)
    top_p, min_p, fraction = tl.load(settings + 1), tl.load(settings + 2), tl.load(settings + 3)
    peak = tl.max(tops, 0)
    sound = (peak < float("inf")) & (peak > -float("inf"))
    token = tl.where(sound, tl.min(tl.where(tops == peak, firsts, vocab), 0), -1)
    if sound & (heat > 0):
        rate = LOG2_E / tl.maximum(heat, COLDEST)
        scales = tl.exp2((tops - peak) * rate)
        sums *= scales
        until = tl.cumsum(sums, 0)
        mass = tl.max(until, 0)
        limited = _limited(top_k, vocab)
        if limited | (top_p < 1) | (min_p > 0):
            floor, low, high = peak - FAR * heat, -float("inf"), peak
            if min_p > 0:
                floor = tl.maximum(floor, peak + tl.log(min_p) * heat)
            if limited | ((top_p < 1) & (min_p <= 0)):
                scales = tl.where(limited, 1.0, scales)
                goal = tl.where(limited, top_k.to(tl.float32), mass * top_p)
                low, high = _bounds(levels + row * PARTS * LEVELS, tops, scales, goal, heat, peak, PARTS,
                                    PARTS_BLOCK, LEVELS, DEPTH)  # fmt: skip
            token = _invert_kept(
                own, peaks, collected + row * LOT, vocab, mass, floor, low, high, peak, rate, top_k, top_p,
                min_p, fraction, LOT, PART, HALVINGS,
            )  # fmt: skip
        else:
            goal = mass * fraction
            last = tl.max(tl.where(sums > 0, part, 0), 0)
            chosen = tl.min(tl.where((sums > 0) & (until > goal), part, last), 0)
            passed = tl.max(tl.where((sums > 0) & (part < chosen), until, 0.0), 0)
            top = tl.load(peaks + chosen)
            goal = (goal - passed) / tl.exp2((top - peak) * rate)
            token = _invert_part(own, vocab, chosen, top, rate, goal, PART)
    slot = tl.load(row_inputs + TO).to(tl.int64)
    tl.store(out + row, token.to(tl.int64))
    tl.store(drawn + slot, token.to(tl.int64))
    _, _, _, penalised = _penalties(settings)
    if penalised & (token >= 0):
        times = tl.load(seen + slot * vocab + token)
        tl.store(seen + slot * vocab + token, tl.where(times <= MOST_SEEN, times + 2, times))


def draw(logits: Tensor, inputs: Tensor, drawn: Tensor, seen: Tensor) -> Tensor:
    """Sample the next token of each row of `logits` (float32 [B, vocab], consumed) by its row of `inputs`.

    Returns int64 [B], with -1 where the logits are not finite. Each token is also written to `drawn`, by
    slot, and with penalties counted in `seen` (int16 [slots, vocab]). At temperature 0 it is the first of
    those with the largest logit.
    """
    count, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    peaks, masses, levels = (logits.new_empty(count, parts, size) for size in (1, 1, LEVELS))
    lot = min(LOT, pow2(vocab, 32))
    columns, collected = (
        torch.empty((count, size), dtype=torch.int32, device=logits.device) for size in (parts, lot)
    )
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    settings = inputs.view(torch.float32)
    _penalise_and_sum_parts[(count, parts)](
        logits, peaks, columns, masses, levels, inputs, settings, seen, vocab,
        ORDER=ORDER, PARTS=parts, PART=PART, LEVELS=LEVELS, num_warps=4, **OPTIONS,
    )  # fmt: skip
    _draw[(count,)](
        logits, peaks, columns, masses, levels, collected, inputs, settings, drawn, seen, out, vocab,
        ORDER=ORDER, PART=PART, PARTS=parts, PARTS_BLOCK=pow2(parts), LEVELS=LEVELS, DEPTH=DEPTH, LOT=lot,
        HALVINGS=HALVINGS, FAR=FAR, maxnreg=128, num_warps=min(max(lot // 1024, 1), 32), **OPTIONS,
    )  # fmt: skip
    return out
