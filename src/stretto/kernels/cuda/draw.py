"""The input of a step and the sampling of its tokens, both on the device, so that the host need not wait.

A row of inputs holds what the host knows of one sequence's step; the token to read may be known to the device
alone. Sampling inverts the cumulative sum, in the vocabulary's order, over the tokens that top_k, top_p and
min_p keep. Their smallest logit is found by bisection; tokens as likely as the last one kept are kept too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels import Batch
from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait

SLOT, POSITION, TOKEN, BLOCK, TOP_K, SINK, COUNT, FIRST = range(8)
TEMPERATURE, TOP_P, MIN_P, FRACTION, REPETITION, FREQUENCY, PRESENCE = range(8, 15)
AHEAD = 15
ORDER = 16
"""How many numbers of 32 bits a row of inputs has. They are float32 from TEMPERATURE to PRESENCE, the others
int32. Row tables and tokens are read by SLOT; the drawn token is written by SINK, which is another slot where
none is wanted. A row has COUNT tokens from POSITION on; the first is number FIRST of the step. The step
computes AHEAD tokens before them, in rows of the same sequence."""
SETTINGS = tl.constexpr(TEMPERATURE)
TO = tl.constexpr(SINK)
BEFORE = tl.constexpr(AHEAD)
IN_PROMPT, IN_OUTPUT = 1, 2
"""What a token's count is made of: 1 if the prompt has it, and 2 for each time it was sampled."""
MOST_SEEN = tl.constexpr(2**15 - 4)

PART = 2048
LOT = 8192
HALVINGS = 26
FAR = 100.0  # exp(-FAR) is too small a weight to matter
LOG2_E = tl.constexpr(1.4426950408889634)
COLDEST = tl.constexpr(1e-30)


@triton.jit(do_not_specialize=["count"])
def _move(source, target, count, BLOCK: tl.constexpr):
    release()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait()
    tl.store(target + place, tl.load(source + place, place < count), place < count)


def move(source: Tensor, target: Tensor) -> None:
    """Copy between the device and pinned memory, in the stream's order. A kernel does it, because the kernels
    before and after would wait longer for a copy engine."""
    count = source.numel()
    _move[(triton.cdiv(count, 256),)](source, target, count, BLOCK=256, num_warps=2, **OPTIONS)


