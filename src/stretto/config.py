"""What each component is told at start, as one frozen struct per component.

`stretto.cli` builds these from a file, the environment and the flags; nothing else reads the environment.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class ModelConfig(Struct, frozen=True, kw_only=True):
    """One model to hold. `path` is a local directory in the Hugging Face layout, or `null` for the null model."""

    name: str
    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class EngineConfig(Struct, frozen=True, kw_only=True):
    """The engine process. Zero means: derive it from the machine and the model (`stretto doctor` says how)."""

    models: tuple[ModelConfig, ...]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    kv_bytes: int = 0
    context: int = 0
    block_size: int = 16
    max_running: int = 256
    max_step_tokens: int = 512
    schedule: Literal["fcfs"] = "fcfs"
    prefix_cache: bool = True


class ServeConfig(Struct, frozen=True, kw_only=True):
    """The HTTP front. `max_waiting` bounds the queue; `drain_s` bounds how long a shutdown waits for answers."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_waiting: int = 512
    max_body_bytes: int = 32 * 2**20
    max_n: int = 16
    max_stop: int = 16
    drain_s: float = 30.0
    api_keys: dict[str, str] = {}
