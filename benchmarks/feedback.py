"""What learning from feedback is worth, on prompts for which the answers of all variants are known.

`coverage`: how often the 95 % intervals of IPS, SNIPS and DR contain the truth, over resampled logs of a
bandit that learns. `drift`: what it costs that one variant becomes bad at one task, until the bandit has
noticed, beside the best policies that never change.

`python benchmarks/feedback.py [--ladder FOLDER --recipe RECIPE]`; without a ladder the answers are drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from stretto.ladder.estimate import Quality, QualityModel, estimate, features
from stretto.ladder.learning.bandit import SETTINGS, Bandit, BanditSettings, Lesson, context, corrected
from stretto.ladder.learning.off_policy import LoggedChoice, MissingOverlap, OffPolicyReport, evaluate
from stretto.optimise import data, recipe
from stretto.optimise.data import DataSample
from stretto.optimise.estimates.quality import fitted
from stretto.optimise.evaluate import EvaluateStep, Measured

Table = NDArray[np.float64]
TASKS: dict[str, tuple[float, tuple[str, ...]]] = {  # how much each level costs, and how users ask
    "sum": (0.10, ("What is the sum of {}?", "add {} please", "total of {}")),
    "sort": (0.07, ("Sort the numbers {}", "put {} in order")),
    "order": (0.03, ("Where is my order {}?", "status of order number {}")),
    "date": (0.08, ("Which weekday is {}?", "how many days from {} until today")),
    "greet": (0.00, ("Hello there {}", "who are you {}")),
}
STRENGTHS = {"full": 0.99, "int8": 0.98, "pruned": 0.95, "small": 0.92, "tiny": 0.85}
LEVELS = 4
LOGGING = structs.replace(SETTINGS, spread=0.3, least=0.2)  # explores enough to evaluate any variant
FLOORS, FLOORED = (0.5, 0.7), 0.3  # floors, and the share of requests that have one
TIGHT = (0, 0, 1, 2)  # how many of the largest variants a deadline excludes
FLIPPED = 0.05  # share of votes that are the wrong way round


@dataclass(frozen=True)
class KnownAnswers:
    """Held-out prompts. `right[i, k]`: whether variant k answers prompt i right. `cells[i]`: the kind of
    prompt i, its task and level. The largest variant comes first."""

    names: tuple[str, ...]
    questions: tuple[str, ...]
    tasks: tuple[str, ...]
    cells: tuple[str, ...]
    right: Table
    models: tuple[QualityModel, ...]

    def estimates(self) -> list[list[Quality]]:
        """What the ladder expects of each prompt and variant."""
        found = [features(question) for question in self.questions]
        return [[estimate(model, each) for model in self.models] for each in found]

    def contexts(self) -> list[NDArray[np.float64]]:
        return [context(features(question)) for question in self.questions]


def drawn(count: int = 2000, seed: int = 0) -> KnownAnswers:
    """Answers by chance: each task has its own difficulty, and small variants lose more with each level."""
    rng = Random(seed)
    halves: list[tuple[list[str], list[str], list[str], Table]] = []
    for _ in ("to fit on", "held out"):
        tasks = [rng.choice(list(TASKS)) for _ in range(count)]
        levels = [rng.randint(1, LEVELS) for _ in tasks]
        numbers = [" ".join(str(rng.randint(1, 99)) for _ in range(level + 1)) for level in levels]
        asked = [rng.choice(TASKS[task][1]).format(some) for task, some in zip(tasks, numbers, strict=True)]
        right = [
            [float(rng.random() < _chance(place, task, level)) for place in range(len(STRENGTHS))]
            for task, level in zip(tasks, levels, strict=True)
        ]
        cells = [f"{task} {level}" for task, level in zip(tasks, levels, strict=True)]
        halves.append((asked, tasks, cells, np.array(right)))
    (asked, _, _, right), (held, tasks, cells, answers) = halves
    return KnownAnswers(
        tuple(STRENGTHS), tuple(held), tuple(tasks), tuple(cells), answers, _models(asked, right)
    )


def _chance(place: int, task: str, level: int) -> float:
    return max(0.02, list(STRENGTHS.values())[place] - TASKS[task][0] * level * (0.6 + 0.55 * place))


def measured(folder: Path, file: Path) -> KnownAnswers:
    """The answers that the step `evaluate` kept in a ladder's folder. Every second prompt fits the estimates,
    the others are held out."""
    parsed = recipe.read(file)
    step = next(step for step in parsed.steps if isinstance(step, EvaluateStep))
    corpus = data.read(parsed.files, file.parent, skip_bad_lines=True)
    samples = [sample for sample in corpus.test if sample.answer is not None][: step.prompts]
    names = [each["name"] for each in msgspec.json.decode((folder / "ladder.json").read_bytes())["variants"]]
    rights = [
        msgspec.json.decode((folder / "evaluation" / f"{name}.json").read_bytes(), type=Measured).rights
        for name in names
    ]
    table = np.array(rights, dtype=np.float64).T
    asked, held = samples[::2], samples[1::2]
    return KnownAnswers(
        tuple(names),
        tuple(sample.question for sample in held),
        tuple(sample.task for sample in held),
        tuple(f"{sample.task} {sample.level}" for sample in held),
        table[1::2],
        _models([sample.question for sample in asked], table[::2]),
    )


def _models(asked: Sequence[str], right: Table) -> tuple[QualityModel, ...]:
    samples = [DataSample(prompt=question, answer="") for question in asked]
    found = [fitted(samples, [bool(each) for each in column]) for column in right.T]
    if any(model is None for model in found):
        raise SystemExit("too few prompts to fit an estimate: evaluate more")
    return tuple(model for model in found if model is not None)


@dataclass(frozen=True)
class Coverage:
    """How one policy was evaluated. `truth`: its value. For each estimator the share of the logs whose
    interval has the truth, and the mean width; `refused`: logs that did not support an estimate."""

    policy: str
    truth: float
    shares: dict[str, float]
    widths: dict[str, float]
    effective: float
    refused: int


@dataclass(frozen=True)
class LogSetting:
    """How many logs, of how many choices. With `learns_every` = 4 the bandit learns from a quarter."""

    resamples: int = 200
    size: int = 1000
    learns_every: int = 1


def coverage(known: KnownAnswers, setting: LogSetting, seed: int = 0) -> list[Coverage]:
    """Logs of a learning bandit on prompts drawn with replacement, and what they say about other policies."""
    estimates, contexts = known.estimates(), known.contexts()
    policies = policies_of(known, estimates)
    reports: dict[str, list[OffPolicyReport]] = {name: [] for name in policies}
    for number in range(setting.resamples):
        rng = np.random.default_rng((seed, number))
        prompts: list[int] = rng.integers(len(known.questions), size=setting.size).tolist()
        log = logged(known, prompts, (estimates, contexts), setting.learns_every, rng)
        for name, policy in policies.items():
            try:
                # The first few choices were not drawn.
                reports[name].append(evaluate(log, policy[prompts[-len(log) :]].tolist()))
            except MissingOverlap:
                continue
    return [
        _covered(name, float((policy * known.right).sum(1).mean()), reports[name], setting.resamples)
        for name, policy in policies.items()
    ]


def policies_of(known: KnownAnswers, estimates: Sequence[Sequence[Quality]]) -> dict[str, Table]:
    """Policies to evaluate, as the probability of each variant for each prompt."""
    count = len(known.names)
    best = [max(range(count), key=lambda place: row[place].mean) for row in estimates]
    cheapest = [
        next((place for place in reversed(range(count)) if row[place].mean >= 0.8), 0) for row in estimates
    ]
    even = np.full((len(known.questions), count), 1.0 / count)
    return {
        "best estimate": np.eye(count)[best],
        "smallest with an estimate of 0.8": np.eye(count)[cheapest],
        f"always {known.names[1]}": np.eye(count)[[1] * len(best)],
        f"always {known.names[-1]}": np.eye(count)[[count - 1] * len(best)],
        "any, evenly": even,
    }


def logged(
    known: KnownAnswers,
    prompts: Sequence[int],
    known_of: tuple[Sequence[Sequence[Quality]], Sequence[NDArray[np.float64]]],
    learns_every: int,
    rng: np.random.Generator,
) -> list[LoggedChoice]:
    """What a bandit logs that learns from rewards before the next choice. `known_of`: the estimates and the
    context of each prompt."""
    estimates, contexts = known_of
    bandit = Bandit(len(known.names), rng, LOGGING)
    everything = range(len(known.names))
    log: list[LoggedChoice] = []
    for number, at in enumerate(prompts):
        changes = bandit.corrections(contexts[at])
        means = [each.mean for each in corrected(estimates[at], changes)]
        place, propensities = bandit.draw(everything, means, changes)
        expected = [each.mean for each in estimates[at]]
        reward = float(known.right[at, place])
        if bandit.weight >= LOGGING.warm:  # before, nothing is drawn
            log.append(LoggedChoice(place, reward, propensities, expected))
        if number % learns_every == 0:
            bandit.learn(Lesson(contexts[at], place, reward - expected[place]))
    return log


def _covered(name: str, truth: float, reports: Sequence[OffPolicyReport], resamples: int) -> Coverage:
    shares: dict[str, float] = {}
    widths: dict[str, float] = {}
    for estimator in ("ips", "snips", "dr"):
        values = [getattr(report, estimator) for report in reports]
        hits = sum(value.low <= truth <= value.high for value in values)
        shares[estimator] = hits / max(1, len(values))
        widths[estimator] = sum(value.high - value.low for value in values) / max(1, len(values))
    effective = sum(report.effective for report in reports) / max(1, len(reports))
    return Coverage(name, truth, shares, widths, effective, resamples - len(reports))


@dataclass(frozen=True)
class DriftSetting:
    """Until request `before` all is as measured. Then the variant `place` answers `task` right only a tenth
    as often as before, for `after` requests."""

    task: str
    place: int = 0
    before: int = 1000
    after: int = 1000
    learns: bool = True
    settings: BanditSettings = SETTINGS


@dataclass(frozen=True)
class DriftRun:
    """By request: the expected quality of the chosen variant, of the best one that never changes (`fixed`),
    of the best rule that has one order of variants for each task (`rule`); whether the request had a floor
    that was said to be met, whether it was violated, and whether the choice explored. The rules know what
    comes: they are the best of the requests before the drift, and of those after it."""

    chosen: Table
    fixed: Table
    rule: Table
    floored: Table
    violated: Table
    explored: Table


def drift(known: KnownAnswers, setting: DriftSetting, seed: int = 0) -> DriftRun:
    """One run. Each choice gets a vote, of which some are wrong."""
    rng = np.random.default_rng(seed)
    bandit = Bandit(len(known.names), np.random.default_rng((seed, 1)), setting.settings)
    estimates, contexts = known.estimates(), known.contexts()
    answers = [known.right, _worse(known, setting, rng)]
    truths = [_by_cell(known.cells, table) for table in answers]
    fixed = [_ranks(truth, ["all"] * len(known.tasks)) for truth in truths]
    rule = [_ranks(truth, known.tasks) for truth in truths]
    rows: list[tuple[float, ...]] = []
    for number in range(setting.before + setting.after):
        late = int(number >= setting.before)
        at = int(rng.integers(len(known.questions)))
        fits = range(int(rng.choice(TIGHT)), len(known.names))
        floor = float(rng.choice(FLOORS)) if rng.random() < FLOORED else 0.0
        changes = bandit.corrections(contexts[at])
        found = corrected(estimates[at], changes)
        feasible = [place for place in fits if found[place].low >= floor]
        met = bool(feasible)
        among = feasible or list(fits)
        means = [found[place].mean for place in among]
        usual = among[max(range(len(among)), key=means.__getitem__)]
        place = among[bandit.draw(among, means, changes).place] if met and setting.learns else usual
        truth = truths[late][at]
        vote = float(answers[late][at, place])
        vote = 1.0 - vote if rng.random() < FLIPPED else vote
        if setting.learns:
            bandit.learn(Lesson(contexts[at], place, vote - estimates[at][place].mean))
        best, best_rule = (next(k for k in ranks[late][at] if k in fits) for ranks in (fixed, rule))
        floored = float(met and floor > 0.0)
        violated = float(floored and truth[place] < floor)
        rows.append((truth[place], truth[best], truth[best_rule], floored, violated, float(place != usual)))
    return DriftRun(*np.array(rows).T)


def _worse(known: KnownAnswers, setting: DriftSetting, rng: np.random.Generator) -> Table:
    changed = known.right.copy()
    hit = np.array([task == setting.task for task in known.tasks]) & (rng.random(len(known.tasks)) < 0.9)
    changed[hit, setting.place] = 0.0
    return changed


def _by_cell(cells: Sequence[str], table: Table) -> Table:
    """The mean of each variant over the prompts of the same cell."""
    found = np.empty_like(table)
    for cell in set(cells):
        held = np.array([each == cell for each in cells])
        found[held] = table[held].mean(0)
    return found


def _ranks(truth: Table, groups: Sequence[str]) -> list[list[int]]:
    """For each prompt the variants by their mean in its group, the best first."""
    order = {
        group: np.argsort(
            -truth[np.array([each == group for each in groups])].mean(0), kind="stable"
        ).tolist()
        for group in set(groups)
    }
    return [order[group] for group in groups]


@dataclass(frozen=True)
class Recovery:
    """What a drift cost, over some runs. Regrets are means per request: quality of the comparison minus that
    of the choice. `worst`: how many requests after the drift the cumulative regret against `fixed` was
    largest. `violations`: among requests with a floor that was said to be met; `all_violations`: among all
    requests; `explored_violations`: choices that explored and violated a floor, among all requests."""

    before: float
    first: float
    later: float
    fixed_later: float
    worst: int
    violations: float
    all_violations: float
    explored: float
    explored_violations: float


def recovery(known: KnownAnswers, setting: DriftSetting, seeds: int = 8, within: int = 200) -> Recovery:
    """Runs with different seeds, before the drift, in the first `within` feedbacks after it, and later."""
    runs = [drift(known, setting, seed) for seed in range(seeds)]

    def mean(name: str) -> Table:
        return np.mean([getattr(run, name) for run in runs], axis=0)

    chosen, at = mean("chosen"), setting.before
    regret, against = mean("rule") - chosen, mean("fixed") - chosen
    floored, violated = mean("floored"), mean("violated")
    explored = np.mean([run.explored * run.violated for run in runs], axis=0)
    return Recovery(
        before=float(regret[at // 2 : at].mean()),
        first=float(regret[at : at + within].mean()),
        later=float(regret[at + within :].mean()),
        fixed_later=float(against[at + within :].mean()),
        worst=int(np.cumsum(against[at:]).argmax()) + 1,
        violations=float(violated.sum() / max(1.0, floored.sum())),
        all_violations=float(violated.mean()),
        explored=float(mean("explored").mean()),
        explored_violations=float(explored.mean()),
    )


def main() -> None:
    options = _arguments()
    known = measured(options.ladder, options.recipe) if options.ladder else drawn(seed=options.seed)
    print(f"{len(known.questions)} held-out prompts, right answers: ", end="")
    shares = known.right.mean(0)
    print(", ".join(f"{name} {share:.1%}" for name, share in zip(known.names, shares, strict=True)))
    print("\n| policy | truth | effective rewards | IPS | SNIPS | DR | width IPS | SNIPS | DR | refused |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in coverage(known, LogSetting(options.resamples, options.size), options.seed):
        covered = " | ".join(f"{share:.1%}" for share in row.shares.values())
        widths = " | ".join(f"{width:.3f}" for width in row.widths.values())
        print(
            f"| {row.policy} | {row.truth:.3f} | {row.effective:.0f} | {covered} | {widths} | {row.refused} |"
        )
    print("\n| drift | learns | regret before | first 200 | later | later, best fixed | worst at | ", end="")
    print("violations of floors | of all requests | explored | and violated |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for task in sorted(set(known.tasks)):
        for learns in (False, True):
            found = recovery(known, DriftSetting(task, learns=learns), options.seeds)
            print(
                f"| {known.names[0]} at {task} | {'yes' if learns else 'no'} | {found.before:.4f} "
                f"| {found.first:.4f} | {found.later:.4f} | {found.fixed_later:+.4f} | {found.worst} "
                f"| {found.violations:.2%} | {found.all_violations:.2%} | {found.explored:.1%} "
                f"| {found.explored_violations:.2%} |",
                flush=True,
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ladder", type=Path, help="folder of a ladder with its evaluation/")
    parser.add_argument("--recipe", type=Path, help="the recipe that made it; needed with --ladder")
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--size", type=int, default=1000, help="choices of each log")
    parser.add_argument("--seeds", type=int, default=8, help="runs of each drift")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.ladder is not None and options.recipe is None:
        parser.error("--ladder needs --recipe, which says what the prompts were")
    return options


if __name__ == "__main__":
    main()
