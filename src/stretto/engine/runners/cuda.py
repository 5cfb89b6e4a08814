"""Runs plans on an NVIDIA device one step ahead of the host: drawn tokens stay there for the next step.

A step is replayed as a CUDA graph of its size or the next larger one. Graphs are captured before the first
request and in spare time, never in a step. It reads sequences and changes none. It knows no queue, no time
and no text.
"""

# torch's stubs do not type `tolist` and `from_numpy`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from stretto.engine.runners.graphs import StepSize, decode_size, first_sizes, later_sizes, nearest
from stretto.engine.runners.sampler import GREEDY_BELOW, Sampler, uniform
from stretto.engine.runners.scores import score
from stretto.engine.scheduler.types import Plan, Row
from stretto.engine.sequence import Drawn, Sequence
from stretto.kernels import Batch
from stretto.kernels.cuda import draw
from stretto.kernels.cuda.launch import compiling_ahead
from stretto.models.decoder import Decoder
from stretto.types import Logprobs, ModelInfo

log = logging.getLogger(__name__)
RING = 4
ALL_KERNELS = 128  # steps of so many tokens use every kernel that longer ones do,
FURTHER_KERNELS = (384, 1024)  # except those of mixtures of experts, which have larger tiles from here on
UPDATES = 4096  # blocks that a step may add to the tables from pinned memory; more take a copy of their own
NO_PENALTIES = (1.0, 0.0, 0.0)
MAX_COUNT = draw.MOST_SEEN.value
# One row of a step's input, as `kernels.cuda.draw` reads it.
INPUT_ROW = np.dtype(
    [
        *(
            (name, np.int32)
            for name in ("slot", "position", "token", "block", "top_k", "sink", "count", "first")
        ),
        *((name, np.float32) for name in ("temperature", "top_p", "min_p", "fraction")),
        *((name, np.float32) for name in ("repetition", "frequency", "presence")),
        ("unused", np.int32),
    ]
)
assert INPUT_ROW.itemsize == 4 * draw.ORDER


@dataclass(frozen=True, slots=True)
class Launched:
    """A launched step.

    tokens: int64 in pinned memory, valid once `arrived`, one for each row of the plan
    waiting: the rows that have a result
    on_host: results that the host drew, by their row
    vectors: results of embedding requests, likewise
    scores: of the tokens of prompts, likewise
    """

    tokens: Tensor
    arrived: torch.cuda.Event
    waiting: list[int]
    on_host: dict[int, Drawn]
    vectors: dict[int, Tensor]
    scores: dict[int, tuple[Logprobs, ...]]

    def wait(self) -> list[Drawn]:
        self.arrived.synchronize()
        tokens: list[int] = self.tokens.tolist()
        return [self._result(row, tokens[row]) for row in self.waiting]

    def _result(self, row: int, token: int) -> Drawn:
        if row in self.vectors:
            return Drawn(-1, embedding=tuple(self.vectors[row].tolist()))
        drawn = self.on_host.get(row) or Drawn(token)
        return structs.replace(drawn, scores=self.scores[row]) if row in self.scores else drawn


class StepOutput(NamedTuple):
    """What a step leaves on the device: tokens [S], and what they were drawn from."""

    tokens: Tensor
    logits: Tensor
    hidden: Tensor
    every: Tensor | None = None  # the hidden states of all tokens, where they are wanted


@dataclass(slots=True)
class StepMemory:
    """The memory on the device of steps of one size, and their graph once it is captured.

    `words`, int32: a row of `INPUT_ROW` for each sequence, and for steps with prompts one more row that pads,
    and the tokens. `outputs`: int64, the last token of each of these rows. `replayed`: the tokens that a
    replay draws.
    """

    size: StepSize
    words: Tensor
    batch: Batch
    outputs: Tensor
    replayed: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None

    @property
    def inputs(self) -> Tensor:
        return self.words[: _rows(self.size) * draw.ORDER].view(-1, draw.ORDER)

    @property
    def ids(self) -> Tensor:
        return self.words[_rows(self.size) * draw.ORDER :]