@triton.jit
def _fill_batch(
    inputs, drawn, tables, tokens, positions, slots, contexts, written, own_tables, table_stride, own_stride,
    ORDER: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    release()
    row = tl.program_id(0).to(tl.int64)
    wait()
    row_inputs = inputs + row * ORDER
    slot, position = tl.load(row_inputs).to(tl.int64), tl.load(row_inputs + 1)
    token, block = tl.load(row_inputs + 2).to(tl.int64), tl.load(row_inputs + 3)
    if token < 0:
        token = tl.maximum(tl.load(drawn + slot), 0)
    tl.store(tokens + row, token)
    tl.store(positions + row, position.to(tl.int64))
    tl.store(slots + row, block.to(tl.int64) * SIZE + position % SIZE)
    tl.store(contexts + row, position + 1)
    tl.store(written + row, position - tl.load(row_inputs + BEFORE))
    last = position // SIZE
    tl.store(tables + slot * table_stride + last, block)
    for start in range(0, last + 1, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(tables + slot * table_stride + column, column < last, 0)
        value = tl.where(column == last, block, value)
        tl.store(own_tables + row * own_stride + column, value, column <= last)


def read(inputs: Tensor, drawn: Tensor, tables: Tensor, batch: Batch, block_size: int) -> None:
    """Fill `batch`, which has `written`, for a step of one token per row.

    `inputs`: int32 [B, ORDER]. `drawn` (int64, the last token) and `tables` (int32, the blocks) are indexed
    by slot; the newest block is added to `tables`. A TOKEN below zero is read from `drawn`. Of a sequence
    with several rows, `tables` must hold all blocks.
    """
    assert batch.written is not None, "rows of one sequence must know of each other"
    _fill_batch[(inputs.shape[0],)](
        inputs, drawn, tables, batch.tokens, batch.positions, batch.slots, batch.contexts, batch.written,
        batch.tables, tables.stride(0), batch.tables.stride(0),
        ORDER=ORDER, SIZE=block_size, COLUMNS=512, **OPTIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["padding"])
def _fill_mixed(
    inputs, ids, drawn, tables, tokens, positions, slots, starts, contexts, outputs, own_tables,
    table_stride, own_stride, padding,
    ORDER: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    release()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wait()
    row_inputs = inputs + row * ORDER
    slot, position = tl.load(row_inputs).to(tl.int64), tl.load(row_inputs + 1)
    count, first = tl.load(row_inputs + 6), tl.load(row_inputs + 7)
    real = slot != padding
    place = part * TOKENS + tl.arange(0, TOKENS)
    inside = place < count
    at = tl.where(real, position + place, 0)
    token = tl.load(ids + first + place, place < tl.where(real, count, 0), 0).to(tl.int64)
    newest = tl.maximum(tl.load(drawn + slot), 0)
    block = tl.load(tables + slot * table_stride + at // SIZE, inside, 0).to(tl.int64)
    tl.store(tokens + first + place, tl.where(token < 0, newest, token), inside)
    tl.store(positions + first + place, at.to(tl.int64), inside)
    tl.store(slots + first + place, block * SIZE + at % SIZE, inside)
    if part == 0:
        context = tl.where(real, position + count, 1)
        tl.store(starts + row, first)
        tl.store(contexts + row, context)
        tl.store(outputs + row, tl.maximum(first + count - 1, 0).to(tl.int64))
        columns = tl.cdiv(context, SIZE)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            value = tl.load(tables + slot * table_stride + column, column < columns, 0)
            tl.store(own_tables + row * own_stride + column, value, column < columns)


def read_mixed(
    inputs: Tensor, ids: Tensor, drawn: Tensor, tables: Tensor, outputs: Tensor, batch: Batch, block_size: int
) -> None:
    """Fill `batch` for a step in which each sequence has any number of tokens.

    `inputs`: int32 [S, ORDER]. Its rows in the last slot are padding, and attend to one key only. `ids`:
    int32 [T], the tokens; one below zero is read from `drawn`. `outputs`: int64 [S], gets the last token of
    each row. `tables` must hold all blocks.
    """
    rows, tokens = inputs.shape[0], ids.shape[0]
    _fill_mixed[(rows, triton.cdiv(tokens, 512))](
        inputs, ids, drawn, tables, batch.tokens, batch.positions, batch.slots, batch.query_starts,
        batch.contexts, outputs, batch.tables, tables.stride(0), batch.tables.stride(0), tables.shape[0] - 1,
        ORDER=ORDER, SIZE=block_size, COLUMNS=512, TOKENS=512, **OPTIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _write_tables(updates, tables, count, stride, BLOCK: tl.constexpr):
    release()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    wait()
    slot = tl.load(updates + 3 * place, inside, 0).to(tl.int64)
    column, block = tl.load(updates + 3 * place + 1, inside, 0), tl.load(updates + 3 * place + 2, inside, 0)
    tl.store(tables + slot * stride + column, block, inside)


def write_tables(updates: Tensor, tables: Tensor) -> None:
    """Write blocks into `tables` (int32, by slot). `updates`: int32 [N, 3], a slot, a column and a block."""
    count = updates.shape[0]
    _write_tables[(triton.cdiv(count, 256),)](
        updates, tables, count, tables.stride(0), BLOCK=256, num_warps=2, **OPTIONS
    )


@triton.jit
def _penalties(settings):
    """Repetition, frequency and presence penalty of a row of inputs, and whether any of them has
    an effect."""
    repetition, frequency, presence = tl.load(settings + 4), tl.load(settings + 5), tl.load(settings + 6)
    return repetition, frequency, presence, (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)


@triton.jit
def _penalise_and_sum_parts(
    logits, peaks, columns, masses, inputs, settings, seen, vocab, ORDER: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """The largest logit of a part of a row, and its first column; NaN counts as infinite. Above temperature
    0 also the sum of exp((logit - peak) / temperature), with the peak of the part. Penalties are applied
    first, to the logits of tokens that have a count."""
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
    tl.store(peaks + row * PARTS + part, peak)
    tl.store(columns + row * PARTS + part, tl.min(tl.where(value == peak, column, vocab), 0))
    if heat > 0:
        sound = (peak < float("inf")) & (peak > -float("inf"))
        weights = tl.exp2((value - tl.where(sound, peak, 0.0)) * (LOG2_E / tl.maximum(heat, COLDEST)))
        tl.store(masses + row * PARTS + part, tl.where(sound, tl.sum(weights, 0), 0.0))


@triton.jit
def _reaches(peaks, start, vocab, floor, LOT: tl.constexpr, PART: tl.constexpr):
    """Whether any of LOT logits from column `start` is at least `floor`. `peaks`: of the parts of the row."""
    part = start // PART + tl.arange(0, LOT // PART if LOT > PART else 1)
    return tl.max(tl.load(peaks + part, part * PART < vocab, -float("inf")), 0) >= floor


@triton.jit
def _mass(logits, peaks, vocab, floor, peak, rate, LOT: tl.constexpr, PART: tl.constexpr):
    """How many logits of a row are at least `floor`, and the sum of their weights."""
    count = 0
    mass = 0.0
    for start in range(0, vocab, LOT):
        if _reaches(peaks, start, vocab, floor, LOT, PART):
            column = start + tl.arange(0, LOT)
            value = tl.load(logits + column, column < vocab, -float("inf"))
            kept = value >= floor
            count += tl.sum(kept.to(tl.int32), 0)
            mass += tl.sum(tl.where(kept, tl.exp2((value - peak) * rate), 0.0), 0)
    return count, mass


@triton.jit
def _floor(
    logits, peaks, vocab, low, peak, rate, minimum, share,
    LOT: tl.constexpr, PART: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """The largest floor, from `low` up, that keeps `minimum` logits and a mass of `share`."""
    high = peak
    for _ in range(HALVINGS):
        middle = low + (high - low) * 0.5
        count, mass = _mass(logits, peaks, vocab, middle, peak, rate, LOT, PART)
        if (count >= minimum) & (mass >= share):
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _invert_kept(
    logits, peaks, vocab, mass, peak, heat, rate, top_k, top_p, min_p, fraction,
    LOT: tl.constexpr, PART: tl.constexpr, HALVINGS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """The token at which the cumulative sum of what top_k, top_p and min_p keep of a row passes `fraction`
    of it; vocab if rounding leaves none. `mass`: the sum of all weights. A lot without a peak as high as the
    floor is not read, and where few tokens are likely, few other lots are left soon."""
    floor = peak - FAR * heat
    limited = (top_k > 0) & (top_k < vocab)
    if min_p > 0:
        floor = tl.maximum(floor, peak + tl.log(min_p) * heat)
    if limited:
        floor = _floor(logits, peaks, vocab, floor, peak, rate, top_k, 0.0, LOT, PART, HALVINGS)
    if (min_p > 0) | limited:
        _, mass = _mass(logits, peaks, vocab, floor, peak, rate, LOT, PART)
    if top_p < 1:
        floor = _floor(logits, peaks, vocab, floor, peak, rate, 0, mass * top_p, LOT, PART, HALVINGS)
        _, mass = _mass(logits, peaks, vocab, floor, peak, rate, LOT, PART)
    goal = mass * fraction
    token = vocab
    passed = 0.0
    for start in range(0, vocab, LOT):
        if _reaches(peaks, start, vocab, floor, LOT, PART):
            column = start + tl.arange(0, LOT)
            value = tl.load(logits + column, column < vocab, -float("inf"))
            weights = tl.where(value >= floor, tl.exp2((value - peak) * rate), 0.0)
            until = passed + tl.cumsum(weights, 0)
            token = tl.minimum(token, tl.min(tl.where((weights > 0) & (until > goal), column, vocab), 0))
            passed += tl.sum(weights, 0)
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
    logits, peaks, columns, masses, inputs, settings, drawn, seen, out, vocab,
    ORDER: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    LOT: tl.constexpr, HALVINGS: tl.constexpr, FAR: tl.constexpr,
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
        sums *= tl.exp2((tops - peak) * rate)
        until = tl.cumsum(sums, 0)
        mass = tl.max(until, 0)
        if (min_p > 0) | (top_p < 1) | ((top_k > 0) & (top_k < vocab)):
            kept = _invert_kept(
                own, peaks, vocab, mass, peak, heat, rate, top_k, top_p, min_p, fraction, LOT, PART, HALVINGS,
                FAR,
            )  # fmt: skip
            token = tl.where(kept < vocab, kept, token)
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
    peaks, masses = logits.new_empty(count, parts), logits.new_empty(count, parts)
    columns = torch.empty((count, parts), dtype=torch.int32, device=logits.device)
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    settings = inputs.view(torch.float32)
    _penalise_and_sum_parts[(count, parts)](
        logits, peaks, columns, masses, inputs, settings, seen, vocab,
        ORDER=ORDER, PARTS=parts, PART=PART, num_warps=4, **OPTIONS,
    )  # fmt: skip
    lot = min(LOT, pow2(vocab))
    _draw[(count,)](
        logits, peaks, columns, masses, inputs, settings, drawn, seen, out, vocab,
        ORDER=ORDER, PART=PART, PARTS=parts, PARTS_BLOCK=pow2(parts), LOT=lot, HALVINGS=HALVINGS, FAR=FAR,
        num_warps=min(max(lot // 1024, 1), 32), **OPTIONS,
    )  # fmt: skip
    return out
