"""What an overload does: `--load` times the peak for `--window` seconds, with the server's own objectives.

The real engine, schedule and admission run in virtual time, so it takes seconds. The peak is the best
goodput that the same requests have at a load from 0.6 to 1. With `--http` the null model of `--null` is
served in real time, and the load comes over sockets.

`python benchmarks/overload.py [--http --null 10:0.4:0.7]`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import overload_http

from stretto.config import TIERS
from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.default_tiers import default_tiers
from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepCost, StepTime
from stretto.simulator.overload import OverloadWorld
from stretto.simulator.replay import capacity
from stretto.simulator.report import RequestOutcome
from stretto.simulator.setting import MIX, SMALL_CPU, Arrival, Setting
from stretto.statistics import spread
from stretto.types import Objective, Request, Sampling

BEFORE_S, WINDOW_S, AFTER_S = 60.0, 60.0, 180.0
CALM = 0.5  # load before and after the overload


def main() -> None:
    options = _arguments()
    if options.http:
        overload_http.run(options)
        return
    cost = msgspec.json.decode(options.times.read_bytes(), type=StepCost) if options.times else SMALL_CPU
    setting = Setting(cost=cost, tiers=TIERS if options.noticed else default_tiers([cost]))
    full = capacity([Arrival(0.0, options.prompt, options.output)] * 200, setting)
    runs = [_run(setting, full, load, options) for load in (0.6, 0.7, 0.8, 0.9, 1.0)]
    peak = max(_in_window(outcomes, options.window) for outcomes, _ in runs)
    most = max(_work_in_window(*run, cost, options.window) for run in runs)
    outcomes, world = _run(setting, full, options.load * peak / full, options)
    objectives = {name: msgspec.to_builtins(tier.objective) for name, tier in setting.tiers.items()}
    print(f"objectives {objectives}\nfcfs saturates at {full:.3f} requests/s; peak goodput {peak:.3f}")
    goodput = _in_window(outcomes, options.window)
    print(f"goodput in the overload {goodput:.3f} requests/s, {goodput / peak:.0%} of the peak")
    work = _work_in_window(outcomes, world, cost, options.window)
    print(f"work for requests on time in the overload {work:.3f} requests/s, {work / most:.0%} of the most")
    for tier in setting.tiers:
        _print_tier(tier, [one for one in outcomes if one.request.tier == tier], world)
    ends = BEFORE_S + options.window
    bad = [one.request.arrival - ends for one in outcomes if not one.good and one.request.arrival > ends]
    print(f"the last request that was refused or late came {max(bad, default=0.0):.1f} s after the overload")


def _run(
    setting: Setting, full: float, load: float, options: argparse.Namespace
) -> tuple[list[RequestOutcome], OverloadWorld]:
    """What became of each request, and the world that has seen it."""
    rng, clock = Random(options.seed), VirtualClock()
    runner = NullRunner(null_info(context=16384, blocks=16384), cost=setting.cost, sleep=clock.sleep)
    model = LoadedModel(runner, StepTime(setting.cost, [0.02] * 16))
    limits = Limits(setting.max_running, setting.max_step_tokens, setting.tiers)
    world = OverloadWorld(clock, [model], limits, SCHEDULES[options.schedule])
    at, end = 0.0, BEFORE_S + options.window + AFTER_S
    while at < end:
        overload = BEFORE_S <= at < BEFORE_S + options.window
        at += rng.expovariate(full * (load if overload else CALM))
        tier = rng.choices(list(MIX), list(MIX.values()))[0]
        ident = len(world.requests) + 1
        request = _request(ident, tier, at, setting.tiers[tier].objective, options)
        world.run(until=at)
        world.offer(request)
    world.run()
    return world.outcomes(), world


def _request(ident: int, tier: str, at: float, objective: Objective, options: argparse.Namespace) -> Request:
    return Request(
        id=ident,
        model="null",
        prompt=(ident,) * options.prompt,
        arrival=at,
        sampling=Sampling(max_tokens=options.output, seed=ident),
        objective=objective,
        tier=tier,
    )


def _in_window(outcomes: Sequence[RequestOutcome], window_s: float) -> float:
    """Requests on time that ended in the window, per second."""
    return sum(one.good and BEFORE_S <= one.last < BEFORE_S + window_s for one in outcomes) / window_s


def _work_in_window(
    outcomes: Sequence[RequestOutcome], world: OverloadWorld, cost: StepCost, window_s: float
) -> float:
    """Requests on time, per second, each counted by the share of its work that was done in the window.

    A prompt counts when its first token comes, each further token when it comes. So what was begun in the
    window and ends on time after it is not lost.
    """
    done = 0.0
    for one in outcomes:
        if one.good:
            length, stamps = len(one.request.prompt), world.stamps[one.request.id]
            works = [cost.prefill(0, length), *(cost.row(length + index) for index in range(1, len(stamps)))]
            inside = [BEFORE_S <= at < BEFORE_S + window_s for at in stamps]
            done += sum(work for work, counts in zip(works, inside, strict=True) if counts) / sum(works)
    return done / window_s


def _print_tier(tier: str, outcomes: Sequence[RequestOutcome], world: OverloadWorld) -> None:
    ttft = spread([one.first - one.request.arrival for one in outcomes if one.count])
    gap = max((max(one.gaps, default=0.0) for one in outcomes), default=0.0) / 1e3
    refusals = [world.refusals[one.request.id] for one in outcomes if one.request.id in world.refusals]
    waits = spread([each.after_s for each in refusals])
    print(
        f"{tier}: {len(outcomes)} sent, {sum(one.good for one in outcomes)} on time, {len(refusals)} refused"
    )
    if ttft:
        print(f"  TTFT p50 {ttft.p50:.1f} s, p99 {ttft.p99:.1f} s, max {ttft.max:.1f} s; gap max {gap:.1f} s")
    if waits:
        late = sum(each.after_s > 0.02 for each in refusals)
        right = sum(each.right for each in refusals)
        print(
            f"  refused after p50 {waits.p50:.3f} s, max {waits.max:.3f} s, {late} after more than 20 ms;",
            end=" ",
        )
        print(f"Retry-After within a factor of 2: {right} of {len(refusals)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=float, default=2.0, help="times the peak")
    parser.add_argument("--schedule", default="deadline", choices=sorted(SCHEDULES))
    parser.add_argument("--times", type=Path, help="a step-time model, JSON")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--noticed", action="store_true", help="the objectives of a fast machine, 5 s and 20 s"
    )
    parser.add_argument("--http", action="store_true", help="serve a null model and send the load to it")
    parser.add_argument("--null", default="10:0.4:0.7", help="its ms of a step, a decoded token, a prompt's")
    parser.add_argument("--config", type=Path, help="its configuration file")
    parser.add_argument("--window", type=float, default=WINDOW_S, help="seconds of the overload")
    parser.add_argument("--probe", type=float, default=30.0, help="seconds of each load that finds the peak")
    return parser.parse_args()


if __name__ == "__main__":
    main()
