"""ladder.json: what is read, and one clear sentence for each thing that can be wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stretto.engine.step_time import StepCost
from stretto.errors import CheckpointError
from stretto.ladder import registry
from stretto.ladder.registry import Ladder, Origin, QualityInterval, Variant

Change = Callable[[dict[str, Any], Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ladder of two variants with checkpoints of their own."""
    variants: list[Variant] = []
    for name in ("full", "small"):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 99}))
        (path / "tokenizer.json").write_text("the tokenizer")
        (path / "model.safetensors").write_bytes(name.encode() * 100)
        variants.append(
            Variant(
                name=name,
                path=name,
                bytes=100,
                quality=QualityInterval(0.9, 0.8, 0.95, 50),
                files=registry.weight_digests(path),
                times={"here": StepCost(1.0)},
                origin=Origin(step="model"),
            )
        )
    ladder = Ladder(
        model="m",
        family="llama",
        vocab=99,
        tokenizer=registry.digest(tmp_path / "full" / "tokenizer.json"),
        top="full",
        variants=tuple(variants),
    )
    registry.save(ladder, tmp_path)
    return tmp_path


def test_a_ladder_is_read_as_it_was_written(folder: Path) -> None:
    ladder = registry.load(folder)
    assert [each.name for each in ladder.variants] == ["full", "small"]
    assert ladder.variant("small").times["here"].base == 1.0
    assert "name" in json.loads((folder / "ladder.json").read_text())["variants"][0]


WRONG: dict[str, tuple[Change, str]] = {
    "misspelt key": (
        lambda data, _: data["variants"][1].update(qualty=1),
        r"\$\.variants\[1\]: Object contains unknown field `qualty`; did you mean quality\?",
    ),
    "missing key": (lambda data, _: data.pop("top"), "missing required field `top`"),
    "share above one": (
        lambda data, _: data["variants"][0]["quality"].update(mean=1.5),
        r"\$\.variants\[0\]\.quality\.mean: Expected `float` <= 1",
    ),
    "unknown format": (
        lambda data, _: data["variants"][1].update(quantise="int9"),
        r"\$\.variants\[1\]\.quantise: Invalid enum value 'int9'; did you mean int",
    ),
    "no variants": (
        lambda data, _: data.update(variants=[]),
        r"\$\.variants: Expected `array` of length >= 1",
    ),
    "two of a name": (lambda data, _: data["variants"][1].update(name="full"), "the name of two variants"),
    "name that is a path": (lambda data, _: data["variants"][1].update(name="../x"), "is no name"),
    "unknown top": (
        lambda data, _: data.update(top="huge"),
        r"\$\.top: 'huge' is none of the variants full, small",
    ),
    "another version": (lambda data, _: data.update(version=9), r"\$\.version is 9"),
    "outside": (lambda data, _: data["variants"][1].update(path="../other"), "leaves the ladder's folder"),
    "missing variant": (
        lambda data, _: data["variants"][1].update(path="gone"),
        r"\$\.variants\[1\]: variant small is missing: there is no directory",
    ),
    "another model": (
        lambda _, path: (path / "small" / "config.json").write_text(
            '{"model_type": "qwen3", "vocab_size": 99}'
        ),
        "variant small is of another model: .* is qwen3 with 99 tokens, and the ladder is llama with 99",
    ),
    "another tokenizer": (
        lambda _, path: (path / "small" / "tokenizer.json").write_text("another"),
        "variant small has another tokenizer",
    ),
    "no tokenizer": (
        lambda _, path: (path / "small" / "tokenizer.json").unlink(),
        "variant small has another tokenizer",
    ),
    "wrong checksum": (
        lambda _, path: (path / "small" / "model.safetensors").write_bytes(b"small" * 99 + b"smalt"),
        "is not the file that was measured as variant small: its checksum differs",
    ),
    "weights gone": (
        lambda _, path: (path / "small" / "model.safetensors").unlink(),
        "measured as variant small",
    ),
    "strange weights": (
        lambda _, path: (path / "small" / "more.safetensors").touch(),
        "measured as variant small",
    ),
    "config gone": (lambda _, path: (path / "small" / "config.json").unlink(), "config.json cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_fault_is_one_sentence_that_says_where(folder: Path, name: str) -> None:
    change, message = WRONG[name]
    data = json.loads((folder / "ladder.json").read_text())
    change(data, folder)
    (folder / "ladder.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message) as raised:
        registry.load(folder)
    assert "\n" not in raised.value.message
    assert str(folder) in raised.value.message


def test_checksums_of_the_weights_can_be_left_unread(folder: Path) -> None:
    (folder / "small" / "model.safetensors").write_bytes(b"x" * 500)
    registry.load(folder, digests=False)
    with pytest.raises(CheckpointError):
        registry.load(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'"text"', b"null"])
def test_a_file_that_is_no_ladder_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ladder.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ladder\.json"):
        registry.load(tmp_path)


def test_a_folder_without_a_ladder_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="stretto optimise"):
        registry.load(tmp_path)
