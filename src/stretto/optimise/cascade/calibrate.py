"""Measures a cascade: how sure a small variant must be of its tokens, and what it costs to ask a better one
otherwise.

The threshold comes from the validation split. What it gives is measured on the test split, with the tokens
that both variants really write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from stretto.engine.step_time import StepCost
from stretto.ladder.estimate import QualityBin
from stretto.ladder.registry import MeasuredCascade
from stretto.models.decoder import Decoder
from stretto.optimise.answers import Ids, TracedAnswer, generate, generate_traced
from stretto.optimise.data import DataSample, right
from stretto.optimise.estimates.quality import LEAST_IN_BIN, calibrated
from stretto.optimise.evaluate import interval
from stretto.optimise.job import StepJob
from stretto.optimise.training.trainer import write_whole

FEWEST = 2 * LEAST_IN_BIN  # prompts of a split that say something
FASTER = 1.1  # times the better variant alone; a smaller gain is not worth its complication


@dataclass(frozen=True, slots=True)
class CascadeSide:
    """One variant of a cascade."""

    name: str
    decoder: Decoder
    cost: StepCost


def measure_cascade(
    job: StepJob, begins: CascadeSide, better: CascadeSide, prompts: int, most_loss: float
) -> MeasuredCascade | None:
    """The cascade of two variants that loses at most `most_loss` of the better one's quality on the
    validation split; None if it is not `FASTER`, or if there are too few prompts with answers."""
    asked = [sample for sample in job.corpus.validation if sample.answer is not None][:prompts]
    held = [sample for sample in job.corpus.test if sample.answer is not None][:prompts]
    if min(len(asked), len(held)) < FEWEST:
        return None
    traced = _traced(job, begins, asked)
    known = _right(job, asked, [each.ids for each in traced])
    alone = _right(job, asked, _answers(job, better, asked))
    below = threshold([each.least for each in traced], known, alone, most_loss)
    if below is None:
        return None
    bins = calibrated([exp(each.least) for each in traced], known)
    return _on_test(job, begins, better, held, below, bins)


class KeptCascade(Struct, frozen=True):
    """A cascade that was measured, or that none was found. `key`: of what it depends on."""

    key: str
    found: MeasuredCascade | None


def kept_cascade(file: Path, key: str, make: Callable[[], MeasuredCascade | None]) -> MeasuredCascade | None:
    """The cascade in `file` if it has this key; otherwise a new one, which is kept there."""
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=KeptCascade)
    except (OSError, msgspec.DecodeError):
        kept = None
    if kept is None or kept.key != key:
        kept = KeptCascade(key, make())
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, msgspec.json.encode(kept))
    return kept.found


def threshold(
    sureness: Sequence[float], first: Sequence[bool], better: Sequence[bool], most_loss: float
) -> float | None:
    """The lowest threshold from which on at most `most_loss` of the better variant's right answers are lost,
    if it answers all prompts of which the first is less sure. None if none is."""
    order = sorted(range(len(sureness)), key=lambda place: sureness[place])
    loss, fewest = 0.0, len(order)
    for count in range(len(order) - 1, -1, -1):  # the better one answers the `count` least sure ones
        place = order[count]
        loss += (better[place] - first[place]) / len(order)
        if loss > most_loss:
            break
        fewest = count
    if fewest == len(order):
        return None
    surest = sureness[order[fewest]]
    return surest if not fewest else (surest + sureness[order[fewest - 1]]) / 2


class HandedOver(NamedTuple):
    """The answers of a cascade. `kept`: how many tokens of each the first variant wrote. `handed`: the places
    of those that the other one ended. `rest`: what it wrote."""

    answers: list[Ids]
    kept: list[int]
    handed: list[int]
    rest: list[Ids]


def hand_over(
    traced: Sequence[TracedAnswer],
    prompts: Sequence[Ids],
    below: float,
    go_on: Callable[[list[Ids]], list[Ids]],
) -> HandedOver:
    """Let `go_on` end the answers, each from the first token on that is less sure than `below`."""
    kept = [each.sure_of(below) for each in traced]
    handed = [
        place for place, (each, count) in enumerate(zip(traced, kept, strict=True)) if count < each.drawn
    ]
    rest = go_on([prompts[place] + traced[place].ids[: kept[place]] for place in handed])
    answers = [each.ids for each in traced]
    for place, ids in zip(handed, rest, strict=True):
        answers[place] = traced[place].ids[: kept[place]] + ids
    return HandedOver(answers, kept, handed, rest)


def _on_test(
    job: StepJob,
    begins: CascadeSide,
    better: CascadeSide,
    held: Sequence[DataSample],
    below: float,
    bins: tuple[QualityBin, ...],
) -> MeasuredCascade | None:
    """What the cascade gives on held-out prompts."""
    traced, alone = _traced(job, begins, held), _answers(job, better, held)
    prompts = [job.codec.prompt(sample) for sample in held]
    on_done = job.counting(f"{better.name}: cascade")
    answers, kept, handed, rest = hand_over(
        traced, prompts, below, lambda starts: generate(better.decoder, starts, job.generation(), on_done)
    )
    rights, usual = _right(job, held, answers), _right(job, held, alone)
    whole = sum(usual_ms(better.cost, len(p), 0, len(ids)) for p, ids in zip(prompts, alone, strict=True))
    taken = sum(
        usual_ms(begins.cost, len(prompt), 0, count) for prompt, count in zip(prompts, kept, strict=True)
    ) + sum(
        usual_ms(better.cost, len(prompts[place]) + kept[place], 0, len(ids))
        for place, ids in zip(handed, rest, strict=True)
    )
    if taken * FASTER > whole:
        return None
    written = sum(kept[place] for place in handed)
    return MeasuredCascade(
        begins=begins.name,
        below=below,
        quality=interval(rights),
        loss=max(sum(usual) - sum(rights), 0) / len(rights),
        escalated=len(handed) / len(held),
        begun=written / max(written + sum(map(len, rest)), 1),
        bins=bins,
    )


def usual_ms(cost: StepCost, prompt: int, cached: int, tokens: int) -> float:
    """What an answer of so many tokens takes alone, without draft tokens."""
    reading = cost.base + cost.prefill(cached, prompt - cached)
    return reading + tokens * cost.decodes(1, prompt + tokens // 2)


def _traced(job: StepJob, side: CascadeSide, samples: Sequence[DataSample]) -> list[TracedAnswer]:
    prompts = [job.codec.prompt(sample) for sample in samples]
    return generate_traced(side.decoder, prompts, job.generation(), job.counting(f"{side.name}: sureness"))


def _answers(job: StepJob, side: CascadeSide, samples: Sequence[DataSample]) -> list[Ids]:
    prompts = [job.codec.prompt(sample) for sample in samples]
    return generate(side.decoder, prompts, job.generation(), job.counting(f"{side.name}: answers"))


def _right(job: StepJob, samples: Sequence[DataSample], answers: Sequence[Ids]) -> list[bool]:
    replies = [job.codec.text.decode(ids) for ids in answers]
    return [right(sample, reply) for sample, reply in zip(samples, replies, strict=True)]
