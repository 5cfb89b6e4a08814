"""Runs plans on an NVIDIA device one step ahead of the host: drawn tokens stay there for the next step.

Steps with one token per sequence are captured as CUDA graphs, one for each size of batch, when that size
first occurs. All other steps are launched kernel by kernel. It reads sequences and changes none. It knows no
queue, no time and no text.
"""

# torch's stubs do not type `tolist` and `from_numpy`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stretto.engine.runners.batch import BatchBuilder
from stretto.engine.runners.sampler import GREEDY_BELOW, Sampler, uniform
from stretto.engine.scheduler.types import Plan, Row
from stretto.engine.sequence import Drawn, Sequence
from stretto.kernels import Batch
from stretto.kernels.cuda import draw
from stretto.models.decoder import Decoder
from stretto.types import ModelInfo

# Sizes of graphs. Beyond 32 sequences a step is padded to the next size, so that there are not hundreds.
SIZES = (*range(1, 33), *range(40, 129, 8), *range(144, 257, 16), *range(288, 1025, 32))
RING = 4
NO_PENALTIES = (1.0, 0.0, 0.0)
MAX_COUNT = draw.MOST_SEEN.value
# One row of a step's input, as `kernels.cuda.draw` reads it.
INPUT_ROW = np.dtype(
    [
        *((name, np.int32) for name in ("slot", "position", "token", "block", "top_k")),
        *((name, np.float32) for name in ("temperature", "top_p", "min_p", "fraction")),
        *((name, np.float32) for name in ("repetition", "frequency", "presence")),
    ]
)
assert INPUT_ROW.itemsize == 4 * draw.ORDER


@dataclass(frozen=True, slots=True)
class Launched:
    """A launched step.

    tokens: int64 in pinned memory, valid once `arrived`; the first `count` are results
    on_host: results that the host drew, by their index among the results
    vectors: results of embedding requests, likewise
    """

    tokens: Tensor
    arrived: torch.cuda.Event
    count: int
    on_host: dict[int, Drawn]
    vectors: dict[int, Tensor]

    def wait(self) -> list[Drawn]:
        self.arrived.synchronize()
        drawn = [Drawn(token) for token in self.tokens[: self.count].tolist()]
        for index, result in self.on_host.items():
            drawn[index] = result
        for index, vector in self.vectors.items():
            drawn[index] = Drawn(-1, embedding=tuple(vector.tolist()))
        return drawn


@dataclass(slots=True)
class Captured:
    """The graph of one size of batch, with its input (`INPUT_ROW`s as int32) and its output (tokens)."""

    inputs: Tensor
    batch: Batch
    output: Tensor
    graph: torch.cuda.CUDAGraph | None = None


