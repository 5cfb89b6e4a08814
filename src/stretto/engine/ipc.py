"""The messages between the server process and the engine process: msgpack over one local socket."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from stretto.config import Tier
from stretto.engine.scheduler.admission import Snapshot
from stretto.types import ModelInfo, QueueState, Request, StepStats, TokenEvent


class Submit(Struct, frozen=True, tag="submit", array_like=True):
    """Run this request."""

    request: Request


class Cancel(Struct, frozen=True, tag="cancel", array_like=True):
    """End these requests: nobody reads their events any more."""

    ids: list[int]


class TurnAway(Struct, frozen=True, tag="turn_away", array_like=True):
    """Prompts in a tier of this weight, of so many milliseconds in all, were refused and do not come."""

    model: str
    weight: float
    ms: float


class Erase(Struct, frozen=True, tag="erase", array_like=True):
    """Drop the cached prompts of a tenant: those about a subject, or all. `id` comes back in `Erased`."""

    id: int
    tenant: str
    subject: str | None


class Stop(Struct, frozen=True, tag="stop", array_like=True):
    """End the engine process now."""


class LoadProgress(Struct, frozen=True, tag="progress", array_like=True):
    """Progress of loading: `done` of `total` units of `stage`."""

    stage: str
    done: int
    total: int


class Ready(Struct, frozen=True, tag="ready", array_like=True):
    """The models are loaded and requests are accepted. `tiers`: what a request gets that names
    no objective. `start_s`: the seconds of the start by part, as `telemetry.start_times` has them."""

    models: list[ModelInfo]
    tiers: dict[str, Tier]
    start_s: dict[str, float] = {}


class Failed(Struct, frozen=True, tag="failed", array_like=True):
    """The engine cannot start. `message` says why."""

    message: str


class StepResult(Struct, frozen=True, tag="step", array_like=True):
    """The events of one step and its statistics (None: no model ran).

    `snapshots`: by model name, the state of the queues for admission. They are sent at most every
    `worker.SNAPSHOT_S` seconds for a model with work. `queues`: by model name, what has changed without a
    step of the model, as when clients leave.
    """

    events: list[TokenEvent]
    stats: StepStats | None
    snapshots: dict[str, Snapshot] = {}
    queues: dict[str, QueueState] = {}


class Erased(Struct, frozen=True, tag="erased", array_like=True):
    """The answer to `Erase`: so many blocks are dropped, and so many are until running sequences end."""

    id: int
    blocks: int
    held: int


ToEngine = Submit | Cancel | TurnAway | Erase | Stop
FromEngine = LoadProgress | Ready | Failed | StepResult | Erased

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


class _Sender(Struct):
    id: int


def sender(raw: bytes) -> int | None:
    """The id of the request in a `Submit` that does not decode, as far as it can be found."""
    try:
        return msgspec.msgpack.decode(raw, type=tuple[str, _Sender])[1].id
    except msgspec.DecodeError:
        return None
