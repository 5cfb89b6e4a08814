"""A world with the admission of the API server: what is refused, when, and whether `Retry-After` was right.

A request is refused when it comes, by the engine's snapshot, or later by the schedule. Each `Retry-After` is
compared with the time after which a request like the refused one would have been admitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from msgspec import structs

from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import VirtualClock
from stretto.engine.scheduler.admission import predict, snapshot
from stretto.engine.scheduler.types import Limits, SchedulePolicy, tier_weight
from stretto.simulator.harness import World
from stretto.simulator.report import RequestOutcome
from stretto.types import Reason, Request, StepStats, TokenEvent

SHORTEST_S = 1.0  # `Retry-After` is whole seconds, so none is shorter


@dataclass(slots=True)
class RefusedRequest:
    """One refused request, in seconds."""

    request: Request
    at: float
    told_s: float  # its `Retry-After`
    actual_s: float = inf  # until a request like it would have been admitted

    @property
    def after_s(self) -> float:
        """How long after it came it was refused."""
        return self.at - self.request.arrival

    @property
    def right(self) -> bool:
        """Whether `Retry-After` was right within a factor of 2. Both are at least `SHORTEST_S`."""
        told, actual = max(self.told_s, SHORTEST_S), max(self.actual_s, SHORTEST_S)
        return told / 2 <= actual <= told * 2


class OverloadWorld(World):
    """One engine of one null model behind the admission of the API server."""

    def __init__(
        self, clock: VirtualClock, models: list[LoadedModel], limits: Limits, schedule: SchedulePolicy
    ) -> None:
        self.refusals: dict[int, RefusedRequest] = {}
        self._open: list[RefusedRequest] = []  # those whose `actual_s` is not known yet
        self._tiers = limits.tiers
        super().__init__(clock, models, limits, schedule, record=False)

    def offer(self, request: Request) -> None:
        """Send a request to the engine, unless it is refused when it comes."""
        self._follow()
        after = self._refused_for(request)
        if after > 0:
            self.requests[request.id] = request
            self._refuse(request, after, request.arrival)  # the API server waits for no step
            cost = self.engine.models[request.model].history.times.cost
            weight = tier_weight(self._tiers, request.tier)
            self.engine.turn_away(request.model, weight, cost.prefill(0, len(request.prompt)))
        else:
            self.submit(structs.replace(request, admitted=True))

    def observe(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        """Record what the engine emitted, and what it refused."""
        super().observe(events, stats)
        for event in events:
            if event.finish is not None and event.finish.reason is Reason.REFUSED:
                self._refuse(self.requests[event.id], event.finish.retry_after or 0.0, self.clock())

    def step(self) -> bool:
        """Run one step, then see which refused requests would be admitted now."""
        ran = super().step()
        self._follow()
        return ran

    def outcomes(self) -> list[RequestOutcome]:
        """What the client of each request saw. All must have ended."""
        made = [RequestOutcome.of(request) for request in self.requests.values()]
        for one in made:
            ident = one.request.id
            for stamp in self.stamps.get(ident, ()):
                one.on_token(stamp)
            end, refusal = self.ends.get(ident), self.refusals.get(ident)
            one.reason = Reason.REFUSED if end is None else end.reason
            one.last = self.ended_at[ident] if refusal is None else refusal.at
        return made

    def _refused_for(self, request: Request) -> float:
        seen = snapshot(self.engine.context(request.model), len(self.requests))
        weight = tier_weight(self._tiers, request.tier)
        return predict(request, seen, weight, self.clock()).refusal(request)

    def _refuse(self, request: Request, after: float, at: float) -> None:
        refusal = RefusedRequest(request, at, after)
        self.refusals[request.id] = refusal
        self._open.append(refusal)

    def _follow(self) -> None:
        """Find which refused requests would be admitted now. One of a tier stands for all: they are alike."""
        now, admitted = self.clock(), dict[str, bool]()
        for refusal in self._open:
            request = refusal.request
            if request.tier not in admitted:
                admitted[request.tier] = self._refused_for(structs.replace(request, arrival=now)) == 0
            if admitted[request.tier]:
                refusal.actual_s = now - refusal.at
        self._open = [refusal for refusal in self._open if refusal.actual_s == inf]
