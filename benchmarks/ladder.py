"""What a ladder gains: the real router, scheduler and moves over null models in virtual time.

`tasks`: prompts for which the answers of all variants are known, with deadlines from tight to loose, beside
each variant alone, the largest that would be on time alone, a random feasible one, and an oracle that knows
which variant answers right. `trace`: goodput of a recorded load beside each variant alone.

`python benchmarks/ladder.py [--ladder FOLDER --recipe RECIPE] [--trace AZURE.csv.gz] [--requests N]`; without
a ladder the answers are drawn by chance, as in `benchmarks/feedback.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from random import Random
from time import process_time

import numpy as np
from feedback import KnownAnswers, drawn, measured
from msgspec import structs

from stretto.bench import traces
from stretto.config import ModelConfig, Tier
from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.admission import Outlook, snapshot
from stretto.engine.scheduler.default_tiers import default_tiers
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence as EngineSequence
from stretto.engine.step_time import StepCost, StepLoad, StepTime
from stretto.ladder.choose import LadderCandidate, Need, VariantChoice, predict
from stretto.ladder.estimate import Quality
from stretto.ladder.learning.feedback import FeedbackStore
from stretto.ladder.learning.learner import Learner
from stretto.ladder.registry import Ladder, Lengths, Origin, QualityInterval, Variant
from stretto.ladder.serving import ServedLadder
from stretto.server.variants.router import Expectation, LadderRequest, VariantPlacement, VariantRouter
from stretto.simulator.harness import World
from stretto.simulator.replay import capacity
from stretto.simulator.report import RequestOutcome
from stretto.simulator.setting import SMALL_CPU, Setting
from stretto.statistics import quantile
from stretto.types import Objective, Reason, Request, Sampling, StepStats, TokenEvent

SPEEDS = {
    "full": 2.5,
    "int8": 1.0,
    "pruned": 0.6,
    "small": 0.3,
    "tiny": 0.12,
}  # times the cost of `SMALL_CPU`
SNAPSHOT_S = 0.02  # as the engine sends them
DEADLINES = (0.15, 0.3, 0.6, 1.5, 4.0)  # times what the top takes alone
LONG = 38  # tokens: the 90 % quantile of the answers to `tasks`
FLOORS, FLOORED = (0.5, 0.7, 0.9), 0.3
OURS, ORACLE, FITS, RANDOM = "ours", "oracle", "largest that fits", "random feasible"


def scaled(cost: StepCost, by: float) -> StepCost:
    return StepCost(*(value * by for value in structs.astuple(cost)))


COSTS = {name: scaled(SMALL_CPU, speed) for name, speed in SPEEDS.items()}


@dataclass(frozen=True)
class Asked:
    """A request of a load, and what is true of it. `right` (whether the answer is), `chance` (that it is) and
    `low` (the estimate's lower bound of that): by variant."""

    at: float
    question: str
    prompt_tokens: int
    output_tokens: int
    objective: Objective
    tier: str
    right: tuple[float, ...]
    chance: tuple[float, ...]
    low: tuple[float, ...]

    def alone_ms(self, cost: StepCost) -> float:
        keys = self.prompt_tokens + self.output_tokens // 2
        first = cost.base + cost.prefill(0, self.prompt_tokens)
        return first + (self.output_tokens - 1) * cost.decodes(1, keys)

    def fits(self, cost: StepCost) -> bool:
        """Whether a variant of this cost would have a long answer on time on an idle machine."""
        tokens = max(self.output_tokens, LONG)
        need = Need(prompt_tokens=self.prompt_tokens, output_tokens=tokens, objective=self.objective)
        return predict(LadderCandidate(name="", cost=cost, quality=0, quality_low=0), need).excess_ms <= 0

    @property
    def possible(self) -> bool:
        """Whether a variant that is sure to reach the floor would be on time on an idle machine."""
        floor = self.objective.min_quality or 0.0
        pairs = zip(COSTS.values(), self.low, strict=True)
        return any(low >= floor and self.fits(cost) for cost, low in pairs)


class NoisyRunner(NullRunner):
    """A null model whose steps take what its cost says, times some noise."""

    def __init__(self, name: str, clock: VirtualClock, noise: float, usual: int) -> None:
        info = null_info(name=name, context=16384, blocks=16384)
        info = structs.replace(info, usual_tokens=usual)
        super().__init__(info, cost=COSTS[name.partition(":")[2]], sleep=clock.sleep)
        self._rng, self._noise = Random(f"{name} {noise}"), noise

    def step_ms(self, load: StepLoad) -> float:
        return self.cost(load) * (self._rng.lognormvariate(0.0, self._noise) if self._noise else 1.0)


class LadderWorld(World):
    """An engine with all variants, and what the server knows of it: snapshots every `SNAPSHOT_S`."""

    def __init__(self, names: Sequence[str], tiers: dict[str, Tier], noise: float, usual: int) -> None:
        clock = VirtualClock()
        models = [
            LoadedModel(
                NoisyRunner(f"m:{name}", clock, noise, usual), StepTime(COSTS[name], [max(noise, 0.01)] * 16)
            )
            for name in names
        ]
        super().__init__(
            clock, models, Limits(256, 512, tiers), SCHEDULES["deadline"], share=False, record=False
        )
        self.outlooks = {f"m:{name}": Outlook(tiers) for name in names}
        self.outcomes: dict[int, RequestOutcome] = {}
        self.spoke: dict[int, str] = {}
        self.on_end: Callable[[int, Reason], None] = lambda ident, reason: None
        self._newest = 0
        self._seen = -inf

    def observe(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        now = self.clock()
        for event in events:
            outcome = self.outcomes[event.id]
            if event.began is not None:
                moved = event.began.moved
                self.spoke[event.id] = moved.model if moved else outcome.request.model
            if event.token is not None:
                outcome.on_token(now)
            if event.finish is not None:
                outcome.reason, outcome.last = event.finish.reason, now
                self.on_end(event.id, event.finish.reason)

    def look(self) -> None:
        """Let the server have new snapshots if the last ones are old."""
        if self.clock() >= self._seen + SNAPSHOT_S or self.engine.idle:
            self._seen = self.clock()
            for name, outlook in self.outlooks.items():
                outlook.see(snapshot(self.engine.context(name), self._newest))

    def admit(self, request: Request, length: int) -> None:
        """Send a request as `EngineClient.submit` does: to a lighter variant if its own refuses it."""
        self.outcomes[request.id] = RequestOutcome.of(request)
        for model in (request.model, *request.lighter):
            place = request.lighter.index(model) + 1 if model != request.model else 0
            trial = structs.replace(request, model=model, lighter=request.lighter[place:])
            forecast = self.outlooks[model].forecast(trial, self.clock())
            if forecast is None or forecast.refusal(trial) <= 0:
                self.outlooks[model].sent(trial)
                self.outcomes[request.id] = RequestOutcome.of(trial)
                self._newest = request.id
                self.engine.submit(EngineSequence.of(trial, length))
                return
        self.outcomes[request.id].reason = Reason.REFUSED
        self.on_end(request.id, Reason.REFUSED)

    def play(self, load: Sequence[Asked], send: Callable[[int, Asked], None]) -> None:
        """Run a load: `send(ident, asked)` is called when a request arrives."""
        coming = list(enumerate(load, 1))[::-1]
        while coming or not self.engine.idle:
            self.look()
            while coming and coming[-1][1].at <= self.clock():
                send(*coming.pop())
            if not self.engine.step() and coming:
                self.clock.sleep(max(coming[-1][1].at - self.clock(), 1e-6))


class PolicyRouter(VariantRouter):
    """The router, or the same with other ways to judge or to choose the feasible variants."""

    policy = OURS
    asked: Asked | None = None
    rng = Random("choices")

    def _expectation(self, asked: LadderRequest, models: Mapping[str, Variant], now: float) -> Expectation:
        expected = super()._expectation(asked, models, now)
        if self.policy != ORACLE or self.asked is None:
            return expected
        places = {model: list(SPEEDS).index(variant.name) for model, variant in models.items()}
        known = {model: Quality(self.asked.right[k], self.asked.chance[k]) for model, k in places.items()}
        return expected._replace(corrected=known)

    def _placed(
        self, asked: LadderRequest, choice: VariantChoice, expected: Expectation, floor: float
    ) -> VariantPlacement:
        if self.policy == RANDOM and choice.feasible:
            choice = choice._replace(chosen=self.rng.choice(choice.feasible))
        return super()._placed(asked, choice, expected, floor)


@dataclass(frozen=True)
class Result:
    """What became of a load under one policy. Shares; `on_time` is among the requests that could be."""

    policy: str
    on_time: float
    quality: float  # right answers among all answers to requests without a floor
    right_on_time: float  # right answers on time, among all requests without a floor
    violated: float  # answers whose chance to be right is below their floor, among those with a floor
    goodput: float  # on time and not below a floor, per second
    ttft_ms: tuple[float, float]  # 99th percentile and maximum
    moved: float
    decision_us: tuple[float, float]  # median and 99th percentile of processor time


class Trial:
    """One policy over one load."""

    def __init__(
        self, policy: str, known: KnownAnswers, tiers: dict[str, Tier], noise: float, usual: int
    ) -> None:
        self.policy, self._known = policy, known
        self.names = [policy] if policy in SPEEDS else list(SPEEDS)
        self.world = LadderWorld(self.names, tiers, noise, usual)
        ladder = served(known, self.names, usual)
        infos = {name: model.runner.info for name, model in self.world.engine.models.items()}
        learner = Learner(FeedbackStore(), {}, np.random.default_rng(0))
        self.router = PolicyRouter(ladder, tiers, lambda: self.world.outlooks, lambda: infos, learner)
        self.router.policy = policy
        self._seconds: list[float] = []
        self._tokens: dict[int, int] = {}
        self.world.on_end = self._ended

    def run(self, load: Sequence[Asked]) -> Result:
        self.world.play(load, self._send)
        return self._result(load)

    def _send(self, ident: int, asked: Asked) -> None:
        self.router.asked = asked
        self._tokens[ident] = asked.output_tokens
        lighter: tuple[str, ...] = ()
        if self.policy == FITS:
            model = next((name for name in self.names if asked.fits(COSTS[name])), self.names[-1])
        elif len(self.names) == 1:
            model = self.names[0]
        else:
            started = process_time()
            placed = self.router.place(_request(ident, asked), self.world.clock())
            self._seconds.append(process_time() - started)
            self.router.reprice(self.world.clock())
            if placed.model is None:
                return
            model, lighter = placed.model.partition(":")[2], placed.lighter
        request = Request(
            id=ident,
            model=f"m:{model}",
            prompt=(0,) * asked.prompt_tokens,
            arrival=asked.at,
            sampling=Sampling(seed=ident),
            objective=asked.objective,
            tier=asked.tier,
            lighter=lighter if self.policy != RANDOM else (),
        )
        self.world.admit(request, asked.prompt_tokens + asked.output_tokens)

    def _ended(self, ident: int, reason: Reason) -> None:
        if reason in (Reason.STOP, Reason.LENGTH):
            self.router.lengths.observe("local", self._tokens[ident], cut=False)

    def _result(self, load: Sequence[Asked]) -> Result:
        outcomes, order = self.world.outcomes, list(SPEEDS)
        could = good = answered = kept = moved = free = 0
        right = right_on_time = 0.0
        floored = violated = 0
        for ident, asked in enumerate(load, 1):
            outcome, possible = outcomes.get(ident), asked.possible
            could += possible
            floored += asked.objective.min_quality is not None
            if outcome is None or ident not in self.world.spoke:
                continue
            variant = order.index(self.world.spoke[ident].partition(":")[2])
            below = asked.chance[variant] < (asked.objective.min_quality or 0.0)
            answered += 1
            violated += below
            moved += self.world.spoke[ident] != outcome.request.model
            good += possible and outcome.good
            kept += outcome.good and not below
            if asked.objective.min_quality is None:
                free += 1
                right += asked.right[variant]
                right_on_time += asked.right[variant] * outcome.good
        first = sorted((one.first - one.request.arrival) * 1e3 for one in outcomes.values() if one.count)
        spent = sorted(second * 1e6 for second in self._seconds)
        return Result(
            policy=self.policy,
            on_time=good / max(could, 1),
            quality=right / max(free, 1),
            right_on_time=right_on_time / max(len(load) - floored, 1),
            violated=violated / max(floored, 1),
            goodput=kept / load[-1].at,
            ttft_ms=(quantile(first, 0.99), first[-1]) if first else (0.0, 0.0),
            moved=moved / max(answered, 1),
            decision_us=(quantile(spent, 0.5), quantile(spent, 0.99)) if spent else (0.0, 0.0),
        )


def _request(ident: int, asked: Asked) -> LadderRequest:
    return LadderRequest(
        question=asked.question,
        prompt_tokens=asked.prompt_tokens,
        longest_prompt=asked.prompt_tokens,
        arrival=asked.at,
        objective=asked.objective,
        tier=asked.tier,
    )


def served(known: KnownAnswers, names: Sequence[str], usual: int) -> ServedLadder:
    """The ladder of these variants with the estimates that were fitted to other prompts."""
    variants: list[Variant] = []
    for name in names:
        place = list(SPEEDS).index(name)
        share = float(known.right[:, place].mean())
        variants.append(
            Variant(
                name=name,
                path=name,
                bytes=0,
                quality=QualityInterval(share, share, share, len(known.questions)),
                files={},
                lengths=Lengths(60, 20, usual),
                estimate=known.models[place],
                origin=Origin(step="model"),
            )
        )
    ladder = Ladder(model="m", family="", vocab=0, tokenizer="", top=names[0], variants=tuple(variants))
    models = {name: ModelConfig(name=f"m:{name}", path=name) for name in names}
    return ServedLadder("m", Path(), ladder, models)


def lower_bounds(known: KnownAnswers) -> list[tuple[float, ...]]:
    """By prompt, then by variant."""
    return [tuple(quality.low for quality in row) for row in known.estimates()]


def true_chances(known: KnownAnswers) -> list[tuple[float, ...]]:
    """By prompt, then by variant: the share of right answers to prompts of its kind."""
    cells: dict[str, list[int]] = {}
    for place, cell in enumerate(known.cells):
        cells.setdefault(cell, []).append(place)
    means = {cell: tuple(known.right[places].mean(axis=0).tolist()) for cell, places in cells.items()}
    return [means[cell] for cell in known.cells]


def tasks(known: KnownAnswers, count: int, load: float, seed: int = 0) -> list[Asked]:
    """Known prompts that arrive at random. At load 1 the top alone, in batches of one, is always busy."""
    rng = Random(f"tasks {seed}")
    chances, lows = true_chances(known), lower_bounds(known)
    made: list[Asked] = []
    for number in range(count):
        place = number % len(known.questions)
        tokens = max(4, min(60, round(rng.lognormvariate(3.0, 0.5))))
        draft = Asked(
            0.0,
            known.questions[place],
            rng.randint(30, 120),
            tokens,
            Objective(),
            "default",
            tuple(known.right[place].tolist()),
            chances[place],
            lows[place],
        )
        limit = rng.choice(DEADLINES) * draft.alone_ms(COSTS["full"])
        floor = rng.choice(FLOORS) if rng.random() < FLOORED else None
        on_miss = "reject" if floor is not None else "degrade"
        objective = Objective(total_ms=limit, min_quality=floor, on_miss=on_miss)
        made.append(structs_replace(draft, objective=objective))
    mean_s = sum(one.alone_ms(COSTS["full"]) for one in made) / len(made) / 1e3
    at = 0.0
    timed: list[Asked] = []
    for one in made:
        at += rng.expovariate(load / mean_s)
        timed.append(structs_replace(one, at=at))
    return timed


def structs_replace(asked: Asked, **changes: object) -> Asked:
    return Asked(**({name: getattr(asked, name) for name in Asked.__dataclass_fields__} | changes))  # pyright: ignore[reportArgumentType]


def recorded(
    known: KnownAnswers, trace: Path, count: int, load: float, tiers: dict[str, Tier]
) -> list[Asked]:
    """A recorded load, a quarter of it `priority`. At load 1 the top alone saturates under `fcfs`."""
    rng = Random("trace")
    arrivals = traces.read(trace, requests=count)
    span = arrivals[-1].at - arrivals[0].at
    chances, lows = true_chances(known), lower_bounds(known)
    made: list[Asked] = []
    for number, arrival in enumerate(arrivals):
        place = number % len(known.questions)
        tier = rng.choices(("priority", "default"), (1, 3))[0]
        floor = rng.choice(FLOORS) if rng.random() < FLOORED else None
        made.append(
            Asked(
                arrival.at - arrivals[0].at,
                known.questions[place],
                min(arrival.prompt_tokens, 16000 - arrival.output_tokens),
                arrival.output_tokens,
                structs.replace(tiers[tier].objective, min_quality=floor),
                tier,
                tuple(known.right[place].tolist()),
                chances[place],
                lows[place],
            )
        )
    rate = capacity(arrivals, Setting(cost=COSTS["full"]))
    stretch = len(made) / (rate * load) / span
    return [structs_replace(one, at=one.at * stretch) for one in made]


HEAD = (
    "| policy | on time | quality | right and on time | floors violated | goodput | TTFT p99, max ms"
    " | moved | decision p50, p99 us |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def show(result: Result) -> None:
    p99, most = result.ttft_ms
    print(
        f"| {result.policy} | {result.on_time:.1%} | {result.quality:.3f} | {result.right_on_time:.3f}"
        f" | {result.violated:.1%} | {result.goodput:.3f}/s | {p99:,.0f}, {most:,.0f} | {result.moved:.1%}"
        f" | {result.decision_us[0]:.0f}, {result.decision_us[1]:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ladder", type=Path)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--loads", default="0.3,0.7,1.2")
    parser.add_argument("--noise", type=float, default=0.05)
    options = parser.parse_args()
    known = measured(options.ladder, options.recipe) if options.ladder else drawn()
    tiers = default_tiers([COSTS["int8"]])
    if options.trace is None:
        for load in map(float, options.loads.split(",")):
            asked = tasks(known, options.requests, load)
            print(f"\nload {load:g}, {len(asked)} requests\n{HEAD}")
            for policy in (OURS, ORACLE, FITS, RANDOM, *SPEEDS):
                show(Trial(policy, known, tiers, options.noise, LONG).run(asked))
        return
    asked = recorded(known, options.trace, options.requests, 1.5, tiers)
    usual = round(quantile(sorted(one.output_tokens for one in asked), 0.9))
    print(f"\n{options.trace.name} at load 1.5, {len(asked)} requests\n{HEAD}")
    for policy in (OURS, *SPEEDS):
        show(Trial(policy, known, tiers, options.noise, usual).run(asked))


if __name__ == "__main__":
    main()
