"""What distillation and healing are worth: students of one size, made in four ways, with several seeds.

`python -m benchmarks.students [--teacher DIR] [--steps N] [--out FOLDER]`. All are trained for as many steps,
on the same questions of the desk's first level, in the same order. `distilled`: the teacher's layers at even
distances, KL and cross-entropy. `fine-tuned`: the same start, cross-entropy alone. `pruned and healed`: the
layers and neurons that matter most, KL and cross-entropy. `from scratch`: random weights, cross-entropy.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import stretto
from recipes.desk.samples import line
from recipes.desk.tasks import TASKS, draw, held_out
from stretto.models import families
from stretto.optimise.answers import TextCodec, generate, mean_kl, read_scores
from stretto.optimise.data import Corpus, DataSample, right
from stretto.optimise.distil import distil, student_cut
from stretto.optimise.evaluate import difference
from stretto.optimise.finetune import finetune
from stretto.optimise.job import StepJob, load_decoder
from stretto.optimise.prune import prune
from stretto.optimise.recipe import DistilStep, FinetuneStep, PruneStep
from stretto.optimise.training.surgery import cut
from stretto.optimise.training.trainer import StepSession, save_model
from stretto.statistics import wilson

DESK = Path(stretto.__file__).parent / "desk"
LEVEL = 1
LONGEST = 64  # tokens of an answer
TEXTS = 64  # to measure KL on
CPU = torch.device("cpu")


@dataclass
class Outcome:
    """What the students of one way answered, over all seeds. `rights`: by seed, then by question."""

    rights: list[bool] = field(default_factory=list[bool])
    shares: list[float] = field(default_factory=list[float])
    kl: list[float] = field(default_factory=list[float])


class Workshop:
    """One teacher, the questions, and the size of its students."""

    def __init__(self, teacher: Path, folder: Path, options: argparse.Namespace) -> None:
        self.teacher, self.folder, self.options = teacher, folder, options
        rng = Random("students")
        drawn = [draw("train", rng.choice(list(TASKS)), LEVEL, rng) for _ in range(options.train)]
        held = [each for task in TASKS for each in held_out(task, LEVEL, options.test // len(TASKS))]
        train, test = (
            tuple(msgspec.convert(line(each), DataSample) for each in group) for group in (drawn, held)
        )
        self.corpus = Corpus(train, test, test)
        self.training: dict[str, Any] = {"batch": options.batch, "rate": options.rate}
        self.size: dict[str, Any] = {"layers": options.layers, "intermediate": options.intermediate}

    def job(self, name: str, parent: Path, seed: int) -> StepJob:
        session = StepSession(self.folder / name, CPU)
        codec = TextCodec(parent, families.read(parent).eos)
        return StepJob("$", parent, self.corpus, codec, session, seed, max_answer=LONGEST)

    def distilled(self, seed: int) -> Path:
        job = self.job(f"distilled {seed}", self.teacher, seed)
        step = DistilStep(
            name="s",
            steps=self.options.steps,
            on_policy_steps=0,
            replies="ideal",
            **self.size,
            **self.training,
        )
        distil(job, step)
        return job.made

    def fine_tuned(self, seed: int) -> Path:
        return self._alone(f"fine-tuned {seed}", self._start(), seed)

    def scratch(self, seed: int) -> Path:
        random = self.folder / f"random {seed}"
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self._start()))
        save_model(model, self.teacher, random)
        return self._alone(f"scratch {seed}", random, seed)

    def healed(self, seed: int) -> Path:
        job = self.job(f"healed {seed}", self.teacher, seed)
        step = PruneStep(
            name="p", heal_steps=self.options.steps, replies="ideal", **self.size, **self.training
        )
        prune(job, step)
        return job.made

    def _start(self) -> Path:
        """The cut that a distilled student starts from."""
        start = self.folder / "start"
        if not start.exists():
            job = self.job("cut", self.teacher, 0)
            cut(self.teacher, start, student_cut(job, DistilStep(name="s", **self.size)))
        return start

    def _alone(self, name: str, parent: Path, seed: int) -> Path:
        job = self.job(name, parent, seed)
        finetune(job, FinetuneStep(name="s", steps=self.options.steps, **self.training))
        return job.made

    def look(self, path: Path, outcome: Outcome) -> None:
        """Add what a student answers, and how far it is from the teacher."""
        job, samples = self.job("look", self.teacher, 0), self.corpus.test
        decoder = load_decoder(path, CPU)
        answers = generate(decoder, [job.codec.prompt(each) for each in samples], job.generation())
        rights = [right(each, job.codec.text.decode(ids)) for each, ids in zip(samples, answers, strict=True)]
        outcome.rights += rights
        outcome.shares.append(mean(rights))
        texts = job.texts(samples[:TEXTS])
        outcome.kl.append(mean_kl(list(read_scores(load_decoder(self.teacher, CPU), decoder, texts))))


def table(outcomes: dict[str, Outcome]) -> str:
    """The ways in rows. Differences are from `distilled`, over the same questions and seeds."""
    rows = [
        "| made by | right, 95 % interval | by seed | KL from the teacher by seed | distilled minus this |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    first = outcomes["distilled"]
    for way, each in outcomes.items():
        low, high = wilson(sum(each.rights), len(each.rights))
        seeds = ", ".join(f"{100 * share:.1f}" for share in each.shares)
        kl = ", ".join(f"{value:.3f}" for value in each.kl)
        least, most = difference([float(x) for x in first.rights], [float(x) for x in each.rights])
        gap = "" if each is first else f"{100 * least:+.1f} to {100 * most:+.1f}"
        share = f"{100 * mean(each.rights):.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        rows.append(f"| {way} | {share} | {seeds} | {kl} | {gap} |")
    return "\n".join(rows)


def measure(workshop: Workshop, seeds: Sequence[int]) -> dict[str, Outcome]:
    ways: dict[str, Callable[[int], Path]] = {
        "distilled": workshop.distilled,
        "fine-tuned": workshop.fine_tuned,
        "pruned and healed": workshop.healed,
        "from scratch": workshop.scratch,
    }
    outcomes = {way: Outcome() for way in ways}
    for seed in seeds:
        for way, make in ways.items():
            started = time.process_time()
            workshop.look(make(seed), outcomes[way])
            spent = time.process_time() - started
            share = outcomes[way].shares[-1]
            print(f"seed {seed}, {way}: {share:.1%} right, {spent:.0f} s", file=sys.stderr, flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=DESK / "tiny")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--intermediate", type=int, default=192)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--train", type=int, default=3000, help="questions to train on")
    parser.add_argument("--test", type=int, default=200, help="questions to measure on")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table(measure(Workshop(options.teacher, Path(folder), options), range(options.seeds))))


if __name__ == "__main__":
    main()
