"""What the choice of a variant costs: processor time of one decision of the server's router.

`python -m benchmarks.decision [--ladder FOLDER] [--rounds N]`: with the engine's last snapshots as they were,
with a new snapshot of every variant, and both after feedback. The snapshots have streams and waiting prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import thread_time_ns

import numpy as np
from msgspec import structs

import stretto
from stretto.config import ModelConfig, Tier, tiers_of
from stretto.engine.runners.null import null_info
from stretto.engine.scheduler.admission import Outlook, Snapshot
from stretto.engine.scheduler.estimate import Estimate
from stretto.ladder import serving
from stretto.ladder.learning.feedback import FeedbackStore, Reward
from stretto.ladder.learning.learner import Learner
from stretto.ladder.registry import Variant
from stretto.server.variants.router import LadderRequest, VariantRouter
from stretto.statistics import quantile
from stretto.types import Objective

DESK = Path(stretto.__file__).parent / "desk"
QUESTION = "Where is order 48213, and what do I get back if I return two of the three lamps from it?"
OBJECTIVE = Objective(ttft_ms=200.0, itl_ms=20.0, total_ms=2000.0, min_quality=0.5)
REWARDS = 60


def snapshot(variant: Variant, number: int, rng: Random) -> Snapshot:
    """An engine's report on one variant: four streams, and six prompts that wait."""
    cost = next(iter(variant.times.values()))
    estimate = Estimate(cost=cost, margin=1.1, streams=4, itl_ms=20.0, load=0.1)
    jobs = sorted((0.1 + rng.random(), 1.0 + rng.random(), 1.0) for _ in range(6))
    return Snapshot(
        now=0.0, newest=number, estimate=estimate, context=800, prompts={1.0: jobs}, inflow={}, lengths={}
    )


class DecisionTimer:
    """A router over the variants of one ladder, and how long its decisions take."""

    def __init__(self, folder: Path, tiers: dict[str, Tier]) -> None:
        self.ladder = serving.read(ModelConfig(name="m", path=str(folder)), "cpu")
        models = {variant.name: self.ladder.models[variant.name].name for variant in self.ladder.variants}
        self.outlooks = {model: Outlook(tiers) for model in models.values()}
        infos = {model: structs.replace(null_info(), name=model, context=8192) for model in models.values()}
        self.learner = Learner(FeedbackStore(), {"m": list(models.values())}, np.random.default_rng(0))
        self.router = VariantRouter(self.ladder, tiers, lambda: self.outlooks, lambda: infos, self.learner)
        self._rng, self._number = Random(0), 0
        self.report()

    def report(self) -> None:
        """Let every variant have a new snapshot."""
        self._number += 1
        for variant in self.ladder.variants:
            self.outlooks[self.ladder.models[variant.name].name].see(
                snapshot(variant, self._number, self._rng)
            )

    def teach(self) -> None:
        """Give rewards, so that estimates are corrected and choices explored."""
        for number in range(REWARDS):
            made = self.router.place(self.asked(), 0.0).made
            assert made is not None
            self.learner.remember("local", str(number), made, 0.0)
            self.learner.reward("local", str(number), Reward(float(self._rng.random() < 0.8)), 0.0)

    def asked(self) -> LadderRequest:
        """A request with words that no earlier one had."""
        self._number += 1
        return LadderRequest(
            question=f"{QUESTION} {self._number}",
            prompt_tokens=120,
            longest_prompt=120,
            arrival=0.0,
            objective=OBJECTIVE,
        )

    def measure(self, before: Callable[[], None], rounds: int) -> list[float]:
        """The microseconds of each decision, in rising order. `before` runs before each, uncounted."""
        took: list[float] = []
        for _ in range(rounds):
            before()
            asked = self.asked()
            started = thread_time_ns()
            self.router.place(asked, 0.0)
            took.append((thread_time_ns() - started) / 1e3)
        return sorted(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ladder", type=Path, default=DESK)
    parser.add_argument("--rounds", type=int, default=3000)
    options = parser.parse_args()
    timer = DecisionTimer(options.ladder, tiers_of({}))
    print(f"{len(timer.ladder.variants)} variants\n| decision | median us | p99 us |\n| --- | ---: | ---: |")
    for feedback in ("", ", after feedback"):
        for what, before in (("snapshots as before", lambda: None), ("new snapshots", timer.report)):
            took = timer.measure(before, options.rounds)
            print(
                f"| {what}{feedback} | {quantile(took, 0.5):.1f} | {quantile(took, 0.99):.1f} |", flush=True
            )
        timer.teach()


if __name__ == "__main__":
    main()
