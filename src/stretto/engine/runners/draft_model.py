"""A draft model: a smaller model that proposes draft tokens for a larger one, the target.

It has its own KV cache with as many blocks as the target's, so both use the same block tables. It draws each
token with the random number that the target will use (`runners.sampler.uniform`), so models with similar
distributions agree at high temperatures too. It ignores grammars.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

import torch

from stretto.engine.runners.sampler import Sampler
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler.types import Row
from stretto.engine.sequence import Sequence
from stretto.engine.step_time import StepLoad, StepTime


class _Read(NamedTuple):
    """What the draft model has read of a sequence: its first `start` tokens, then the tokens of `draft`."""

    seq: Sequence
    preemptions: int
    start: int
    draft: tuple[int, ...]


class DraftModel:
    """The model of the runner `small`, drafting for sequences of the runner `target`.

    `times` is the step-time model of its passes, which keeps learning from them.
    """

    def __init__(self, small: TorchRunner, target: TorchRunner, times: StepTime) -> None:
        self.model = small.info.name
        self.times = times
        self._decoder = small.decoder
        self._batches = target.batches
        self._cache = small.decoder.new_cache(target.info.blocks, target.info.block_size)
        self._sampler = Sampler(target.info.vocab, target.eos, small.decoder.device)
        self._reads: dict[int, _Read] = {}  # by slot

    @property
    def nbytes(self) -> int:
        """The size of its KV cache in bytes."""
        return self._cache.nbytes

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """That many draft tokens for each sequence, in as many passes as the largest count."""
        drafts: dict[Sequence, tuple[int, ...]] = dict.fromkeys(counts, ())
        while unfinished := [seq for seq, count in counts.items() if len(drafts[seq]) < count]:
            rows = [self._next_row(seq, drafts[seq]) for seq in unfinished]
            started = time.monotonic()
            for seq, token in zip(unfinished, self._forward(rows), strict=True):
                self._reads[seq.slot] = _Read(seq, seq.preemptions, len(seq.tokens), drafts[seq])
                drafts[seq] += (token,)
            self._observe(rows, (time.monotonic() - started) * 1e3)
        return drafts

    def read(self, seq: Sequence) -> int:
        """How many tokens of a sequence its KV cache holds: up to the first rejected draft token."""
        last = self._reads.get(seq.slot)
        if last is None or last.seq is not seq or last.preemptions != seq.preemptions:
            return 0
        pairs = zip(last.draft, seq.tokens[last.start :], strict=False)
        return last.start + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def erase(self, blocks: list[int]) -> None:
        """Zero its KV memory of these blocks."""
        self._cache.erase(blocks)

    @torch.inference_mode()
    def _forward(self, rows: list[Row]) -> list[int]:
        """Read the rows and draw the token after each."""
        arrays = self._batches.build(rows)
        ends = arrays.query_starts[1:].astype("int64") - 1
        batch = replace(arrays, outputs=ends).to_batch(torch.as_tensor)
        logits = self._decoder.logits(self._decoder.forward(batch, self._cache))
        return self._sampler.draft(logits, [(row.seq, row.draft) for row in rows])

    def _next_row(self, seq: Sequence, draft: tuple[int, ...]) -> Row:
        """What the model reads before its next draft token: all tokens that it has not read."""
        start = len(seq.tokens) + len(draft) - 1 if draft else min(self.read(seq), len(seq.tokens) - 1)
        return Row(seq, start, len(seq.tokens) + len(draft) - start, False, draft)

    def _observe(self, rows: list[Row], ms: float) -> None:
        """Update the step-time model, unless the pass also read tokens of a prompt."""
        if all(row.count == 1 for row in rows):
            self.times.observe(StepLoad(len(rows), 0, sum(row.start + 1 for row in rows), 0.0), ms)
