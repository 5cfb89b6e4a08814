"""What an overload does: `--load` times the peak for a minute, with the server's default objectives.

The real engine and schedule run in virtual time, so it takes seconds. The peak is the best goodput that the
same requests have at a load from 0.6 to 1.

`python benchmarks/overload.py`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import inf
from pathlib import Path
from random import Random

import msgspec

from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepCost, StepTime
from stretto.simulator.harness import World
from stretto.simulator.replay import capacity
from stretto.simulator.report import RequestOutcome
from stretto.simulator.setting import MIX, SMALL_CPU, Arrival, Setting, tiers_for
from stretto.statistics import spread
from stretto.types import Reason, Request, Sampling

BEFORE_S, WINDOW_S, AFTER_S = 60.0, 60.0, 180.0
CALM = 0.5  # load before and after the overload


def main() -> None:
    options = _arguments()
    cost = msgspec.json.decode(options.times.read_bytes(), type=StepCost) if options.times else SMALL_CPU
    setting = Setting(cost=cost, tiers=tiers_for(cost))
    full = capacity([Arrival(0.0, options.prompt, options.output)] * 200, setting)
    peak = max(_in_window(_run(setting, full, load, options)[0]) for load in (0.6, 0.7, 0.8, 0.9, 1.0))
    outcomes, told = _run(setting, full, options.load, options)
    objectives = {name: msgspec.to_builtins(tier.objective) for name, tier in setting.tiers.items()}
    print(f"objectives {objectives}\nfcfs saturates at {full:.3f} requests/s; peak goodput {peak:.3f}")
    goodput = _in_window(outcomes)
    print(f"goodput in the overload {goodput:.3f} requests/s, {goodput / peak:.0%} of the peak")
    for tier in setting.tiers:
        _print_tier(tier, [one for one in outcomes if one.request.tier == tier], told)
    ends = BEFORE_S + WINDOW_S
    bad = [one.request.arrival - ends for one in outcomes if not one.good and one.request.arrival > ends]
    print(f"the last request that was refused or late came {max(bad, default=0.0):.1f} s after the overload")


def _run(
    setting: Setting, full: float, load: float, options: argparse.Namespace
) -> tuple[list[RequestOutcome], dict[int, float]]:
    """What became of each request, and the `Retry-After` of each that was refused, seconds."""
    rng, clock = Random(options.seed), VirtualClock()
    runner = NullRunner(null_info(context=16384, blocks=16384), cost=setting.cost, sleep=clock.sleep)
    model = LoadedModel(runner, StepTime(setting.cost, [0.02] * 16))
    limits = Limits(setting.max_running, setting.max_step_tokens, setting.tiers)
    world = World(clock, [model], limits, SCHEDULES[options.schedule], record=False)
    at, end = 0.0, BEFORE_S + WINDOW_S + AFTER_S
    while at < end:
        overload = BEFORE_S <= at < BEFORE_S + WINDOW_S
        at += rng.expovariate(full * (load if overload else CALM))
        ident, tier = len(world.requests) + 1, rng.choices(list(MIX), list(MIX.values()))[0]
        world.run(until=at)
        world.submit(
            Request(
                id=ident,
                model="null",
                prompt=(ident,) * options.prompt,
                arrival=clock(),
                sampling=Sampling(max_tokens=options.output, seed=ident),
                objective=setting.tiers[tier].objective,
                tier=tier,
            )
        )
    world.run()
    outcomes = [RequestOutcome.of(request) for request in world.requests.values()]
    for one in outcomes:
        for stamp in world.stamps.get(one.request.id, ()):
            one.on_token(stamp)
        one.reason, one.last = world.ends[one.request.id].reason, world.ended_at[one.request.id]
    refused = {
        ident: end.retry_after or 0.0 for ident, end in world.ends.items() if end.reason is Reason.REFUSED
    }
    return outcomes, refused


def _in_window(outcomes: Sequence[RequestOutcome]) -> float:
    """Requests on time that ended in the window, per second."""
    return sum(one.good and BEFORE_S <= one.last < BEFORE_S + WINDOW_S for one in outcomes) / WINDOW_S


def _print_tier(tier: str, outcomes: Sequence[RequestOutcome], told: dict[int, float]) -> None:
    ttft = spread([one.first - one.request.arrival for one in outcomes if one.count])
    gap = max((max(one.gaps, default=0.0) for one in outcomes), default=0.0) / 1e3
    refused = [one for one in outcomes if one.request.id in told]
    waits = spread([one.last - one.request.arrival for one in refused])
    right = [_tried_again(one, outcomes, told) for one in refused]
    within = sum(
        0.5 <= actual / max(told[one.request.id], 1e-9) <= 2
        for one, actual in zip(refused, right, strict=True)
    )
    print(
        f"{tier}: {len(outcomes)} sent, {sum(one.good for one in outcomes)} on time, {len(refused)} refused"
    )
    if ttft:
        print(f"  TTFT p50 {ttft.p50:.1f} s, p99 {ttft.p99:.1f} s, max {ttft.max:.1f} s; gap max {gap:.1f} s")
    if waits:
        print(
            f"  refused after p50 {waits.p50:.2f} s, p99 {waits.p99:.2f} s, max {waits.max:.2f} s;", end=" "
        )
        print(f"Retry-After within a factor of 2: {within} of {len(refused)}")


def _tried_again(
    refused: RequestOutcome, outcomes: Sequence[RequestOutcome], told: dict[int, float]
) -> float:
    """How long after its refusal the next request of its tier came that was admitted; all are of one size."""
    later = (
        one.request for one in outcomes if one.request.arrival > refused.last and one.request.id not in told
    )
    return min((request.arrival for request in later), default=inf) - refused.last


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=float, default=2.0)
    parser.add_argument("--schedule", default="deadline", choices=sorted(SCHEDULES))
    parser.add_argument("--times", type=Path, help="a step-time model, JSON")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
