"""The engine's loop: take what arrived, plan a step, launch it, commit what it drew, tell the outside.

It alone changes sequences, queues and pools. The clock and the runners are arguments, so the same loop runs
in virtual time over `stretto.engine.runners.null`. Of texts, sockets and tensors it knows nothing.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import Protocol

from msgspec.structs import replace

from stretto.engine.kv_cache import BlockPool
from stretto.engine.scheduler.deadline import latest_start
from stretto.engine.scheduler.fairness import Ledger
from stretto.engine.scheduler.types import Limits, Plan, Queues, Row, SchedulePolicy, SchedulingContext
from stretto.engine.sequence import TIMED, UNPLACED, Drawn, Rank, Sequence
from stretto.engine.speculative.policy import Speculation
from stretto.engine.step_time import StepLoad, StepTime
from stretto.types import Began, Finish, ModelInfo, Reason, StepStats, TokenEvent

log = logging.getLogger(__name__)
NOT_A_NUMBER = "the model's output was not a number (NaN or infinite logits)"


class Pending(Protocol):
    """A launched step. `wait` gives one result for each of the plan's rows that draws, in order."""

    def wait(self) -> list[Drawn]: ...


class Runner(Protocol):
    """Runs plans for one model. `depth` launched steps may be unfinished when the next is launched."""

    info: ModelInfo
    eos: frozenset[int]
    depth: int

    def launch(self, plan: Plan) -> Pending: ...

    def erase(self, blocks: list[int]) -> None:
        """Zero the KV memory of these blocks."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to serve: its runner and its step-time model.

    `speculation` proposes draft tokens for its sequences; None: its steps verify none.
    """

    runner: Runner
    times: StepTime = field(default_factory=StepTime)
    speculation: Speculation | None = None

    @property
    def info(self) -> ModelInfo:
        """The description of the model. Its KV memory includes that of its draft model."""
        info, extra = self.runner.info, 0 if self.speculation is None else self.speculation.kv_bytes
        return replace(info, kv_bytes=info.kv_bytes + extra) if extra else info


