"""Runs plans on an NVIDIA device one step ahead of the host: a step's tokens stay there for the next to read.

Steps of one token per sequence are captured as CUDA graphs, one for each size of batch, when that size is
first met; all others are launched kernel by kernel. It reads sequences and never changes one. It knows no
queue, no time and no text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stretto.engine.runners.sampler import GREEDY_BELOW, Sampler, uniform
from stretto.engine.scheduler.types import Plan, Row
from stretto.engine.sequence import Drawn, Sequence
from stretto.kernels import Batch
from stretto.kernels.cuda import draw
from stretto.models.decoder import Decoder
from stretto.types import ModelInfo

# Beyond 32 sequences a graph runs a few rows more than there are rather than being one of hundreds.
SIZES = (*range(1, 33), *range(40, 129, 8), *range(144, 257, 16), *range(288, 1025, 32))
RING = 4
NO_PENALTIES = (1.0, 0.0, 0.0)
MOST_SEEN = draw.MOST_SEEN.value


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way. `tokens`: where they arrive on the host. `by_hand`: what the host drew itself, and
    `vectors` the rows that ask for one, by their place among the rows that draw."""

    tokens: Tensor
    arrived: torch.cuda.Event
    count: int
    by_hand: dict[int, Drawn]
    vectors: dict[int, Tensor]

    def wait(self) -> list[Drawn]:
        self.arrived.synchronize()
        drawn = [Drawn(token) for token in self.tokens[: self.count].tolist()]
        for row, result in self.by_hand.items():
            drawn[row] = result
        for row, vector in self.vectors.items():
            drawn[row] = Drawn(-1, embedding=tuple(vector.tolist()))
        return drawn


@dataclass(slots=True)
class Captured:
    """A graph of one size of batch: it reads `orders` and leaves the tokens in `output`."""

    orders: Tensor
    batch: Batch
    output: Tensor
    graph: torch.cuda.CUDAGraph | None = None


