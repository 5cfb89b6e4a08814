"""What a burst does to a fast device in virtual time, where answers take much of its time and places run out.

    python benchmarks/fast_device.py [--rate 65] [--seconds 60] [--slots 256] [--blocks 26000] [--mixed]
    python benchmarks/fast_device.py --at-once 64 [--requests 256]

The real engine, schedule and admission run over steps that take what those of an 8B model take on one H200 at
its power limit. Requests have 512 tokens and answers 128, with `ttft_ms` = 500 and `itl_ms` = 50. With
`--mixed` lengths are log-normal (about 650 and 220 tokens in the mean), 20/60/20 among the tiers, with the
default objectives of such a device. `--at-once` sends a new request when one has ended, with objectives that
leave time. Prints what was on time, refused and late, tokens/s, TTFT, the longest gap between two tokens, and
the preemptions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from random import Random
from typing import Any

from msgspec.structs import replace

from stretto.config import TIERS, Tier
from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.default_tiers import default_tiers
from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepCost, StepLoad, StepTime
from stretto.simulator.overload import OverloadWorld
from stretto.simulator.report import RequestOutcome
from stretto.simulator.setting import MIX
from stretto.statistics import spread
from stretto.types import Objective, Request, Sampling

KNOWN = StepCost(base=3.9, per_decode=0.012, per_prefill=0.021, per_key=3.8e-5, per_pair=1e-7)
SATURATING, STEP_TOKENS = 256, 2560
TIGHT = Tier(objective=Objective(ttft_ms=500, itl_ms=50), weight=2.0)
LOOSE = Tier(objective=Objective(ttft_ms=20_000, itl_ms=250), weight=2.0)
KEY_MS = 3.6e-5
STEPS = {
    1: 3.9, 8: 4.5, 16: 4.65, 32: 4.75, 64: 4.9, 96: 5.4, 128: 5.47, 160: 6.0, 192: 6.5, 224: 7.0, 256: 7.45,
    320: 8.72, 384: 10.02, 448: 11.3, 512: 12.5, 576: 13.9, 640: 15.3, 704: 16.7, 768: 18.0, 832: 19.3,
    896: 20.5, 960: 21.8, 1024: 23.0, 1152: 25.5, 1280: 28.0, 1408: 31.2, 1536: 34.5, 1664: 37.7, 1792: 40.9,
    1920: 43.5, 2048: 46.2, 2304: 52.0, 2560: 58.0,
}  # fmt: skip
"""Milliseconds of a step apart from the keys that it reads, by the tokens that it is padded to. Measured on
an H200 in steps that follow one another, with 0, 16, 64 and 255 decodes."""


class MeasuredRunner(NullRunner):
    """A step takes what one of the next larger size was measured to take."""

    def step_ms(self, load: StepLoad) -> float:
        tokens = load.decode + load.prefill
        size = next((size for size in STEPS if size >= tokens), None)
        ms = tokens * STEPS[STEP_TOKENS] / STEP_TOKENS if size is None else STEPS[size]
        return ms + KEY_MS * load.context


def requests(rate: float, seconds: float, tiers: dict[str, Tier], *, mixed: bool) -> Iterator[Request]:
    """The requests of a burst, by arrival."""
    rng, at, ident = Random(2 if mixed else 1), 0.0, 0
    while at < seconds:
        at += rng.expovariate(rate)
        ident += 1
        prompt, answer, tier = 512, 128, "default"
        if mixed:
            prompt = min(int(rng.lognormvariate(6.0, 1.0)) + 16, 4096)
            answer = min(int(rng.lognormvariate(5.0, 0.9)) + 4, 2048)
            tier = rng.choices(list(MIX), list(MIX.values()))[0]
        yield Request(
            id=ident,
            model="null",
            prompt=(ident,) * prompt,
            arrival=at,
            sampling=Sampling(max_tokens=answer, seed=ident),
            objective=tiers[tier].objective,
            tier=tier,
        )


def new_world(tiers: dict[str, Tier], slots: int, blocks: int, schedule: str) -> OverloadWorld:
    """An engine over such a device, in virtual time."""
    clock = VirtualClock()
    runner = MeasuredRunner(null_info(context=16384, blocks=blocks), sleep=clock.sleep)
    model = LoadedModel(runner, StepTime(KNOWN, [0.05] * 16, saturating=SATURATING))
    return OverloadWorld(clock, [model], Limits(slots, STEP_TOKENS, tiers), SCHEDULES[schedule])


def played(
    rate: float, seconds: float, *, slots: int = 256, blocks: int = 26000, mixed: bool = False,
    schedule: str = "deadline",
) -> OverloadWorld:  # fmt: skip
    """The world after a burst, in which all requests have ended."""
    tiers = default_tiers([KNOWN]) if mixed else {**TIERS, "default": TIGHT}
    world = new_world(tiers, slots, blocks, schedule)
    for request in requests(rate, seconds, tiers, mixed=mixed):
        world.run(until=request.arrival)
        world.offer(request)
    world.run()
    return world


def closed_loop(
    at_once: int, count: int, *, slots: int = 512, blocks: int = 26000, schedule: str = "deadline"
) -> OverloadWorld:
    """The world after `count` requests, of which `at_once` were always under way until the last was sent."""
    world = new_world({**TIERS, "default": LOOSE}, slots, blocks, schedule)
    kind, sent = next(requests(1.0, 60.0, {**TIERS, "default": LOOSE}, mixed=False)), 0
    while sent < count or not world.engine.idle:
        while sent < count and sent - len(world.ends) < at_once:
            sent += 1
            world.offer(replace(kind, id=sent, prompt=(sent,) * len(kind.prompt), arrival=world.clock()))
        world.step()
    return world


def show(tier: str, outcomes: list[RequestOutcome], world: OverloadWorld, seconds: float) -> None:
    """Print what became of the requests of one tier."""
    served = [one for one in outcomes if one.count]
    good, refused = sum(one.good for one in outcomes), len(outcomes) - len(served)
    print(
        f"{tier}: {len(outcomes)} sent, {good} on time ({good / seconds:.1f}/s), {refused} refused, "
        f"{len(served) - good} late"
    )
    ttft = spread([one.first - one.request.arrival for one in served])
    gap = spread([max(one.gaps, default=0.0) for one in served])
    if ttft and gap:
        print(
            f"  TTFT p50 {ttft.p50:.2f} s, p99 {ttft.p99:.2f}, max {ttft.max:.2f}; longest gap p50 "
            f"{gap.p50:.0f} ms, p99 {gap.p99:.0f}, max {gap.max:.0f}"
        )
    right = sum(each.right for each in world.refusals.values() if each.request.tier == tier)
    if refused:
        print(f"  Retry-After within a factor of 2: {right} of {refused}")


def main() -> None:
    """Run one burst and print what became of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=65.0, help="requests per second")
    parser.add_argument("--at-once", type=int, help="requests under way, instead of a rate")
    parser.add_argument("--requests", type=int, default=256, help="of --at-once")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slots", type=int, default=256, help="most sequences at once")
    parser.add_argument("--blocks", type=int, default=26000, help="blocks of 16 tokens")
    parser.add_argument("--mixed", action="store_true", help="mixed lengths and tiers, default objectives")
    parser.add_argument("--schedule", default="deadline", choices=sorted(SCHEDULES))
    options = parser.parse_args()
    device: dict[str, Any] = {name: vars(options)[name] for name in ("slots", "blocks", "schedule")}
    if options.at_once:
        world = closed_loop(options.at_once, options.requests, **device)
        seconds = world.clock()
    else:
        world = played(options.rate, options.seconds, mixed=options.mixed, **device)
        seconds = options.seconds
    outcomes = world.outcomes()
    for tier in dict.fromkeys(one.request.tier for one in outcomes):
        show(tier, [one for one in outcomes if one.request.tier == tier], world, seconds)
    preempted = sum(step.preempted for step in world.steps)
    tokens = sum(one.count for one in outcomes) / world.clock()
    print(f"the last ended after {world.clock():.1f} s; {tokens:.0f} tokens/s; {preempted} preemptions")


if __name__ == "__main__":
    main()
