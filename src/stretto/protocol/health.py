"""The responses of the routes that say whether a process is alive and ready."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from stretto.types import EngineHealth


class Status(Struct, frozen=True):
    """The response of `/ready` on success."""

    status: Literal["ready"] = "ready"


class Health(Struct, frozen=True, kw_only=True):
    """The response of `/health`, which any live process gives. `degraded`: its engine takes no requests."""

    status: Literal["ok", "degraded"]
    engine: EngineHealth
