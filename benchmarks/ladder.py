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
from dataclasses import dataclass, field, fields, replace
from math import inf
from pathlib import Path
from random import Random
from time import process_time
from typing import NamedTuple

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
from stretto.engine.sequence import Drawn
from stretto.engine.sequence import Sequence as EngineSequence
from stretto.engine.step_time import StepCost, StepLoad, StepTime
from stretto.ladder.choose import VariantChoice
from stretto.ladder.estimate import Quality
from stretto.ladder.learning.feedback import FeedbackStore
from stretto.ladder.learning.learner import Learner
from stretto.ladder.lengths import AnswerTokens
from stretto.ladder.registry import Ladder, Lengths, Origin, QualityInterval, Variant
from stretto.ladder.serving import ServedLadder
from stretto.server.variants.router import Expectation, LadderRequest, VariantPlacement, VariantRouter
from stretto.simulator.harness import World
from stretto.simulator.report import RequestOutcome
from stretto.statistics import quantile
from stretto.types import Reason, Request, Sampling, StepStats, TokenEvent

SNAPSHOT_S = 0.02  # as the engine sends them
OURS, CELLS, ORACLE = "ours", "knows each kind's share", "oracle"
CASCADE = "ours with a cascade"
FITS, RANDOM = "largest that fits", "random feasible"


class NoisyRunner(NullRunner):
    """A null model whose steps take what its cost says, times some noise."""

    def __init__(self, name: str, cost: StepCost, clock: VirtualClock, noise: float, usual: int) -> None:
        info = null_info(name=name, context=16384, blocks=16384)
        info = structs.replace(info, usual_tokens=usual)
        super().__init__(info, cost=cost, sleep=clock.sleep)
        self._rng, self._noise = Random(f"{name} {noise}"), noise
        self.unsure: dict[int, frozenset[int]] = {}  # by request, the tokens of which it is not sure

    def step_ms(self, load: StepLoad) -> float:
        return self.cost(load) * (self._rng.lognormvariate(0.0, self._noise) if self._noise else 1.0)

    def draw(self, seq: EngineSequence, ahead: int) -> Drawn:
        drawn = super().draw(seq, ahead)
        if seq.request.cascade is not None and seq.output_len + ahead in self.unsure.get(seq.request.id, ()):
            return structs.replace(drawn, sureness=-inf)
        return drawn


class LadderWorld(World):
    """An engine with all variants, and what the server knows of it: snapshots every `SNAPSHOT_S`."""

    def __init__(
        self, costs: Mapping[str, StepCost], tiers: dict[str, Tier], noise: float, usual: int
    ) -> None:
        clock, names = VirtualClock(), list(costs)
        self.runners = {
            name: NoisyRunner(f"m:{name}", cost, clock, noise, usual) for name, cost in costs.items()
        }
        models = [
            LoadedModel(runner, StepTime(runner.cost, [max(noise, 0.01)] * 16))
            for runner in self.runners.values()
        ]
        super().__init__(
            clock, models, Limits(256, 512, tiers), SCHEDULES["deadline"], share=False, record=False
        )
        self.outlooks = {f"m:{name}": Outlook(tiers) for name in names}
        self.outcomes: dict[int, RequestOutcome] = {}
        self.spoke: dict[int, str] = {}
        self.handed: dict[int, int] = {}  # by request, the tokens after which a better variant went on
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
                if moved is not None and moved.why == "unsure":
                    self.handed[event.id] = moved.after
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


class KnownAnswer(NamedTuple):
    """`variant`: the place of the one that answered, or ended the answer; negative: none did. `chance`: the
    share of such answers that are right in that kind of questions."""

    variant: int
    right: float = 0.0
    chance: float = 0.0


