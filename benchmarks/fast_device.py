"""What a burst does to a fast device in virtual time, where answers take much of its time and places run out.

    python benchmarks/fast_device.py [--rate 65] [--seconds 60] [--slots 256] [--blocks 26000] [--mixed]

The real engine, schedule and admission run over steps that take what those of an 8B model take on one H200,
in round figures: a step reads all weights or computes all tokens, whichever takes longer. Requests have 512
tokens and answers 128, with `ttft_ms` = 500 and `itl_ms` = 50. With `--mixed` lengths are log-normal (about
650 and 220 tokens in the mean), 20/60/20 among the tiers, with the default objectives of such a device.
Prints what was on time, refused and late, TTFT, the longest gap between two tokens, and the preemptions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from random import Random

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

KNOWN = StepCost(base=3.6, per_decode=0.018, per_prefill=0.0245, per_key=4.4e-5, per_pair=1e-7)
WEIGHTS_MS, FIXED_MS, SATURATING = 3.4, 0.35, 512
TIGHT = Tier(objective=Objective(ttft_ms=500, itl_ms=50), weight=2.0)
STEP_TOKENS = 8192


class SaturatingRunner(NullRunner):
    """A step reads all weights, or computes all tokens, whichever takes longer."""

    def step_ms(self, load: StepLoad) -> float:
        """The milliseconds of a step."""
        tokens_ms = KNOWN.per_prefill * (load.decode + load.prefill)
        return FIXED_MS + (WEIGHTS_MS**3 + tokens_ms**3) ** (1 / 3) + KNOWN.per_key * load.context


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


def played(
    rate: float, seconds: float, *, slots: int = 256, blocks: int = 26000, mixed: bool = False,
    schedule: str = "deadline",
) -> OverloadWorld:  # fmt: skip
    """The world after a burst, in which all requests have ended."""
    clock = VirtualClock()
    tiers = default_tiers([KNOWN]) if mixed else {**TIERS, "default": TIGHT}
    runner = SaturatingRunner(null_info(context=16384, blocks=blocks), sleep=clock.sleep)
    model = LoadedModel(runner, StepTime(KNOWN, [0.05] * 16, saturating=SATURATING))
    world = OverloadWorld(clock, [model], Limits(slots, STEP_TOKENS, tiers), SCHEDULES[schedule])
    for request in requests(rate, seconds, tiers, mixed=mixed):
        world.run(until=request.arrival)
        world.offer(request)
    world.run()
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
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slots", type=int, default=256, help="most sequences at once")
    parser.add_argument("--blocks", type=int, default=26000, help="blocks of 16 tokens")
    parser.add_argument("--mixed", action="store_true", help="mixed lengths and tiers, default objectives")
    parser.add_argument("--schedule", default="deadline", choices=sorted(SCHEDULES))
    options = parser.parse_args()
    world = played(
        options.rate, options.seconds, slots=options.slots, blocks=options.blocks, mixed=options.mixed,
        schedule=options.schedule,
    )  # fmt: skip
    outcomes = world.outcomes()
    for tier in dict.fromkeys(one.request.tier for one in outcomes):
        show(tier, [one for one in outcomes if one.request.tier == tier], world, options.seconds)
    preempted = sum(step.preempted for step in world.steps)
    print(f"the last ended after {world.clock():.1f} s; {preempted} preemptions")


if __name__ == "__main__":
    main()
