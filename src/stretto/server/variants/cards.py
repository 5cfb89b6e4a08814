"""What clients may know of a ladder's variants: measured quality, and step time on this machine."""

from __future__ import annotations

from collections.abc import Mapping

from stretto.engine.scheduler.admission import Snapshot
from stretto.ladder.serving import ServedLadder
from stretto.protocol.openai import VariantCard


def cards_of(ladder: ServedLadder, snapshots: Mapping[str, Snapshot]) -> list[VariantCard]:
    """The variants that are served, the best first. `snapshots`: the engine's last ones, by model name."""
    found: list[VariantCard] = []
    for variant in ladder.variants:
        model, quality = ladder.models[variant.name].name, variant.quality
        seen = snapshots.get(model)
        found.append(
            VariantCard(
                id=model,
                quality=quality.mean,
                quality_low=quality.low,
                quality_high=quality.high,
                step_ms=None if seen is None else seen.estimate.cost.decodes(1, variant.lengths.prompt_p50),
            )
        )
    return found
