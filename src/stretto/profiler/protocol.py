"""What can be asked of an engine that is measured alone, and what it then says.

One line of JSON each way over a pipe, in the order of these structs: whoever asks needs no torch.
"""

from __future__ import annotations

from msgspec import Struct

from stretto.types import ModelInfo


class Task(Struct, frozen=True, kw_only=True):
    """`batch` prompts at once, each of `prompt_tokens` random tokens and with an answer of `output_tokens`.
    Equal seeds give equal prompts, which need not be read again while their blocks are kept."""

    prompt_tokens: int
    batch: int = 1
    output_tokens: int = 32
    seed: int = 0


class Took(Struct, frozen=True, kw_only=True):
    """`ttft_ms`: until every prompt had its first token; `cached_tokens` of them were not read anew.
    `decode_tokens` are those drawn after that, until the first answer ended, in `decode_ms`. `peak_bytes`:
    the most memory that the process has had."""

    ttft_ms: float
    cached_tokens: int
    decode_tokens: int
    decode_ms: float
    peak_bytes: int


class Ready(Struct, frozen=True, kw_only=True):
    """The model is loaded. `kernels` is the name of their table, or the device; `threads` compute."""

    model: ModelInfo
    kernels: str
    threads: int


class Part(Struct, frozen=True, kw_only=True):
    """One kind of layer in a decode step: bytes it must read, and the milliseconds it took."""

    layer: str
    bytes: int
    ms: float


class Parts(Struct, frozen=True, kw_only=True):
    """A decode step taken apart. `bandwidth`: bytes per second that this process can read from memory.
    `step_ms` is the step as it was taken apart, the time between its parts included."""

    bandwidth: float
    step_ms: float
    parts: list[Part]
