"""Questions whose answers are known for every variant of a ladder, and loads that are made of them.

The answers are those of a ladder on disk (`answers.py`), or drawn by chance (`feedback.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from random import Random
from statistics import median

import numpy as np
from msgspec import structs

from benchmarks import answers
from benchmarks.answers import CascadeAnswers
from benchmarks.feedback import KnownAnswers
from stretto.bench import traces
from stretto.config import TIERS, Tier
from stretto.engine.scheduler.default_tiers import LONG_PROMPT, PAUSES, PROMPTS
from stretto.engine.step_time import StepCost
from stretto.ladder import registry
from stretto.ladder.choose import LadderCandidate, Need, predict
from stretto.ladder.registry import Ladder
from stretto.simulator.replay import capacity
from stretto.simulator.setting import SMALL_CPU, Setting
from stretto.statistics import quantile
from stretto.types import Objective

SPEEDS = (2.5, 1.0, 0.6, 0.3, 0.12)  # of the drawn variants: times the cost of `SMALL_CPU`
DEADLINES = (0.25, 0.5, 1.0, 2.0, 5.0)  # times what the top takes alone for a usual request
FLOORS, FLOORED = (0.5, 0.7, 0.9), 0.3
Kinds = Sequence[tuple[str, Sequence[float]]]  # of questions: their kind, and whether each variant was right


def scaled(cost: StepCost, by: float) -> StepCost:
    return StepCost(*(value * by for value in structs.astuple(cost)))


@dataclass(frozen=True)
class KnownLadder:
    """A ladder whose variants have answered all questions. `costs`: by name, the largest first.

    By question: `prompts`, the tokens of it; `lengths`, of each variant's answer; `low`, the lower bounds of
    the estimates; `chances`, the shares of right answers to questions of its kind. `ladder`: that on disk;
    `cascaded`: what its cascade answers.
    """

    known: KnownAnswers
    costs: dict[str, StepCost]
    prompts: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    low: tuple[tuple[float, ...], ...]
    chances: tuple[tuple[float, ...], ...]
    ladder: Ladder | None = None
    cascaded: CascadeAnswers | None = None

    @cached_property
    def cascade_chances(self) -> list[float]:
        """By question: the share of the cascade's answers to questions of its kind that are right."""
        rights = [] if self.cascaded is None else self.cascaded.right
        rows: dict[str, list[bool]] = {}
        for cell, right in zip(self.known.cells, rights, strict=True):
            rows.setdefault(cell, []).append(right)
        return [sum(rows[cell]) / len(rows[cell]) for cell in self.known.cells]

    @classmethod
    def of(
        cls,
        known: KnownAnswers,
        costs: Sequence[StepCost],
        prompts: Sequence[int],
        lengths: Sequence[tuple[int, ...]],
        more: Kinds | None = None,
    ) -> KnownLadder:
        """`more`: whether answers to other questions are right, which say how often each kind is."""
        low = tuple(tuple(quality.low for quality in row) for row in known.estimates())
        named = dict(zip(known.names, costs, strict=True))
        return cls(known, named, tuple(prompts), tuple(lengths), low, true_chances(known, more))

    @property
    def long(self) -> int:
        """The 90 % quantile of the answers' tokens."""
        return round(quantile(sorted(row[0] for row in self.lengths), 0.9))


def by_chance(known: KnownAnswers) -> KnownLadder:
    """Variants without weights. Random numbers say how long their answers are."""
    rng = Random("lengths")
    count = len(known.questions)
    tokens = [max(4, min(60, round(rng.lognormvariate(3.0, 0.5)))) for _ in range(count)]
    costs = [scaled(SMALL_CPU, speed) for speed in SPEEDS]
    prompts = [rng.randint(30, 120) for _ in range(count)]
    return KnownLadder.of(known, costs, prompts, [(each,) * len(SPEEDS) for each in tokens])


def answered(folder: Path, file: Path, count: int, truth: Path | None = None) -> KnownLadder:
    """A ladder on disk, its estimates, and its answers to questions of the desk that it was not made with.

    `truth`: a file of answers to more of them, which are not asked, but say what share of a kind is right.
    """
    ladder, found = registry.load(folder), answers.kept(file, folder, partial(answers.held_out, count))
    names = tuple(variant.name for variant in ladder.variants)
    table = np.array([found.variants[name].right for name in names], dtype=np.float64).T
    models = tuple(variant.estimate for variant in ladder.variants if variant.estimate is not None)
    if len(models) < len(names):
        raise SystemExit(f"{folder}: a variant has no estimate of its quality")
    cells = tuple(f"{task} {level}" for task, level in zip(found.tasks, found.levels, strict=True))
    known = KnownAnswers(names, tuple(found.questions), tuple(found.tasks), cells, table, models)
    costs = [next(iter(variant.times.values())) for variant in ladder.variants]
    lengths = list(zip(*(found.variants[name].tokens for name in names), strict=True))
    more = None
    if truth is not None:
        other = answers.kept(truth, folder, partial(answers.held_out, count))
        kinds = [f"{task} {level}" for task, level in zip(other.tasks, other.levels, strict=True)]
        rights = zip(*(other.variants[name].right for name in names), strict=True)
        more = list(zip(kinds, rights, strict=True))
    made = KnownLadder.of(known, costs, found.prompt_tokens, lengths, more)
    return replace(made, ladder=ladder, cascaded=found.cascade)


