"""What the HTTP process and the engine process say to each other: msgpack over one local socket."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from stretto.engine.scheduler.admission import Snapshot
from stretto.types import ModelInfo, Request, StepStats, TokenEvent


class Submit(Struct, frozen=True, tag="submit", array_like=True):
    """Run this request."""

    request: Request


class Cancel(Struct, frozen=True, tag="cancel", array_like=True):
    """Nobody reads these requests any more."""

    ids: list[int]


class Stop(Struct, frozen=True, tag="stop", array_like=True):
    """End the process now."""


class Progress(Struct, frozen=True, tag="progress", array_like=True):
    """Long work at start: `done` of `total` units of `stage`."""

    stage: str
    done: int
    total: int


class Ready(Struct, frozen=True, tag="ready", array_like=True):
    """The models are loaded; requests may come."""

    models: list[ModelInfo]


class Failed(Struct, frozen=True, tag="failed", array_like=True):
    """The engine cannot start, and a restart would not help."""

    message: str


class Step(Struct, frozen=True, tag="step", array_like=True):
    """All that one step said. `seen`: what a model's engine looks like after it, now and then."""

    events: list[TokenEvent]
    stats: StepStats | None
    seen: dict[str, Snapshot] = {}


ToEngine = Submit | Cancel | Stop
FromEngine = Progress | Ready | Failed | Step

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
