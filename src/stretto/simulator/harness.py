"""The engine over null models in virtual time: the harness of every scheduler test, and of the replay.

Time moves only when a step takes some or `run` waits, so a run is exact, instant and the same each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.null import VirtualClock
from stretto.engine.scheduler.types import Limits, Plan, SchedulePolicy, SchedulingContext
from stretto.engine.sequence import Sequence
from stretto.types import Finish, Request, StepStats, TokenEvent

MAX_IDLE_STEPS = 10  # in a row, while requests are left


class World:
    """An engine, its clock, and all that it planned and emitted.

    The runners of `models` must wait with `clock.sleep`. `record=False` is for long loads: it keeps no plan
    and checks no invariant, and a subclass replaces `observe`.
    """

    def __init__(
        self,
        clock: VirtualClock,
        models: list[LoadedModel],
        limits: Limits,
        schedule: SchedulePolicy,
        *,
        share: bool = True,
        record: bool = True,
    ) -> None:
        self.clock = clock
        self.requests: dict[int, Request] = {}
        self.events: dict[int, list[TokenEvent]] = {}  # by request
        self.stamps: dict[int, list[float]] = {}  # when each token of a request was emitted
        self.ends: dict[int, Finish] = {}
        self.ended_at: dict[int, float] = {}
        self.steps: list[StepStats] = []
        self.plans: list[Plan] = []
        self._schedule = schedule
        self._record = record
        self.engine = EngineCore(
            models,
            limits=limits,
            schedule=self._plan if record else schedule,
            clock=clock,
            emit=self.observe,
            share=share,
        )

    def observe(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        """Record what the engine emitted. Raises AssertionError when a request ends twice."""
        self.steps += [] if stats is None else [stats]
        for event in events:
            self.events.setdefault(event.id, []).append(event)
            if event.token is not None:
                self.stamps.setdefault(event.id, []).append(self.clock())
            if event.finish is not None:
                assert event.id not in self.ends, f"request {event.id} ended twice"
                self.ends[event.id] = event.finish
                self.ended_at[event.id] = self.clock()

    def submit(self, request: Request) -> Request:
        """Send a request to the engine."""
        self.requests[request.id] = request
        self.engine.submit(Sequence.of(request, self.engine.models[request.model].runner.info.context))
        return request

    def cancel(self, ident: int) -> None:
        """Cancel a request and check the invariants."""
        self.engine.cancel(ident)
        self.engine.check()

    def step(self) -> bool:
        """Run one step and check the invariants; False when there was nothing to run."""
        ran = self.engine.step()
        if self._record:
            self.engine.check()
        return ran

    def run(self, until: float = inf, arriving: Iterable[Sequence] = ()) -> None:
        """Step until nothing is left or the clock says `until`, and submit each sequence when it arrives.

        `arriving` is in order of arrival. Raises RuntimeError when requests are left and nothing is run.
        """
        coming = iter(arriving)
        following = next(coming, None)
        idle_steps = 0
        if self.engine.idle:
            self.engine.step()  # it emits the ends of cancelled requests
        while self.clock() < until and not (following is None and self.engine.idle):
            while following is not None and following.request.arrival <= self.clock():
                self.engine.submit(following)
                following = next(coming, None)
            if self.step():
                idle_steps = 0
            elif following is not None:
                self.clock.sleep(max(min(following.request.arrival, until) - self.clock(), 0.0))
            else:
                idle_steps += 1
                if idle_steps == MAX_IDLE_STEPS:
                    raise RuntimeError("the schedule runs nothing, and requests are left")
        if until < inf:
            self.clock.sleep(max(until - self.clock(), 0.0))

    def tokens(self, ident: int) -> list[int]:
        """The tokens emitted for a request."""
        return [event.token for event in self.events.get(ident, []) if event.token is not None]

    def _plan(self, context: SchedulingContext) -> Plan:
        plan = self._schedule(context)
        self.plans.append(plan)
        return plan
