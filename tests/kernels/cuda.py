"""Where the tests of the CUDA table run: on a GPU, or without one in Triton's interpreter."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stretto.kernels import Batch, Cache
from tests.kernels.steps import Step

GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import interpreter  # noqa: E402  # isort: skip

DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter is slow, and it truncates bfloat16 instead of rounding it.
TOLERANCES = {torch.float32: 1e-5} | ({torch.float16: 2e-3, torch.bfloat16: 1.5e-2} if GPU else {})

FP8 = triton.language.float8e4nv
TORCH_TYPES = {
    FP8: torch.float8_e4m3fn,
    triton.language.bfloat16: torch.bfloat16,
    triton.language.float16: torch.float16,
    triton.language.float32: torch.float32,
}
interpreted = interpreter._convert_float


def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """What the interpreter converts numbers by. It rounds to e4m3 without a carry, so torch does that, and
    as a GPU does it: to the nearest, and to the largest number instead of infinity."""
    if FP8 not in (source, target):
        return interpreted(values, source, target, rounding)
    held = torch.from_numpy(np.ascontiguousarray(values)).view(TORCH_TYPES[source]).float()
    if target == FP8:
        held = held.clamp(-448.0, 448.0)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[TORCH_TYPES[target].itemsize]
    return held.to(TORCH_TYPES[target]).view(bits).numpy()


interpreter._convert_float = convert


def on_device(made: Step) -> tuple[Batch, Cache]:
    """Copy the batch and the cache to the device."""
    moved = {
        field.name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for field in fields(made.batch)
        for value in [getattr(made.batch, field.name)]
    }
    return Batch(**moved), Cache([layer.to(DEVICE) for layer in made.cache.layers])
