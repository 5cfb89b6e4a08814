"""Compares the gateway's ways to choose a worker, in virtual time on a recorded load.

    python benchmarks/routing.py TRACE [--workers 8] [--load 1.0] [--requests 4000] [--skip 0] [--seed 0]
        [--routes deadline,sticky]

Every worker is the real engine with the schedule `deadline` over a null model in virtual time. The gateway's
real router places each request at its arrival, from reports of at most 50 ms ago. The load is a multiple
of what the workers can serve together under fcfs. Prefixes are those of the trace. Prints one row a route:
attainment, goodput, TTFT p50, p99 and maximum, and the share of prompt tokens that were in a prefix cache,
beside the share that one cache without limits would have held of the same prompts: a prompt that a worker
refused is in no cache. Then it prints how much better `deadline` is than the best baseline, and how much
better anything could be.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from random import Random
from time import perf_counter
from typing import cast

from msgspec import structs

from stretto.bench import traces
from stretto.deadlines import Deadline
from stretto.engine.scheduler.admission import Outlook, snapshot
from stretto.engine.sequence import Sequence as EngineSequence
from stretto.gateway.routing.router import Ask, Method, Placement, Router, WorkerView
from stretto.simulator import upper_bound
from stretto.simulator.replay import Outcomes, TraceWorld, capacity
from stretto.simulator.report import ANSWERED, RequestOutcome, TierReport, by_tier
from stretto.simulator.setting import PREFIX_BLOCK, Arrival, Setting, planned, within
from stretto.types import Request, StepStats, TokenEvent

ROUTES: tuple[Method, ...] = ("round-robin", "least-load", "two-choices", "sticky", "deadline")
REPORT_S = 0.05
BLOCK = 16  # tokens of a KV block of the null model


class CountingWorld(TraceWorld):
    """One engine in virtual time that counts the tokens of prompts, and those in the prefix cache."""

    def __init__(self, setting: Setting, outcomes: Outcomes, *, share: bool) -> None:
        super().__init__(setting, outcomes, share=share)
        self.asked = self.cached = 0

    def observe(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        """Count the prompts that were read."""
        for event in events:
            began = event.began
            if event.token is not None and began is not None:
                self.asked += len(self.outcomes[event.id].request.prompt)
                self.cached += began.cached_tokens
        super().observe(events, stats)


class SimulatedWorker:
    """One engine in virtual time, and the gateway's view of it."""

    def __init__(self, name: str, setting: Setting, outcomes: Outcomes, *, share: bool) -> None:
        self.world = CountingWorld(setting, outcomes, share=share)
        pieces = setting.blocks * BLOCK // PREFIX_BLOCK
        self.view = WorkerView(name, outlooks={"null": Outlook(setting.tiers)}, pieces=pieces)
        self._outcomes = outcomes
        self._running: set[int] = set()
        self._newest = 0
        self._reported = -inf

    def advance(self, now: float) -> list[int]:
        """Run until `now`, and report if the last report is old. Returns the ids of what it has refused."""
        if self.world.clock() < now:
            self.world.run(until=now)
        ended = {ident for ident in self._running if self._outcomes[ident].reason is not None}
        self._running -= ended
        self.view.active -= len(ended)
        refused = [ident for ident in ended if self._outcomes[ident].reason not in ANSWERED]
        if now >= self._reported + REPORT_S:
            self._reported = self.view.seen = now
            self.view.outlooks["null"].see(snapshot(self.world.engine.context("null"), self._newest))
        return refused

    def submit(self, request: Request, length: int) -> None:
        """Send a request to the engine; it ends when it has `length` tokens."""
        self._running.add(request.id)
        self._newest = request.id
        self.world.engine.submit(EngineSequence.of(request, length))


