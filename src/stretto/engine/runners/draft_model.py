"""A smaller model that guesses for a larger one: it reads the same tokens into a cache of its own, which has
a place for every block of the larger one's, so that both go by one table.

It draws at the same places with the same numbers (`runners.sampler.uniform`), so two models that think
alike say the same even at high temperatures. Grammars it does not know: those are the larger one's to check.
"""

from __future__ import annotations

import time

import torch

from stretto.engine.runners.sampler import Sampler
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler.types import Row
from stretto.engine.sequence import Sequence
from stretto.engine.step_time import StepLoad, StepTime


class Draft:
    """The model of `small` guesses for the sequences of `runner`. `times` are those of its steps, and learn
    from its passes. Sequences keep how far it has read them (`drafted`)."""

    def __init__(self, small: TorchRunner, runner: TorchRunner) -> None:
        self.model = small.info.name
        self.times = StepTime()
        self._decoder = small.decoder
        self._runner = runner
        self._cache = small.decoder.new_cache(runner.info.blocks, runner.info.block_size)
        self._sampler = Sampler(runner.info.vocab, runner.eos, small.decoder.device)

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    def propose(self, wanted: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """So many guesses for each sequence, whose blocks have room for them."""
        guesses: dict[Sequence, tuple[int, ...]] = dict.fromkeys(wanted, ())
        while asking := [seq for seq, count in wanted.items() if len(guesses[seq]) < count]:
            rows = [_next(seq, guesses[seq]) for seq in asking]
            started = time.monotonic()
            for seq, token in zip(asking, self._pass(rows), strict=True):
                seq.drafted = len(seq.tokens) + len(guesses[seq])
                guesses[seq] += (token,)
            self._learn(rows, (time.monotonic() - started) * 1e3)
        return guesses

    def erase(self, blocks: list[int]) -> None:
        """Zero its KV memory of these blocks."""
        self._cache.erase(blocks)

    @torch.inference_mode()
    def _pass(self, rows: list[Row]) -> list[int]:
        """Read the rows and draw what follows each."""
        batch = self._runner.batch(rows)
        batch.outputs = batch.query_starts[1:].long() - 1
        logits = self._decoder.logits(self._decoder.forward(batch, self._cache))
        return self._sampler.guess(logits, [(row.seq, row.draft) for row in rows])

    def _learn(self, rows: list[Row], ms: float) -> None:
        """Passes that also read a backlog teach nothing about those that do not."""
        if all(row.count == 1 for row in rows):
            self.times.observe(StepLoad(len(rows), 0, sum(row.start + 1 for row in rows), 0.0), ms)


def _next(seq: Sequence, guesses: tuple[int, ...]) -> Row:
    """What is to be read before the next guess: the tokens it has not seen, or the last guess."""
    start = len(seq.tokens) + len(guesses) - 1 if guesses else min(seq.drafted, len(seq.tokens) - 1)
    return Row(seq, start, len(seq.tokens) + len(guesses) - start, False, guesses)
