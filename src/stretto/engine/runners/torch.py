"""Runs plans on the CPU, or on any device step by step: plan -> batch -> decoder -> sampler.

It reads sequences and changes none. It knows no queue, no time and no text.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stretto.engine.runners.batch import BatchBuilder
from stretto.engine.runners.null import Finished
from stretto.engine.runners.sampler import Sampler
from stretto.engine.runners.scores import scored_rows
from stretto.engine.scheduler.types import Plan, Row
from stretto.engine.sequence import Drawn
from stretto.models.decoder import Decoder
from stretto.types import ModelInfo


class TorchRunner:
    """One decoder with its KV cache and sampler. `eos`: the tokens that end an answer.

    `batches` and `decoder` are also used by a draft model, which shares the block tables.
    """

    depth = 0

    def __init__(self, decoder: Decoder, info: ModelInfo, *, eos: frozenset[int], max_running: int) -> None:
        self.info = info
        self.eos = eos
        self.decoder = decoder
        self.batches = BatchBuilder(max_running=max_running, context=info.context, block_size=info.block_size)
        self._cache = decoder.new_cache(info.blocks, info.block_size)
        self._sampler = Sampler(info.vocab, eos, torch.device(info.device))

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Finished:
        """Run the plan. One result for each row that draws or scores, in the plan's order."""
        drawing = [row for row in plan.rows if row.draw]
        scoring = any(row.scored for row in plan.rows)
        batch = self.batches.build(plan.rows).to_batch(torch.as_tensor)
        hidden = self.decoder.forward(batch, self._cache)
        if scoring:
            return Finished(scored_rows(hidden, plan.rows, self.decoder.logits, self._results))
        return Finished(self._results(hidden, drawing))

    def erase(self, blocks: list[int]) -> None:
        """Zero the KV memory of these blocks."""
        self._cache.erase(blocks)

    def prepare(self) -> bool:
        """Nothing: all steps are run alike."""
        return False

    def _results(self, hidden: Tensor, drawing: list[Row]) -> list[Drawn]:
        """One result for each row, from the hidden states of the positions after which they draw."""
        generating = [row for row in drawing if row.seq.request.task == "generate"]
        if len(generating) == len(drawing):
            return self._draw(hidden, generating)
        drawn = iter(self._draw(hidden[_outputs_of("generate", drawing)], generating))
        vectors = iter(hidden[_outputs_of("embed", drawing)])
        return [
            next(drawn) if row.seq.request.task == "generate" else _embedding(next(vectors))
            for row in drawing
        ]

    def _draw(self, hidden: Tensor, rows: list[Row]) -> list[Drawn]:
        """Draw for each row from its hidden states: one, and one more for each draft token."""
        if not rows:
            return []
        drafts = [row.draft for row in rows]
        return self._sampler(self.decoder.logits(hidden), [row.seq for row in rows], drafts)


def _outputs_of(task: str, rows: list[Row]) -> Tensor:
    """Which hidden states belong to rows of this task: bool [outputs]."""
    return torch.tensor([row.seq.request.task == task for row in rows for _ in range(1 + len(row.draft))])


def _embedding(hidden: Tensor) -> Drawn:
    vector = torch.nn.functional.normalize(hidden.float(), dim=0)
    return Drawn(-1, embedding=tuple(np.asarray(vector).tolist()))
