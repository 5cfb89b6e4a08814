"""A ladder of tiny random checkpoints on disk, for servers: `full`, `int8` of the same weights, `small`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stretto.engine.step_time import StepCost
from stretto.ladder import registry
from stretto.ladder.registry import Ladder, Lengths, Origin, QualityInterval, TokenEnergy, Variant
from tests.optimise import tiny

SHARES = {"full": 0.95, "int8": 0.9, "small": 0.5}
MODEL = "tiny-ladder"


def variant(name: str, **fields: Any) -> Variant:
    """A variant whose measured share of right answers is that of `SHARES`, give or take 0.05."""
    share = SHARES.get(name, 0.5)
    usual: dict[str, Any] = {
        "path": name,
        "bytes": 300 if name == "small" else 1000,
        "quality": QualityInterval(share, share - 0.05, min(1.0, share + 0.05), 500),
        "files": {},
        "times": {"here": StepCost(base=share)},
        "energy": TokenEnergy(share / 100, "estimate: for tests"),
        "lengths": Lengths(8, 4, 8),
        "origin": Origin(step="model"),
    }
    return Variant(name=name, **(usual | fields))


def ladder_of(*variants: Variant, vocab: int = 99, tokenizer: str = "") -> Ladder:
    """A ladder whose first variant is the top."""
    return Ladder(
        model=MODEL,
        family="llama",
        vocab=vocab,
        tokenizer=tokenizer,
        top=variants[0].name,
        variants=variants,
    )


def make(folder: Path) -> Path:
    """Write the ladder and its checkpoints; returns the folder."""
    tiny.checkpoint(folder / "full")
    tiny.checkpoint(folder / "small", layers=2)
    full, small = registry.weight_digests(folder / "full"), registry.weight_digests(folder / "small")
    ladder = ladder_of(
        variant("full", files=full),
        variant("int8", path="full", files=full, quantise="int8"),
        variant("small", files=small),
        vocab=tiny.tokenizer().get_vocab_size(),
        tokenizer=registry.digest(folder / "full" / "tokenizer.json"),
    )
    registry.save(ladder, folder)
    return folder
