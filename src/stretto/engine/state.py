"""One model of the engine: as it is loaded, and as it is served. `stretto.engine.core` alone changes it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import inf

from msgspec import Struct
from msgspec.structs import replace

from stretto.engine.kv_cache import BlockPool
from stretto.engine.runners.interface import Pending, Runner
from stretto.engine.scheduler.lateness import Alarms
from stretto.engine.scheduler.types import History, Plan, Queues
from stretto.engine.sequence import SPARE_TIME, TIMED
from stretto.engine.speculative.policy import Speculation
from stretto.engine.step_time import StepLoad, StepTime
from stretto.types import ModelInfo


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


class InFlightStep(Struct, frozen=True):
    """A step between its launch and its commit."""

    plan: Plan
    pending: Pending
    started: float
    load: StepLoad
