"""Cutting and saving checkpoints of every family: the engine and transformers read the result alike."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stretto.errors import StartError
from stretto.models import families
from stretto.optimise.answers import logits_of
from stretto.optimise.job import load_decoder
from stretto.optimise.training.importance import spread_layers, subset
from stretto.optimise.training.surgery import Cut, cut
from stretto.optimise.training.trainer import load_model, save_model
from tests.models.checkpoints import FAMILIES, make

CPU = torch.device("cpu")
TOKENS = [5, 9, 33, 120, 7, 64, 64, 3, 88, 21, 40, 77, 14, 150]
TEXT_FAMILIES = [name for name in FAMILIES if name != "gemma3-image"]


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() / wanted.norm() < 1e-3)


@pytest.fixture(scope="module", params=TEXT_FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "model"
    make(request.param, path)
    return path


def both(path: Path) -> tuple[Tensor, Tensor]:
    """The logits of the engine and of transformers."""
    model: Any = load_model(path, CPU).eval()
    with torch.inference_mode():
        reference = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return logits_of(load_decoder(path, CPU), TOKENS), reference


def test_a_model_without_some_layers_is_the_same_in_the_engine_and_in_transformers(
    checkpoint: Path, tmp_path: Path
) -> None:
    cut(checkpoint, tmp_path / "cut", Cut((0, 2, 3)))
    wanted = logits_of(subset(load_decoder(checkpoint, CPU), (0, 2, 3)), TOKENS)
    engine, reference = both(tmp_path / "cut")
    assert close(engine, wanted) and close(reference, wanted)
    assert not close(logits_of(load_decoder(checkpoint, CPU), TOKENS), wanted)


def test_neurons_and_dimensions_in_another_order_change_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """The parts that are indexed fit together: attention, feed-forward blocks, norms and embeddings."""
    spec = families.read(checkpoint)
    order = torch.randperm(spec.intermediate, generator=torch.Generator().manual_seed(1))
    neurons = None if spec.routing else tuple(order for _ in spec.layers)
    longrope = any(rope.kind == "longrope" for rope in spec.ropes)
    hidden = None if longrope else torch.randperm(spec.hidden, generator=torch.Generator().manual_seed(2))
    cut(checkpoint, tmp_path / "cut", Cut((0, 1, 2, 3), neurons, hidden))
    wanted = logits_of(load_decoder(checkpoint, CPU), TOKENS)
    engine, reference = both(tmp_path / "cut")
    assert close(engine, wanted) and close(reference, wanted)


def test_a_narrow_model_is_the_same_in_the_engine_and_in_transformers(
    checkpoint: Path, tmp_path: Path
) -> None:
    spec = families.read(checkpoint)
    neurons = None if spec.routing else tuple(torch.arange(0, 64) for _ in range(2))
    narrow = Cut((1, 3), neurons, torch.arange(0, 64, 2))
    if any(rope.kind == "longrope" for rope in spec.ropes):
        with pytest.raises(StartError, match="longrope embedding, which fixes its `hidden`"):
            cut(checkpoint, tmp_path / "cut", narrow)
        return
    cut(checkpoint, tmp_path / "cut", narrow)
    engine, reference = both(tmp_path / "cut")
    assert close(engine, reference)
    assert families.read(tmp_path / "cut").hidden == 32


def test_a_saved_model_is_read_by_the_engine(checkpoint: Path, tmp_path: Path) -> None:
    save_model(load_model(checkpoint, CPU), checkpoint, tmp_path / "saved")
    wanted = logits_of(load_decoder(checkpoint, CPU), TOKENS)
    assert close(logits_of(load_decoder(tmp_path / "saved", CPU), TOKENS), wanted)


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    make("gemma3-image", tmp_path / "image")
    with pytest.raises(StartError, match="more than a text model"):
        cut(tmp_path / "image", tmp_path / "cut", Cut((0,)))
    make("mixtral", tmp_path / "experts")
    with pytest.raises(StartError, match="mixture of experts, whose width is not pruned"):
        cut(tmp_path / "experts", tmp_path / "cut2", Cut((0,), (torch.arange(32),)))


def test_layers_are_spread_from_the_first_to_the_last() -> None:
    assert spread_layers(6, 3) == (0, 2, 5)
    assert spread_layers(4, 4) == (0, 1, 2, 3)
    assert spread_layers(4, 1) == (0,)
    for total in range(2, 40):
        for count in range(2, total + 1):
            found = spread_layers(total, count)
            assert len(set(found)) == count and (found[0], found[-1]) == (0, total - 1)
