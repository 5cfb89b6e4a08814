"""Finds the models that a command names: directories, models of a hub, ladders and their variants.

It reads no weights but to compare their checksums, and loads none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from stretto.config import EngineConfig, ModelConfig
from stretto.errors import StartError
from stretto.hardware import snapshot
from stretto.ladder import serving
from stretto.ladder.serving import ServedLadder
from stretto.models import source
from stretto.models.source import ProgressCallback


class LocatedModels(NamedTuple):
    """An engine whose models have directories, and the ladders that some of them are variants of."""

    engine: EngineConfig
    ladders: tuple[ServedLadder, ...]


def locate(models: Iterable[ModelConfig], on_progress: ProgressCallback | None) -> tuple[ModelConfig, ...]:
    """The models with a directory for each path. Hub ids are downloaded first. A ladder is its top alone."""
    found = (_resolved(model, on_progress) for model in models)
    return tuple(serving.top_alone(model) if _is_ladder(model) else model for model in found)


def locate_variants(engine: EngineConfig, on_progress: ProgressCallback | None) -> LocatedModels:
    """The models with a directory for each path, and all variants of a ladder in its place.

    With `quantise`, a ladder is its top variant in that format, alone. Raises StartError for two models of
    one name, CheckpointError for a ladder that is damaged.
    """
    device = engine.device if engine.device != "auto" else "cuda" if snapshot().gpus else "cpu"
    models: list[ModelConfig] = []
    ladders: list[ServedLadder] = []
    for model in (_resolved(model, on_progress) for model in engine.models):
        if not _is_ladder(model):
            models.append(model)
        elif model.quantise is not None:
            models.append(serving.top_alone(model))
        else:
            ladders.append(serving.read(model, device))
            models += ladders[-1].models.values()
    names = [model.name for model in models] + [ladder.name for ladder in ladders]
    for name in names:
        if names.count(name) > 1:
            raise StartError(f"two models are called {name}: give one of them another name, as NAME=PATH")
    return LocatedModels(structs.replace(engine, models=tuple(models)), tuple(ladders))


def _resolved(model: ModelConfig, on_progress: ProgressCallback | None) -> ModelConfig:
    if model.is_null:
        return model
    return structs.replace(model, path=str(source.resolve(model.path, on_progress)))


def _is_ladder(model: ModelConfig) -> bool:
    return not model.is_null and serving.is_ladder(Path(model.path))
