"""Paged attention: `decode` for sequences with one query, `chunk` for those with several.

Heads that share a key are rows of one matrix product. The softmax is computed online (Milakov and Gimelshein
2018, arXiv 1805.02867). `decode` splits a sequence's keys over programs, as Flash-Decoding does (Dao et al.
2023); the last program of a head to finish adds up the parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels import Attention, Batch
from stretto.kernels.cuda.hopper import attention as hopper
from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait
from stretto.kernels.cuda.rows import new_rows

KEYS = 64
MAX_SPLITS = 32
PROGRAMS = 264  # two for each multiprocessor of a Hopper card
MANY_PROGRAMS = 512
CHUNK_ROWS, CHUNK_KEYS, CHUNK_STAGES = 128, 128, 3
SEQUENCES = 512  # `_number_tiles` is compiled once for up to so many sequences
PARTS_AT_ONCE, PARTS_VALUES = 8, 4096  # that a program adds up at once: more would not fit its registers
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _cap(scores, CAP: tl.constexpr):
    if CAP > 0:
        # tanh(y) = 2 sigmoid(2 y) - 1
        scores = CAP * (2.0 * tl.sigmoid(scores * (2.0 / CAP)) - 1.0)
    return scores


@triton.jit
def _scores(queries, keys, scale, CAP: tl.constexpr, EXACT: tl.constexpr):
    """Scaled and capped scores, float32 [rows, keys]; `keys` are transposed."""
    return _cap(tl.dot(queries, keys, input_precision="ieee" if EXACT else "tf32") * scale, CAP)


@triton.jit
def _accumulate(scores, values, high, total, mixed, EXACT: tl.constexpr):
    """Add scores and values to the online softmax -> the new maximum, sum of weights, and weighted sum."""
    top = tl.maximum(high, tl.max(scores, 1))
    # Without a key so far the maximum is -inf, and -inf - -inf would be NaN.
    floor = tl.where(top == -float("inf"), 0.0, top)
    fade = tl.exp(high - floor)
    weights = tl.exp(scores - floor[:, None])
    total = total * fade + tl.sum(weights, 1)
    mixed = mixed * fade[:, None]
    mixed = tl.dot(weights.to(values.dtype), values, acc=mixed, input_precision="ieee" if EXACT else "tf32")
    return top, total, mixed


@triton.jit
def _attend(queries, keys, values, seen, scale, high, total, mixed, CAP: tl.constexpr, EXACT: tl.constexpr):
    """As `_accumulate`, for keys that either all queries see or none does."""
    scores = tl.where(seen[None], _scores(queries, tl.trans(keys), scale, CAP, EXACT), -float("inf"))
    return _accumulate(scores, values, high, total, mixed, EXACT)


@triton.jit
def _combine(
    parts, stats, out, active, SHARE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one sequence's heads that share keys: parts [splits, SHARE, DIM], stats
    [splits, 2, SHARE] (maximum, sum). A thread handles one column of several parts, so that no thread
    waits for another."""
    column = tl.arange(0, WIDTH)
    inside, head = column < SHARE * DIM, column // DIM
    high = tl.full((WIDTH,), -float("inf"), tl.float32)
    total = tl.where(inside, 0.0, 1.0)
    mixed = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, active, PARTS):
        split = start + tl.arange(0, PARTS)[:, None]
        there = (split < active) & inside[None]
        spot = stats + split * 2 * SHARE + head[None]
        highs = tl.load(spot, there, -float("inf"), cache_modifier=".cg")
        totals = tl.load(spot + SHARE, there, 0.0, cache_modifier=".cg")
        values = tl.load(parts + split * SHARE * DIM + column[None], there, 0.0, cache_modifier=".cg")
        top = tl.maximum(high, tl.max(highs, 0))
        floor = tl.where(inside, top, 0.0)
        fade, fades = tl.exp(high - floor), tl.exp(highs - floor[None])
        total = tl.where(inside, total * fade, total) + tl.sum(totals * fades, 0)
        mixed = mixed * fade + tl.sum(values * fades, 0)
        high = top
    tl.store(out + column, (mixed / total).to(out.dtype.element_ty), inside)


