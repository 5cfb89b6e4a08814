"""Runs plans on a real model: plan -> flat arrays -> decoder -> sampler.

CPU and CUDA differ in the kernels table alone. It reads sequences and never changes one but for its place in
the block tables (`tabled`), and it knows nothing of queues, time or text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stretto.engine.runners.sampler import Sampler
from stretto.engine.scheduler.types import Plan, Row
from stretto.engine.sequence import Drawn
from stretto.engine.speculative.policy import Speculation
from stretto.kernels import Batch
from stretto.models.decoder import Decoder
from stretto.types import ModelInfo


@dataclass(frozen=True, slots=True)
class Done:
    """A step whose results are already here: on the CPU launching is running."""

    drawn: list[Drawn]

    def wait(self) -> list[Drawn]:
        return self.drawn


class TorchRunner:
    """One decoder and its KV cache. `eos` are the tokens that end an answer; `speculation` guesses at
    answers, None: it does not."""

    depth = 0
    speculation: Speculation | None = None

    def __init__(self, decoder: Decoder, info: ModelInfo, *, eos: frozenset[int], max_running: int) -> None:
        self.info = info
        self.eos = eos
        self.decoder = decoder
        self._cache = decoder.new_cache(info.blocks, info.block_size)
        self._sampler = Sampler(info.vocab, eos, torch.device(info.device))
        self._tables = np.zeros((max_running, -(-info.context // info.block_size)), dtype=np.int32)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Done:
        """Run the plan. One result for each row that draws, in the plan's order."""
        drawing = [row for row in plan.rows if row.draw]
        hidden = self.decoder.forward(self.batch(plan.rows), self._cache)
        spoken = [row for row in drawing if row.seq.request.task == "generate"]
        if len(spoken) == len(drawing):
            return Done(self._draw(hidden, spoken))
        texts = iter(self._draw(hidden[_of("generate", drawing)], spoken))
        vectors = iter(hidden[_of("embed", drawing)])
        return Done(
            [
                next(texts) if row.seq.request.task == "generate" else _embedding(next(vectors))
                for row in drawing
            ]
        )

    def erase(self, blocks: list[int]) -> None:
        """Zero the KV memory of these blocks, a drafter's of them too."""
        self._cache.erase(blocks)
        if self.speculation is not None and self.speculation.drafter is not None:
            self.speculation.drafter.erase(blocks)

    def _draw(self, hidden: Tensor, rows: list[Row]) -> list[Drawn]:
        """What the rows draw from their hidden states, one and one more for each guess."""
        if not rows:
            return []
        drafts = [row.draft for row in rows]
        return self._sampler(self.decoder.logits(hidden), [row.seq for row in rows], drafts)

    def batch(self, rows: list[Row]) -> Batch:
        """The plan as the flat arrays that kernels read."""
        size, sequences = self.info.block_size, len(rows)
        counts = [row.count for row in rows]
        contexts = [row.start + row.count for row in rows]
        starts = np.zeros(sequences + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        tokens: list[int] = []
        outputs: list[int] = []
        for row, start in zip(rows, starts[1:].tolist(), strict=True):
            self._enter(row)
            tokens += row.seq.tokens[row.start : row.start + row.count]
            tokens += row.draft[max(row.start - len(row.seq.tokens), 0) :]
            if row.draw:
                outputs += range(start - 1 - len(row.draft), start)
        places = np.array([row.seq.slot for row in rows])
        firsts = np.array([row.start for row in rows]) - starts[:-1]  # position less index among all tokens
        positions = np.repeat(firsts, counts) + np.arange(len(tokens))
        blocks = self._tables[np.repeat(places, counts), positions // size].astype(np.int64)
        return Batch(
            tokens=torch.from_numpy(np.array(tokens)),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(blocks * size + positions % size),
            query_starts=torch.from_numpy(starts),
            contexts=torch.from_numpy(np.array(contexts, dtype=np.int32)),
            tables=torch.from_numpy(self._tables[places, : -(-max(contexts) // size)]),
            outputs=torch.from_numpy(np.array(outputs, dtype=np.int64)),
            query_lens=counts,
            context_lens=contexts,
        )

    def _enter(self, row: Row) -> None:
        """Write the blocks a sequence has got since its last step into its row of the tables."""
        seq = row.seq
        if seq.tabled < len(seq.blocks):
            self._tables[seq.slot, seq.tabled : len(seq.blocks)] = seq.blocks[seq.tabled :]
            seq.tabled = len(seq.blocks)


def _of(task: str, rows: list[Row]) -> Tensor:
    """Which hidden states belong to rows of this task, bool."""
    return torch.tensor([row.seq.request.task == task for row in rows for _ in range(1 + len(row.draft))])


def _embedding(hidden: Tensor) -> Drawn:
    vector = torch.nn.functional.normalize(hidden.float(), dim=0)
    return Drawn(-1, embedding=tuple(vector.tolist()))