class CudaRunner:
    """One decoder on a device and its KV cache. `eos` are the tokens that end an answer.

    `depth` is 1, and 0 while the last launched step holds rows that the host draws: nothing can follow those
    before they are known.
    """

    def __init__(self, decoder: Decoder, info: ModelInfo, *, eos: frozenset[int], max_running: int) -> None:
        self.info = info
        self.eos = eos
        self.depth = 1
        self._decoder = decoder
        self._device = decoder.device
        # One block and one slot more than there are: what fills a graph up to its size lives there.
        self._cache = decoder.new_cache(info.blocks + 1, info.block_size)
        self._sampler = Sampler(info.vocab, eos, self._device)
        columns = -(-info.context // info.block_size)
        self._tables = torch.zeros((max_running + 1, columns), dtype=torch.int32, device=self._device)
        self._drawn = torch.zeros(max_running + 1, dtype=torch.int64, device=self._device)
        self._seen = torch.zeros((max_running + 1, info.vocab), dtype=torch.int16, device=self._device)
        # By slot: the sequence whose blocks the row of the tables holds, its preemptions so far, how many.
        self._entered: dict[int, tuple[Sequence, int, int]] = {}
        # By slot, whose history that is, and after how many preemptions.
        self._histories: dict[int, tuple[Sequence, int]] = {}
        self._filler = np.zeros(draw.ORDER, dtype=np.int32)
        self._filler[[draw.SLOT, draw.BLOCK]] = max_running, info.blocks
        self._filler[draw.REPETITION : draw.REPETITION + 1].view(np.float32)[:] = 1.0
        self._captured: dict[int, Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._sizes = [size for size in SIZES if size < max_running] + [max_running]
        self._ring = [_Pinned(max_running) for _ in range(RING)]
        self._turn = 0

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start the plan. One result for each row that draws, in the plan's order."""
        rows = plan.rows
        drawing = [row.seq for row in rows if row.draw]
        by_hand = {place: seq for place, seq in enumerate(drawing) if _by_hand(seq)}
        self.depth = 0 if by_hand else 1
        self._turn = (self._turn + 1) % RING
        pinned = self._ring[self._turn]
        logits, vectors = None, {}
        if not by_hand and all(self._is_decode(row) for row in rows):
            tokens = self._replay(rows, pinned)
        else:
            tokens, logits, vectors = self._run(rows, pinned)
        if drawing:
            draw.move(tokens[: len(drawing)], pinned.tokens)
        pinned.arrived.record()
        own: dict[int, Drawn] = {}
        if by_hand and logits is not None:
            results = self._sampler(logits[list(by_hand)], list(by_hand.values()))
            own = dict(zip(by_hand, results, strict=True))
        return Launched(pinned.tokens, pinned.arrived, len(drawing), own, vectors)

    def erase(self, blocks: list[int]) -> None:
        """Zero the KV memory of these blocks."""
        self._cache.erase(blocks)

    def _is_decode(self, row: Row) -> bool:
        """Whether an order says all of it: one token, and the device lacks at most the newest block."""
        seq = row.seq
        return (
            row.count == 1
            and row.draw
            and seq.request.task == "generate"
            and self._in_table(seq) >= len(seq.kv.blocks) - 1
        )

    def _in_table(self, seq: Sequence) -> int:
        """How many blocks of a sequence the table on the device holds."""
        owner, preemptions, count = self._entered.get(seq.slot, (None, 0, 0))
        return count if owner is seq and preemptions == seq.preemptions else 0

    def _replay(self, rows: list[Row], pinned: _Pinned) -> Tensor:
        size = next(size for size in self._sizes if size >= len(rows))
        orders = pinned.orders[:size]
        orders[len(rows) :] = self._filler
        for row, order in zip(rows, orders, strict=False):
            self._order(row.seq, row.start, order)
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._room(size)
        draw.move(torch.from_numpy(orders), captured.orders)
        if captured.graph is not None:
            captured.graph.replay()
            return captured.output
        # The first step of its size also compiles what is not compiled yet, which a capture must not.
        tokens = self._step(captured)
        self._capture(captured)
        return tokens

    def _capture(self, captured: Captured) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            captured.output = self._step(captured)
        captured.graph = graph

    def _step(self, captured: Captured) -> Tensor:
        draw.read(captured.orders, self._drawn, self._tables, captured.batch, self.info.block_size)
        hidden = self._decoder.forward(captured.batch, self._cache)
        return draw.draw(self._decoder.logits(hidden), captured.orders, self._drawn, self._seen)

    def _room(self, size: int) -> Captured:
        """Where a step of `size` sequences is laid out."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        batch = Batch(
            tokens=zeros(size),
            positions=zeros(size),
            slots=zeros(size),
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=self._device),
            contexts=zeros(size, dtype=torch.int32),
            tables=zeros(size, self._tables.shape[1], dtype=torch.int32),
            outputs=None,
            query_lens=[1] * size,
            context_lens=[self.info.context] * size,
        )
        return Captured(zeros(size, draw.ORDER, dtype=torch.int32), batch, zeros(size))

    def _order(self, seq: Sequence, start: int, order: NDArray[np.int32]) -> None:
        """Say in `order` what the step does for `seq`, whose newest token is at `start`."""
        sampling = seq.request.sampling
        greedy = sampling.temperature < GREEDY_BELOW or sampling.top_k == 1
        order[: draw.TEMPERATURE] = (
            seq.slot,
            start,
            seq.tokens[start] if start < len(seq.tokens) else -1,
            seq.kv.blocks[start // self.info.block_size],
            sampling.top_k,
        )
        order[draw.TEMPERATURE :].view(np.float32)[:] = (
            0.0 if greedy else sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            0.0 if greedy else uniform(seq.seed, seq.length),
            *self._penalties(seq),
        )
        self._entered[seq.slot] = seq, seq.preemptions, len(seq.kv.blocks)

    def _penalties(self, seq: Sequence) -> tuple[float, float, float]:
        """For repetition, frequency and presence, with the history they need on the device."""
        sampling = seq.request.sampling
        asked = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        if asked == NO_PENALTIES or _by_hand(seq):
            self._histories.pop(seq.slot, None)
            return NO_PENALTIES
        if self._histories.get(seq.slot) != (seq, seq.preemptions):
            # From here on the device counts what it draws.
            self._histories[seq.slot] = seq, seq.preemptions
            history: dict[int, int] = {}
            if sampling.repetition_penalty != 1.0:
                history = dict.fromkeys(seq.tokens[: seq.prompt_len], draw.IN_PROMPT)
            for token, times in Counter(seq.tokens[seq.prompt_len :]).items():
                history[token] = history.get(token, 0) + min(draw.IN_OUTPUT * times, MOST_SEEN)
            row = self._seen[seq.slot].zero_()
            if history:
                tokens, counts = _sent(np.array(list(history.items())).T.copy(), self._device)
                row[tokens] = counts.to(torch.int16)
        return asked

    def _run(self, rows: list[Row], pinned: _Pinned) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """A step that is not captured: prompts, and what decodes beside them. Its tokens, logits and
        vectors."""
        hidden = self._decoder.forward(self._batch(rows), self._cache)
        drawing = [row for row in rows if row.draw]
        if not drawing:
            return self._drawn, hidden, {}
        orders = pinned.orders[: len(drawing)]
        for row, order in zip(drawing, orders, strict=True):
            self._order(row.seq, row.start + row.count - 1, order)
        logits = self._decoder.logits(hidden)
        tokens = draw.draw(logits, _sent(orders, self._device), self._drawn, self._seen)
        vectors = {
            place: torch.nn.functional.normalize(hidden[place].float(), dim=0)
            for place, row in enumerate(drawing)
            if row.seq.request.task == "embed"
        }
        return tokens, logits, vectors

    def _batch(self, rows: list[Row]) -> Batch:
        """The plan as the flat arrays that kernels read; every row's blocks are entered in the tables."""
        size = self.info.block_size
        counts = [row.count for row in rows]
        contexts = [row.start + row.count for row in rows]
        starts = [0, *accumulate(counts)]
        tables = np.zeros((len(rows), max(-(-context // size) for context in contexts)), dtype=np.int32)
        flat = np.empty((3, starts[-1]), dtype=np.int64)
        unknown: list[tuple[int, int]] = []
        for index, (row, start) in enumerate(zip(rows, starts, strict=False)):
            seq, end = row.seq, row.start + row.count
            blocks = seq.kv.blocks[: -(-end // size)]
            tables[index, : len(blocks)] = blocks
            span, own = np.arange(row.start, end), slice(start, start + row.count)
            known = seq.tokens[row.start : end]
            if len(known) < row.count:
                unknown.append((start + row.count - 1, seq.slot))
                known = [*known, 0]
            flat[:, own] = known, span, tables[index, span // size] * np.int64(size) + span % size
            self._entered[seq.slot] = seq, seq.preemptions, len(blocks)
        tokens, positions, slots = _sent(flat, self._device)
        if unknown:
            places, held = _sent(np.array(unknown).T.copy(), self._device)
            tokens[places] = self._drawn[held].clamp_min(0)
        own_tables = _sent(tables, self._device)
        places = _sent(np.array([row.seq.slot for row in rows]), self._device)
        self._tables[places, : tables.shape[1]] = own_tables
        outputs = [starts[index + 1] - 1 for index, row in enumerate(rows) if row.draw]
        return Batch(
            tokens=tokens,
            positions=positions,
            slots=slots,
            query_starts=_sent(np.array(starts, dtype=np.int32), self._device),
            contexts=_sent(np.array(contexts, dtype=np.int32), self._device),
            tables=own_tables,
            outputs=_sent(np.array(outputs, dtype=np.int64), self._device),
            query_lens=counts,
            context_lens=contexts,
        )


class _Pinned:
    """The host's end of a step: memory that the device copies from and to while the host goes on."""

    def __init__(self, rows: int) -> None:
        pin = torch.cuda.is_available()
        self.orders = torch.zeros((rows, draw.ORDER), dtype=torch.int32, pin_memory=pin).numpy()
        self.tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=pin)
        self.arrived = torch.cuda.Event()


def _sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device, once the stream gets there: the host does not wait."""
    held = torch.from_numpy(array)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.clone()


def _by_hand(seq: Sequence) -> bool:
    """Whether the host must draw for it: it knows grammars and how to report."""
    sampling = seq.request.sampling
    return seq.request.task == "generate" and (
        seq.grammar is not None
        or sampling.logprobs is not None
        or bool(sampling.logit_bias)
        or seq.output_len < sampling.min_tokens
    )
