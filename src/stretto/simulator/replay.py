"""A recorded load through the real engine and schedule in virtual time: hours take seconds.

A null model takes the place of the real one. A step takes what a cost model says, times some noise, so the
scheduler's own model is not exactly right. The scheduler does not know where an answer will end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from msgspec import structs

from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import Finished, NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits, Plan
from stretto.engine.sequence import Sequence as EngineSequence
from stretto.engine.step_time import StepLoad, StepTime
from stretto.simulator.harness import World
from stretto.simulator.report import ReplayReport, RequestOutcome, by_tier, wasted, weighted
from stretto.simulator.setting import Arrival, Setting, planned, request_of, within
from stretto.simulator.upper_bound import bounds
from stretto.types import Objective, Request, StepStats, TokenEvent

Outcomes = dict[int, RequestOutcome]


class TraceRunner(NullRunner):
    """The null model under a cost with noise. It counts the tokens computed for each request."""

    def __init__(self, setting: Setting, clock: VirtualClock, outcomes: Outcomes) -> None:
        info = null_info(context=setting.context, blocks=setting.blocks)
        super().__init__(info, cost=setting.cost, sleep=clock.sleep)
        self._noise = setting.noise
        self._outcomes = outcomes
        self._rng = Random(f"noise {setting.seed}")

    def step_ms(self, load: StepLoad) -> float:
        """The milliseconds of a step, with noise."""
        return self.cost(load) * (self._rng.lognormvariate(0.0, self._noise) if self._noise else 1.0)

    def launch(self, plan: Plan) -> Finished:
        """Run the step, and count what it computes."""
        for row in plan.rows:
            self._outcomes[row.seq.request.id].processed += row.count
        return super().launch(plan)


class TraceWorld(World):
    """One engine of one null model, and the outcome of every request."""

    def __init__(self, setting: Setting, outcomes: Outcomes, *, share: bool) -> None:
        clock = VirtualClock()
        times = StepTime(setting.known or setting.cost, [setting.noise] * 16)
        self.step_count = self.preemptions = 0
        self.outcomes = outcomes
        super().__init__(
            clock,
            [LoadedModel(TraceRunner(setting, clock, outcomes), times)],
            Limits(setting.max_running, setting.max_step_tokens, setting.tiers),
            SCHEDULES[setting.schedule],
            share=share,
            record=False,
        )

    def observe(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        """Record what the client of each request sees."""
        now = self.clock()
        for event in events:
            outcome = self.outcomes[event.id]
            if event.token is not None:
                outcome.on_token(now)
            if event.finish is not None:
                outcome.reason = event.finish.reason
                outcome.last = now
        if stats is not None:
            self.step_count += 1
            self.preemptions += stats.preempted


def replay(arrivals: Sequence[Arrival], setting: Setting, *, rate: float | None = None) -> ReplayReport:
    """Run a load and return the report of `replayed` alone."""
    return replayed(arrivals, setting, rate=rate)[0]


def replayed(
    arrivals: Sequence[Arrival], setting: Setting, *, rate: float | None = None
) -> tuple[ReplayReport, list[RequestOutcome]]:
    """Run a load; returns the report, and what the client of each request would have seen.

    `rate`: requests per second at load 1.0; None measures `capacity` first. Prompts that exceed the context
    are cut. Equal settings give equal reports.
    """
    usable = [within(arrival, setting) for arrival in arrivals]
    full = capacity(usable, setting) if rate is None else rate
    requests = planned(usable, setting, full)
    outputs = [arrival.output_tokens for arrival in usable]
    world = _run(requests, usable, setting)
    outcomes, end = list(world.outcomes.values()), requests[-1].arrival
    tiers = by_tier(outcomes, setting.tiers, end)
    (model,) = world.engine.models.values()
    report = ReplayReport(
        schedule=setting.schedule,
        load=setting.load,
        rate=len(outcomes) / end if end else 0.0,
        capacity=full,
        duration_s=end,
        drained_s=world.clock(),
        steps=world.step_count,
        tokens=sum(one.processed for one in outcomes),
        wasted=wasted(outcomes),
        preemptions=world.preemptions,
        model_error=model.history.times.error,
        weighted_goodput=weighted(tiers, setting.tiers),
        tiers=tiers,
        objectives={name: tier.objective for name, tier in setting.tiers.items()},
        best_goodput=bounds(requests, outputs, setting),
    )
    return report, outcomes


def capacity(arrivals: Sequence[Arrival], setting: Setting, most: int = 2000) -> float:
    """Requests per second that `fcfs` completes when the first `most` all wait from the start.

    It never idles then and its batches are the largest, so load 1.0 is where it saturates.
    """
    usable = [within(arrival, setting) for arrival in arrivals[:most]]
    requests = [
        request_of(arrival, ident, 0.0, tier="flex", objective=Objective())
        for ident, arrival in enumerate(usable, 1)
    ]
    world = _run(requests, usable, structs.replace(setting, schedule="fcfs", noise=0.0))
    return len(requests) / world.clock()


def _run(requests: Sequence[Request], arrivals: Sequence[Arrival], setting: Setting) -> TraceWorld:
    """Run these requests to their recorded lengths, which stand in the sequences' limits.

    A schedule looks at the request alone, which asks for no limit.
    """
    outcomes = {request.id: RequestOutcome.of(request) for request in requests}
    world = TraceWorld(setting, outcomes, share=any(arrival.prefix for arrival in arrivals))
    lengths = [arrival.prompt_tokens + arrival.output_tokens for arrival in arrivals]
    world.run(arriving=map(EngineSequence.of, requests, [min(length, setting.context) for length in lengths]))
    return world