@dataclass
class Tally:
    """What became of loads under one policy, added up. `could`: requests that could be on time; `sure`: those
    that would be even with a long answer; `free`: without a floor. `right`: right answers to these."""

    sent: int = 0
    could: int = 0
    sure: int = 0
    floored: int = 0
    good: int = 0
    sure_good: int = 0
    answered: int = 0
    free: int = 0
    right: float = 0.0
    right_on_time: float = 0.0
    violated: int = 0
    kept: int = 0
    above_floor: int = 0
    moved: int = 0
    seconds: float = 0.0
    first_ms: list[float] = field(default_factory=list[float])
    decided_us: list[float] = field(default_factory=list[float])

    def add(
        self, asked: Asked, outcome: RequestOutcome | None, answer: KnownAnswer, ladder: KnownLadder
    ) -> None:
        """Count a request."""
        floor = asked.objective.min_quality
        possible, sure = asked.feasible(ladder), asked.feasible(ladder, ladder.long)
        self.sent += 1
        self.could += possible
        self.sure += sure
        self.floored += floor is not None
        if outcome is None or answer.variant < 0:
            return
        good, below = outcome.good, answer.chance < (floor or 0.0)
        self.answered += 1
        self.good += possible and good
        self.sure_good += sure and good
        self.violated += below
        self.kept += good and not below
        if floor is None:
            self.free += 1
            self.right += answer.right
            self.right_on_time += answer.right * good
        else:
            self.above_floor += good and not below

    def include(self, other: Tally) -> None:
        """Add another tally to this one."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def quality(self) -> float:
        """The share of right answers among all answers to requests without a floor."""
        return self.right / max(self.free, 1)

    @property
    def goodput(self) -> float:
        """Requests per second that were on time and not below their floor."""
        return self.kept / self.seconds


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
        self._unsure: dict[int, list[int]] = {}
        self._tokens: dict[int, tuple[int, AnswerTokens | None]] = {}
        self.world.on_end = self._ended

    def run(self, load: Sequence[Asked]) -> Tally:
        self.world.play(load, self._send)
        outcomes, order, found = self.world.outcomes, list(self._ladder.costs), Tally(seconds=load[-1].at)
        for ident, asked in enumerate(load, 1):
            outcome, spoke = outcomes.get(ident), self.world.spoke.get(ident)
            answer = KnownAnswer(-1)
            if spoke is not None:
                answer = self._answer(ident, asked, order.index(spoke.partition(":")[2]))
            found.add(asked, outcome, answer, self._ladder)
            found.moved += outcome is not None and spoke is not None and spoke != outcome.request.model
        found.first_ms = [(one.first - one.request.arrival) * 1e3 for one in outcomes.values() if one.count]
        found.decided_us = [second * 1e6 for second in self._seconds]
        return found

    def _answer(self, ident: int, asked: Asked, variant: int) -> KnownAnswer:
        """What is known of an answer that this variant gave or ended. One of a cascade is like the others of
        it if the better variant went on as soon as the first one was not sure."""
        cascaded, place = self._ladder.cascaded, asked.place
        handed, unsure = self.world.handed.get(ident), self._unsure.get(ident)
        if cascaded is None or unsure is None or handed != next(iter(unsure), None):
            return KnownAnswer(variant, asked.right[variant], asked.chance[variant])
        return KnownAnswer(variant, float(cascaded.right[place]), self._ladder.cascade_chances[place])

    def _send(self, ident: int, asked: Asked) -> None:
        self.router.asked = asked
        placed = VariantPlacement(None)
        if self.policy == FITS:
            usual = int(self.router.lengths.expect("local").long)
            fitting = (name for name, cost in self.costs.items() if asked.fits(cost, usual))
            model = next(fitting, self.names[-1])
        elif len(self.names) == 1:
            model = self.names[0]
        else:
            started = process_time()
            placed = self.router.place(_request(asked, self.policy == CASCADE), self.world.clock())
            self._seconds.append(process_time() - started)
            self.router.reprice(self.world.clock())
            if placed.model is None:
                return
            model = placed.model.partition(":")[2]
        tokens = asked.tokens[list(self._ladder.costs).index(model)]
        cascaded = self._ladder.cascaded
        if placed.cascade is not None and cascaded is not None:
            self._unsure[ident] = cascaded.unsure[asked.place]
            self.world.runners[model].unsure[ident] = frozenset(cascaded.unsure[asked.place])
            tokens = cascaded.tokens[asked.place]
        self._tokens[ident] = tokens, placed.fitted
        request = Request(
            id=ident,
            model=f"m:{model}",
            prompt=(0,) * asked.prompt_tokens,
            arrival=asked.at,
            sampling=Sampling(seed=ident),
            objective=asked.objective,
            tier=asked.tier,
            lighter=placed.lighter if self.policy != RANDOM else (),
            expected_tokens=placed.expected_tokens,
            cascade=placed.cascade,
        )
        self.world.admit(request, asked.prompt_tokens + tokens)

    def _ended(self, ident: int, reason: Reason) -> None:
        if reason in (Reason.STOP, Reason.LENGTH):
            self.router.lengths.observe("local", *self._tokens[ident])


def _request(asked: Asked, cascade: bool) -> LadderRequest:
    return LadderRequest(
        question=asked.question,
        prompt_tokens=asked.prompt_tokens,
        longest_prompt=asked.prompt_tokens,
        arrival=asked.at,
        objective=asked.objective,
        tier=asked.tier,
        cascade=cascade,
    )


def served(full: KnownLadder, names: Sequence[str], usual: int) -> ServedLadder:
    """The ladder of these variants: as it is on disk, or with estimates that were fitted to other prompts."""
    ladder = full.ladder or Ladder(
        model="m", family="", vocab=0, tokenizer="", top=full.known.names[0], variants=_made(full, usual)
    )
    variants = tuple(variant for variant in ladder.variants if variant.name in names)
    top = ladder.top if ladder.top in names else names[0]
    models = {name: ModelConfig(name=f"m:{name}", path=name) for name in names}
    return ServedLadder("m", Path(), structs.replace(ladder, top=top, variants=variants), models)


def with_usual(full: KnownLadder, usual: int) -> KnownLadder:
    """The same for a load whose lengths have nothing to do with the questions. `usual`: of a long answer."""
    if full.ladder is None:
        return full
    lengths = Lengths(60, 20, usual)
    variants = tuple(structs.replace(variant, lengths=lengths) for variant in full.ladder.variants)
    return replace(full, ladder=structs.replace(full.ladder, variants=variants, lengths=None))


def _made(full: KnownLadder, usual: int) -> tuple[Variant, ...]:
    """Variants without weights."""
    known, variants = full.known, list[Variant]()
    for place, name in enumerate(known.names):
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
    return tuple(variants)


HEAD = (
    "| policy | on time | with a long answer | quality | right and on time | floors violated | on time, above"
    " their floor | goodput | TTFT p99, max ms | moved | decision p50, p99 us |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def show(policy: str, found: Tally) -> None:
    first, spent = sorted(found.first_ms) or [0.0], sorted(found.decided_us) or [0.0]
    print(
        f"| {policy} | {found.good / max(found.could, 1):.1%} | {found.sure_good / max(found.sure, 1):.1%}"
        f" | {found.quality:.3f} | {found.right_on_time / max(found.sent - found.floored, 1):.3f}"
        f" | {found.violated / max(found.floored, 1):.1%} | {found.above_floor} of {found.floored}"
        f" | {found.goodput:.3f}/s | {quantile(first, 0.99):,.0f}, {first[-1]:,.0f}"
        f" | {found.moved / max(found.answered, 1):.1%} | {quantile(spent, 0.5):.0f},"
        f" {quantile(spent, 0.99):.0f} |",
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
    parser.add_argument("--seeds", default="0", help="of the loads, with commas; all count together")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.ladder:
        ladder = answered(options.ladder, options.answers, options.count, options.truth)
    else:
        ladder = by_chance(drawn())
    tiers = tight_tiers(list(ladder.costs.values())[1])
    loads = {"trace": 1.5} if options.trace else {load: float(load) for load in options.loads.split(",")}
    for load in loads.values():
        if options.trace:
            made = [recorded(ladder, options.trace, options.requests, load, tiers)]
            usual = round(quantile(sorted(one.tokens[0] for one in made[0]), 0.9))
            policies, measured = [OURS], with_usual(ladder, usual)
        else:
            made, measured = [tasks(ladder, options.requests, load, seed) for seed in seeds], ladder
            usual, policies = ladder.long, [OURS, CELLS, ORACLE, FITS, RANDOM]
            policies += [CASCADE] if ladder.cascaded else []
        print(f"\nload {load:g}, {sum(map(len, made))} requests\n{HEAD}")
        chosen = options.policies.split(",") if options.policies else [*policies, *ladder.costs]
        best = 0.0
        for policy in chosen:
            total = Tally()
            for asked in made:
                total.include(Trial(policy, measured, tiers, options.noise, usual).run(asked))
            show(policy, total)
            if policy in ladder.costs:
                best = max(best, total.goodput)
        if options.trace and best:
            most = len(made[0]) / made[0][-1].at
            print(
                f"All requests on time and above their floor: {most:.3f}/s, {most / best:.2f} times the best"
            )


if __name__ == "__main__":
    main()
