"""A ladder as a server has it: the models that its variants become, and the names that clients call them.

It reads `ladder.json` through `registry`. It knows neither engine nor HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from stretto.config import ModelConfig, Quantise
from stretto.errors import CheckpointError
from stretto.ladder import registry
from stretto.ladder.registry import Ladder, Variant

log = logging.getLogger(__name__)
# The formats that a device's kernels compute with.
FORMATS: dict[str, frozenset[Quantise | None]] = {
    "cpu": frozenset({None, "int8", "int4"}),
    "cuda": frozenset({None, "fp8", "int4"}),
}


class ServedLadder(NamedTuple):
    """A ladder that is served under `name`. `models`: the engine's models of its variants, by variant; they
    are in the ladder's order, and variants that the device cannot run are missing."""

    name: str
    folder: Path
    ladder: Ladder
    models: dict[str, ModelConfig]

    @property
    def top(self) -> ModelConfig:
        """The model of the top variant, or of the best one that the device runs."""
        return self.models.get(self.ladder.top) or next(iter(self.models.values()))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that are served, the best first."""
        return tuple(each for each in self.ladder.variants if each.name in self.models)


def is_ladder(folder: Path) -> bool:
    """Whether a directory holds a ladder."""
    return (folder / registry.FILE).is_file()


def read(model: ModelConfig, device: str) -> ServedLadder:
    """The ladder in the directory `model.path`, for a device ("cpu" or "cuda").

    Each variant becomes a model called `NAME:VARIANT`. Checksums of the weights are compared. Raises
    CheckpointError for a ladder that is damaged, or has no variant that the device can run.
    """
    folder = Path(model.path)
    ladder = registry.load(folder)
    drafting = _drafting([each for each in ladder.variants if each.quantise in FORMATS[device]])
    models = {
        variant.name: structs.replace(
            model,
            name=f"{model.name}:{variant.name}",
            path=str((folder / variant.path).resolve()),
            quantise=variant.quantise,
            exclude=variant.exclude,
            usual_tokens=variant.lengths.p90,
            draft=f"{model.name}:{drafting.name}" if drafting and drafting.path != variant.path else None,
        )
        for variant in ladder.variants
        if variant.quantise in FORMATS[device]
    }
    missing = [each.name for each in ladder.variants if each.name not in models]
    if not models:
        raise CheckpointError(
            f"{folder / registry.FILE}: no variant runs here: {device} has no kernels for the formats of"
            f" {', '.join(missing)}; make a ladder with other formats"
        )
    if missing:
        log.warning(
            "%s: not served, as %s has no kernels for their formats: %s",
            model.name,
            device,
            ", ".join(missing),
        )
    return ServedLadder(model.name, folder, ladder, models)


def _drafting(variants: Sequence[Variant]) -> Variant | None:
    """The smallest variant, which drafts for those of other checkpoints; None: all are of one checkpoint."""
    smallest = min(variants, key=lambda each: each.bytes, default=None)
    several = len({each.path for each in variants}) > 1
    return smallest if several else None


def top_alone(model: ModelConfig) -> ModelConfig:
    """The top variant of the ladder in the directory `model.path`, as a model under the ladder's own name.

    A format that the user has set takes the place of the variant's. Raises CheckpointError.
    """
    folder = Path(model.path)
    ladder = registry.load(folder, digests=False)
    top = ladder.variant(ladder.top)
    return structs.replace(
        model,
        path=str((folder / top.path).resolve()),
        quantise=model.quantise or top.quantise,
        exclude=() if model.quantise else top.exclude,
    )
