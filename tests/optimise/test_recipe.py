"""Recipes and data: what is read, and what is said about everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from stretto.errors import StartError
from stretto.optimise import data, recipe
from stretto.optimise.data import DataSample, right
from stretto.optimise.recipe import DataFiles, DistilStep, QuantiseStep

GOOD: dict[str, Any] = {
    "model": "desk",
    "data": {"train": "train.jsonl", "test": "test.jsonl"},
    "steps": [
        {"step": "finetune", "name": "tuned", "steps": 10, "rate": "1e-3", "weights": {"sums": 2}},
        {"step": "distil", "name": "small", "from": "tuned", "layers": 2, "intermediate": 64},
        {"step": "prune", "name": "pruned", "from": "tuned", "layers": 3},
        {"step": "quantise", "name": "int8", "from": "tuned", "format": "int8"},
        {"step": "evaluate", "prompts": 20},
        {"step": "ladder"},
    ],
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The good recipe with one change. `path` is like `steps.0.name`; the value None removes the key."""
    whole = json.loads(json.dumps(GOOD))
    *parents, last = path.split(".")
    held: Any = whole
    for part in parents:
        held = held[int(part)] if part.isdecimal() else held[part]
    if value is None:
        del held[int(last) if isinstance(held, list) else last]
    elif isinstance(held, list):
        cast("list[Any]", held).insert(int(last), value)
    else:
        held[last] = value
    return whole


def test_a_recipe_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    found = recipe.read(path)
    assert [step.name for _, step in found.making] == ["tuned", "small", "pruned", "int8"]
    small, int8 = found.steps[1], found.steps[3]
    assert isinstance(small, DistilStep) and (small.parent, small.layers) == ("tuned", 2)
    assert isinstance(int8, QuantiseStep) and int8.parent == "tuned"
    assert found.files == DataFiles("train.jsonl", None, "test.jsonl")


def test_one_file_of_data_may_be_a_string() -> None:
    assert recipe.parse(changed("data", "all.jsonl"), "r").files == DataFiles("all.jsonl")