@dataclass(frozen=True)
class Replayed:
    """What became of a load with one route. Shares are of the tokens of the prompts that were read."""

    timed: TierReport
    cached: float
    one_cache: float  # that one cache without limits would have held
    choice_us: float

    def row(self, route: str) -> list[str]:
        """Its row of the table."""
        ttft = self.timed.ttft_ms
        times = [] if ttft is None else [f"{value / 1e3:.2f}" for value in (ttft.p50, ttft.p99, ttft.max)]
        return [
            route,
            f"{self.timed.attainment:.1%}",
            f"{self.timed.goodput:.4f}",
            *times,
            f"{self.cached:.1%}",
            f"{self.one_cache:.1%}",
            str(self.timed.refused),
            f"{self.choice_us:.0f}",
        ]


def run(route: Method, load: list[tuple[Request, Arrival]], setting: Setting, workers: int) -> Replayed:
    """Replay the load over the workers with one route."""
    outcomes = {request.id: RequestOutcome.of(request) for request, _ in load}
    share = any(arrival.prefix for _, arrival in load)  # without prefixes all prompts would look alike
    names = [f"w{number}" for number in range(workers)]
    pool = {name: SimulatedWorker(name, setting, outcomes, share=share) for name in names}
    router = Router(route, Random(1).randrange)
    router.workers = {name: worker.view for name, worker in pool.items()}
    deciding, placements = 0.0, dict[int, tuple[Ask, Placement]]()
    for request, arrival in load:
        for worker in pool.values():
            for refused in worker.advance(request.arrival):
                router.refused(*placements[refused])
        lengths = cast("tuple[int, ...]", range(len(request.prompt)))
        ask = Ask(structs.replace(request, prompt=lengths), keys_of(arrival), PREFIX_BLOCK)
        began = perf_counter()
        placed = router.place(ask, request.arrival)
        deciding += perf_counter() - began
        assert placed is not None
        placements[request.id] = ask, placed
        total = min(arrival.prompt_tokens + arrival.output_tokens, setting.context)
        pool[placed.worker.name].submit(request, total)
    for worker in pool.values():
        worker.world.run()
    timed = by_tier(list(outcomes.values()), setting.tiers, load[-1][0].arrival)["timed"]
    asked, cached = (sum(getattr(one.world, name) for one in pool.values()) for name in ("asked", "cached"))
    read = [(request, arrival) for request, arrival in load if outcomes[request.id].count]
    return Replayed(timed, cached / asked, reuse_of_one_cache(read, inf), deciding / len(load) * 1e6)


