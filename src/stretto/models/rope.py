"""Rotary embeddings: from config.json to a `Rope`, and from a `Rope` to the frequencies that kernels use."""

from __future__ import annotations

from math import ceil, floor, log, pi, sqrt
from typing import Any, cast

import torch
from torch import Tensor

from stretto.kernels import Rotation
from stretto.models.fields import Fields
from stretto.models.spec import Rope, RopeKind

KINDS = {"default", "linear", "llama3", "yarn", "longrope"}


def read(fields: Fields, config: Fields, dims: int, *, theta: float) -> Rope:
    """The rotary embedding that an object of config.json describes.

    `fields` holds `rope_type` (or `type`) and its parameters; `theta` is the default of `rope_theta`. Raises
    CheckpointError for a kind or a value that is not implemented.
    """
    key = "rope_type" if fields.get("rope_type") is not None else "type"
    kind = fields.text(key, "default")
    if kind == "su":
        kind = "longrope"
    if kind not in KINDS:
        raise fields.error(key, f"is {kind!r}; implemented are {', '.join(sorted(KINDS))}")
    base: dict[str, Any] = {"theta": fields.number("rope_theta", theta), "dims": dims}
    if kind == "default":
        return Rope(kind="default", **base)
    context = config.count("max_position_embeddings")
    original = config.get("original_max_position_embeddings") or fields.get(
        "original_max_position_embeddings"
    )
    if kind != "linear":
        base["original"] = context if original is None else original
        if not isinstance(base["original"], int) or base["original"] < 1:
            raise fields.error(
                "original_max_position_embeddings", f"must be a whole number, not {original!r}"
            )
    if kind == "longrope":
        return _longrope(fields, base, context)
    base["factor"] = fields.number("factor", context / base["original"] if kind == "yarn" else None)
    if kind == "llama3":
        base |= {"low": fields.number("low_freq_factor"), "high": fields.number("high_freq_factor")}
        if base["high"] <= base["low"]:
            raise fields.error("high_freq_factor", f"must be above low_freq_factor ({base['low']})")
    if kind == "yarn":
        base |= {"beta_fast": fields.number("beta_fast", 32.0), "beta_slow": fields.number("beta_slow", 1.0)}
        base |= {"truncate": fields.flag("truncate", True), "attention": fields.maybe("attention_factor")}
        base |= {"mscale": fields.maybe("mscale"), "mscale_all": fields.maybe("mscale_all_dim")}
    return Rope(kind=cast(RopeKind, kind), **base)


def _longrope(fields: Fields, base: dict[str, Any], context: int) -> Rope:
    short = fields.list("short_factor")
    if len(short) != base["dims"] // 2 or not all(isinstance(x, int | float) and x > 0 for x in short):
        raise fields.error("short_factor", f"must be a list of {base['dims'] // 2} numbers above zero")
    factor, attention = fields.number("factor", context / base["original"]), fields.maybe("attention_factor")
    if attention is None:
        attention = sqrt(1 + log(factor) / log(base["original"])) if factor > 1 else 1.0
    return Rope(kind="longrope", short=tuple(short), attention=attention, factor=factor, **base)


def rotation(rope: Rope, device: torch.device) -> Rotation:
    """The frequencies of a rotary embedding (Su et al. 2021, arXiv 2104.09864), extended for long contexts as
    its kind says."""
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.int64).float() / rope.dims
    frequencies = 1.0 / (rope.theta**exponents)
    scale = 1.0
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies, scale = _yarn(rope, frequencies), _yarn_scale(rope)
    elif rope.kind == "longrope":
        frequencies, scale = frequencies / torch.tensor(rope.short), rope.attention or 1.0
    return Rotation(frequencies.to(device), scale)


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Llama 3.1's rule: low frequencies are divided by the factor, high ones kept, and those
    between blended."""
    cycles = rope.original * frequencies / (2 * pi)
    kept = ((cycles - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(rope: Rope, frequencies: Tensor) -> Tensor:
    """NTK by parts (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""

    def pair(cycles: float) -> float:
        return rope.dims * log(rope.original / (cycles * 2 * pi)) / (2 * log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    ramp = (torch.arange(rope.dims // 2).float() - low) / ((high - low) or 0.001)
    slowed = ramp.clamp(0, 1)
    return frequencies / rope.factor * slowed + frequencies * (1 - slowed)


def _yarn_scale(rope: Rope) -> float:
    if rope.attention is not None:
        return rope.attention
    if rope.factor <= 1:
        return 1.0
    if rope.mscale and rope.mscale_all:
        return (0.1 * rope.mscale * log(rope.factor) + 1) / (0.1 * rope.mscale_all * log(rope.factor) + 1)
    return 0.1 * log(rope.factor) + 1
