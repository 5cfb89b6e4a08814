"""The two ends of a step that the host does not wait for: what it reads is laid out, what follows is drawn.

A row of orders says all the host knows of a sequence's step; the token to read may be known to the device
alone. A draw inverts the cumulative sum, in the vocabulary's order, over the tokens that top_k, top_p and
min_p leave; their least logit is found by bisection, and tokens as likely as the last one kept are kept too.
"""
# Triton's kernels are no Python a type checker knows.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportPrivateImportUsage=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels import Batch
from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait

SLOT, POSITION, TOKEN, BLOCK, TOP_K = range(5)
TEMPERATURE, TOP_P, MIN_P, FRACTION, REPETITION, FREQUENCY, PRESENCE = range(5, 12)
ORDER = 12
"""Numbers of 32 bits in an order; those from TEMPERATURE on are float32."""
IN_PROMPT, IN_OUTPUT = 1, 2
"""What a history counts for a token: 1 if the prompt has it, and 2 each time it was drawn."""
MOST_SEEN = tl.constexpr(2**15 - 4)

PART = 2048
LOT = 32768
HALVINGS = 26
FAR = 100.0  # a weight of exp(-FAR) is none


@triton.jit(do_not_specialize=["count"])
def _move(source, target, count, BLOCK: tl.constexpr):
    release()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait()
    tl.store(target + place, tl.load(source + place, place < count), place < count)


def move(source: Tensor, target: Tensor) -> None:
    """Copy between the device and pinned memory, in the stream's order. It is a kernel, because those before
    and after it would wait longer for an engine that copies."""
    count = source.numel()
    _move[(triton.cdiv(count, 256),)](source, target, count, BLOCK=256, num_warps=2, **OPTIONS)


