"""Measures second attempts in virtual time: several workers, one of which is slow now and then.

    python benchmarks/hedging.py [--requests 3000] [--load 0.5] [--slow 10] [--json]

Every worker is the real engine over a null model; the gateway's real router and its real decision about
second attempts act on them. For 0.3 s in every second the steps of one worker take `slow` times as long as
its step-time model expects: too short for the model, and so the router, to learn it. The loser of two
attempts is cancelled at the winner's first token. Prints the time to the first token without and with second
attempts, how many there were, and the extra work in tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from random import Random
from typing import cast

from msgspec import Struct, json, structs

from stretto.config import Tier
from stretto.engine.scheduler.admission import Outlook, snapshot
from stretto.engine.sequence import Sequence as EngineSequence
from stretto.engine.step_time import StepCost, StepLoad
from stretto.gateway.routing.hedge import Hedges
from stretto.gateway.routing.router import Ask, Placement, Router, WorkerView
from stretto.simulator.replay import Outcomes, TraceRunner, TraceWorld
from stretto.simulator.report import RequestOutcome
from stretto.simulator.setting import Arrival, Setting, request_of
from stretto.statistics import quantile
from stretto.types import Objective, Request

COST = StepCost(base=8.0, per_decode=0.1, per_prefill=0.05)
TTFT_MS = 150.0
TICK_S = 0.005  # the gateway looks for first tokens so often
REPORT_S = 0.05
PERIOD_S, BURST_S = 1.0, 0.3
WORKERS = 4
SECOND = 1_000_000  # what a second attempt's id exceeds the request's by


class HedgingFigures(Struct, frozen=True, kw_only=True):
    """What one run showed. Times are milliseconds."""

    ttft_p50_ms: float
    ttft_p99_ms: float
    ttft_max_ms: float
    on_time: float
    seconds: int
    won: int
    tokens: int


class UnsteadyWorld(TraceWorld):
    """An engine whose steps take `slow` times as long in bursts."""

    def __init__(self, setting: Setting, outcomes: Outcomes, slow: float) -> None:
        super().__init__(setting, outcomes, share=False)
        runner = self.engine.models["null"].runner
        assert isinstance(runner, TraceRunner)
        usual = runner.step_ms

        def step_ms(load: StepLoad) -> float:
            return usual(load) * (slow if self.clock() % PERIOD_S < BURST_S else 1.0)

        runner.step_ms = step_ms  # type: ignore[method-assign]


@dataclass(slots=True)
class Flight:
    """A request that has no first token yet."""

    ask: Ask
    length: int
    first: Placement
    second: Placement | None = None


@dataclass
class Fleet:
    """The workers, and a gateway in front of them. `hedges`: None for a gateway without second attempts."""

    setting: Setting
    slow: float
    hedges: Hedges | None
    outcomes: Outcomes = field(default_factory=dict[int, RequestOutcome])
    router: Router = field(default_factory=lambda: Router("deadline", Random(1).randrange))
    worlds: dict[str, TraceWorld] = field(default_factory=dict[str, TraceWorld])
    running: dict[int, tuple[WorkerView, str]] = field(default_factory=dict[int, tuple[WorkerView, str]])
    flights: dict[int, Flight] = field(default_factory=dict[int, Flight])
    ttfts: dict[int, float] = field(default_factory=dict[int, float])
    seconds: int = 0
    won: int = 0
    newest: int = 0
    reported: float = -inf

    def __post_init__(self) -> None:
        for number in range(WORKERS):
            name = f"w{number}"
            self.worlds[name] = UnsteadyWorld(self.setting, self.outcomes, self.slow if not number else 1.0)
            self.router.workers[name] = WorkerView(name, outlooks={"null": Outlook(self.setting.tiers)})

    def advance(self, now: float) -> None:
        """Run the workers until `now`, take their reports, and see which answers began or ended."""
        for name, world in self.worlds.items():
            if world.clock() < now:
                world.run(until=now)
            if now >= self.reported + REPORT_S:
                view = self.router.workers[name]
                view.seen = now
                view.outlooks["null"].see(snapshot(world.engine.context("null"), self.newest))
        if now >= self.reported + REPORT_S:
            self.reported = now
        for ident in [ident for ident in self.running if self.outcomes[ident].reason is not None]:
            self.router.done(self.running.pop(ident)[0])
        for flight in list(self.flights.values()):
            self._look(flight, now)

    def send(self, flight: Flight, placement: Placement, ident: int) -> None:
        """Send one attempt to its worker."""
        request = structs.replace(flight.ask.request, id=ident, prompt=(0,) * len(flight.ask.request.prompt))
        self.outcomes[ident] = RequestOutcome.of(request)
        name = placement.worker.name
        self.running[ident] = placement.worker, name
        self.newest = max(self.newest, flight.ask.request.id)
        self.worlds[name].engine.submit(EngineSequence.of(request, flight.length))

    def arrive(self, request: Request, length: int) -> float:
        """A request comes; returns when to think about a second attempt."""
        ask = Ask(structs.replace(request, prompt=cast("tuple[int, ...]", range(len(request.prompt)))))
        placement = self.router.place(ask, request.arrival)
        assert placement is not None
        flight = self.flights[request.id] = Flight(ask, length, placement)
        self.send(flight, placement, request.id)
        if self.hedges is None:
            return inf
        self.hedges.placed(ask, placement)
        return request.arrival + self.hedges.wait(ask, placement)

    def reconsider(self, ident: int, now: float) -> None:
        """The time has come at which a first token should have been there."""
        flight = self.flights.get(ident)
        if flight is None or self.hedges is None:
            return
        flight.second = self.hedges.second(self.router, flight.ask, flight.first, now, ())
        if flight.second is not None:
            self.seconds += 1
            self.send(flight, flight.second, ident + SECOND)

    def _look(self, flight: Flight, now: float) -> None:
        ident, arrival = flight.ask.request.id, flight.ask.request.arrival
        attempts = [(self.outcomes[ident].first, ident, flight.first)]
        if flight.second is not None:
            attempts.append((self.outcomes[ident + SECOND].first, ident + SECOND, flight.second))
        came, winner, placement = min(attempts, key=lambda attempt: attempt[0])
        if came > now:
            if all(self.outcomes[each].reason is not None for _, each, _ in attempts):
                del self.flights[ident]  # refused
            return
        self.ttfts[ident] = came - arrival
        self.won += winner != ident
        if self.hedges is not None:
            self.hedges.came(placement, came - arrival)
        for _, loser, _ in attempts:
            if loser != winner and loser in self.running:
                view, name = self.running.pop(loser)
                self.worlds[name].engine.cancel(loser)
                self.router.done(view)
        del self.flights[ident]


def requests(count: int, load: float, seed: int = 0) -> Iterator[tuple[Request, int]]:
    """Requests of 200 to 600 tokens and answers of 16 to 48, with the tokens of both."""
    rng = Random(seed)
    at = 0.0
    mean_ms = 400 * COST.per_prefill + 32 * (COST.base / 4 + COST.per_decode)  # four share a step
    for ident in range(1, count + 1):
        at += rng.expovariate(load * WORKERS / (mean_ms / 1e3))
        arrival = Arrival(at, rng.randrange(200, 601), rng.randrange(16, 49))
        request = request_of(arrival, ident, at, tier="default", objective=Objective(ttft_ms=TTFT_MS))
        yield request, arrival.prompt_tokens + arrival.output_tokens


def run(count: int, load: float, slow: float, share: float) -> HedgingFigures:
    """Send the load; `share`: of the work, for second attempts."""
    tiers = {"default": Tier(objective=Objective(ttft_ms=TTFT_MS), weight=2.0)}
    setting = Setting(cost=COST, noise=0.05, tiers=tiers, mix={"default": 1.0})
    fleet = Fleet(setting, slow, Hedges(share) if share else None)
    due: list[tuple[float, int]] = []
    now = 0.0
    for request, length in requests(count, load):
        while now + TICK_S < request.arrival:
            now += TICK_S
            fleet.advance(now)
            while due and due[0][0] <= now:
                fleet.reconsider(heappop(due)[1], now)
        now = request.arrival
        fleet.advance(now)
        when = fleet.arrive(request, length)
        if when < inf:
            heappush(due, (when, request.id))
    for _ in range(int(20 / TICK_S)):
        now += TICK_S
        fleet.advance(now)
    found = sorted(fleet.ttfts.values())
    return HedgingFigures(
        ttft_p50_ms=quantile(found, 0.5) * 1e3,
        ttft_p99_ms=quantile(found, 0.99) * 1e3,
        ttft_max_ms=found[-1] * 1e3,
        on_time=sum(ttft <= TTFT_MS / 1e3 for ttft in found) / count,
        seconds=fleet.seconds,
        won=fleet.won,
        tokens=sum(one.processed for one in fleet.outcomes.values()),
    )


def main() -> None:
    """Run with and without second attempts and print both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--load", type=float, default=0.5)
    parser.add_argument("--slow", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    without = run(options.requests, options.load, options.slow, 0.0)
    hedged = run(options.requests, options.load, options.slow, options.share)
    if options.json:
        print(json.encode({"without": without, "with": hedged}).decode())
        return
    for name, each in (("without", without), ("with", hedged)):
        print(
            f"{name:>8}: TTFT p50 {each.ttft_p50_ms:.0f} ms, p99 {each.ttft_p99_ms:.0f}, max "
            f"{each.ttft_max_ms:.0f}; {each.on_time:.1%} on time; "
            f"{each.seconds} second attempts, {each.won} won"
        )
    print(
        f"TTFT p99 with second attempts is {hedged.ttft_p99_ms / without.ttft_p99_ms:.2f} of that without, "
        f"for {hedged.tokens / without.tokens - 1:+.1%} tokens"
    )


if __name__ == "__main__":
    main()
