"""Whether the smallest variant's entropy after a prompt tells more of a right answer than the text does.

`python -m benchmarks.entropy --fit FILE --held FILE [LADDER]`: what `python -m benchmarks.answers` kept, the
first with `--refit`. Estimates with and without the entropy are fitted to the first and judged on the second:
Brier score, log loss and AUC of each variant, and what a choice by them gets right on an idle machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from msgspec import json
from numpy.typing import NDArray

from benchmarks.answers import DESK, LadderAnswers, VariantAsking, held_out, to_fit
from benchmarks.known import DEADLINES, alone_ms
from stretto.ladder import registry
from stretto.ladder.estimate import FEATURES, features
from stretto.ladder.registry import Ladder
from stretto.optimise.answers import logits_of
from stretto.optimise.data import DataSample
from stretto.optimise.estimates.quality import RIDGE, calibrated, smoothed
from stretto.optimise.estimates.regression import FeatureWeights, SparseRow, logistic, unseen

Shares = NDArray[np.float64]
USUAL = 70, 43  # tokens of a prompt and of an answer
Signal = Callable[[torch.Tensor], list[float]]


def last(entropy: torch.Tensor) -> list[float]:
    """The entropy after the last token of the prompt, and its logarithm."""
    return [float(entropy[-1]), float((entropy[-1] + 1e-4).log()) / 4]


def mean(entropy: torch.Tensor) -> list[float]:
    """The mean entropy over the prompt."""
    return [float(entropy.mean())]


def rows_of(
    samples: Sequence[DataSample], entropies: Sequence[torch.Tensor], signal: Signal | None
) -> list[SparseRow]:
    """The features of prompts, with those of the entropy after them."""
    rows = [features(sample.question).pairs() for sample in samples]
    if signal is not None:
        for row, entropy in zip(rows, entropies, strict=True):
            row += enumerate(signal(entropy), FEATURES)
    return rows


def entropies_of(folder: Path, ladder: Ladder, samples: Sequence[DataSample]) -> list[torch.Tensor]:
    """The entropy of the smallest variant at each token of each prompt, in nats."""
    asking = VariantAsking(folder, min(ladder.variants, key=lambda each: each.bytes))
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for sample in samples:
            chances = logits_of(asking.decoder, asking.codec.prompt(sample)).float().log_softmax(-1)
            found.append(-(chances.exp() * chances).sum(-1))
    return found


def estimated(
    rows: Sequence[SparseRow], rights: Sequence[bool], kinds: Sequence[str], asked: Sequence[SparseRow]
) -> Shares:
    """The calibrated estimates for the prompts `asked`, fitted as the step `evaluate` does."""

    def fit(places: Sequence[int]) -> FeatureWeights:
        labels = smoothed([rights[place] for place in places], [kinds[place] for place in places])
        return logistic([rows[place] for place in places], labels, RIDGE, FEATURES + 2)

    bins = calibrated(unseen(rows, fit, _chance), rights, kinds)
    weights = fit(range(len(rows)))
    scores = [_chance(weights, row) for row in asked]
    return np.interp(scores, [each.score for each in bins], [each.mean for each in bins]).clip(0.005, 0.995)


def _chance(weights: FeatureWeights, row: SparseRow) -> float:
    return float(1.0 / (1.0 + np.exp(-sum(weights[index] * value for index, value in row))))


def auc(estimates: Shares, rights: Shares) -> float:
    """The chance that a right answer has a higher estimate than a wrong one; equal ones count half."""
    good, bad = estimates[rights == 1.0], estimates[rights == 0.0]
    return float(((good[:, None] > bad) + 0.5 * (good[:, None] == bad)).mean())


def chosen_right(estimates: Shares, rights: Shares, times_ms: Shares, usual_ms: float) -> float:
    """The share of right answers if each request takes the best estimate among what is on time."""
    good = asked = 0.0
    for deadline in DEADLINES:
        fits = times_ms <= deadline * usual_ms
        choice = np.where(fits, estimates, -1.0).argmax(1)
        some = fits.any(1)
        good += float(rights[np.arange(len(choice)), choice][some].sum())
        asked += float(some.sum())
    return good / asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("ladder", nargs="?", type=Path, default=DESK)
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--held", type=Path, required=True)
    options = parser.parse_args()
    ladder = registry.load(options.ladder)
    fit, held = (json.decode(file.read_bytes(), type=LadderAnswers) for file in (options.fit, options.held))
    asked, new = to_fit(), held_out(20)
    if [fit.questions, held.questions] != [[each.question for each in part] for part in (asked, new)]:
        raise SystemExit("the files hold other questions than those of `benchmarks.answers`")
    known, seen = (entropies_of(options.ladder, ladder, part) for part in (asked, new))
    names = [each.name for each in ladder.variants]
    rights = np.array([held.variants[name].right for name in names], dtype=np.float64).T
    costs = [next(iter(each.times.values())) for each in ladder.variants]
    tokens = zip(*(held.variants[name].tokens for name in names), strict=True)
    times = np.array(
        [
            [alone_ms(cost, prompt, count) for cost, count in zip(costs, row, strict=True)]
            for prompt, row in zip(held.prompt_tokens, tokens, strict=True)
        ]
    )
    kinds = [f"{task} {level}" for task, level in zip(fit.tasks, fit.levels, strict=True)]
    print("| entropy | variant | Brier | log loss | AUC | right by the choice |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for title, signal in (("none", None), ("after the prompt", last), ("mean over the prompt", mean)):
        rows, fresh = rows_of(asked, known, signal), rows_of(new, seen, signal)
        found = np.array([estimated(rows, fit.variants[name].right, kinds, fresh) for name in names]).T
        chosen = chosen_right(found, rights, times, alone_ms(costs[0], *USUAL))
        for place, name in enumerate(names):
            p, y = found[:, place], rights[:, place]
            loss = -float((y * np.log(p) + (1 - y) * np.log(1 - p)).mean())
            brier, area = float(((p - y) ** 2).mean()), auc(p, y)
            print(
                f"| {title} | `{name}` | {brier:.4f} | {loss:.4f} | {area:.4f} | {chosen:.2%} |", flush=True
            )


if __name__ == "__main__":
    main()
