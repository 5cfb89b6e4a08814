"""Fine-tuning on corrected answers: what is read and left out, what is learnt, and when a step is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stretto.errors import StartError
from stretto.models import families
from stretto.optimise import data, recipe, steps
from stretto.optimise.answers import TextCodec, generate
from stretto.optimise.data import DataSample
from stretto.optimise.job import StepJob, load_decoder
from stretto.optimise.recipe import FinetuneStep
from stretto.optimise.steps import RunOptions, RunReport
from stretto.optimise.training.trainer import StepSession
from tests.optimise import tiny
from tests.optimise.conftest import Workshop

STEP: dict[str, Any] = {"step": "finetune", "name": "student", "steps": 120, "batch": 32, "rate": 3e-3}


def second(count: int) -> list[dict[str, Any]]:
    """What users corrected: the second digit, a task that the data does not have."""
    found: dict[str, dict[str, Any]] = {}
    for sample in tiny.lines(count * 2, seed=9):
        digits = sample["prompt"].split(maxsplit=1)[1].rstrip(":").split()
        prompt = f"second {' '.join(digits)}:"
        found[prompt] = {"prompt": prompt, "answer": digits[1], "task": "feedback"}
    return list(found.values())[:count]


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feedback")
    shutil.copytree(workshop.model, folder / "model")
    shutil.copyfile(workshop.folder / "data.jsonl", folder / "data.jsonl")
    tiny.write(folder / "feedback.jsonl", second(600)[:400])
    return folder


def run(folder: Path, out: str, step: dict[str, Any], **options: Any) -> RunReport:
    parsed = recipe.parse({"model": "model", "data": "data.jsonl", "steps": [STEP | step]}, "recipe")
    return steps.run(parsed, RunOptions(out=folder / out, folder=folder, **options))


def share(model: Path, samples: list[dict[str, Any]], workshop: Workshop) -> float:
    """The share of these samples that a checkpoint answers right."""
    codec = TextCodec(model, families.read(model).eos)
    job = StepJob("$", model, workshop.corpus, codec, StepSession(model.parent / "score"), 0, max_answer=3)
    asked = [DataSample(**sample) for sample in samples]
    answers = generate(
        load_decoder(model, job.session.device), [codec.prompt(each) for each in asked], job.generation()
    )
    replies = [codec.text.decode(ids) for ids in answers]
    return sum(data.right(each, reply) for each, reply in zip(asked, replies, strict=True)) / len(asked)


def test_a_student_learns_what_users_corrected_and_keeps_what_it_knew(
    folder: Path, workshop: Workshop
) -> None:
    run(folder, "learnt", {"feedback": "feedback.jsonl", "weights": {"feedback": 4}})
    manifest = json.loads((folder / "learnt" / "student" / "manifest.json").read_text())
    assert manifest["report"]["feedback"] == 400 and manifest["report"]["feedback_held_out"] == 0
    assert "feedback" not in manifest["options"]
    unseen, known = second(600)[400:], tiny.lines(100, seed=4)
    before, after = folder / "learnt" / "full", folder / "learnt" / "student"
    assert share(before, unseen, workshop) < 0.5 < 0.7 < share(after, unseen, workshop)
    assert share(after, known, workshop) > 0.9


def test_a_step_is_kept_while_its_feedback_is_the_same(folder: Path) -> None:
    file = folder / "changing.jsonl"
    tiny.write(file, second(20))
    short = {"feedback": "changing.jsonl", "steps": 1}
    run(folder, "kept", short)
    moved = folder / "elsewhere.jsonl"
    shutil.copyfile(file, moved)
    again = run(folder, "kept", short | {"feedback": str(moved)}, resume=True)
    assert [each.status for each in again.steps] == ["kept", "kept"]
    tiny.write(file, second(21))
    assert [each.status for each in run(folder, "kept", short, resume=True).steps] == ["kept", "made"]


def test_a_prompt_to_measure_with_is_left_out_in_any_form(workshop: Workshop, tmp_path: Path) -> None:
    asked = workshop.corpus.test[0].question
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked}]
    lines = [*second(3), {"prompt": asked, "answer": "1"}, {"messages": turns, "answer": "1"}]
    found = data.read_feedback(tiny.write(tmp_path / "feedback.jsonl", lines), workshop.corpus)
    assert (len(found.samples), found.held) == (3, 2)
    with pytest.raises(StartError, match="none of its 1 lines can be trained on"):
        data.read_feedback(tiny.write(tmp_path / "all.jsonl", lines[3:4]), workshop.corpus)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "none of its 0 lines"),
        ('{"prompt": "a"}\n', "feedback.jsonl:1: a prompt needs an answer"),
        ('{"prompt": "a", "answer": "b", "stars": 3}\n', "feedback.jsonl:1: .*stars"),
        ('{"text": "a text"}\n', "a text is no corrected answer"),
        ("no JSON\n", "1 bad lines in the feedback"),
    ],
)
def test_what_is_no_feedback_is_refused(workshop: Workshop, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "feedback.jsonl"
    file.write_text(text)
    with pytest.raises(StartError, match=message):
        data.read_feedback(file, workshop.corpus)
    with pytest.raises(StartError, match="cannot be read"):
        data.read_feedback(tmp_path / "missing.jsonl", workshop.corpus)


def test_the_flag_gives_every_finetune_the_file_unless_it_names_one(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: m\ndata: d.jsonl\nsteps:\n  - {step: finetune, name: a}\n"
        "  - {step: finetune, name: b, from: a, feedback: own.jsonl}\n"
    )
    found = recipe.read(file, tmp_path / "feedback.jsonl").steps
    assert [step.feedback for step in found if isinstance(step, FinetuneStep)] == [
        str(tmp_path / "feedback.jsonl"),
        "own.jsonl",
    ]
    file.write_text("model: m\ndata: d.jsonl\nsteps:\n  - {step: quantise, name: a}\n")
    with pytest.raises(StartError, match=r"\$.steps has no `finetune`"):
        recipe.read(file, tmp_path / "feedback.jsonl")
