"""Runs plans on an NVIDIA device one step ahead of the host: drawn tokens stay there for the next step.

A step is replayed as a CUDA graph of its size or the next larger one. Graphs are captured before the first
request and in spare time, never in a step. A draft token is a row of its own, like a decode of the same
sequence. The runner reads sequences and changes none. It knows no queue, no time and no text.
"""

# torch's stubs do not type `tolist` and `from_numpy`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from msgspec import structs
from torch import Tensor
from torch.nn.functional import normalize

from stretto.engine.runners.graphs import (
    StepSize,
    decode_size,
    first_sizes,
    later_sizes,
    nearest,
    rows_for,
)
from stretto.engine.runners.sampler import GREEDY_BELOW, Sampler, drawn_on_host, uniform
from stretto.engine.runners.scores import score
from stretto.engine.runners.step_memory import INPUT_ROW, PinnedMemory, StepMemory, send
from stretto.engine.scheduler.types import Plan, Row
from stretto.engine.sequence import Drawn, Sequence, follow
from stretto.kernels.cuda import draw, step_inputs
from stretto.kernels.cuda.hopper.gated import LEAST_ROWS
from stretto.kernels.cuda.launch import compiling_ahead, loading
from stretto.models.decoder import Decoder
from stretto.telemetry.start_times import StartTimes
from stretto.types import Logprobs, ModelInfo

log = logging.getLogger(__name__)
RING = 10  # launched steps whose results are still to be read: those of a draft model are launched at once
ALL_KERNELS = 128  # steps of so many tokens use every kernel that longer ones do,
# except for the gated product on Hopper and for experts, which have larger tiles from here on.
GATED_KERNELS, EXPERT_KERNELS = (LEAST_ROWS,), (384, LEAST_ROWS, 1024)
NO_PENALTIES = (1.0, 0.0, 0.0)
MAX_COUNT = draw.MOST_SEEN.value


@dataclass(frozen=True, slots=True)
class Launched:
    """A launched step.

    tokens: int64 in pinned memory, valid once `arrived`, one for each row of the step
    places: by row of the plan, the first of its rows of the step; the next ones have its draft tokens
    drafts: those draft tokens, by row of the plan that has any
    waiting: the rows of the plan that have a result
    on_host: results that the host drew, by their row of the plan
    vectors: results of embedding requests, likewise
    scores: of the tokens of prompts, likewise
    """

    tokens: Tensor
    arrived: torch.cuda.Event
    places: list[int] | range
    drafts: dict[int, tuple[int, ...]]
    waiting: list[int]
    on_host: dict[int, Drawn]
    vectors: dict[int, Tensor]
    scores: dict[int, tuple[Logprobs, ...]]

    def wait(self) -> list[Drawn]:
        self.arrived.synchronize()
        tokens: list[int] = self.tokens.tolist()
        return [self._result(row, tokens) for row in self.waiting]

    def _result(self, row: int, tokens: list[int]) -> Drawn:
        if row in self.vectors:
            return Drawn(-1, embedding=tuple(self.vectors[row].tolist()))
        first = self.places[row]
        if (draft := self.drafts.get(row)) is not None:
            return follow(draft, lambda accepted: Drawn(tokens[first + accepted]))
        drawn = self.on_host.get(row) or Drawn(tokens[first])
        return structs.replace(drawn, scores=self.scores[row]) if row in self.scores else drawn


class StepOutput(NamedTuple):
    """What a step leaves on the device: tokens [S], and what they were drawn from."""

    tokens: Tensor
    logits: Tensor
    hidden: Tensor
    every: Tensor | None = None  # the hidden states of all tokens, where they are wanted


