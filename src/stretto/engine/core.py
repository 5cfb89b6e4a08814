"""The engine's loop: plan a step, launch it, commit the tokens it drew, and emit them.

It alone changes sequences, queues and pools; what concerns one model alone is in `stretto.engine.state`. The
clock and the runners are arguments, so the same loop runs in virtual time over `stretto.engine.runners.null`.
It knows no text, no socket and no tensor.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from heapq import heapify, heappop, heappush
from math import inf
from operator import attrgetter

from stretto.engine.scheduler.lateness import RESUME_S, goes_first_at
from stretto.engine.scheduler.lengths import IdleTime
from stretto.engine.scheduler.types import Limits, Plan, Row, SchedulePolicy, SchedulingContext
from stretto.engine.sequence import Drawn, Ending, Sequence
from stretto.engine.state import InFlightStep, LoadedModel, ModelState
from stretto.engine.variants.moves import LOOK_S, behind, heavier_request, lighter_request, movable
from stretto.types import MoveReason, Reason, Request, StepStats, TokenEvent

log = logging.getLogger(__name__)
_rank = attrgetter("rank")
NOT_A_NUMBER = "the model's output was not a number (NaN or infinite logits)"


class EngineCore:
    """All models of one device.

    `emit(events, stats)` is called after each step, and whenever a sequence ends without one; then `stats` is
    None. `share` turns the prefix cache on.
    """

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
        idle = IdleTime()
        self.models = {
            model.runner.info.name: ModelState.of(model, limits, idle, share=share) for model in models
        }
        self._others = {a: [self.models[b] for b in self.models if b != a] for a in self.models}
        self._turns = deque(self.models)
        self._contexts = {name: partial(self.context, name) for name in self.models}

    @property
    def idle(self) -> bool:
        """Nothing is waiting, running or in flight."""
        return not self._sequences and not any(model.in_flight for model in self.models.values())

    def submit(self, seq: Sequence) -> None:
        """Queue a sequence. Its prompt must fit the model's context."""
        model = self.models[seq.request.model]
        queues = model.queues
        self._sequences[seq.request.id] = seq
        if seq.scores is None:  # a scored prompt is read anew
            seq.expected = model.pool.expected(seq.kv)
        insort(queues.waiting, seq, key=_rank)
        if seq.deadline.whole < inf:
            heappush(queues.ends, (seq.deadline.whole, seq.request.id, seq))
        if seq.started is not None:
            model.alarms.add(self._clock() + RESUME_S, seq.request.id)
        elif not seq.request.spare_time:
            model.alarms.add(goes_first_at(seq, model.history.times.cost), seq.request.id)
        if seq.request.emitted and len(seq.tokens) >= seq.limit:
            self._end(seq, Ending(Reason.LENGTH))

    def turn_away(self, name: str, weight: float, ms: float) -> None:
        """Record that prompts of this weight and so many milliseconds were refused and do not come."""
        self.models[name].history.arrivals.turn_away(weight, ms, self._clock())

    def cancel(self, ident: int) -> None:
        """End a sequence now. Ignores one that is unknown or has ended: a cancel may cross the end."""
        if (seq := self._sequences.get(ident)) is not None:
            self._end(seq, Ending(Reason.CANCELLED))

    def erase(self, tenant: str, subject: str | None) -> Iterator[tuple[int, int]]:
        """Drop and zero the cached prompts of a tenant or of its subject: blocks, and those still in use."""
        for model in self.models.values():
            blocks, held = model.pool.drop(tenant, subject)
            model.erase(blocks)
            yield len(blocks), held

    def step(self) -> bool:
        """Run one step of one model; False when no model has anything to run.

        A step that keeps the deadlines of the other models comes first, then any step.
        """
        models = self._by_turn()
        considerate = [self._until(model) for model in models]
        regardless = [inf] * (len(models) if len(models) > 1 else 0)
        for model, until in zip(models * 2, considerate + regardless, strict=False):
            stats = self._turn(model, until)
            self._flush(stats)
            model.learn(self._clock())  # tokens do not wait for this
            if stats is not None:
                return True
        self._flush(None)
        return False

    def context(self, name: str, until: float = inf, due: tuple[Sequence, ...] = ()) -> SchedulingContext:
        """What a policy looks at now to plan the next step of a model, which should be over at `until`."""
        model, others, now = self.models[name], self._others[name], self._clock()
        spare = not any(other.needs_time for other in others)
        elsewhere = sum(other.queues.pressure(other.history.times.cost) for other in others)
        return SchedulingContext(
            name, model.queues, model.pool, self._limits, model.history, now, until, due, elsewhere, spare
        )

    def _until(self, model: ModelState) -> float:
        """When a step of this model must be over for the streams of the others."""
        others = [other for other in self._others[model.runner.info.name] if other.busy]
        return min((other.latest_start() for other in others), default=inf)

    def _by_turn(self) -> list[ModelState]:
        """The models with work, in turn, but first the one whose deadlines need a step soonest: if the first
        in turn has deadlines too, or if they cannot wait for its step."""
        busy = [model for model in map(self.models.__getitem__, self._turns) if model.busy]
        self._turns.rotate(-1)
        if len(busy) > 1:
            now = self._clock()
            soonest = min(busy, key=lambda model: model.latest_start())
            if now + busy[0].history.times.cost.decodes(1, 0) / 1e3 <= soonest.latest_start():
                # Prompts take turns. Streams do not: one with little time would be as slow as all together.
                streams = [model for model in busy if model.streams_alone]
                if busy[0] not in streams:
                    return busy
                soonest = min(streams, key=lambda model: model.latest_start())
            busy.remove(soonest)
            busy.insert(0, soonest)
        return busy

    def check(self) -> None:
        """Raise AssertionError when a model and its sequences disagree on who holds blocks and slots."""
        for model in self.models.values():
            model.check(self._limits.max_running)

    def _turn(self, model: ModelState, until: float) -> StepStats | None:
        """Launch the model's next step, then commit the steps beyond its depth.

        All steps in flight are committed when there is nothing to run.
        """
        name = model.runner.info.name
        for other in self._others[name]:
            other.answered = None
        rang = [self._sequences.get(ident) for ident in model.alarms.due(self._clock())]
        context = self.context(name, until, tuple(seq for seq in rang if seq and seq.request.model == name))
        plan = self._schedule(context)
        if model.in_flight and not context.due and model.promises_drafts(plan, context):
            return self._commit(model, model.in_flight.popleft())
        if len(self.models) > 1 and self._move_late(model, plan, context):
            context = self.context(name, until, tuple(seq for seq in context.due if not seq.ended))
            plan = self._schedule(context)
        self._apply(model, plan)
        if plan.rows:
            model.add_drafts(plan, context)
            self._launch(model, plan)
        else:
            model.answered = None
        stats = None
        while len(model.in_flight) > (model.runner.depth if plan.rows else 0):
            stats = self._commit(model, model.in_flight.popleft())
        return stats

    def _move_late(self, model: ModelState, plan: Plan, context: SchedulingContext) -> bool:
        """Move sequences that would be late, and can be on time elsewhere; whether there were any."""
        moved, now = False, self._clock()
        look = now >= model.looked + LOOK_S
        if look:
            model.looked = now
        late = {*plan.to_move}
        for seq in movable(plan, look=look):
            request = lighter_request(seq, late, self._contexts)
            moved = (request is not None and self._move(model, seq, request, "moved")) or moved
        for seq in behind(context) if look else ():
            request = lighter_request(seq, late, self._contexts)
            if request is not None and self._move(model, seq, request, "moved"):
                return True  # that gives the other streams time
        return moved

    def _move(self, model: ModelState, seq: Sequence, request: Request, why: MoveReason) -> bool:
        """Let the model of `request` go on with a sequence, if all its tokens fit there."""
        context = self.models[request.model].runner.info.context
        if len(seq.tokens) >= context:
            return False
        if seq.slot >= 0:
            model.queues.running.remove(seq)
            model.pool.forget(seq.kv, wrong=False)
            self._release(model, seq)
        else:
            model.queues.waiting.remove(seq)
        if model.speculation is not None:
            model.speculation.forget(seq)
        if seq.deadline.whole < inf:
            model.queues.ends = [one for one in model.queues.ends if one[2] is not seq]
            heapify(model.queues.ends)
        seq.ended = True  # steps in flight may still hold it
        self.submit(seq.moved_to(request, context, why))
        return True

    def _apply(self, model: ModelState, plan: Plan) -> None:
        """Do to queues and blocks what the plan says."""
        for seq in plan.end:
            self._end(seq, Ending(Reason.DEADLINE))
        for seq, after in plan.refuse:
            self._end(seq, Ending(Reason.REFUSED, retry_after=after))
        while model.queues.ends and model.queues.ends[0][2].ended:
            heappop(model.queues.ends)
        self._place(model, plan)
        for seq in plan.preempt:
            self._preempt(model, seq)
        now = self._clock()
        for seq, matched in plan.admit:
            self._admit(model, seq, matched, now)
        for row in plan.rows:
            model.pool.extend(row.seq.kv, row.start + row.count)
        model.erase(model.pool.stale())  # they may hold NaN, which would spread to their new owners

    def _place(self, model: ModelState, plan: Plan) -> None:
        """Give sequences their new ranks, and record the newcomers' work and the plan's promises."""
        for seq, rank in plan.place:
            if not seq.ended:
                queue = model.queues.waiting if seq.slot < 0 else model.queues.running
                queue.remove(seq)
                seq.rank = rank
                insort(queue, seq, key=_rank)
        for at, seq in plan.first:
            model.alarms.add(at, seq.request.id)
        model.history.record(plan, self._limits.tiers, self._clock())

    def _preempt(self, model: ModelState, seq: Sequence) -> None:
        """Take a running sequence's blocks and slot; it waits at its old rank."""
        model.queues.running.remove(seq)
        self._release(model, seq)
        seq.preemptions += 1
        if not seq.request.spare_time:
            model.alarms.add(self._clock() + RESUME_S, seq.request.id)
        insort(model.queues.waiting, seq, key=_rank)

    def _admit(self, model: ModelState, seq: Sequence, matched: list[int], now: float) -> None:
        """Let a waiting sequence run, with the cached blocks that it adopts."""
        model.queues.waiting.remove(seq)
        model.pool.adopt(seq.kv, matched, claim=not seq.request.spare_time)
        seq.slot = model.slots.pop()
        if seq.started is None:
            seq.started = now
            seq.cached = seq.kv.computed
        insort(model.queues.running, seq, key=_rank)

    def _launch(self, model: ModelState, plan: Plan) -> None:
        load, started = plan.load, self._clock()
        try:
            pending = model.runner.launch(plan)
        except Exception as error:
            self._fail(plan.rows, error)
            return
        if model.answered is not None:
            model.history.turnarounds.add((self._clock() - model.answered) * 1e3)
            model.answered = None
        for row in plan.rows:
            seq, count = row.seq, row.count
            model.pool.advance(seq.kv, count)
            seq.in_flight += row.draw
            if (count > 1 or row.start % model.pool.size == 0) and not seq.request.spare_time:
                model.charge(row, apart=plan.apart)
        model.in_flight.append(InFlightStep(plan, pending, started, load))

    def _commit(self, model: ModelState, launched: InFlightStep) -> StepStats:
        """Append the tokens that a step drew, end what is complete, and publish the new blocks."""
        waiting = [row for row in launched.plan.rows if row.draw or row.scored]
        try:
            drawn = launched.pending.wait()
        except Exception as error:
            for row in waiting:
                row.seq.in_flight -= row.draw
            self._fail(launched.plan.rows, error)
            waiting, drawn = [], []
        model.answered = self._clock()
        accepted = 0
        for row, result in zip(waiting, drawn, strict=True):
            seq = row.seq
            seq.in_flight -= row.draw
            if row.scored and not seq.ended:
                self._score(row, result)
            if row.draw and not seq.kv.drawn and result.finite:
                model.pool.judge(seq.kv, row.start + row.count - len(row.draft))
            if row.draw and not seq.ended:
                try:
                    self._take(model, row, result)
                    if row.draft:
                        accepted += self._take_more(model, row, result.then)
                except Exception as error:
                    self._fail([row], error)
        for row in launched.plan.rows:
            seq = row.seq
            if not seq.ended and seq.kv.blocks:
                model.pool.publish(seq.kv)
                if not row.draw and not seq.draws and row.start + row.count == seq.length:
                    model.record_emission(seq, self._clock())
                    self._end(seq, Ending(Reason.LENGTH))
        stats = model.stats(launched, accepted, self._clock())
        model.unlearnt.append((launched.load, stats.ms))
        if not model.busy:
            model.answered = None
        return stats

    def _score(self, row: Row, drawn: Drawn) -> None:
        """Keep the log-probabilities of a prompt's tokens. A step before a preemption may have given some of
        them already."""
        seq = row.seq
        if len(drawn.scores) != row.scored:
            self._end(seq, Ending(Reason.ERROR, error=NOT_A_NUMBER))
        elif seq.scores is not None and (known := len(seq.scores) - row.positions_scored.start) >= 0:
            seq.scores += drawn.scores[known:]

    def _take_more(self, model: ModelState, row: Row, drawn: tuple[Drawn, ...]) -> int:
        """Take the tokens drawn after accepted draft tokens, until one ends the sequence; returns how many.

        What the rejected draft tokens left in the KV cache is trimmed.
        """
        seq, before = row.seq, row.seq.output_len
        if row.draft and model.speculation is not None and not seq.ended:
            model.speculation.observe(seq, len(row.draft), len(drawn))
        for each in drawn:
            if not seq.ended:
                self._take(model, row, each)
        accepted = seq.output_len - before
        if row.draft and not seq.ended:
            model.pool.trim(seq.kv, len(seq.tokens) - 1)
        return accepted

    def _take(self, model: ModelState, row: Row, drawn: Drawn) -> None:
        """Append one drawn token, emit it, and end the sequence if it is the last."""
        seq, tokens, token = row.seq, row.seq.tokens, drawn.token
        request = seq.request
        if request.cascade is not None and seq.unsure_of(drawn):
            heavier = heavier_request(seq, self._contexts)
            if heavier is not None and self._move(model, seq, heavier, "unsure"):
                return
        model.record_emission(seq, self._clock())
        if drawn.embedding is not None and drawn.finite:
            self._end(seq, Ending(Reason.STOP, embedding=drawn.embedding))
            return
        if token < 0:
            self._end(seq, seq.grammar_ending or Ending(Reason.ERROR, error=NOT_A_NUMBER))
            return
        stops = token in model.runner.eos and not request.sampling.ignore_eos
        if (stops or token in seq.stops) and seq.output_len >= request.sampling.min_tokens:
            tokens.append(token)
            self._end(seq, Ending(Reason.STOP, stop_token=token))
            return
        tokens.append(token)
        if seq.grammar is not None and not seq.grammar.accept(token):
            refused = Ending(Reason.ERROR, error="the grammar refused the model's token")
            self._end(seq, seq.grammar_ending or refused)
            return
        began = None
        if len(tokens) - seq.prompt_len == len(request.emitted) + 1 or seq.moved is not None:
            began, seq.scores, seq.moved = seq.began, None, None
        self._events.append(TokenEvent(request.id, token, drawn.logprobs, began=began))
        if seq.grammar is not None and seq.grammar.finished:
            self._end(seq, Ending(Reason.STOP))
        elif len(tokens) >= seq.limit:
            self._end(seq, Ending(Reason.LENGTH))

    def _end(self, seq: Sequence, ending: Ending) -> None:
        """End a sequence wherever it stands, and emit its end."""
        model = self.models[seq.request.model]
        if ending.reason in (Reason.STOP, Reason.LENGTH) and seq.draws:
            model.history.lengths.observe(seq.request.tier, seq.output_len)
        del self._sequences[seq.request.id]
        seq.ended = True
        if model.speculation is not None:
            model.speculation.forget(seq)
        if seq.slot >= 0:
            wrong = ending.reason is Reason.ERROR
            if seq.draws or wrong:
                model.pool.forget(seq.kv, wrong=wrong)
            model.queues.running.remove(seq)
            self._release(model, seq)
        else:
            model.queues.waiting.remove(seq)
        began = seq.began if seq.scores is not None or seq.moved is not None else None
        finish, vector = seq.finish(ending, self._clock()), ending.embedding
        self._events.append(TokenEvent(seq.request.id, finish=finish, embedding=vector, began=began))

    def _release(self, model: ModelState, seq: Sequence) -> None:
        model.pool.release(seq.kv, late=seq.in_flight > 0)
        model.slots.append(seq.slot)
        seq.slot = -1

    def _fail(self, rows: list[Row], error: Exception) -> None:
        """End the sequences of these rows, whose step raised, and no others."""
        named = {"request_id": ",".join([row.seq.request.request_id for row in rows])}
        log.error("a step of %s failed", rows[0].seq.request.model, exc_info=error, extra=named)
        reason = f"the step failed: {type(error).__name__}: {error}"
        for row in rows:
            if not row.seq.ended:
                self._end(row.seq, Ending(Reason.ERROR, error=reason))

    def _flush(self, stats: StepStats | None) -> None:
        if self._events or stats is not None:
            events, self._events = self._events, []
            self._emit(events, stats)
