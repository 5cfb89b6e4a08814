"""One model of the engine: as it is loaded, and as it is served.

`stretto.engine.core` alone changes it and calls what changes it. It knows no other model and no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import inf

from msgspec import Struct
from msgspec.structs import replace

from stretto.engine.kv_cache import BlockPool
from stretto.engine.runners.interface import Pending, Runner
from stretto.engine.scheduler.lateness import Alarms
from stretto.engine.scheduler.lengths import IdleTime
from stretto.engine.scheduler.types import History, Limits, Plan, Queues, Row, SchedulingContext
from stretto.engine.sequence import SPARE_TIME, TIMED, Sequence
from stretto.engine.speculative.policy import Speculation
from stretto.engine.step_time import StepLoad, StepTime
from stretto.types import ModelInfo, StepStats


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
    """One model while the engine serves it."""

    runner: Runner
    pool: BlockPool
    slots: list[int]  # the free rows of the runner's tables
    history: History
    speculation: Speculation | None = None
    queues: Queues = field(default_factory=Queues)
    alarms: Alarms = field(default_factory=Alarms)
    freed: float = -inf  # when its last step was over
    answered: float | None = None  # when the result of its last step came, while it goes on at once
    looked: float = -inf  # when it last looked for another model for those that would be late
    in_flight: deque[InFlightStep] = field(default_factory=lambda: deque[InFlightStep]())
    unlearnt: list[tuple[StepLoad, float]] = field(default_factory=list[tuple[StepLoad, float]])

    @classmethod
    def of(cls, model: LoadedModel, limits: Limits, idle: IdleTime, *, share: bool) -> ModelState:
        """Before any request. `idle`: that of the device. `share` turns the prefix cache on."""
        runner, info = model.runner, model.runner.info
        return cls(
            runner=runner,
            pool=BlockPool(info.blocks, info.block_size, share=share),
            slots=list(range(limits.max_running - 1, -1, -1)),
            history=History.of(model.times, info.usual_tokens, limits.tiers, idle),
            speculation=model.speculation,
        )

    @property
    def busy(self) -> bool:
        return bool(self.in_flight or self.queues.waiting or self.queues.running)

    @property
    def needs_time(self) -> bool:
        """Whether it has work that is not for spare time. Such work stands first in both queues."""
        queues = (self.queues.waiting, self.queues.running)
        return any(queue and queue[0].rank.group != SPARE_TIME for queue in queues)

    @property
    def streams_alone(self) -> bool:
        """Whether all its work is streams with deadlines."""
        timed = all(seq.rank.group == TIMED and seq.deadline.emitted for seq in self.queues.running)
        return timed and not self.queues.waiting and bool(self.queues.running)

    def learn(self, now: float) -> None:
        """Learn from the steps that have been committed: their loads and milliseconds."""
        for load, ms in self.unlearnt:
            self.history.observe(load, ms, now)
        self.unlearnt.clear()

    def latest_start(self) -> float:
        """When its next step must start for its deadlines to be met; inf when it has none."""
        return self.queues.latest_start(self.history.times.cost)

    def promises_drafts(self, plan: Plan, context: SchedulingContext) -> bool:
        """Whether draft tokens are predicted to pay off for a plan that is made when the results of the steps
        in flight are known. Until then the tokens that they would follow are not."""
        return self.speculation is not None and bool(self.speculation.choose(plan, context).by_sequence)

    def add_drafts(self, plan: Plan, context: SchedulingContext) -> None:
        """Let the plan's decodes verify draft tokens where that is predicted to pay off."""
        speculation = self.speculation
        if speculation is None or self.in_flight:
            return
        chosen = speculation.choose(plan, context)
        counts = chosen.by_sequence
        if counts:
            for row in plan.rows:
                self.pool.extend(row.seq.kv, row.start + row.count + counts.get(row.seq, 0))
            self.erase(self.pool.stale())
            drafts = speculation.propose(chosen)
            if chosen.model:
                self.answered = None  # the time of a draft model is no turnaround
            plan.add_drafts(drafts, self.history.times.cost, apart=speculation.apart)

    def charge(self, row: Row, *, apart: bool) -> None:
        """Charge a tenant for a chunk of a prompt, a row with draft tokens, or a block of decodes.

        `apart`: whether each draft token reads the keys by itself.
        """
        cost, size = self.history.times.cost, self.pool.size
        if row.draft:
            ms = cost(Plan("", rows=[row], apart=apart).load) - cost.base
        else:
            ms = cost.prefill(row.start, row.count) if row.count > 1 else size * cost.row(row.start)
        self.history.fairness.charge(row.seq.request.tenant, ms)

    def record_emission(self, seq: Sequence, now: float) -> None:
        """Record the time of a token. The first one sets the pace at which the whole answer is on time."""
        deadline = seq.deadline
        if not deadline.emitted and deadline.whole < inf:
            deadline.keep_pace(now, self.history.lengths.of(seq.request))
        deadline.emit(now)

    def erase(self, blocks: list[int]) -> None:
        """Zero blocks, after all launched steps."""
        if blocks:
            self.runner.erase(blocks)
            if self.speculation is not None:
                self.speculation.erase(blocks)

    def stats(self, launched: InFlightStep, accepted: int, now: float) -> StepStats:
        """What is reported of a step that is over now. `accepted`: its draft tokens that were right."""
        plan, load = launched.plan, launched.load
        proposed = sum(len(row.draft) for row in plan.rows)
        started, self.freed = max(launched.started, self.freed), now
        return StepStats(
            model=plan.model,
            started=started,
            ms=(now - started) * 1e3,
            decode_tokens=load.decode - proposed + accepted,
            prefill_tokens=load.prefill,
            context_tokens=load.context,
            running=len(self.queues.running),
            waiting=len(self.queues.waiting),
            blocks_free=self.pool.available,
            blocks_total=self.pool.total,
            preempted=len(plan.preempt),
            predicted_ms=plan.predicted,
            proposed=proposed,
            accepted=accepted,
        )

    def check(self, max_running: int) -> None:
        """Raise AssertionError when its sequences disagree with its pool, or with its `max_running` slots."""
        running, waiting = self.queues.running, self.queues.waiting
        self.pool.check(seq.kv for seq in running)
        assert all(not seq.kv.blocks for seq in waiting), "a waiting sequence holds blocks"
        assert len(self.slots) + len(running) == max_running, "slots were lost"


class InFlightStep(Struct, frozen=True):
    """A step between its launch and its commit."""

    plan: Plan
    pending: Pending
    started: float
    load: StepLoad
