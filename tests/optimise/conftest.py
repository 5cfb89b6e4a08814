"""A tiny model that knows its tasks, trained once for all tests here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from stretto.models import families
from stretto.optimise import data
from stretto.optimise.answers import TextCodec
from stretto.optimise.data import Corpus
from stretto.optimise.finetune import finetune
from stretto.optimise.job import StepJob
from stretto.optimise.recipe import DataFiles, FinetuneStep
from stretto.optimise.training.trainer import StepSession
from tests.optimise import tiny

COUNT = 2500


@dataclass(frozen=True)
class Workshop:
    """A trained checkpoint and its data. `job` makes a step of it."""

    folder: Path
    model: Path
    corpus: Corpus

    def job(self, name: str, parent: Path | None = None, seed: int = 0) -> StepJob:
        start = parent or self.model
        session = StepSession(self.folder / "steps" / name)
        codec = TextCodec(start, families.read(start).eos)
        return StepJob("$.steps[0]", start, self.corpus, codec, session, seed, max_answer=4)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    base = tiny.checkpoint(folder / "base")
    tiny.write(folder / "data.jsonl", tiny.lines(COUNT))
    corpus = data.read(DataFiles("data.jsonl"), folder)
    raw = Workshop(folder, base, corpus)
    job = raw.job("tuned")
    finetune(job, FinetuneStep(name="tuned", steps=450, batch=32, rate=3e-3))
    return Workshop(folder, job.made, corpus)
