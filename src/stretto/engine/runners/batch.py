"""Turns the rows of a plan into the flat arrays that kernels read, on the host.

It owns the block tables of the running sequences. It knows no tensor on a device and no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stretto.engine.scheduler.types import Row
from stretto.engine.sequence import Sequence
from stretto.kernels import Batch


@dataclass(frozen=True, slots=True)
class BatchArrays:
    """The fields of `stretto.kernels.Batch` as numpy arrays, with the same shapes and types.

    `by_token` is int64 [3, T]: token ids, positions and KV slots. `unknown` lists tokens that are still being
    drawn, as pairs of an index into T and the sequence's slot. Their token id here is 0.
    """

    by_token: NDArray[np.int64]
    query_starts: NDArray[np.int32]
    contexts: NDArray[np.int32]
    tables: NDArray[np.int32]
    outputs: NDArray[np.int64]
    query_lens: list[int]
    context_lens: list[int]
    unknown: list[tuple[int, int]]

    def to_batch(self, send: Callable[[NDArray[Any]], Tensor]) -> Batch:
        """The batch on a device. `send` copies one array there."""
        tokens, positions, slots = send(self.by_token)
        return Batch(
            tokens=tokens,
            positions=positions,
            slots=slots,
            query_starts=send(self.query_starts),
            contexts=send(self.contexts),
            tables=send(self.tables),
            outputs=send(self.outputs),
            query_lens=self.query_lens,
            context_lens=self.context_lens,
        )


class BatchBuilder:
    """Builds batches for one model. Its block tables are int32 [max_running, blocks of a full context].

    A row of the tables belongs to a slot. `_written` holds for each slot the sequence whose blocks are there,
    its number of preemptions at that time, and how many of the blocks are still valid.
    """

    def __init__(self, *, max_running: int, context: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((max_running, -(-context // block_size)), dtype=np.int32)
        self._written: dict[int, tuple[Sequence, int, int]] = {}

    def build(self, rows: list[Row]) -> BatchArrays:
        """The arrays for these rows: T tokens of S rows, those of a row next to each other."""
        size = self._block_size
        counts = [row.count for row in rows]
        contexts = [row.start + row.count for row in rows]
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        tokens: list[int] = []
        outputs: list[int] = []
        unknown: list[tuple[int, int]] = []
        for row, end in zip(rows, starts[1:].tolist(), strict=True):
            self._update_table(row)
            tokens += row.seq.tokens[row.start : row.start + row.count]
            tokens += row.draft[max(row.start - len(row.seq.tokens), 0) :]
            if len(tokens) < end:
                unknown.append((end - 1, row.seq.slot))
                tokens.append(0)
            if row.scored:
                first = end - row.count - row.start
                outputs += [first + position for position in row.positions_scored]
            if row.draw:
                outputs += range(end - 1 - len(row.draft), end)
        table_rows = np.array([row.seq.slot for row in rows])
        firsts = np.array([row.start for row in rows]) - starts[:-1]  # position less index among all tokens
        positions = np.repeat(firsts, counts) + np.arange(len(tokens))
        blocks = self._tables[np.repeat(table_rows, counts), positions // size].astype(np.int64)
        return BatchArrays(
            by_token=np.array([tokens, positions, blocks * size + positions % size], dtype=np.int64),
            query_starts=starts,
            contexts=np.array(contexts, dtype=np.int32),
            tables=self._tables[table_rows, : -(-max(contexts) // size)],
            outputs=np.array(outputs, dtype=np.int64),
            query_lens=counts,
            context_lens=contexts,
            unknown=unknown,
        )

    def _update_table(self, row: Row) -> None:
        """Write the blocks that a sequence has got since its last step into its row of the tables."""
        seq, blocks = row.seq, row.seq.kv.blocks
        owner, preemptions, count = self._written.get(seq.slot, (None, 0, 0))
        if owner is not seq or preemptions != seq.preemptions:
            count = 0
        if count < len(blocks):
            self._tables[seq.slot, count : len(blocks)] = blocks[count:]
        # The blocks of draft tokens are written again next time, because rejection frees them.
        valid = -(-(row.start + row.count - len(row.draft)) // self._block_size)
        self._written[seq.slot] = seq, seq.preemptions, valid