def keys_of(arrival: Arrival) -> tuple[int, ...]:
    """The keys of the prompt's whole blocks, each of which covers everything before it."""
    keys: list[int] = []
    key = hash(arrival.tenant)
    for block in arrival.prefix[: arrival.prompt_tokens // PREFIX_BLOCK]:
        key = hash((key, block))
        keys.append(key)
    return tuple(keys)


def reuse_of_one_cache(load: Sequence[tuple[Request, Arrival]], pieces: float) -> float:
    """The share of the prompts' tokens that one cache of so many pieces would hold, the least recently used
    ones forgotten first."""
    seen: OrderedDict[int, None] = OrderedDict()
    held = asked = 0
    for request, arrival in load:
        keys = keys_of(arrival)
        known = next((index for index, key in enumerate(keys) if key not in seen), len(keys))
        held += min(known * PREFIX_BLOCK, len(request.prompt) - 1)
        asked += len(request.prompt)
        for key in reversed(keys):
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > pieces:
            seen.popitem(last=False)
    return held / asked


def most_on_time(
    load: Sequence[tuple[Request, Arrival]], setting: Setting, workers: int, end: float = inf
) -> float:
    """The share of the timed requests that no placement exceeds, of those that end by `end`.

    All workers are taken for one machine that is as fast as they are together, steps cost nothing of their
    own, and one cache without limits holds all that came before. A request counts in two parts, as much as
    they weigh in it: its prompt, which one worker must read until the first token is due, and its answer.
    """
    cost, seen, timed, works = setting.cost, set[int](), 0, list[upper_bound.Work]()
    for request, arrival in load:
        keys = keys_of(arrival)
        known = next((index for index, key in enumerate(keys) if key not in seen), len(keys))
        seen.update(keys)
        if not request.objective.timed:
            continue
        timed += 1
        length = len(request.prompt)
        cached = min(known * PREFIX_BLOCK, length - 1)
        tokens = min(arrival.output_tokens, setting.context - length)
        deadline = Deadline.of(request.arrival, request.objective)
        first, last = (min(deadline.of_token(token), end) for token in (0, tokens - 1))
        parts = (
            (first, cost.prefill(cached, length - cached) / 1e3),
            (last, (tokens - 1) * cost.row(length + tokens // 2) / 1e3),
        )
        whole = sum(seconds for _, seconds in parts)
        if request.arrival + parts[0][1] <= first and request.arrival + whole <= last:
            works += [
                upper_bound.Work(request.arrival, due, seconds / workers, worth=seconds / whole)
                for due, seconds in parts
                if seconds
            ]
    return upper_bound.most_on_time(works) / timed


def main() -> None:
    """Run the routes and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--skip", type=int, default=0, help="so many requests of the trace")
    parser.add_argument("--seed", type=int, default=0, help="of the tiers and of the steps' noise")
    parser.add_argument("--blocks", type=int, default=16384, help="of 16 tokens, in each worker's KV cache")
    parser.add_argument("--routes", default=",".join(ROUTES))
    options = parser.parse_args()
    setting = Setting(
        load=options.load * options.workers, noise=0.05, blocks=options.blocks, seed=options.seed
    )
    recorded = traces.read(options.trace, requests=options.skip + options.requests)[options.skip :]
    start = recorded[0].at
    arrivals = [within(structs.replace(each, at=each.at - start), setting) for each in recorded]
    rate = capacity(arrivals, setting, most=500)
    load = list(zip(planned(arrivals, setting, rate), arrivals, strict=True))
    pieces = options.workers * options.blocks * BLOCK / PREFIX_BLOCK
    print(
        f"{len(load)} requests, {options.workers} workers with KV caches of {options.blocks * BLOCK} tokens, "
        f"load {options.load}; one cache without limits would hold {reuse_of_one_cache(load, inf):.1%} of "
        f"the prompts, one as large as all workers' {reuse_of_one_cache(load, pieces):.1%}"
    )
    heads = ("route", "on time", "goodput/s", "TTFT p50 s", "p99", "max", "cached", "one cache", "refused")
    print(("{:>12}" * 10).format(*heads, "us a choice"))
    found: dict[str, TierReport] = {}
    for route in options.routes.split(","):
        replayed = run(cast(Method, route), load, setting, options.workers)
        found[route] = replayed.timed
        print(("{:>12}" * 10).format(*replayed.row(route)), flush=True)
    compare(found, load, setting, options.workers)


def compare(
    found: dict[str, TierReport], load: Sequence[tuple[Request, Arrival]], setting: Setting, workers: int
) -> None:
    """Print what no placement exceeds, beside `deadline`, as multiples of the best baseline."""
    end = load[-1][0].arrival
    timed = sum(request.objective.timed for request, _ in load)
    bounds = most_on_time(load, setting, workers), most_on_time(load, setting, workers, end) * timed / end
    print(f"no placement has more than {bounds[0]:.1%} on time, nor a goodput of more than {bounds[1]:.4f}/s")
    baselines = [report for route, report in found.items() if route != "deadline"]
    if baselines and "deadline" in found:
        best = max(one.attainment for one in baselines), max(one.goodput for one in baselines)
        ours = found["deadline"].attainment, found["deadline"].goodput
        for name, own, base, bound in zip(("on time", "goodput"), ours, best, bounds, strict=True):
            print(f"{name}: {own / base:.2f} times the best baseline; nothing has {bound / base:.2f} times")


if __name__ == "__main__":
    main()
