"""A draft model: a smaller model that proposes draft tokens for a larger one, the target.

It has its own KV cache with as many blocks as the target's, so both use the same blocks. It draws each token
with the random number that the target will use (`runners.sampler.uniform`), so models with similar
distributions agree at high temperatures too. It ignores grammars.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple, Protocol

import torch

from stretto.engine.runners.interface import Pending
from stretto.engine.runners.sampler import Sampler
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler.types import Plan, Row
from stretto.engine.sequence import Sequence
from stretto.engine.step_time import StepLoad, StepTime
from stretto.types import ModelInfo

UNREAD = (
    2  # after a step all of whose draft tokens were right: the last of them, and the token drawn after it
)
CHUNK = 512  # tokens of prompts in a pass on a GPU


class _Read(NamedTuple):
    """What the draft model has read of a sequence: its first `start` tokens, then the tokens of `draft`."""

    seq: Sequence
    preemptions: int
    start: int
    draft: tuple[int, ...]


class _Reads:
    """What a draft model has read of each sequence, by its slot."""

    def __init__(self) -> None:
        self._by_slot: dict[int, _Read] = {}

    def count(self, seq: Sequence) -> int:
        """How many tokens of a sequence are in the KV cache: up to the first rejected draft token."""
        last = self._by_slot.get(seq.slot)
        if last is None or last.seq is not seq or last.preemptions != seq.preemptions:
            return 0
        pairs = zip(last.draft, seq.tokens[last.start :], strict=False)
        return last.start + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def record(self, seq: Sequence, start: int, draft: tuple[int, ...] = ()) -> None:
        """Record that its first `start` tokens and then `draft` are read."""
        self._by_slot[seq.slot] = _Read(seq, seq.preemptions, start, draft)


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
        self._reads = _Reads()

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
                self._reads.record(seq, len(seq.tokens), drafts[seq])
                drafts[seq] += (token,)
            self._observe(rows, (time.monotonic() - started) * 1e3)
        return drafts

    def read(self, seq: Sequence) -> int:
        """How many tokens of a sequence its KV cache holds."""
        return self._reads.count(seq)

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


class DraftRunner(Protocol):
    """A runner that launches a pass before the last one is over, for tokens that the device alone knows."""

    info: ModelInfo

    @property
    def cache_bytes(self) -> int: ...
    def launch(self, plan: Plan) -> Pending: ...
    def erase(self, blocks: list[int]) -> None: ...
    def trim(self, seq: Sequence, tokens: int) -> None: ...


class DeviceDraftModel:
    """A draft model on a GPU. It has a runner of its own, with the blocks and the slots of the target's.

    All passes are launched at once. Each reads the token that the one before it drew on the device. `times`
    is the step-time model of its passes, which keeps learning from them.
    """

    def __init__(self, runner: DraftRunner, times: StepTime) -> None:
        self.model = runner.info.name
        self.times = times
        self._runner = runner
        self._reads = _Reads()

    @property
    def nbytes(self) -> int:
        """The size of its KV cache in bytes."""
        return self._runner.cache_bytes

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """That many draft tokens for each sequence, in as many passes as the largest count."""
        self._catch_up(counts)
        started, passes = time.monotonic(), list[tuple[list[Row], Pending]]()
        for ahead in range(max(counts.values())):
            rows = [self._row(seq, ahead) for seq, count in counts.items() if count > ahead]
            passes.append((rows, self._runner.launch(Plan(self.model, rows=rows))))
        drafts: dict[Sequence, tuple[int, ...]] = dict.fromkeys(counts, ())
        for rows, pending in passes:
            for row, drawn in zip(rows, pending.wait(), strict=True):
                drafts[row.seq] += (max(drawn.token, 0),)
        for seq, draft in drafts.items():
            self._reads.record(seq, len(seq.tokens), draft[:-1])
            self._runner.trim(seq, len(seq.tokens))
        ms = (time.monotonic() - started) * 1e3 / len(passes)
        read = sum(row.start + 1 for rows, _ in passes for row in rows) // len(passes)
        self.times.observe(StepLoad(sum(counts.values()) // len(passes), 0, read, 0.0), ms)
        return drafts

    def read(self, seq: Sequence) -> int:
        """How many tokens of a sequence its KV cache holds."""
        return self._reads.count(seq)

    def erase(self, blocks: list[int]) -> None:
        """Zero its KV memory of these blocks."""
        self._runner.erase(blocks)

    def _catch_up(self, counts: dict[Sequence, int]) -> None:
        """Read all but the last `UNREAD` tokens of the sequences, in passes of at most `CHUNK` tokens."""
        rows: list[Row] = []
        left = CHUNK
        for seq in counts:
            while (behind := len(seq.tokens) - UNREAD - (start := self.read(seq))) > 0:
                rows.append(Row(seq, start, min(behind, left), False))
                self._reads.record(seq, start + rows[-1].count)
                left -= rows[-1].count
                if not left:
                    self._runner.launch(Plan(self.model, rows=rows)).wait()
                    rows, left = [], CHUNK
        if rows:
            self._runner.launch(Plan(self.model, rows=rows)).wait()

    def _row(self, seq: Sequence, ahead: int) -> Row:
        """What pass `ahead` reads: the tokens that are unread, then the one that the last pass drew."""
        start = min(self.read(seq), len(seq.tokens) - 1)
        if ahead:
            return Row(seq, len(seq.tokens) + ahead - 1, 1, True)
        return Row(seq, start, len(seq.tokens) - start, True)
