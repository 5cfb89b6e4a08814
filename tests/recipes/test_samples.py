"""The desk's tasks as data for `stretto optimise`, and the recipe of its ladder."""

from __future__ import annotations

from pathlib import Path

from recipes.desk import samples
from recipes.desk.tasks import LEVELS, TASKS
from stretto.optimise import data, recipe
from stretto.optimise.recipe import DataFiles

RECIPE = Path(samples.__file__).parent / "ladder.yaml"


def test_the_samples_are_read_without_a_bad_line_and_apart(tmp_path: Path) -> None:
    samples.write(tmp_path, (300, 1, 2))
    files = DataFiles("train.jsonl", "validation.jsonl", "test.jsonl")
    corpus = data.read(files, tmp_path)
    assert (len(corpus.train), len(corpus.test)) == (300, 2 * len(TASKS) * len(LEVELS))
    assert {each.task for each in corpus.test} == set(TASKS)
    for each in corpus.test:
        assert each.ideal is not None and data.right(each, each.ideal)
        assert not data.right(each, "I do not know")


def test_any_beginning_of_the_test_split_is_balanced() -> None:
    cells = samples.cells(2, 0)
    first = {(each.task, each.level) for each in cells[: len(TASKS) * len(LEVELS)]}
    assert len(first) == len(TASKS) * len(LEVELS)


def test_the_recipe_of_the_ladder_is_good() -> None:
    found = recipe.read(RECIPE)
    assert [step.name for _, step in found.making] == [
        "pruned",
        "small",
        "tiny",
        "int8",
        "int4",
        "pruned-int8",
        "small-int8",
        "tiny-int8",
    ]
    assert all("build/desk-samples" in (name or "") for name in (found.files.train, found.files.test))
