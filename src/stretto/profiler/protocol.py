"""The messages between a benchmark and the engine process that it measures: lines of JSON over a pipe.

The benchmark's side needs no torch.
"""

from __future__ import annotations

from msgspec import Struct

from stretto.types import ModelInfo


class Workload(Struct, frozen=True, kw_only=True):
    """`batch` requests at once, each with `prompt_tokens` random tokens and an answer of `output_tokens`.

    Equal seeds give equal prompts, which the prefix cache may hold from an earlier workload.
    """

    prompt_tokens: int
    batch: int = 1
    output_tokens: int = 32
    seed: int = 0


class Measurement(Struct, frozen=True, kw_only=True):
    """The result of a workload.

    ttft_ms: until every request had its first token
    cached_tokens: prompt tokens that the prefix cache held
    decode_tokens, decode_ms: tokens drawn after that until the first answer ended, and the time this took
    peak_bytes: the peak memory of the process so far
    """

    ttft_ms: float
    cached_tokens: int
    decode_tokens: int
    decode_ms: float
    peak_bytes: int


class ModelReady(Struct, frozen=True, kw_only=True):
    """The model is loaded. `kernels` names its kernels table, or its device; `threads` compute."""

    model: ModelInfo
    kernels: str
    threads: int


class LayerTime(Struct, frozen=True, kw_only=True):
    """One kind of layer in a decode step: the bytes that it must read and the milliseconds that it took."""

    layer: str
    bytes: int
    ms: float


class StepProfile(Struct, frozen=True, kw_only=True):
    """The time of a decode step by kind of layer.

    bandwidth: bytes per second that this process can read from memory
    step_ms: the whole step while it was profiled, with the time between its layers
    """

    bandwidth: float
    step_ms: float
    parts: list[LayerTime]
