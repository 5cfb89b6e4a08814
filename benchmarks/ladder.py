"""What a ladder gains: the real router, scheduler and moves over null models in virtual time.

`tasks`: prompts for which the answers of all variants are known, with deadlines from tight to loose, beside
each variant alone, the largest that would be on time alone, a random feasible one, and an oracle that knows
which variant answers right. `trace`: goodput of a recorded load beside each variant alone.

`python -m benchmarks.ladder [--ladder FOLDER] [--trace AZURE.csv.gz] [--requests N]`; with a ladder, its
answers to held-out questions of the desk (asked once, then kept in a file), its estimates and its step times.
Without one they are drawn by chance, as in `benchmarks/feedback.py`.
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
from msgspec import structs

from benchmarks.feedback import drawn
from benchmarks.known import Asked, KnownLadder, answered, by_chance, recorded, tasks, tight_tiers
from stretto.config import ModelConfig, Tier
from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.admission import Outlook, snapshot
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence as EngineSequence
from stretto.engine.step_time import StepCost, StepLoad, StepTime
from stretto.ladder.choose import VariantChoice
from stretto.ladder.estimate import Quality
from stretto.ladder.learning.feedback import FeedbackStore
from stretto.ladder.learning.learner import Learner
from stretto.ladder.registry import Ladder, Lengths, Origin, QualityInterval, Variant
from stretto.ladder.serving import ServedLadder
from stretto.server.variants.router import Expectation, LadderRequest, VariantPlacement, VariantRouter
from stretto.simulator.harness import World
from stretto.simulator.report import RequestOutcome
from stretto.statistics import quantile
from stretto.types import Reason, Request, Sampling, StepStats, TokenEvent

SNAPSHOT_S = 0.02  # as the engine sends them
OURS, CELLS, ORACLE = "ours", "knows each kind's share", "oracle"
FITS, RANDOM = "largest that fits", "random feasible"


class NoisyRunner(NullRunner):
    """A null model whose steps take what its cost says, times some noise."""

    def __init__(self, name: str, cost: StepCost, clock: VirtualClock, noise: float, usual: int) -> None:
        info = null_info(name=name, context=16384, blocks=16384)
        info = structs.replace(info, usual_tokens=usual)
        super().__init__(info, cost=cost, sleep=clock.sleep)
        self._rng, self._noise = Random(f"{name} {noise}"), noise

    def step_ms(self, load: StepLoad) -> float:
        return self.cost(load) * (self._rng.lognormvariate(0.0, self._noise) if self._noise else 1.0)


class LadderWorld(World):
    """An engine with all variants, and what the server knows of it: snapshots every `SNAPSHOT_S`."""

    def __init__(
        self, costs: Mapping[str, StepCost], tiers: dict[str, Tier], noise: float, usual: int
    ) -> None:
        clock, names = VirtualClock(), list(costs)
        models = [
            LoadedModel(
                NoisyRunner(f"m:{name}", cost, clock, noise, usual), StepTime(cost, [max(noise, 0.01)] * 16)
            )
            for name, cost in costs.items()
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
        if self.policy not in (ORACLE, CELLS) or self.asked is None:
            return expected
        right, chance = self.asked.right, self.asked.chance
        known = {
            model: Quality((right if self.policy == ORACLE else chance)[k], chance[k])
            for k, model in enumerate(self._variants)
            if model in models
        }
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
    foreseen: float  # on time among those that would be even with a long answer
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
        self, policy: str, ladder: KnownLadder, tiers: dict[str, Tier], noise: float, usual: int
    ) -> None:
        self.policy, self._ladder = policy, ladder
        self.costs = {policy: ladder.costs[policy]} if policy in ladder.costs else ladder.costs
        self.names = list(self.costs)
        self.world = LadderWorld(self.costs, tiers, noise, usual)
        known = served(ladder, self.names, usual)
        infos = {name: model.runner.info for name, model in self.world.engine.models.items()}
        learner = Learner(FeedbackStore(), {}, np.random.default_rng(0))
        self.router = PolicyRouter(known, tiers, lambda: self.world.outlooks, lambda: infos, learner)
        self.router.policy = policy
        self._seconds: list[float] = []
        self._tokens: dict[int, int] = {}
        self.world.on_end = self._ended

    def run(self, load: Sequence[Asked]) -> Result:
        self.world.play(load, self._send)
        return self._result(load)

    def _send(self, ident: int, asked: Asked) -> None:
        self.router.asked = asked
        lighter: tuple[str, ...] = ()
        if self.policy == FITS:
            usual = self.router.lengths.predict("local")
            fitting = (name for name, cost in self.costs.items() if asked.fits(cost, usual))
            model = next(fitting, self.names[-1])
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
        tokens = self._tokens[ident] = asked.tokens[list(self._ladder.costs).index(model)]
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
        self.world.admit(request, asked.prompt_tokens + tokens)

    def _ended(self, ident: int, reason: Reason) -> None:
        if reason in (Reason.STOP, Reason.LENGTH):
            self.router.lengths.observe("local", self._tokens[ident], cut=False)

    def _result(self, load: Sequence[Asked]) -> Result:
        outcomes, order = self.world.outcomes, list(self._ladder.costs)
        long = self._ladder.long
        could = good = foreseen = kept_foreseen = answered = kept = moved = free = 0
        right = right_on_time = 0.0
        floored = violated = 0
        for ident, asked in enumerate(load, 1):
            outcome = outcomes.get(ident)
            possible, sure = asked.feasible(self._ladder), asked.feasible(self._ladder, long)
            could += possible
            foreseen += sure
            floored += asked.objective.min_quality is not None
            if outcome is None or ident not in self.world.spoke:
                continue
            variant = order.index(self.world.spoke[ident].partition(":")[2])
            below = asked.chance[variant] < (asked.objective.min_quality or 0.0)
            answered += 1
            violated += below
            moved += self.world.spoke[ident] != outcome.request.model
            good += possible and outcome.good
            kept_foreseen += sure and outcome.good
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
            foreseen=kept_foreseen / max(foreseen, 1),
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


def served(full: KnownLadder, names: Sequence[str], usual: int) -> ServedLadder:
    """The ladder of these variants with the estimates that were fitted to other prompts."""
    known, variants = full.known, list[Variant]()
    for name in names:
        place = known.names.index(name)
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
    ladder = Ladder(
        model="m",
        family="",
        vocab=0,
        tokenizer="",
        top=names[0],
        variants=tuple(variants),
    )
    models = {name: ModelConfig(name=f"m:{name}", path=name) for name in names}
    return ServedLadder("m", Path(), ladder, models)


HEAD = (
    "| policy | on time | foreseen | quality | right and on time | floors violated | goodput"
    " | TTFT p99, max ms | moved | decision p50, p99 us |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def show(result: Result) -> None:
    p99, most = result.ttft_ms
    print(
        f"| {result.policy} | {result.on_time:.1%} | {result.foreseen:.1%} | {result.quality:.3f}"
        f" | {result.right_on_time:.3f} | {result.violated:.1%} | {result.goodput:.3f}/s"
        f" | {p99:,.0f}, {most:,.0f} | {result.moved:.1%}"
        f" | {result.decision_us[0]:.0f}, {result.decision_us[1]:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ladder", type=Path, help="default: variants without weights")
    parser.add_argument("--answers", type=Path, default=Path("build/answers.json"))
    parser.add_argument("--count", type=int, default=20, help="questions of each task and level to ask")
    parser.add_argument("--truth", type=Path, help="answers to more questions, for the share that is right")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--loads", default="0.3,0.7,1.2")
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--policies", help="these alone, with commas")
    options = parser.parse_args()
    if options.ladder:
        ladder = answered(options.ladder, options.answers, options.count, options.truth)
    else:
        ladder = by_chance(drawn())
    tiers = tight_tiers(list(ladder.costs.values())[1])
    loads = {"trace": 1.5} if options.trace else {load: float(load) for load in options.loads.split(",")}
    for load in loads.values():
        if options.trace:
            asked, policies = recorded(ladder, options.trace, options.requests, load, tiers), [OURS]
            usual = round(quantile(sorted(one.tokens[0] for one in asked), 0.9))
        else:
            asked, policies = tasks(ladder, options.requests, load), [OURS, CELLS, ORACLE, FITS, RANDOM]
            usual = ladder.long
        print(f"\nload {load:g}, {len(asked)} requests\n{HEAD}")
        chosen = options.policies.split(",") if options.policies else [*policies, *ladder.costs]
        results = [Trial(policy, ladder, tiers, options.noise, usual).run(asked) for policy in chosen]
        for result in results:
            show(result)
        alone = max((each.goodput for each in results if each.policy in ladder.costs), default=0.0)
        if options.trace and alone:
            most = len(asked) / asked[-1].at
            print(
                f"All requests on time and above their floor: {most:.3f}/s, {most / alone:.2f} times the best"
            )


if __name__ == "__main__":
    main()