WRONG: dict[str, tuple[str, object, str]] = {
    "misspelt step": (
        "steps.1.step",
        "distill",
        r"r: \$\.steps\[1\]\.step: there is no step 'distill'; did you mean distil\?",
    ),
    "foreign step": (
        "steps.1.step",
        "zzz",
        r"\$\.steps\[1\]\.step: there is no step 'zzz'; known are finetune, distil,",
    ),
    "step without a kind": ("steps.1.step", None, r"\$\.steps\[1\] has no key `step`"),
    "misspelt key of a step": (
        "steps.1.layer",
        3,
        r"\$\.steps\[1\]: Object contains unknown field `layer`; did you mean layers\?",
    ),
    "misspelt key at the top": (
        "stepps",
        [],
        r"\$: Object contains unknown field `stepps`; did you mean steps\?",
    ),
    "misspelt key of the data": (
        "data.tset",
        "x",
        r"\$\.data: Object contains unknown field `tset`; did you mean test\?",
    ),
    "key of another step": ("steps.3.layers", 2, r"\$\.steps\[3\]: Object contains unknown field `layers`"),
    "misspelt format": (
        "steps.3.format",
        "int44",
        r"\$\.steps\[3\]\.format: Invalid enum value 'int44'; did you mean int4\?",
    ),
    "misspelt method": ("steps.0.method", "lara", r"\$\.steps\[0\]\.method: .*did you mean lora\?"),
    "steps below zero": ("steps.0.steps", -1, r"\$\.steps\[0\]\.steps: Expected `int` >= 0"),
    "rate above one": ("steps.0.rate", 3, r"\$\.steps\[0\]\.rate: Expected `float` <= 1"),
    "text for a number": ("steps.0.steps", "many", r"\$\.steps\[0\]\.steps: Expected `int`"),
    "negative weight": (
        "steps.0.weights.sums",
        -2,
        r"\$\.steps\[0\]\.weights\[\.\.\.\]: Expected `float` >= 0",
    ),
    "no steps": ("steps", [], r"\$\.steps: Expected `array` of length >= 1"),
    "no model": ("model", None, "missing required field `model`"),
    "no name": (
        "steps.1.name",
        None,
        r"\$\.steps\[1\]: Object missing required field `name`|missing required field `name` - ",
    ),
    "two of a name": (
        "steps.1.name",
        "tuned",
        r"\$\.steps\[1\]\.name: tuned is the name of an earlier variant",
    ),
    "name of the model": ("steps.1.name", "full", r"\$\.steps\[1\]\.name: full is the name"),
    "name that is a path": ("steps.1.name", "../x", r"\$\.steps\[1\]\.name: '../x' is no name"),
    "reserved name": ("steps.1.name", "evaluation", r"\$\.steps\[1\]\.name: 'evaluation' is no name"),
    "unknown parent": (
        "steps.1.from",
        "tunned",
        r"\$\.steps\[1\]\.from: no earlier step makes 'tunned'; did you mean tuned\?",
    ),
    "parent that comes later": (
        "steps.1.from",
        "pruned",
        r"\$\.steps\[1\]\.from: no earlier step makes 'pruned'",
    ),
    "quantised parent": (
        "steps.4",
        {"step": "prune", "name": "p2", "from": "int8", "layers": 1},
        r"\$\.steps\[4\]\.from: int8 is quantised",
    ),
    "width that is no multiple of the tile": (
        "steps.1.intermediate",
        50,
        r"\$\.steps\[1\]\.intermediate: 50 is no multiple of 32",
    ),
    "student with a size": (
        "steps.1.student",
        "other",
        r"\$\.steps\[1\]\.student: a checkpoint has its own size",
    ),
    "nothing to prune": ("steps.2.layers", None, r"\$\.steps\[2\]: nothing would become smaller"),
    "ladder without evaluate": (
        "steps.4",
        None,
        r"\$\.steps\[4\]: `ladder` needs the measurements of `evaluate`",
    ),
    "variant after evaluate": (
        "steps.5",
        {"step": "quantise", "name": "late"},
        r"\$\.steps\[5\] makes a variant after `evaluate`",
    ),
    "evaluate twice": ("steps.5", {"step": "evaluate"}, r"\$\.steps\[5\]: a recipe has this step only once"),
    "unknown top": (
        "steps.4.top",
        "smal",
        r"\$\.steps\[4\]\.top: no step makes 'smal'; did you mean small\?",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_fault_of_a_recipe_names_its_path(name: str) -> None:
    path, value, message = WRONG[name]
    with pytest.raises(StartError, match=message) as raised:
        recipe.parse(changed(path, value), "r")
    assert raised.value.message.startswith("r: ")


@pytest.mark.parametrize(
    "content", ["", "[]", "text", "a: [", "model: &x [*x]", "\x00", "steps: {a: b}", "? [1]\n: 2"]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(StartError, match=r"recipe\.yaml"):
        recipe.read(path)


def test_a_recipe_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot read the recipe"):
        recipe.read(tmp_path / "none.yaml")


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def sample(number: int, **others: object) -> str:
    return json.dumps({"prompt": f"p{number}", "answer": str(number)} | others)


def test_bad_lines_are_counted_and_named(tmp_path: Path) -> None:
    good = [sample(number) for number in range(60)]
    bad = {
        '{"prompt": "x"': "truncated",
        '{"prompt": "x"}': "a prompt needs an answer",
        '{"answer": "x"}': "exactly one of prompt, messages and text",
        '{"prompt": "x", "text": "y", "answer": "z"}': "exactly one of",
        '{"prompt": "x", "anser": "y"}': "unknown field `anser`",
        '{"prompt": "x", "answer": "(", "match": "regex"}': "no regex",
        '{"prompt": "x", "answer": "{", "match": "json"}': "no JSON",
        '{"prompt": "x", "answer": "a", "match": "fuzzy"}': "fuzzy",
        '{"prompt": "x", "answer": "a", "reply": "b"}': "does not match its answer",
        '{"prompt": "x", "answer": "a", "weight": -1}': ">= 0",
        '{"text": " "}': "empty",
        "7": "Expected `object`",
    }
    for line, problem in bad.items():
        write(tmp_path / "d.jsonl", *good[:3], line, *good[3:])
        with pytest.raises(StartError, match="1 bad lines in the data") as raised:
            data.read(DataFiles("d.jsonl"), tmp_path)
        assert "d.jsonl:4: " in raised.value.message and problem in raised.value.message
        assert "--skip-bad-lines" in raised.value.message
    write(tmp_path / "d.jsonl", *good, *bad)
    corpus = data.read(DataFiles("d.jsonl"), tmp_path, skip_bad_lines=True)
    assert corpus.bad.count == len(bad)
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) == 60
    with pytest.raises(StartError, match=f"{len(bad)} bad lines"):
        data.read(DataFiles("d.jsonl"), tmp_path)


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff", "answer": "x"}\n')
    with pytest.raises(StartError, match=r"d\.jsonl:1: "):
        data.read(DataFiles("d.jsonl"), tmp_path)


def test_splits_do_not_overlap_and_do_not_depend_on_the_order(tmp_path: Path) -> None:
    lines = [sample(number) for number in range(200)]
    write(tmp_path / "a.jsonl", *lines)
    write(tmp_path / "b.jsonl", *lines[::-1])
    first = data.read(DataFiles("a.jsonl"), tmp_path)
    second = data.read(DataFiles("b.jsonl"), tmp_path)
    assert {each.key for each in first.test} == {each.key for each in second.test}
    splits = [{each.key for each in split} for split in (first.train, first.validation, first.test)]
    assert sum(map(len, splits)) == len(splits[0] | splits[1] | splits[2]) == 200
    assert all(splits)


def test_a_prompt_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *[sample(number) for number in range(50)])
    write(tmp_path / "test.jsonl", sample(7), sample(77))
    with pytest.raises(StartError, match=r"data\.test: 1 of its prompts are in data\.train too"):
        data.read(DataFiles("train.jsonl", None, "test.jsonl"), tmp_path)


def test_texts_and_prompts_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", *[sample(number) for number in range(60)], json.dumps({"text": "some text"}))
    with pytest.raises(StartError, match="mixes texts and prompts"):
        data.read(DataFiles("d.jsonl"), tmp_path)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be read"):
        data.read(DataFiles("none.jsonl"), tmp_path)
    write(tmp_path / "d.jsonl")
    with pytest.raises(StartError, match="gives no samples"):
        data.read(DataFiles("d.jsonl"), tmp_path)


def test_plain_text_is_cut_into_pieces(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("".join(f"Sentence number {number}. " for number in range(3000)))
    corpus = data.read(DataFiles("d.txt"), tmp_path)
    assert not corpus.graded
    assert all(each.text for each in corpus.train)


@pytest.mark.parametrize(
    ("match", "answer", "good", "bad"),
    [
        ("exact", "12 days", ["12 days", " 12  days\n"], ["12 days.", "so 12 days", "", "12"]),
        ("last_line", "12", ["3 + 9 = 12\n12", "12", "x\n\n12 \n"], ["12\n13", "x 12", ""]),
        ("last_line", "a\nb", ["x\na\nb"], ["b", "a b"]),
        ("regex", r"\d+ days?", ["1 day", " 12 days "], ["12 daysx", "x 1 day", ""]),
        (
            "json",
            '{"a": 1, "b": [true]}',
            ['{"b":[true],"a":1}', '```json\n{"a": 1, "b": [true]}\n```'],
            ['{"a": 1.0, "b": [true]}', "{", '{"a": 1}', "[" * 100_000],
        ),
    ],
)
def test_replies_are_judged_by_the_rule(
    match: data.Match, answer: str, good: list[str], bad: list[str]
) -> None:
    asked = DataSample(prompt="p", answer=answer, match=match)
    assert [reply for reply in good if not right(asked, reply)] == []
    assert [reply for reply in bad if right(asked, reply)] == []