@triton.jit
def _read(
    orders, drawn, tables, tokens, positions, slots, contexts, own_tables, table_stride, own_stride,
    ORDER: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    release()
    row = tl.program_id(0).to(tl.int64)
    wait()
    order = orders + row * ORDER
    slot, position = tl.load(order).to(tl.int64), tl.load(order + 1)
    token, block = tl.load(order + 2).to(tl.int64), tl.load(order + 3)
    if token < 0:
        token = tl.maximum(tl.load(drawn + slot), 0)
    tl.store(tokens + row, token)
    tl.store(positions + row, position.to(tl.int64))
    tl.store(slots + row, block.to(tl.int64) * SIZE + position % SIZE)
    tl.store(contexts + row, position + 1)
    last = position // SIZE
    tl.store(tables + slot * table_stride + last, block)
    for start in range(0, last + 1, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(tables + slot * table_stride + column, column < last, 0)
        value = tl.where(column == last, block, value)
        tl.store(own_tables + row * own_stride + column, value, column <= last)


def read(orders: Tensor, drawn: Tensor, tables: Tensor, batch: Batch, block_size: int) -> None:
    """Lay out a step of one token per sequence in `batch`: `orders` int32 [B, ORDER]; `drawn` int64 and
    `tables` int32 by slot, where the newest block is entered. A TOKEN below zero is in `drawn`."""
    _read[(orders.shape[0],)](
        orders, drawn, tables, batch.tokens, batch.positions, batch.slots, batch.contexts, batch.tables,
        tables.stride(0), batch.tables.stride(0), ORDER=ORDER, SIZE=block_size, COLUMNS=512, **OPTIONS,
    )  # fmt: skip


@triton.jit
def _penalties(asked):
    """Repetition, frequency and presence penalty of an order, and whether any changes anything."""
    repetition, frequency, presence = tl.load(asked + 4), tl.load(asked + 5), tl.load(asked + 6)
    return repetition, frequency, presence, (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)


@triton.jit
def _survey(
    logits, peaks, places, orders, asked, seen, vocab, ORDER: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """The greatest of a part of a row, and the first place that has it; NaN counts as infinite. Logits of
    tokens in the row's history are changed first, as its penalties ask."""
    release()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * PART + tl.arange(0, PART)
    wait()
    spot = logits + row * vocab + column
    value = tl.load(spot, column < vocab, -float("inf"))
    repetition, frequency, presence, penalised = _penalties(asked + row * ORDER + 5)
    if penalised:
        slot = tl.load(orders + row * ORDER).to(tl.int64)
        times = tl.load(seen + slot * vocab + column, column < vocab, 0).to(tl.int32)
        changed = tl.where(value > 0, value / repetition, value * repetition)
        drawn = times // 2
        changed -= frequency * drawn.to(tl.float32) + tl.where(drawn > 0, presence, 0.0)
        value = tl.where(times > 0, changed, value)
        tl.store(spot, value, column < vocab)
    value = tl.where(value == value, value, float("inf"))
    peak = tl.max(value, 0)
    tl.store(peaks + row * PARTS + part, peak)
    tl.store(places + row * PARTS + part, tl.min(tl.where(value == peak, column, vocab), 0))


@triton.jit
def _mass(logits, vocab, floor, peak, heat, LOT: tl.constexpr):
    """How many logits of a row are at least `floor`, and the sum of their weights."""
    count = 0
    mass = 0.0
    for start in range(0, vocab, LOT):
        column = start + tl.arange(0, LOT)
        value = tl.load(logits + column, column < vocab, -float("inf"))
        kept = value >= floor
        count += tl.sum(kept.to(tl.int32), 0)
        mass += tl.sum(tl.where(kept, tl.exp((value - peak) / heat), 0.0), 0)
    return count, mass


@triton.jit
def _floor(logits, vocab, low, peak, heat, least, share, HALVINGS: tl.constexpr, LOT: tl.constexpr):
    """The greatest floor from `low` on that leaves `least` logits and a mass of `share`."""
    high = peak
    for _ in range(HALVINGS):
        middle = low + (high - low) * 0.5
        count, mass = _mass(logits, vocab, middle, peak, heat, LOT)
        if (count >= least) & (mass >= share):
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _draw(
    logits, peaks, places, orders, asked, drawn, seen, out, vocab,
    ORDER: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, LOT: tl.constexpr,
    HALVINGS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    release()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_BLOCK)
    wait()
    tops = tl.load(peaks + row * PARTS + part, part < PARTS, -float("inf"))
    peak = tl.max(tops, 0)
    token = tl.min(
        tl.where(tops == peak, tl.load(places + row * PARTS + part, part < PARTS, vocab), vocab), 0
    )
    order, asked = orders + row * ORDER, asked + row * ORDER + 5
    heat = tl.load(asked)
    sound = (peak < float("inf")) & (peak > -float("inf"))
    token = tl.where(sound, token, -1)
    if sound & (heat > 0):
        top_k, top_p, min_p = tl.load(order + 4), tl.load(asked + 1), tl.load(asked + 2)
        own = logits + row * vocab
        floor = peak - FAR * heat
        if min_p > 0:
            floor = tl.maximum(floor, peak + tl.log(min_p) * heat)
        if (top_k > 0) & (top_k < vocab):
            floor = _floor(own, vocab, floor, peak, heat, top_k, 0.0, HALVINGS, LOT)
        _, mass = _mass(own, vocab, floor, peak, heat, LOT)
        if top_p < 1:
            floor = _floor(own, vocab, floor, peak, heat, 0, mass * top_p, HALVINGS, LOT)
            _, mass = _mass(own, vocab, floor, peak, heat, LOT)
        goal = mass * tl.load(asked + 3)
        before = 0
        passed = 0.0
        for start in range(0, vocab, LOT):
            column = start + tl.arange(0, LOT)
            value = tl.load(own + column, column < vocab, -float("inf"))
            weights = tl.where(value >= floor, tl.exp((value - peak) / heat), 0.0)
            until = passed + tl.cumsum(weights, 0)
            before += tl.sum(((until <= goal) & (column < vocab)).to(tl.int32), 0)
            passed += tl.sum(weights, 0)
        # Rounding may leave nothing after the goal: then the likeliest is it.
        token = tl.where(before < vocab, before, token)
    slot = tl.load(order).to(tl.int64)
    tl.store(out + row, token.to(tl.int64))
    tl.store(drawn + slot, token.to(tl.int64))
    _, _, _, penalised = _penalties(asked)
    if penalised & (token >= 0):
        times = tl.load(seen + slot * vocab + token)
        tl.store(seen + slot * vocab + token, tl.where(times <= MOST_SEEN, times + 2, times))


def draw(logits: Tensor, orders: Tensor, drawn: Tensor, seen: Tensor) -> Tensor:
    """The next token of each row of `logits` (float32 [B, vocab], consumed) by its order, int64 [B]; -1 where
    they are not numbers. Each is also noted in `drawn`, by slot, and with penalties in the histories `seen`
    (int16 [slots, vocab]). At temperature 0 it is the first of the greatest."""
    count, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    peaks = logits.new_empty(count, parts)
    places = torch.empty((count, parts), dtype=torch.int32, device=logits.device)
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    asked = orders.view(torch.float32)
    _survey[(count, parts)](
        logits, peaks, places, orders, asked, seen, vocab,
        ORDER=ORDER, PARTS=parts, PART=PART, num_warps=4, **OPTIONS,
    )  # fmt: skip
    lot = min(LOT, pow2(vocab))
    _draw[(count,)](
        logits, peaks, places, orders, asked, drawn, seen, out, vocab,
        ORDER=ORDER, PARTS=parts, PARTS_BLOCK=pow2(parts), LOT=lot, HALVINGS=HALVINGS, FAR=FAR,
        num_warps=min(max(lot // 1024, 1), 32), **OPTIONS,
    )  # fmt: skip
    return out
