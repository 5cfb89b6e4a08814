"""The input of a step on the device, so that the host need not wait for the last one.

A row of inputs holds what the host knows of one sequence's step. The token to read may be known to the device
alone. Kernels, and not the copy engine, move the rows and make the batch that the layers read from them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels import Batch
from stretto.kernels.cuda.launch import OPTIONS, release, wait

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