@triton.jit
def _arrive(
    stats, parts, arrived, out, split, active, head, high, total, SHARE: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the maxima and sums of a part. The last program to arrive adds up all parts."""
    tl.store(stats + split * 2 * SHARE + head, high, head < SHARE)
    tl.store(stats + split * 2 * SHARE + SHARE + head, total, head < SHARE)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == active - 1:
        _combine(parts, stats, out, active, SHARE, DIM, WIDTH, PARTS)
        tl.store(arrived, 0)


@triton.jit
def _pages(
    pool, further, table, start, oldest, end, dim,
    KV_HEADS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keys and values of one head at the KEYS positions from `start`, and which of them are in
    [oldest, end)."""
    key = start + tl.arange(0, KEYS)
    seen = (key >= oldest) & (key < end)
    block = tl.load(table + key // SIZE, seen, 0).to(tl.int64)
    at = pool + (block * KV_HEADS * SIZE + key % SIZE)[:, None] * DIM + dim[None]
    readable = seen[:, None] & (dim < DIM)[None]
    return tl.load(at, readable, 0.0), tl.load(at + further, readable, 0.0), seen


@triton.jit
def _decode(
    q, layer, tables, starts, contexts, written, out, parts, stats, arrived, q_stride, table_stride, blocks,
    scale,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, SHARE_BLOCK: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
    MIXED: tl.constexpr, REPEATED: tl.constexpr,
):  # fmt: skip
    """One part of the keys of a sequence that has one query, for the heads that share the keys. Only the
    query and the newest key and value come from this step, so all older ones are loaded before `wait`. If
    sequences may be REPEATED, those from number `written` on come from this step too, by other queries of the
    same sequence. They are loaded after `wait`."""
    release()
    seq, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, context = tl.load(starts + seq).to(tl.int64), tl.load(contexts + seq)
    newest = context - 1
    earlier = tl.load(written + seq) if REPEATED else newest
    oldest = tl.maximum(context - WINDOW, 0) if WINDOW else 0
    base = oldest // KEYS * KEYS
    reach = tl.cdiv(tl.cdiv(context - base, KEYS), SPLITS) * KEYS
    active = tl.cdiv(context - base, reach)
    if MIXED:
        wait()  # without one query anywhere, all programs return, and the next kernel must not start before
    if tl.load(starts + seq + 1) - row != 1 or split >= active:
        return
    head, dim, inside = tl.arange(0, SHARE_BLOCK), tl.arange(0, DIM_BLOCK), tl.arange(0, DIM_BLOCK) < DIM
    own = (head < SHARE)[:, None] & inside[None]
    table, pool = tables + seq * table_stride, layer + kv_head.to(tl.int64) * SIZE * DIM
    further = blocks.to(tl.int64) * KV_HEADS * SIZE * DIM
    begin, end = base + split * reach, tl.minimum(base + (split + 1) * reach, newest)
    keys, values, seen = _pages(
        pool, further, table, begin, oldest, tl.minimum(end, earlier), dim, KV_HEADS, SIZE, DIM, KEYS
    )  # fmt: skip
    last = pool + (tl.load(table + newest // SIZE).to(tl.int64) * KV_HEADS * SIZE + newest % SIZE) * DIM + dim
    mine = split == active - 1
    wait()
    queries = tl.load(q + row * q_stride + (kv_head * SHARE + head[:, None]) * DIM + dim[None], own, 0.0)
    new_key, new_value = tl.load(last, inside, 0.0), tl.load(last + further, inside, 0.0)
    score = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None], 1) * scale
    high = tl.where(mine, _cap(score, CAP), -float("inf"))
    total = tl.zeros((SHARE_BLOCK,), tl.float32) + tl.where(mine, 1.0, 0.0)
    mixed = (
        tl.zeros((SHARE_BLOCK, DIM_BLOCK), tl.float32) + tl.where(mine, new_value.to(tl.float32), 0.0)[None]
    )
    high, total, mixed = _attend(queries, keys, values, seen, scale, high, total, mixed, CAP, EXACT)
    following = tl.minimum(begin + KEYS, tl.maximum(begin, earlier)) if REPEATED else begin + KEYS
    for start in range(following, end, KEYS):
        keys, values, seen = _pages(
            pool, further, table, start, oldest, end, dim, KV_HEADS, SIZE, DIM, KEYS
        )  # fmt: skip
        high, total, mixed = _attend(queries, keys, values, seen, scale, high, total, mixed, CAP, EXACT)
    there = out + (row * KV_HEADS + kv_head) * SHARE * DIM
    if active == 1:
        spot = there + head[:, None] * DIM + dim[None]
        tl.store(spot, (mixed / total[:, None]).to(out.dtype.element_ty), own)
        return
    pair = seq * KV_HEADS + kv_head
    parts, stats = parts + pair * SPLITS * SHARE * DIM, stats + pair * SPLITS * SHARE * 2
    tl.store(parts + (split * SHARE + head)[:, None] * DIM + dim[None], mixed, own)
    _arrive(stats, parts, arrived + pair, there, split, active, head, high, total, SHARE, DIM, WIDTH, PARTS)


@triton.jit
def _longer(begins, counts, tiles, keys, TOKENS: tl.constexpr):
    """How many tiles of each sequence read more than so many keys. A tile reads the keys in front of the
    sequence's queries and those up to its own last query."""
    full = tl.maximum(keys - begins, 0) // TOKENS  # tiles of TOKENS queries that do not read more
    return tiles - tl.where(begins + counts <= keys, tiles, tl.minimum(full, tl.maximum(tiles - 1, 0)))


@triton.jit(do_not_specialize=["sequences"])
def _number_tiles(
    starts, contexts, tiles_out, sequences, LEAST: tl.constexpr, TOKENS: tl.constexpr, SEQS: tl.constexpr
):
    """The first row of `number_tiles`, or that of one tile, whose place is the number of longer ones."""
    release()
    each = tl.arange(0, SEQS)
    there = each < sequences
    wait()
    counts = tl.load(starts + 1 + each, there, 0) - tl.load(starts + each, there, 0)
    begins = tl.load(contexts + each, there, 0) - counts
    tiles = tl.where(there & (counts >= LEAST), tl.cdiv(counts, TOKENS), 0)
    own, total = tl.program_id(0) - 1, tl.sum(tiles, 0)
    if own < 0:
        tl.store(tiles_out, total)
    elif own >= total:
        tl.store(tiles_out + 4 * (own + 1), -1)
    else:
        seq = tl.sum((tl.cumsum(tiles, 0) <= own).to(tl.int32), 0)
        token = (own - tl.sum(tl.where(each < seq, tiles, 0), 0)) * TOKENS
        first = tl.load(starts + seq) + token
        left = tl.load(starts + seq + 1) - first
        position = tl.load(contexts + seq) - left
        keys = position + tl.minimum(left, TOKENS)
        longer = _longer(begins, counts, tiles, keys, TOKENS)
        as_long = _longer(begins, counts, tiles, keys - 1, TOKENS) - longer
        place = tl.sum(longer + tl.where(each < seq, as_long, 0), 0)
        spot = tiles_out + 4 * (place + 1)
        tl.store(spot, seq)
        tl.store(spot + 1, first)
        tl.store(spot + 2, left)
        tl.store(spot + 3, position)


@triton.jit
def _chunk_keys(
    queries, position, keys_at, values_at, table, start, oldest, end, dim, scale, high, total, mixed,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    KEYS: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """As `_accumulate`, for those of the KEYS keys from `start` that are in [oldest, end). Without MASKED,
    all queries see all of them."""
    key = start + tl.arange(0, KEYS)
    written = (key >= oldest) & (key < end)
    readable = written[:, None] & (dim < DIM)[None]
    if MASKED:
        block = tl.load(table + key // SIZE, written, 0).to(tl.int64)
    else:
        block = tl.load(table + key // SIZE).to(tl.int64)
    at = (block * STRIDE + key % SIZE * DIM)[:, None] + dim[None]
    if MASKED or dim.shape[0] != DIM:
        keys, values = tl.load(keys_at + at, readable, 0.0), tl.load(values_at + at, readable, 0.0)
    else:
        keys, values = tl.load(keys_at + at), tl.load(values_at + at)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee" if EXACT else "tf32")
    unit = scale * LOG2_E
    if CAP > 0:
        scores = _cap(scores * scale, CAP)
        unit = LOG2_E
    if MASKED:
        seen = written[None] & (key[None] <= position[:, None])
        if WINDOW:
            seen &= key[None] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, -float("inf"))
    top = tl.maximum(high, tl.max(scores, 1) * unit)
    floor = top
    if MASKED:  # without a key so far the maximum is -inf, and -inf - -inf would be NaN
        floor = tl.where(top == -float("inf"), 0.0, top)
    fade = tl.exp2(high - floor)
    weights = tl.exp2(scores * unit - floor[:, None])
    total = total * fade + tl.sum(weights, 1)
    mixed = mixed * fade[:, None]
    mixed = tl.dot(weights.to(values.dtype), values, acc=mixed, input_precision="ieee" if EXACT else "tf32")
    return top, total, mixed


@triton.jit(do_not_specialize=["table_stride"])
def _chunk(
    q, layer, tables, tiles, out, q_stride, table_stride, blocks, scale,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, SHARE_BLOCK: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of TOKENS queries of one sequence, for the heads that share keys. Keys that all queries of the
    tile see need no mask."""
    release()
    kv_head = tl.program_id(1)
    wait()
    spot = tiles + 4 * (tl.program_id(0) + 1)
    seq = tl.load(spot).to(tl.int64)
    if seq < 0:
        return
    first, count, lowest = tl.load(spot + 1), tl.load(spot + 2), tl.load(spot + 3)
    line = tl.arange(0, TOKENS * SHARE_BLOCK)
    token, head = line // SHARE_BLOCK, line % SHARE_BLOCK
    dim = tl.arange(0, DIM_BLOCK)
    own = ((token < count) & (head < SHARE))[:, None] & (dim < DIM)[None]
    rows = (first + token).to(tl.int64)
    lanes = (kv_head * SHARE + head)[:, None] * DIM + dim[None]
    queries = tl.load(q + rows[:, None] * q_stride + lanes, own, 0.0)
    position = lowest + token
    high = tl.full((TOKENS * SHARE_BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((TOKENS * SHARE_BLOCK,), tl.float32)
    mixed = tl.zeros((TOKENS * SHARE_BLOCK, DIM_BLOCK), tl.float32)
    table = tables + seq * table_stride
    keys_at = layer + kv_head * SIZE * DIM
    values_at = keys_at + blocks.to(tl.int64) * KV_HEADS * SIZE * DIM
    end = lowest + tl.minimum(TOKENS, count)
    oldest = tl.maximum(lowest - WINDOW + 1, 0) if WINDOW else 0
    begin = oldest // KEYS * KEYS
    seen_by_all = begin if WINDOW else tl.maximum(lowest + 1, 0) // KEYS * KEYS
    for start in range(begin, seen_by_all, KEYS):
        high, total, mixed = _chunk_keys(
            queries, position, keys_at, values_at, table, start, oldest, end, dim, scale, high, total, mixed,
            SIZE, KV_HEADS * SIZE * DIM, DIM, WINDOW, CAP, KEYS, EXACT, False,
        )  # fmt: skip
    for start in range(seen_by_all, end, KEYS):
        high, total, mixed = _chunk_keys(
            queries, position, keys_at, values_at, table, start, oldest, end, dim, scale, high, total, mixed,
            SIZE, KV_HEADS * SIZE * DIM, DIM, WINDOW, CAP, KEYS, EXACT, True,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # a row that pads the step may see no key
    spot = out + rows[:, None] * (KV_HEADS * SHARE * DIM) + lanes
    tl.store(spot, (mixed / total[:, None]).to(out.dtype.element_ty), own)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """What the programs of one head exchange: `parts` of the weighted sum, `stats` of the softmax, and how
    many programs have `arrived` (int32 zeros, which are zero again afterwards)."""

    splits: int
    parts: Tensor
    stats: Tensor
    arrived: Tensor

    @classmethod
    def of(cls, sequences: int, heads: int, layer: Tensor, arrived: Tensor) -> DecodeWorkspace:
        kv_heads, dim = layer.shape[2], layer.shape[4]
        splits = 1
        while splits < MAX_SPLITS and sequences * kv_heads * splits * 2 <= PROGRAMS:
            splits *= 2
        outputs = torch.empty((sequences, heads, splits, dim), dtype=torch.float32, device=layer.device)
        return cls(splits, outputs, outputs.new_empty((sequences, heads, splits, 2)), arrived)


def decode(q: Tensor, kind: Attention, layer: Tensor, batch: Batch, workspace: DecodeWorkspace) -> Tensor:
    """Attention of the sequences that have one query, [T, heads * head_dim]. The rows of other sequences are
    not written."""
    share = kind.heads // kind.kv_heads
    out, width = new_rows(q, q.shape[0], kind.heads * kind.head_dim), pow2(share * kind.head_dim)
    _decode[(batch.contexts.shape[0], kind.kv_heads, workspace.splits)](
        q, layer, batch.tables, batch.query_starts, batch.contexts,
        batch.contexts if batch.written is None else batch.written, out,
        workspace.parts, workspace.stats, workspace.arrived,
        q.stride(0), batch.tables.stride(0), layer.shape[1], kind.scale,
        KV_HEADS=kind.kv_heads, SHARE=share, SHARE_BLOCK=pow2(share, 16), DIM=kind.head_dim,
        DIM_BLOCK=pow2(kind.head_dim, 16), SIZE=layer.shape[3], WINDOW=kind.window, CAP=kind.softcap,
        SPLITS=workspace.splits, WIDTH=width, PARTS=min(max(PARTS_VALUES // width, 1), PARTS_AT_ONCE),
        KEYS=KEYS if kind.head_dim > 64 else 2 * KEYS,
        EXACT=q.dtype == torch.float32, MIXED=not batch.query_lens or max(batch.query_lens) > 1,
        REPEATED=batch.written is not None,
        num_warps=_decode_warps(kind, batch.contexts.shape[0]),
        num_stages=3 if kind.head_dim <= 128 and q.itemsize == 2 else 1, **OPTIONS,
    )  # fmt: skip
    return out


def _decode_warps(kind: Attention, sequences: int) -> int:
    """Two warps read the keys of wide heads faster than four, if programs are many and share few heads."""
    few = kind.heads // kind.kv_heads <= 4
    return 2 if few and kind.head_dim > 64 and sequences * kind.kv_heads >= MANY_PROGRAMS else 4


def tile_tokens(kind: Attention, itemsize: int) -> int:
    """How many queries of a sequence a program of `chunk` handles."""
    share = pow2(kind.heads // kind.kv_heads)
    tokens = max((64 if _wide(kind, itemsize) else CHUNK_ROWS) // share, 1)
    return max(tokens, pow2(-(-16 // share)))


def _wide(kind: Attention, itemsize: int) -> bool:
    return kind.head_dim > 128 or itemsize > 2


def number_tiles(batch: Batch, tokens: int, least: int) -> Tensor:
    """The tiles of `tokens` queries of the sequences that have `least` or more, int32 [1 + tiles, 4].

    The first row has their number. The others have a tile's sequence or -1, its first row of the step, the
    sequence's queries from there on, and the position of the first. Those that read the most keys come first.
    When only the device knows the sequences, there are as many rows as there may be tiles.
    """
    sequences = batch.contexts.shape[0]
    tiles = sum(-(-count // tokens) for count in batch.query_lens if count >= least)
    if not batch.query_lens:
        tiles = batch.tokens.shape[0] // tokens + sequences
    out = torch.empty((1 + tiles, 4), dtype=torch.int32, device=batch.contexts.device)
    _number_tiles[(1 + tiles,)](
        batch.query_starts,
        batch.contexts,
        out,
        sequences,
        LEAST=least,
        TOKENS=tokens,
        SEQS=pow2(sequences, SEQUENCES),
        **OPTIONS,
    )
    return out


def in_one_launch(kind: Attention, layer: Tensor, sequences: int) -> bool:
    """Whether `chunk` handles sequences with one query too."""
    return hopper.supported(kind, layer) and hopper.keeps_busy(kind, sequences)


def chunk(
    q: Tensor, kind: Attention, layer: Tensor, batch: Batch, tiles: Tensor, out: Tensor | None = None
) -> Tensor:
    """Attention of the sequences that have tiles: `tiles` as `number_tiles` makes them of `tile_tokens`. The
    rows of others in `out` are not changed."""
    if out is None:
        out = new_rows(q, q.shape[0], kind.heads * kind.head_dim)
    if hopper.supported(kind, layer):
        hopper.chunk(q, kind, layer, batch, tiles, out)
        return out
    wide = _wide(kind, q.itemsize)
    _chunk[(tiles.shape[0] - 1, kind.kv_heads)](
        q, layer, batch.tables, tiles, out,
        q.stride(0), batch.tables.stride(0), layer.shape[1], kind.scale,
        KV_HEADS=kind.kv_heads, SHARE=kind.heads // kind.kv_heads,
        SHARE_BLOCK=pow2(kind.heads // kind.kv_heads), DIM=kind.head_dim,
        DIM_BLOCK=pow2(kind.head_dim, 16), SIZE=layer.shape[3], WINDOW=kind.window, CAP=kind.softcap,
        TOKENS=tile_tokens(kind, q.itemsize), KEYS=32 if wide else CHUNK_KEYS,
        EXACT=q.dtype == torch.float32, num_warps=4 if wide else 8,
        num_stages=1 if wide else CHUNK_STAGES, **OPTIONS,
    )  # fmt: skip
    return out