class CudaRunner:
    """One decoder on a device, with its KV cache. `eos`: the tokens that end an answer.

    `depth` is 1. It is 0 while the last launched step has rows that the host draws, because their tokens must
    be known before the next step. There is no speculation: two steps are in flight at once, and the result of
    a draft token is known only after its step.
    """

    def __init__(self, decoder: Decoder, info: ModelInfo, *, eos: frozenset[int], max_running: int) -> None:
        self.info = info
        self.eos = eos
        self.depth = 1
        self._decoder = decoder
        self._device = decoder.device
        # The rows that pad a step to the size of its graph use one extra block and one extra slot.
        self._cache = decoder.new_cache(info.blocks + 1, info.block_size)
        self._sampler = Sampler(info.vocab, eos, self._device)
        columns = -(-info.context // info.block_size)
        self._tables = torch.zeros((max_running + 1, columns), dtype=torch.int32, device=self._device)
        self._drawn = torch.zeros(max_running + 1, dtype=torch.int64, device=self._device)
        self._seen = torch.zeros((max_running + 1, info.vocab), dtype=torch.int16, device=self._device)
        # By slot, the sequence in that row of `_tables`, its preemptions by then, and its blocks there.
        self._in_tables: dict[int, tuple[Sequence, int, int]] = {}
        # By slot, the sequence whose tokens `_seen` counts, and its preemptions by then.
        self._counted: dict[int, tuple[Sequence, int]] = {}
        self._batches = BatchBuilder(
            max_running=max_running, context=info.context, block_size=info.block_size
        )
        self._padding = np.zeros((), dtype=INPUT_ROW)
        self._padding["slot"], self._padding["block"] = max_running, info.blocks
        self._padding["repetition"] = 1.0
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
        on_host = {index: seq for index, seq in enumerate(drawing) if _drawn_on_host(seq)}
        self.depth = 0 if on_host else 1
        self._turn = (self._turn + 1) % RING
        pinned = self._ring[self._turn]
        logits, vectors = None, {}
        if not on_host and all(self._is_decode(row) for row in rows):
            tokens = self._replay(rows, pinned)
        else:
            tokens, logits, vectors = self._run(rows, pinned)
        if drawing:
            draw.move(tokens[: len(drawing)], pinned.tokens)
        pinned.arrived.record()
        results: dict[int, Drawn] = {}
        if on_host and logits is not None:
            drawn = self._sampler(logits[list(on_host)], list(on_host.values()))
            results = dict(zip(on_host, drawn, strict=True))
        return Launched(pinned.tokens, pinned.arrived, len(drawing), results, vectors)

    def erase(self, blocks: list[int]) -> None:
        """Zero the KV memory of these blocks."""
        self._cache.erase(blocks)

    def _is_decode(self, row: Row) -> bool:
        """Whether an `INPUT_ROW` is enough: one token, and the device lacks at most the newest block."""
        seq = row.seq
        return (
            row.count == 1
            and row.draw
            and seq.request.task == "generate"
            and self._blocks_in_tables(seq) >= len(seq.kv.blocks) - 1
        )

    def _blocks_in_tables(self, seq: Sequence) -> int:
        """How many blocks of a sequence the tables on the device hold."""
        owner, preemptions, count = self._in_tables.get(seq.slot, (None, 0, 0))
        return count if owner is seq and preemptions == seq.preemptions else 0

    def _replay(self, rows: list[Row], pinned: _Pinned) -> Tensor:
        size = next(size for size in self._sizes if size >= len(rows))
        inputs = pinned.inputs[:size]
        inputs[len(rows) :] = self._padding
        for index, row in enumerate(rows):
            inputs[index] = self._input(row.seq, row.start)
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._allocate(size)
        draw.move(torch.from_numpy(_as_words(inputs)), captured.inputs)
        if captured.graph is not None:
            captured.graph.replay()
            return captured.output
        # The first step of a size may compile kernels, which is not possible during a capture.
        tokens = self._step(captured)
        self._capture(captured)
        return tokens

    def _capture(self, captured: Captured) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            captured.output = self._step(captured)
        captured.graph = graph

    def _step(self, captured: Captured) -> Tensor:
        draw.read(captured.inputs, self._drawn, self._tables, captured.batch, self.info.block_size)
        hidden = self._decoder.forward(captured.batch, self._cache)
        return draw.draw(self._decoder.logits(hidden), captured.inputs, self._drawn, self._seen)

    def _allocate(self, size: int) -> Captured:
        """The memory on the device for a step of `size` sequences."""

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

    def _input(self, seq: Sequence, position: int) -> tuple[float, ...]:
        """The `INPUT_ROW` of a sequence with its newest token at `position`. Token -1 is on the device."""
        sampling = seq.request.sampling
        greedy = sampling.temperature < GREEDY_BELOW or sampling.top_k == 1
        self._in_tables[seq.slot] = seq, seq.preemptions, len(seq.kv.blocks)
        return (
            seq.slot,
            position,
            seq.tokens[position] if position < len(seq.tokens) else -1,
            seq.kv.blocks[position // self.info.block_size],
            sampling.top_k,
            0.0 if greedy else sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            0.0 if greedy else uniform(seq.seed, seq.length),
            *self._penalties(seq),
        )

    def _penalties(self, seq: Sequence) -> tuple[float, float, float]:
        """The repetition, frequency and presence penalty. Writes the token counts they need on the device."""
        sampling = seq.request.sampling
        penalties = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        if penalties == NO_PENALTIES or _drawn_on_host(seq):
            self._counted.pop(seq.slot, None)
            return NO_PENALTIES
        if self._counted.get(seq.slot) != (seq, seq.preemptions):
            # From here on the device itself counts the tokens that it draws.
            self._counted[seq.slot] = seq, seq.preemptions
            counts: dict[int, int] = {}
            if sampling.repetition_penalty != 1.0:
                counts = dict.fromkeys(seq.tokens[: seq.prompt_len], draw.IN_PROMPT)
            for token, times in Counter(seq.tokens[seq.prompt_len :]).items():
                counts[token] = counts.get(token, 0) + min(draw.IN_OUTPUT * times, MAX_COUNT)
            row = self._seen[seq.slot].zero_()
            if counts:
                tokens, times = _send(np.array(list(counts.items())).T.copy(), self._device)
                row[tokens] = times.to(torch.int16)
        return penalties

    def _run(self, rows: list[Row], pinned: _Pinned) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """A step that is not captured, with chunks of prompts. Returns its tokens, logits and vectors."""
        hidden = self._decoder.forward(self._batch(rows), self._cache)
        drawing = [row for row in rows if row.draw]
        if not drawing:
            return self._drawn, hidden, {}
        inputs = pinned.inputs[: len(drawing)]
        for index, row in enumerate(drawing):
            inputs[index] = self._input(row.seq, row.start + row.count - 1)
        logits = self._decoder.logits(hidden)
        tokens = draw.draw(logits, _send(_as_words(inputs), self._device), self._drawn, self._seen)
        vectors = {
            index: torch.nn.functional.normalize(hidden[index].float(), dim=0)
            for index, row in enumerate(drawing)
            if row.seq.request.task == "embed"
        }
        return tokens, logits, vectors

    def _batch(self, rows: list[Row]) -> Batch:
        """The rows as a batch on the device, where the block tables are updated as well."""
        arrays = self._batches.build(rows)
        batch = arrays.to_batch(lambda array: _send(array, self._device))
        if arrays.unknown:
            indexes, slots = _send(np.array(arrays.unknown).T.copy(), self._device)
            batch.tokens[indexes] = self._drawn[slots].clamp_min(0)
        slots = _send(np.array([row.seq.slot for row in rows]), self._device)
        self._tables[slots, : arrays.tables.shape[1]] = batch.tables
        for row in rows:
            self._in_tables[row.seq.slot] = row.seq, row.seq.preemptions, len(row.seq.kv.blocks)
        return batch


class _Pinned:
    """Pinned memory of one step, which the device copies from and to while the host goes on."""

    def __init__(self, rows: int) -> None:
        pin = torch.cuda.is_available()
        words = torch.zeros((rows, draw.ORDER), dtype=torch.int32, pin_memory=pin).numpy()
        self.inputs = words.view(INPUT_ROW)[:, 0]
        self.tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=pin)
        self.arrived = torch.cuda.Event()


def _as_words(inputs: NDArray[np.void]) -> NDArray[np.int32]:
    """`INPUT_ROW`s as int32 [rows, ORDER], without a copy."""
    return inputs.view(np.int32).reshape(len(inputs), draw.ORDER)


def _send(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device. The host does not wait for the copy."""
    held = torch.from_numpy(array)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.clone()


def _drawn_on_host(seq: Sequence) -> bool:
    """Whether the host must draw, because the device has no grammars, logprobs, bias or minimum length."""
    sampling = seq.request.sampling
    return seq.request.task == "generate" and (
        seq.grammar is not None
        or sampling.logprobs is not None
        or bool(sampling.logit_bias)
        or seq.output_len < sampling.min_tokens
    )