class CudaRunner:
    """One decoder on a device, with its KV cache. `eos`: the tokens that end an answer. `most_tokens`: of a
    step.

    `depth` is 1. It is 0 while the last launched step has rows that the host draws, because their tokens must
    be known before the next step. There is no speculation: two steps are in flight at once, and the result of
    a draft token is known only after its step.
    """

    def __init__(
        self,
        decoder: Decoder,
        info: ModelInfo,
        *,
        eos: frozenset[int],
        max_running: int,
        most_tokens: int = 8192,
    ) -> None:
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
        self._tables[max_running] = info.blocks
        self._drawn = torch.zeros(max_running + 1, dtype=torch.int64, device=self._device)
        self._seen = torch.zeros((max_running + 1, info.vocab), dtype=torch.int16, device=self._device)
        # By slot, the sequence in that row of `_tables`, its preemptions by then, and its blocks there.
        self._in_tables: dict[int, tuple[Sequence, int, int]] = {}
        # By slot, the sequence whose tokens `_seen` counts, and its preemptions by then.
        self._counted: dict[int, tuple[Sequence, int]] = {}
        self._padding = np.zeros((), dtype=INPUT_ROW)
        self._padding["slot"] = self._padding["sink"] = max_running
        self._padding["block"], self._padding["repetition"] = info.blocks, 1.0
        self._first = first_sizes(max_running, most_tokens)
        self._later = later_sizes(max_running, most_tokens)
        self._memory: dict[StepSize, StepMemory] = {}
        on_gpu = self._device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._ring = [_Pinned(max_running, most_tokens) for _ in range(RING)]
        self._turn = 0

    def start(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile the kernels of all steps, and capture graphs so that each step has one that holds it.

        `progress(done, total)` counts graphs.
        """
        further = () if self._decoder.spec.routing is None else FURTHER_KERNELS
        with torch.inference_mode(), compiling_ahead():
            for size in self._first:
                if size.decodes or size.tokens <= ALL_KERNELS or size.tokens in further:
                    self._step(self._idle(size))
        draw.write_tables(
            self._ring[0].updates([(len(self._tables) - 1, 0, self.info.blocks)], self._device), self._tables
        )
        tokens, rows = set[int](), set[int]()
        for done, size in enumerate(self._first):
            # The kernels of a step with prompts follow from its tokens, and those of its draws from its rows.
            self._prepare(size, loaded=not size.decodes and size.tokens in tokens and size.rows in rows)
            if not size.decodes:
                tokens.add(size.tokens)
                rows.add(size.rows)
            progress(done + 1, len(self._first))

    def prepare(self) -> bool:
        """Capture one more graph, which takes some hundredths of a second -> whether there are more. When one
        fails, as for want of memory, the graphs that there are serve all steps."""
        try:
            if self._later:
                self._prepare(self._later.pop())
        except RuntimeError:
            log.warning("no further graphs of %s are captured", self.info.name, exc_info=True)
            self._later.clear()
        return bool(self._later)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start the plan. One result for each row that draws or scores, in the plan's order."""
        rows = plan.rows
        drawing = [index for index, row in enumerate(rows) if row.draw]
        on_host = [index for index in drawing if _drawn_on_host(rows[index].seq)]
        embedded = [index for index in drawing if rows[index].seq.request.task == "embed"]
        scoring = [index for index, row in enumerate(rows) if row.scored]
        self.depth = 0 if on_host or scoring else 1
        self._turn = (self._turn + 1) % RING
        pinned = self._ring[self._turn]
        decodes = len(drawing) == len(rows) and all(row.count == 1 for row in rows)
        size = (
            decode_size(len(rows)) if decodes else StepSize(sum(row.count for row in rows), len(rows), False)
        )
        held = nearest(self._memory, size)
        memory = self._allocate(size) if held is None else self._memory[held]
        self._fill(memory, rows, pinned)
        logits = hidden = None
        every = None
        eager = on_host or embedded or scoring
        if memory.graph is not None and memory.replayed is not None and not eager:
            memory.graph.replay()
            tokens = memory.replayed
        else:
            tokens, logits, hidden, every = self._step(memory, every=bool(scoring))
        draw.move(tokens[: len(rows)], pinned.tokens)
        pinned.arrived.record()
        results: dict[int, Drawn] = {}
        if on_host and logits is not None:
            drawn = self._sampler(logits[on_host], [rows[index].seq for index in on_host])
            results = dict(zip(on_host, drawn, strict=True))
        vectors = {
            index: torch.nn.functional.normalize(hidden[index].float(), dim=0)
            for index in embedded
            if hidden is not None
        }
        scores = {} if every is None else self._scores(rows, every)
        waiting = sorted({*drawing, *scoring})
        return Launched(pinned.tokens[: len(rows)], pinned.arrived, waiting, results, vectors, scores)

    def erase(self, blocks: list[int]) -> None:
        """Zero the KV memory of these blocks."""
        self._cache.erase(blocks)

    @torch.inference_mode()
    def _prepare(self, size: StepSize, *, loaded: bool = False) -> None:
        """Capture the graph of a size. Unless its kernels are loaded they run once before, because none can
        load in a capture."""
        memory = self._idle(size)
        if not loaded:
            self._step(memory)
        self._capture(memory)
        self._memory[size] = memory

    def _idle(self, size: StepSize) -> StepMemory:
        """The memory for steps of a size, filled with padding."""
        memory = self._allocate(size)
        self._fill(memory, [], self._ring[0])
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the pinned memory is used again
        return memory

    def _capture(self, memory: StepMemory) -> None:
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                memory.replayed = self._step(memory).tokens
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        memory.graph = graph

    def _scores(self, rows: list[Row], every: Tensor) -> dict[int, tuple[Logprobs, ...]]:
        """The scores of the tokens of prompts, by row. `every`: the hidden states of all tokens."""
        scores: dict[int, tuple[Logprobs, ...]] = {}
        first = 0
        for index, row in enumerate(rows):
            if row.scored:
                start = first + row.positions_scored.start - row.start
                scores[index] = score(row, every[start : start + row.scored], self._decoder.logits)
            first += row.count
        return scores

    def _step(self, memory: StepMemory, *, every: bool = False) -> StepOutput:
        """Run a step, with the hidden states of all its tokens if `every`."""
        inputs, batch = memory.inputs, memory.batch
        if memory.size.decodes:
            draw.read(inputs, self._drawn, self._tables, batch, self.info.block_size)
        else:
            draw.read_mixed(
                inputs, memory.ids, self._drawn, self._tables, memory.outputs, batch, self.info.block_size
            )
        states = None
        if every and batch.outputs is not None:
            states = self._decoder.forward(replace(batch, outputs=None), self._cache)
            hidden = states[batch.outputs]
        else:
            hidden = self._decoder.forward(batch, self._cache)
        logits = self._decoder.logits(hidden)
        tokens = draw.draw(logits, inputs[: memory.size.rows], self._drawn, self._seen)
        return StepOutput(tokens, logits, hidden, states)

    def _allocate(self, size: StepSize) -> StepMemory:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        rows = _rows(size)
        outputs = zeros(rows)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=self._device)
        starts[rows] = size.tokens
        batch = Batch(
            tokens=zeros(size.tokens),
            positions=zeros(size.tokens),
            slots=zeros(size.tokens),
            query_starts=starts,
            contexts=zeros(rows, dtype=torch.int32),
            tables=zeros(rows, self._tables.shape[1], dtype=torch.int32),
            outputs=None if size.decodes else outputs[: size.rows],
            query_lens=[1] * size.rows if size.decodes else [],
            context_lens=[self.info.context] * size.rows if size.decodes else [],
        )
        words = rows * draw.ORDER + (0 if size.decodes else size.tokens)
        return StepMemory(size, zeros(words, dtype=torch.int32), batch, outputs)

    def _fill(self, memory: StepMemory, rows: list[Row], pinned: _Pinned) -> None:
        """Send the rows to the memory of a step. What the tables on the device lack is written there."""
        size = memory.size
        inputs, ids = pinned.parts(size)
        inputs[len(rows) :] = self._padding
        updates: list[tuple[int, int, int]] = []
        first = 0
        for index, row in enumerate(rows):
            inputs[index] = self._input(row, first, updates, size.decodes)
            if not size.decodes:
                tokens = row.seq.tokens[row.start : row.start + row.count]
                ids[first : first + len(tokens)] = tokens
                ids[first + len(tokens) : first + row.count] = -1  # it is on the device
            first += row.count
        if not size.decodes:
            inputs["first"][len(rows) :] = first
            inputs["count"][-1] = size.tokens - first
        if updates:
            draw.write_tables(pinned.updates(updates, self._device), self._tables)
        words = len(inputs) * draw.ORDER + (0 if size.decodes else first)
        draw.move(torch.from_numpy(pinned.words[:words]), memory.words)

    def _input(
        self, row: Row, first: int, updates: list[tuple[int, int, int]], decodes: bool
    ) -> tuple[float, ...]:
        """The `INPUT_ROW` of a row, whose first token is number `first` of the step. Token -1 is on the
        device. `updates` gets the blocks that the device lacks, except the newest of a decode.
        """
        seq, position = row.seq, row.start
        sampling, blocks = seq.request.sampling, seq.kv.blocks
        owner, preemptions, known = self._in_tables.get(seq.slot, (None, 0, 0))
        if owner is not seq or preemptions != seq.preemptions:
            known = 0
        block = blocks[position // self.info.block_size]
        held = len(blocks) - 1 if decodes else len(blocks)
        if known < held:
            updates += ((seq.slot, column, blocks[column]) for column in range(known, held))
        self._in_tables[seq.slot] = seq, seq.preemptions, len(blocks)
        if not row.draw:
            return (seq.slot, position, -1, block, 0, int(self._padding["sink"]), row.count, first,
                    0.0, 1.0, 0.0, 0.0, *NO_PENALTIES, 0)  # fmt: skip
        greedy = sampling.temperature < GREEDY_BELOW or sampling.top_k == 1
        return (
            seq.slot,
            position,
            seq.tokens[position] if position < len(seq.tokens) else -1,
            block,
            sampling.top_k,
            seq.slot,
            row.count,
            first,
            0.0 if greedy else sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            0.0 if greedy else uniform(seq.seed, seq.length),
            *self._penalties(seq),
            0,
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


class _Pinned:
    """Pinned memory of one step, which the device copies from and to while the host goes on."""

    def __init__(self, rows: int, tokens: int) -> None:
        self._pin = torch.cuda.is_available()
        self.words: NDArray[np.int32] = self._zeros((rows + 1) * draw.ORDER + tokens).numpy()
        self.tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=self._pin)
        self.arrived = torch.cuda.Event()
        self._updates = self._zeros(UPDATES * 3).view(-1, 3)

    def parts(self, size: StepSize) -> tuple[NDArray[np.void], NDArray[np.int32]]:
        """`INPUT_ROW`s and tokens of a step, as views of `words`."""
        until = _rows(size) * draw.ORDER
        return self.words[:until].view(INPUT_ROW), self.words[until : until + size.tokens]

    def updates(self, updates: list[tuple[int, int, int]], device: torch.device) -> Tensor:
        """The updates as int32 [N, 3], where the device can read them."""
        array = np.array(updates, dtype=np.int32)
        if len(array) > UPDATES:
            return _send(array, device)
        self._updates.numpy()[: len(array)] = array
        return self._updates[: len(array)]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, pin_memory=self._pin)


def _rows(size: StepSize) -> int:
    """The rows of a step's input: one more than its sequences where tokens may have to be padded."""
    return size.rows + (not size.decodes)


def _send(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device. The host does not wait for the copy."""
    held = torch.from_numpy(array)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.clone()


def _drawn_on_host(seq: Sequence) -> bool:
    """Whether the host must draw, because the device has no grammars, logprobs, bias or minimum length."""
    sampling = seq.request.sampling
    return seq.request.task == "generate" and (
        seq.grammar is not None
        or seq.request.cascade is not None
        or sampling.logprobs is not None
        or bool(sampling.logit_bias)
        or seq.output_len < sampling.min_tokens
    )