@dataclass(slots=True)
class ModelState:
    """One model's runner, pool and queues, and what is learnt of its time. `slots` are the free rows of the
    runner's tables; `freed`: when its last step was over."""

    runner: Runner
    pool: BlockPool
    slots: list[int]
    times: StepTime
    speculation: Speculation | None = None
    queues: Queues = field(default_factory=Queues)
    ledger: Ledger = field(default_factory=Ledger)
    freed: float = -inf
    flight: deque[InFlightStep] = field(default_factory=lambda: deque[InFlightStep]())

    @property
    def busy(self) -> bool:
        return bool(self.flight or self.queues.waiting or self.queues.running)

    def latest_start(self) -> float:
        """When its next step must start for those with a due; inf when there are none."""
        return latest_start(self.queues, self.times.cost)


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A step between its launch and its commit."""

    plan: Plan
    pending: Pending
    started: float
    load: StepLoad


class EngineCore:
    """All models of one device. `emit(events, stats)` is called once per step that had something to say."""

    def __init__(
        self,
        models: list[LoadedModel],
        *,
        limits: Limits,
        schedule: SchedulePolicy,
        clock: Callable[[], float],
        emit: Callable[[list[TokenEvent], StepStats | None], None],
        share: bool = True,
    ) -> None:
        self._limits = limits
        self._schedule = schedule
        self._clock = clock
        self._emit = emit
        self._sequences: dict[int, Sequence] = {}
        self._events: list[TokenEvent] = []
        self.lanes = {
            model.runner.info.name: ModelState(
                runner=model.runner,
                pool=BlockPool(model.runner.info.blocks, model.runner.info.block_size, share=share),
                slots=list(range(limits.max_running - 1, -1, -1)),
                times=model.times,
                speculation=model.speculation,
            )
            for model in models
        }
        self._turns = deque(self.lanes)

    @property
    def idle(self) -> bool:
        """Nothing is waiting, running or in flight."""
        return not self._sequences and not any(lane.flight for lane in self.lanes.values())

    def submit(self, seq: Sequence) -> None:
        """Queue a sequence; its request was checked against the model's context at the edge."""
        queues = self.lanes[seq.request.model].queues
        self._sequences[seq.request.id] = seq
        insort(queues.waiting, seq, key=_rank)
        if seq.deadline.whole < inf:
            heappush(queues.ends, (seq.deadline.whole, seq.request.id, seq))

    def cancel(self, ident: int) -> None:
        """Drop a sequence now; unknown and ended ones are ignored, since a cancel may cross the end."""
        seq = self._sequences.get(ident)
        if seq is not None:
            self._end(seq, Reason.CANCELLED)

    def step(self) -> bool:
        """One turn of one model; False when no model had anything to run."""
        lanes = self._by_turn()
        considerate = [self._until(lane) for lane in lanes]
        regardless = [inf] * (len(lanes) if len(lanes) > 1 else 0)
        for lane, until in zip(lanes * 2, considerate + regardless, strict=False):
            stats = self._turn(lane, until)
            self._flush(stats)
            if stats is not None:
                return True
        self._flush(None)
        return False

    def _until(self, lane: ModelState) -> float:
        """When a step of this lane must be over for the streams of the others."""
        others = [other for other in self.lanes.values() if other is not lane and other.busy]
        return min((other.latest_start() for other in others), default=inf)

    def _by_turn(self) -> list[ModelState]:
        """The lanes with work: each has its turn, unless another's streams cannot wait for its step."""
        busy = [lane for lane in map(self.lanes.__getitem__, self._turns) if lane.busy]
        self._turns.rotate(-1)
        if len(busy) > 1:
            now = self._clock()
            soonest = min(busy, key=lambda lane: lane.latest_start())
            if now + busy[0].times.cost.decodes(1, 0) / 1e3 > soonest.latest_start():
                busy.remove(soonest)
                busy.insert(0, soonest)
        return busy

    def check(self) -> None:
        """Raise AssertionError when a pool and the sequences that hold its blocks disagree."""
        for lane in self.lanes.values():
            lane.pool.check(seq.kv for seq in lane.queues.running)
            assert all(not seq.kv.blocks for seq in lane.queues.waiting), "a waiting sequence holds blocks"
            assert len(lane.slots) + len(lane.queues.running) == self._limits.max_running, "slots were lost"

    def _turn(self, lane: ModelState, until: float) -> StepStats | None:
        """Launch the lane's next step, then commit those beyond its depth (all, when there is nothing to
        run).
        """
        moment = SchedulingContext(self._clock(), lane.times, lane.ledger, until)
        plan = self._schedule(lane.runner.info.name, lane.queues, lane.pool, self._limits, moment)
        self._apply(lane, plan)
        if plan.rows:
            self._add_drafts(lane, plan, moment)
            self._launch(lane, plan)
        stats = None
        while len(lane.flight) > (lane.runner.depth if plan.rows else 0):
            stats = self._commit(lane, lane.flight.popleft())
        return stats

    def _apply(self, lane: ModelState, plan: Plan) -> None:
        """Do what the plan says to queues and blocks."""
        now = self._clock()
        for seq in plan.end:
            self._end(seq, Reason.DEADLINE)
        for seq, after in plan.refuse:
            self._end(seq, Reason.REFUSED, retry_after=after)
        while lane.queues.ends and lane.queues.ends[0][2].ended:
            heappop(lane.queues.ends)
        for seq, rank in plan.place:
            if seq.ended:
                continue
            if seq.rank[0] == UNPLACED and rank[0] == TIMED:
                tier = self._limits.tiers.get(seq.request.tier)
                lane.ledger.arrived(tier.weight if tier else 0.0, lane.times.cost.prefill(0, seq.prompt_len))
            queue = lane.queues.waiting if seq.slot < 0 else lane.queues.running
            queue.remove(seq)
            seq.rank = rank
            insort(queue, seq, key=_rank)
        lane.ledger.promise(plan.tags, plan.owed)
        for seq in plan.preempt:
            lane.queues.running.remove(seq)
            self._release(lane, seq)
            seq.preemptions += 1
            insort(lane.queues.waiting, seq, key=_rank)
        for seq, matched in plan.admit:
            lane.queues.waiting.remove(seq)
            lane.pool.adopt(seq.kv, matched)
            seq.slot = lane.slots.pop()
            if seq.started is None:
                seq.started = now
                seq.cached = seq.kv.computed
            insort(lane.queues.running, seq, key=_rank)
        for row in plan.rows:
            lane.pool.extend(row.seq.kv, row.start + row.count)

    def _add_drafts(self, lane: ModelState, plan: Plan, moment: SchedulingContext) -> None:
        """Let the plan's decodes verify draft tokens where that is predicted to pay off."""
        speculation = lane.speculation
        if speculation is None:
            return
        chosen = speculation.choose(plan, lane.queues, lane.pool, self._limits, moment)
        counts = chosen.by_sequence
        if not counts:
            return
        for row in plan.rows:
            lane.pool.extend(row.seq.kv, row.start + row.count + counts.get(row.seq, 0))
        drafts = speculation.propose(chosen)
        plan.add_drafts(drafts, lane.times.cost)

    def _launch(self, lane: ModelState, plan: Plan) -> None:
        load, started = plan.load, self._clock()
        try:
            pending = lane.runner.launch(plan)
        except Exception as error:
            self._fail(plan, error)
            return
        for row in plan.rows:
            lane.pool.advance(row.seq.kv, row.count)
            row.seq.in_flight += row.draw
            if row.count > 1 or row.start % lane.pool.size == 0:
                self._charge(lane, row)
        lane.flight.append(InFlightStep(plan, pending, started, load))

    def _charge(self, lane: ModelState, row: Row) -> None:
        """The tenant had this chunk, or (reckoned once a block) these decodes, or checked these guesses."""
        cost, size = lane.times.cost, lane.pool.size
        if row.draft:
            ms = cost(Plan("", [row]).load) - cost.base
        else:
            ms = cost.prefill(row.start, row.count) if row.count > 1 else size * cost.row(row.start)
        lane.ledger.charge(row.seq.request.tenant, ms)

    def _commit(self, lane: ModelState, flight: InFlightStep) -> StepStats:
        """Append what the step drew, end what is complete, and let others share the new blocks."""
        drawing = [row for row in flight.plan.rows if row.draw]
        try:
            drawn = flight.pending.wait()
        except Exception as error:
            for row in drawing:
                row.seq.in_flight -= 1
            self._fail(flight.plan, error)
            drawing, drawn = [], []
        accepted = 0
        for row, result in zip(drawing, drawn, strict=True):
            row.seq.in_flight -= 1
            if not row.seq.ended:
                self._take(lane, row, result)
                accepted += self._take_more(lane, row, result.then)
        for row in flight.plan.rows:
            if not row.seq.ended and row.seq.kv.blocks:
                lane.pool.publish(row.seq.kv)
        stats = self._stats(lane, flight, accepted)
        lane.times.observe(flight.load, stats.ms)
        lane.ledger.fade(self._clock())
        return stats

    def _take_more(self, lane: ModelState, row: Row, drawn: tuple[Drawn, ...]) -> int:
        """The tokens drawn after right guesses, until one ends the sequence; how many they were. Of the wrong
        guesses nothing is kept."""
        seq, before = row.seq, row.seq.output_len
        for each in drawn:
            if not seq.ended:
                self._take(lane, row, each)
        accepted = seq.output_len - before
        if row.draft and lane.speculation is not None:
            lane.speculation.observe(seq, len(row.draft), len(drawn))
        if row.draft and not seq.ended:
            lane.pool.trim(seq.kv, len(seq.tokens) - 1)
        return accepted

    def _take(self, lane: ModelState, row: Row, drawn: Drawn) -> None:
        """One drawn token: keep it, pass it on, and see whether it ends the sequence."""
        seq, sampling, token = row.seq, row.seq.request.sampling, drawn.token
        self._speak(lane, seq)
        if drawn.embedding is not None:
            self._end(seq, Reason.STOP, embedding=drawn.embedding)
            return
        if token < 0:
            self._end(seq, Reason.ERROR, error=_trouble(seq) or NOT_A_NUMBER)
            return
        stops = not sampling.ignore_eos and token in lane.runner.eos
        if (stops or token in sampling.stop_token_ids) and seq.output_len >= sampling.min_tokens:
            seq.tokens.append(token)
            self._end(seq, Reason.STOP, stop_token=token)
            return
        seq.tokens.append(token)
        if seq.grammar is not None and not seq.grammar.accept(token):
            self._end(seq, Reason.ERROR, error=_trouble(seq) or "the grammar refused the model's token")
            return
        began = _began(seq) if seq.output_len == 1 else None
        self._events.append(TokenEvent(seq.request.id, token, drawn.logprobs, began=began))
        if seq.grammar is not None and seq.grammar.finished:
            self._end(seq, Reason.STOP)
        elif len(seq.tokens) >= seq.limit:
            self._end(seq, Reason.LENGTH)

    def _speak(self, lane: ModelState, seq: Sequence) -> None:
        """Note when a token was out. The first one settles how fast the rest must follow to be out in all by
        the last due."""
        now = self._clock()
        if not seq.deadline.emitted and seq.deadline.whole < inf:
            rest = lane.ledger.expected(seq.request.tier, seq.request.sampling.max_tokens)
            seq.deadline.keep_pace(now, rest)
        seq.deadline.emit(now)

    def _end(
        self,
        seq: Sequence,
        reason: Reason,
        *,
        stop_token: int | None = None,
        error: str | None = None,
        embedding: tuple[float, ...] | None = None,
        retry_after: float | None = None,
    ) -> None:
        """End a sequence wherever it stands, and say so."""
        lane = self.lanes[seq.request.model]
        if reason in (Reason.STOP, Reason.LENGTH):
            lane.ledger.ended(seq.request.tier, seq.output_len)
        del self._sequences[seq.request.id]
        seq.ended = True
        if lane.speculation is not None:
            lane.speculation.forget(seq)
        if seq.slot >= 0:
            if reason is Reason.ERROR:
                self._erase(lane, lane.pool.forget(seq.kv))
            lane.queues.running.remove(seq)
            self._release(lane, seq)
        else:
            lane.queues.waiting.remove(seq)
        started = self._clock() if seq.started is None else seq.started
        finish = Finish(
            reason=reason,
            prompt_tokens=seq.prompt_len,
            output_tokens=seq.output_len,
            cached_tokens=min(seq.cached, seq.prompt_len),
            queue_ms=(started - seq.request.arrival) * 1e3,
            stop_token=stop_token,
            error=error,
            preemptions=seq.preemptions,
            late=seq.deadline.late or reason in (Reason.DEADLINE, Reason.REFUSED),
            retry_after=retry_after,
        )
        self._events.append(TokenEvent(seq.request.id, finish=finish, embedding=embedding))

    def _erase(self, lane: ModelState, blocks: list[int]) -> None:
        """Zero blocks that may hold NaN, which would spread to their next owner."""
        lane.runner.erase(blocks)
        if lane.speculation is not None:
            lane.speculation.erase(blocks)

    def _release(self, lane: ModelState, seq: Sequence) -> None:
        lane.pool.release(seq.kv)
        lane.slots.append(seq.slot)
        seq.slot = -1

    def _fail(self, plan: Plan, error: Exception) -> None:
        """A step that raised ends the sequences in it, and no others."""
        log.exception("a step of %s failed", plan.model, exc_info=error)
        for row in plan.rows:
            if not row.seq.ended:
                self._end(row.seq, Reason.ERROR, error=f"the step failed: {type(error).__name__}: {error}")

    def _stats(self, lane: ModelState, flight: InFlightStep, accepted: int) -> StepStats:
        now = self._clock()
        proposed = sum(len(row.draft) for row in flight.plan.rows)
        started, lane.freed = max(flight.started, lane.freed), now
        return StepStats(
            model=flight.plan.model,
            started=started,
            ms=(now - started) * 1e3,
            decode_tokens=flight.load.decode - proposed + accepted,
            prefill_tokens=flight.load.prefill,
            context_tokens=flight.load.context,
            running=len(lane.queues.running),
            waiting=len(lane.queues.waiting),
            blocks_free=lane.pool.available,
            blocks_total=lane.pool.total,
            preempted=len(flight.plan.preempt),
            predicted_ms=flight.plan.predicted,
            proposed=proposed,
            accepted=accepted,
        )

    def _flush(self, stats: StepStats | None) -> None:
        if self._events or stats is not None:
            events, self._events = self._events, []
            self._emit(events, stats)


def _began(seq: Sequence) -> Began | None:
    """A front that ends the answer itself, at a stop string, hears of no other end."""
    if seq.started is None:
        return None
    return Began((seq.started - seq.request.arrival) * 1e3, min(seq.cached, seq.prompt_len))


def _rank(seq: Sequence) -> Rank:
    return seq.rank


def _trouble(seq: Sequence) -> str | None:
    """What a sequence's grammar says went wrong, if anything did."""
    return None if seq.grammar is None else seq.grammar.error
