"""Asks every variant of a ladder held-out questions of the desk, and keeps what they answered.

`python -m benchmarks.answers [LADDER] --out FILE [--count N] [--seed S]`: N questions of each task and level,
none of which the ladder was evaluated or fitted on. With another seed they are none of the first 20 of the
usual one. Answers are greedy, on the kernels that serve. With `--refit` it asks those that the ladder was
evaluated on and as many of the validation split, and fits the estimates of quality again to the answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch
from msgspec import Struct, structs

import stretto
from recipes.desk.samples import TEST_SEED, VALIDATION_SEED, cells, line
from recipes.desk.tasks import prompt_text
from stretto.ladder import registry
from stretto.ladder.registry import Ladder, Variant
from stretto.models import families
from stretto.optimise.answers import AnswerOptions, Ids, TextCodec, generate, generate_traced
from stretto.optimise.cascade.calibrate import hand_over
from stretto.optimise.data import DataSample, right
from stretto.optimise.estimates.lengths import fitted_lengths
from stretto.optimise.estimates.quality import fitted
from stretto.optimise.job import load_decoder

DESK = Path(stretto.__file__).parent / "desk"
SEED = 7  # of the questions
ASKED = 20  # of each task and level in the tables of docs/ladder.md
EVALUATED = 15  # questions of each task and level that the bundled ladder was evaluated on
LONGEST = 320  # tokens of an answer
CPU = torch.device("cpu")


class VariantAnswers(Struct, frozen=True):
    """Of each question: whether one variant's answer was right, and the tokens of it."""

    right: list[bool]
    tokens: list[int]


class CascadeAnswers(Struct, frozen=True):
    """Of each question: the tokens of the first variant's answer that it is not sure of. The other one ends
    the answer from the first of them on: whether that is right, and its tokens."""

    unsure: list[list[int]]
    right: list[bool]
    tokens: list[int]


class LadderAnswers(Struct, frozen=True):
    """What all variants answered. `questions`: the text of the last message. `tasks`, `levels`: of each
    question. `prompt_tokens`: of all its messages. `variants`: by name, the best first. `cascade`: what that
    of the ladder answers, if it has one."""

    questions: list[str]
    tasks: list[str]
    levels: list[str]
    prompt_tokens: list[int]
    variants: dict[str, VariantAnswers]
    cascade: CascadeAnswers | None = None


def held_out(count: int, seed: int = SEED) -> list[DataSample]:
    """`count` questions of each task and level that no training or evaluation has seen."""
    seen = cells(EVALUATED, TEST_SEED) + cells(EVALUATED, VALIDATION_SEED)
    if seed != SEED:
        seen += cells(ASKED, SEED)
    return [msgspec.convert(line(each), DataSample) for each in cells(count, seed, map(prompt_text, seen))]


def to_fit() -> list[DataSample]:
    """What the estimates of the bundled ladder are fitted to."""
    first = cells(EVALUATED, TEST_SEED)
    more = cells(EVALUATED, VALIDATION_SEED, map(prompt_text, first))
    return [msgspec.convert(line(each), DataSample) for each in first + more]


def asked(folder: Path, samples: list[DataSample]) -> LadderAnswers:
    """The answers of all variants of the ladder in `folder`."""
    ladder = registry.load(folder)
    found: dict[str, VariantAnswers] = {}
    lengths: list[int] = []
    for variant in ladder.variants:
        asking = VariantAsking(folder, variant)
        prompts = [asking.codec.prompt(sample) for sample in samples]
        lengths = [len(ids) for ids in prompts]
        answers = generate(asking.decoder, prompts, asking.how)
        rights = asking.rights(samples, answers)
        # The token that ends an answer is computed too.
        found[variant.name] = VariantAnswers(rights, [len(ids) + 1 for ids in answers])
        print(f"{variant.name}: {sum(rights) / len(rights):.1%} right", file=sys.stderr, flush=True)
    return LadderAnswers(
        [sample.question for sample in samples],
        [sample.task for sample in samples],
        [str(sample.level) for sample in samples],
        lengths,
        found,
        _of_cascade(folder, ladder, samples),
    )


class VariantAsking:
    """A variant of the ladder in `folder`, ready to be asked."""

    def __init__(self, folder: Path, variant: Variant) -> None:
        path = folder / variant.path
        spec = families.read(path)
        self.codec = TextCodec(path, spec.eos)
        self.how = AnswerOptions(LONGEST, spec.context, frozenset(spec.eos))
        self.decoder = load_decoder(path, CPU, variant.quantise, variant.exclude)

    def rights(self, samples: list[DataSample], answers: list[Ids]) -> list[bool]:
        """Whether each answer is right."""
        replies = [self.codec.text.decode(ids) for ids in answers]
        return [right(sample, reply) for sample, reply in zip(samples, replies, strict=True)]


def _of_cascade(folder: Path, ladder: Ladder, samples: list[DataSample]) -> CascadeAnswers | None:
    better = next((each for each in ladder.variants if each.cascade is not None), None)
    if better is None or better.cascade is None:
        return None
    below = better.cascade.below
    first, other = VariantAsking(folder, ladder.variant(better.cascade.begins)), VariantAsking(folder, better)
    prompts = [first.codec.prompt(sample) for sample in samples]
    traced = generate_traced(first.decoder, prompts, first.how)
    found = hand_over(traced, prompts, below, lambda starts: generate(other.decoder, starts, other.how))
    unsure = [[place for place, sure in enumerate(each.sureness) if sure < below] for each in traced]
    tokens = [len(ids) + 1 for ids in found.answers]
    return CascadeAnswers(unsure, other.rights(samples, found.answers), tokens)


def kept(file: Path, folder: Path, samples: Callable[[], list[DataSample]]) -> LadderAnswers:
    """The answers in `file`; the samples are asked first if there is no such file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.encode(asked(folder, samples())))
    return msgspec.json.decode(file.read_bytes(), type=LadderAnswers)


def refitted(folder: Path, found: LadderAnswers) -> Ladder:
    """The ladder with estimates of quality and of lengths that are fitted to these answers."""
    ladder = registry.load(folder)
    kinds = zip(found.questions, found.tasks, found.levels, strict=True)
    samples = [DataSample(prompt=text, answer="", task=task, level=level) for text, task, level in kinds]
    variants = tuple(
        structs.replace(each, estimate=fitted(samples, found.variants[each.name].right))
        for each in ladder.variants
    )
    lengths = fitted_lengths(samples, found.variants[ladder.top].tokens)
    return structs.replace(ladder, variants=variants, lengths=lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("ladder", nargs="?", type=Path, default=DESK)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60, help="questions of each task and level")
    parser.add_argument("--seed", type=int, default=SEED, help="of the questions")
    parser.add_argument("--refit", action="store_true", help="fit the estimates in the ladder again")
    options = parser.parse_args()
    if options.refit:
        registry.save(refitted(options.ladder, kept(options.out, options.ladder, to_fit)), options.ladder)
    else:
        kept(options.out, options.ladder, partial(held_out, options.count, options.seed))


if __name__ == "__main__":
    main()