class CudaRunner:
    """One decoder on a device, with its KV cache. `eos`: the tokens that end an answer. `most_tokens`: of a
    step.

    `depth` is 1. It is 0 while the last launched step has draft tokens or rows that the host draws, because
    their results must be known before the next step. A step has at most `graphs.rows_for(max_running)` rows.
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
        self._abridged = decoder.abridged(self._cache)
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
        rows = rows_for(max_running)
        self._first, self._later = first_sizes(rows, most_tokens), later_sizes(rows, most_tokens)
        self._memory: dict[StepSize, StepMemory] = {}
        on_gpu = self._device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._ring = [PinnedMemory(rows, most_tokens) for _ in range(RING)]
        self._turn = 0

    def start(
        self,
        progress: Callable[[int, int], None] = lambda done, total: None,
        times: StartTimes | None = None,
    ) -> None:
        """Compile the kernels of all steps, and capture graphs so that each step has one that holds it.

        `progress(done, total)` counts graphs. `times` gets the parts of the start.
        """
        times = times or StartTimes()
        with times.part("kernels"):
            self._compile()
        with times.part("graphs"):
            self._capture_first(progress, times)

    def _compile(self) -> None:
        further = GATED_KERNELS if self._decoder.spec.routing is None else EXPERT_KERNELS
        with torch.inference_mode(), compiling_ahead():
            for size in self._first:
                if size.decodes or size.tokens <= ALL_KERNELS or size.tokens in further:
                    self._step(self._idle(size), abridged=True)

    def _capture_first(self, progress: Callable[[int, int], None], times: StartTimes) -> None:
        step_inputs.write_tables(
            self._ring[0].updates([(len(self._tables) - 1, 0, self.info.blocks)], self._device), self._tables
        )
        tokens, rows = set[int](), set[int]()
        for done, size in enumerate(self._first):
            # The kernels of a step with prompts follow from its tokens, and those of its draws from its rows.
            if size.decodes or size.tokens not in tokens or size.rows not in rows:
                with times.part("first steps"):
                    self._load_kernels(size)
            self._prepare(size)
            if not size.decodes:
                tokens.add(size.tokens)
                rows.add(size.rows)
            progress(done + 1, len(self._first))

    def prepare(self) -> bool:
        """Capture one more graph, which takes some hundredths of a second -> whether there are more. When one
        fails, as for want of memory, the graphs that there are serve all steps."""
        try:
            if self._later:
                size = self._later.pop()
                self._load_kernels(size)
                self._prepare(size)
        except RuntimeError:
            log.warning("no further graphs of %s are captured", self.info.name, exc_info=True)
            self._later.clear()
        return bool(self._later)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start the plan. One result for each row that draws or scores, in the plan's order."""
        rows = plan.rows
        drawing = [index for index, row in enumerate(rows) if row.draw]
        on_host = [index for index in drawing if drawn_on_host(rows[index].seq)]
        embedded = [index for index in drawing if rows[index].seq.request.task == "embed"]
        scoring = [index for index, row in enumerate(rows) if row.scored]
        drafts = {index: row.draft for index, row in enumerate(rows) if row.draft}
        self.depth = 0 if on_host or scoring or drafts else 1
        self._turn = (self._turn + 1) % RING
        pinned = self._ring[self._turn]
        parts = [part for row in rows for part in _parts(row)] if drafts else rows
        places = [0, *accumulate(1 + len(row.draft) for row in rows)] if drafts else range(len(rows))
        decodes = len(drawing) == len(rows) and all(part.count == 1 for part in parts)
        size = (
            decode_size(len(parts))
            if decodes
            else StepSize(sum(part.count for part in parts), len(parts), False)
        )
        held = nearest(self._memory, size)
        memory = self._allocate(size) if held is None else self._memory[held]
        self._update_tables(rows, pinned, decodes)
        self._fill(memory, parts, pinned)
        logits = hidden = None
        every = None
        eager = on_host or embedded or scoring
        if memory.graph is not None and memory.replayed is not None and not eager:
            memory.graph.replay()
            tokens = memory.replayed
        else:
            tokens, logits, hidden, every = self._step(memory, every=bool(scoring))
        step_inputs.move(tokens[: len(parts)], pinned.tokens)
        pinned.arrived.record()
        results: dict[int, Drawn] = {}
        if on_host and logits is not None:
            own = logits[[places[index] for index in on_host]]
            results = dict(zip(on_host, self._sampler(own, [rows[i].seq for i in on_host]), strict=True))
        vectors: dict[int, Tensor] = {}
        if hidden is not None:
            vectors = {index: normalize(hidden[places[index]].float(), dim=0) for index in embedded}
        return Launched(
            pinned.tokens[: len(parts)],
            pinned.arrived,
            places,
            drafts,
            waiting=sorted({*drawing, *scoring}),
            on_host=results,
            vectors=vectors,
            scores={} if every is None else self._scores(rows, every),
        )

    def erase(self, blocks: list[int]) -> None:
        """Zero the KV memory of these blocks, after all launched steps. The host does not wait for them."""
        index = send(np.array(blocks), self._device)
        for layer in self._cache.layers:
            layer[:, index] = 0

    @property
    def cache_bytes(self) -> int:
        """The size of the KV cache."""
        return self._cache.nbytes

    def trim(self, seq: Sequence, tokens: int) -> None:
        """Expect other blocks after the first `tokens` tokens of a sequence: a draft model read more."""
        owner, preemptions, known = self._in_tables[seq.slot]
        self._in_tables[seq.slot] = owner, preemptions, min(known, -(-tokens // self.info.block_size))

    @torch.inference_mode()
    def _load_kernels(self, size: StepSize) -> None:
        """Run an abridged step of a size, so that its kernels are loaded: none can load in a capture."""
        with loading():
            self._step(self._idle(size), abridged=True)

    @torch.inference_mode()
    def _prepare(self, size: StepSize) -> None:
        """Capture the graph of a size whose kernels are loaded."""
        memory = self._idle(size)
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

    def _step(self, memory: StepMemory, *, every: bool = False, abridged: bool = False) -> StepOutput:
        """Run a step, with the hidden states of all tokens if `every`. `abridged`: only for its kernels."""
        inputs, batch = memory.inputs, memory.batch
        decoder, cache = self._abridged if abridged else (self._decoder, self._cache)
        if memory.size.decodes:
            step_inputs.read(inputs, self._drawn, self._tables, batch, self.info.block_size)
        else:
            step_inputs.read_mixed(
                inputs, memory.ids, self._drawn, self._tables, memory.outputs, batch, self.info.block_size
            )
        states = None
        if every and batch.outputs is not None:
            states = decoder.forward(replace(batch, outputs=None), cache)
            hidden = states[batch.outputs]
        else:
            hidden = decoder.forward(batch, cache)
        logits = decoder.logits(hidden)
        tokens = draw.draw(logits, inputs[: memory.size.rows], self._drawn, self._seen)
        return StepOutput(tokens, logits, hidden, states)

    def _allocate(self, size: StepSize) -> StepMemory:
        return StepMemory.of(size, self._device, self.info.context, self._tables.shape[1])

    def _update_tables(self, rows: list[Row], pinned: PinnedMemory, decodes: bool) -> None:
        """Write the blocks that the tables on the device lack, except the newest of a decode, which its row
        of the input brings along. A sequence with draft tokens has several such rows, so it lacks none.
        """
        updates: list[tuple[int, int, int]] = []
        size = self.info.block_size
        for row in rows:
            seq = row.seq
            owner, preemptions, known = self._in_tables.get(seq.slot, (None, 0, 0))
            if owner is not seq or preemptions != seq.preemptions:
                known = 0
            end = -(-(row.start + row.count) // size)
            held = end - 1 if decodes and not row.draft else end
            if known < held:
                blocks = seq.kv.blocks
                updates += ((seq.slot, column, blocks[column]) for column in range(known, held))
            # The blocks of draft tokens are written again next time, because rejection frees them.
            self._in_tables[seq.slot] = seq, seq.preemptions, row.start // size + 1 if row.draft else end
        if updates:
            step_inputs.write_tables(pinned.updates(updates, self._device), self._tables)

    def _fill(self, memory: StepMemory, parts: list[Row], pinned: PinnedMemory) -> None:
        """Send rows, and those of draft tokens as `_parts` makes them, to the memory of a step."""
        size = memory.size
        inputs, ids = pinned.parts(size)
        inputs[len(parts) :] = self._padding
        first = 0
        for index, row in enumerate(parts):
            inputs[index] = self._input(row, first)
            if not size.decodes:
                tokens = row.seq.tokens[row.start : row.start + row.count] or row.draft[-1:]
                ids[first : first + len(tokens)] = tokens
                ids[first + len(tokens) : first + row.count] = -1  # it is on the device
            first += row.count
        if not size.decodes:
            inputs["first"][len(parts) :] = first
            inputs["count"][-1] = size.tokens - first
        words = len(inputs) * step_inputs.ORDER + (0 if size.decodes else first)
        step_inputs.move(torch.from_numpy(pinned.words[:words]), memory.words)

    def _input(self, row: Row, first: int) -> tuple[float, ...]:
        """The `INPUT_ROW` of a row, whose first token is number `first` of the step. Token -1 is known to the
        device alone."""
        seq, position, ahead = row.seq, row.start, len(row.draft)
        sampling, sink = seq.request.sampling, int(self._padding["sink"])
        block = seq.kv.blocks[position // self.info.block_size]
        if not row.draw:
            return (seq.slot, position, -1, block, 0, sink, row.count, first,
                    0.0, 1.0, 0.0, 0.0, *NO_PENALTIES, 0)  # fmt: skip
        token = seq.tokens[position] if position < len(seq.tokens) else row.draft[-1] if ahead else -1
        greedy = sampling.temperature < GREEDY_BELOW or sampling.top_k == 1
        return (
            seq.slot,
            position,
            token,
            block,
            sampling.top_k,
            sink if ahead else seq.slot,  # the host gives the token after draft tokens
            row.count,
            first,
            0.0 if greedy else sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            0.0 if greedy else uniform(seq.seed, position + row.count),
            *self._penalties(seq),
            ahead,
        )

    def _penalties(self, seq: Sequence) -> tuple[float, float, float]:
        """The repetition, frequency and presence penalty. Writes the token counts they need on the device."""
        sampling = seq.request.sampling
        penalties = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        if penalties == NO_PENALTIES or drawn_on_host(seq):
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
                tokens, times = send(np.array(list(counts.items())).T.copy(), self._device)
                row[tokens] = times.to(torch.int16)
        return penalties


def _parts(row: Row) -> list[Row]:
    """The rows of the step for a row of the plan: its own, and one for each of its draft tokens. In these
    `draft` has the draft tokens up to the row's own."""
    own = Row(row.seq, row.start, row.count - len(row.draft), row.draw, (), row.scored)
    ends = range(1, len(row.draft) + 1)
    return [own, *(Row(row.seq, row.start + end, 1, True, row.draft[:end]) for end in ends)]
