"""A decoder with one layer of each kind calls the kernels of the whole model."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stretto.kernels.reference import REFERENCE
from stretto.models.load import load
from tests.models.checkpoints import make
from tests.models.stepping import Driver

CALLED = ("linear", "norm", "add_norm", "linear_act_and_mul", "rope_and_cache", "paged_attention", "experts")


def described(value: Any) -> Any:
    """A value without the numbers in its tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, *(described(getattr(value, each.name)) for each in fields(value))
    return value if isinstance(value, int | float | str | tuple) else type(value).__name__


def calls(driver: Driver, counts: list[int]) -> list[Any]:
    """What the kernels are called with in a step of texts of these lengths."""
    seen: list[Any] = []
    table = driver.decoder.kernels

    def note(name: str, kernel: Callable[..., Any], *args: Any) -> Any:
        seen.append((name, *map(described, args)))
        return kernel(*args)

    noted = replace(table, **{name: partial(note, name, getattr(table, name)) for name in CALLED})
    driver.decoder.kernels = noted
    driver.step([(driver.text(list(range(3, 3 + count))), count) for count in counts])
    driver.decoder.kernels = table
    return seen


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", 2), ("gemma3", 3), ("qwen2-window", 3), ("qwen3_moe", 3), ("olmo2", 2)]
)
@pytest.mark.parametrize("counts", [[1, 1], [7, 1]])
def test_an_abridged_model_calls_the_kernels_of_the_whole(
    family: str, layers: int, counts: list[int], tmp_path: Path
) -> None:
    make(family, tmp_path)
    driver = Driver(load(tmp_path, dtype=torch.float32, device=torch.device("cpu"), kernels=REFERENCE))
    whole = calls(driver, counts)
    driver.decoder, driver.cache = driver.decoder.abridged(driver.cache)
    assert len(driver.decoder.weights.stack.layers) == len(driver.cache.layers) <= layers
    abridged = calls(driver, counts)
    assert {*map(repr, abridged)} == {*map(repr, whole)} and len(abridged) < len(whole)