@dataclass(frozen=True)
class Asked:
    """A request of a load, and what is true of it. `right` (whether the answer is), `chance` (that it is) and
    `low` (the estimate's lower bound of that): by variant. `place`: of the question among the known ones."""

    at: float
    question: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    objective: Objective
    tier: str
    right: tuple[float, ...]
    chance: tuple[float, ...]
    low: tuple[float, ...]
    place: int = 0

    def fits(self, cost: StepCost, tokens: int) -> bool:
        """Whether a variant of this cost would have so many tokens on time on an idle machine."""
        need = Need(prompt_tokens=self.prompt_tokens, output_tokens=tokens, objective=self.objective)
        return predict(LadderCandidate(name="", cost=cost, quality=0, quality_low=0), need).excess_ms <= 0

    def feasible(self, ladder: KnownLadder, least: int = 0) -> bool:
        """Whether a variant that is sure to reach the floor would be on time on an idle machine with its own
        answer; with one of `least` tokens, if that is longer."""
        floor = self.objective.min_quality or 0.0
        rows = zip(ladder.costs.values(), self.low, self.tokens, strict=True)
        return any(low >= floor and self.fits(cost, max(tokens, least)) for cost, low, tokens in rows)


def alone_ms(cost: StepCost, prompt: int, tokens: int) -> float:
    """What one request takes on an idle machine."""
    first = cost.base + cost.prefill(0, prompt)
    return first + (tokens - 1) * cost.decodes(1, prompt + tokens // 2)


def true_chances(known: KnownAnswers, more: Kinds | None = None) -> tuple[tuple[float, ...], ...]:
    """By prompt, then by variant: the share of right answers to prompts of its kind, `more` included."""
    rows: dict[str, list[Sequence[float]]] = {}
    for cell, right in chain(zip(known.cells, known.right.tolist(), strict=True), more or ()):
        rows.setdefault(cell, []).append(right)
    means = {
        cell: tuple(np.array(held, dtype=np.float64).mean(axis=0).tolist()) for cell, held in rows.items()
    }
    return tuple(means[cell] for cell in known.cells)


def asked_of(ladder: KnownLadder, number: int, at: float, objective: Objective, tier: str) -> Asked:
    """The next of the known questions, in turn."""
    place, known = number % len(ladder.prompts), ladder.known
    return Asked(
        at,
        known.questions[place],
        ladder.prompts[place],
        ladder.lengths[place],
        objective,
        tier,
        tuple(known.right[place].tolist()),
        ladder.chances[place],
        ladder.low[place],
        place,
    )


def tasks(ladder: KnownLadder, count: int, load: float, seed: int = 0) -> list[Asked]:
    """Known prompts that arrive at random. At load 1 the top alone, in batches of one, is always busy."""
    rng = Random(f"tasks {seed}")
    top = next(iter(ladder.costs.values()))
    order = rng.sample(range(len(ladder.prompts)), len(ladder.prompts))
    usual = alone_ms(
        top, *(round(median(each)) for each in (ladder.prompts, [row[0] for row in ladder.lengths]))
    )
    alone = [
        alone_ms(top, prompt, row[0]) for prompt, row in zip(ladder.prompts, ladder.lengths, strict=True)
    ]
    at, made = 0.0, list[Asked]()
    for number in range(count):
        at += rng.expovariate(load / (sum(alone) / len(alone) / 1e3))
        floor = rng.choice(FLOORS) if rng.random() < FLOORED else None
        objective = Objective(
            total_ms=rng.choice(DEADLINES) * usual,
            min_quality=floor,
            on_miss="reject" if floor is not None else "degrade",
        )
        made.append(asked_of(ladder, order[number % len(order)], at, objective, "default"))
    return made


def tight_tiers(cost: StepCost) -> dict[str, Tier]:
    """Tiers as tight as a machine of this cost can promise, however fast it is.

    The multiples are those of `default_tiers`, which also has limits that people do not notice.
    """
    prompt_ms = cost.base + cost.prefill(0, LONG_PROMPT)
    pause_ms = cost.decodes(1, LONG_PROMPT // 4)
    return {
        name: structs.replace(
            tier,
            objective=Objective(
                ttft_ms=PROMPTS[name] * prompt_ms if name in PROMPTS else None,
                itl_ms=PAUSES[name] * pause_ms if name in PAUSES else None,
            ),
        )
        for name, tier in TIERS.items()
    }


def recorded(
    ladder: KnownLadder, trace: Path, count: int, load: float, tiers: dict[str, Tier]
) -> list[Asked]:
    """A recorded load, a quarter of it `priority`. At load 1 the top alone saturates under `fcfs`."""
    rng = Random("trace")
    arrivals = traces.read(trace, requests=count)
    top = next(iter(ladder.costs.values()))
    stretch = (
        len(arrivals) / (capacity(arrivals, Setting(cost=top)) * load) / (arrivals[-1].at - arrivals[0].at)
    )
    made: list[Asked] = []
    for number, arrival in enumerate(arrivals):
        tier = rng.choices(("priority", "default"), (1, 3))[0]
        floor = rng.choice(FLOORS) if rng.random() < FLOORED else None
        objective = structs.replace(tiers[tier].objective, min_quality=floor)
        one = asked_of(ladder, number, (arrival.at - arrivals[0].at) * stretch, objective, tier)
        prompt = min(arrival.prompt_tokens, 16000 - arrival.output_tokens)
        tokens = (arrival.output_tokens,) * len(ladder.costs)
        made.append(replace(one, prompt_tokens=prompt, tokens=tokens))
    return made
