"""What a request asks of time, from its `objective` and `service_tier` and the server's tiers.

Pure: it knows the wire's fields and the configured tiers, and no clock, queue or engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from stretto.config import Schedule, Tier
from stretto.errors import InvalidRequest
from stretto.protocol.openai import AskedTotal, Generation
from stretto.types import Objective

DEFAULT = "default"


class Aim(NamedTuple):
    """The objective to keep, and the tier whose weight the request has."""

    objective: Objective = Objective()
    tier: str = DEFAULT


def tier_of(request: Generation) -> str:
    """The name of the tier that a request asks for."""
    return DEFAULT if request.service_tier in (None, "auto") else request.service_tier


def aim(request: Generation, tiers: Mapping[str, Tier], schedule: Schedule, tier: str | None = None) -> Aim:
    """The request's own limits, and its tier's (or those of `tier`) where it has none. Without a stream no
    gap between tokens is seen, so the tier's does not count. Raises InvalidRequest for limits that contradict
    each other, and for a refusal that `schedule` never gives."""
    tier = tier_of(request) if tier is None else tier
    usual, asked = tiers[tier].objective, request.objective
    if asked is not None and asked.on_miss == "reject" and schedule == "fcfs":
        where = "$.objective.on_miss"
        raise InvalidRequest(
            f"{where}: this server runs the schedule fcfs, which refuses nobody; ask for late or degrade",
            param=where,
        )
    own = (
        Objective()
        if asked is None
        else Objective(ttft_ms=asked.ttft_ms, itl_ms=asked.itl_ms, total_ms=asked.total_ms)
    )
    _check(own, streamed=bool(request.stream))
    objective = Objective(
        ttft_ms=usual.ttft_ms if own.ttft_ms is None else own.ttft_ms,
        itl_ms=None if not request.stream else usual.itl_ms if own.itl_ms is None else own.itl_ms,
        total_ms=usual.total_ms if own.total_ms is None else own.total_ms,
        on_miss=usual.on_miss if asked is None or asked.on_miss is None else asked.on_miss,
    )
    return Aim(objective, tier)


def of_embedding(asked: AskedTotal | None) -> Objective:
    """An embedding has no due of its own accord: tiers speak of streams."""
    return Objective(total_ms=None if asked is None else asked.total_ms)


def _check(own: Objective, *, streamed: bool) -> None:
    if own.itl_ms is not None and not streamed:
        where = "$.objective.itl_ms"
        raise InvalidRequest(f"{where} needs stream: true; without it ask for total_ms", param=where)
    for name in ("ttft_ms", "itl_ms"):
        part = getattr(own, name)
        if part is not None and own.total_ms is not None and own.total_ms < part:
            where = "$.objective.total_ms"
            raise InvalidRequest(f"{where} ({own.total_ms:g}) is below {name} ({part:g})", param=where)
