"""Decides the objective and the tier of a request from its fields, the configuration and the tenant's quota.

The functions are pure: they know no clock, queue or engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from msgspec import structs

from stretto.config import Schedule, Tier
from stretto.errors import InvalidRequest
from stretto.protocol.openai import Generation, ObjectiveFields, TotalObjective
from stretto.types import Objective, Preference

DEFAULT = "default"
PRIORITY = "priority"
EVERYONE = "*"
NO_TENANTS: Mapping[str, Preference] = {}


class ServiceLevel(NamedTuple):
    """The objective of a request, the tier whose weight it has, by what its variant is chosen, whether
    a small one may begin the answer, and whether the request itself asks for that."""

    objective: Objective
    tier: str
    prefer: Preference = "quality"
    cascade: bool = False
    asks_cascade: bool = False

    def for_begun(self) -> ServiceLevel:
        """The same for an answer that another worker began: however late it is, it is not refused."""
        return self._replace(objective=structs.replace(self.objective, on_miss="late"))


class ServicePolicy(NamedTuple):
    """The part of the server's configuration that objectives depend on."""

    tiers: Mapping[str, Tier]
    schedule: Schedule
    prefer: Preference = "quality"
    tenants_prefer: Mapping[str, Preference] = NO_TENANTS
    cascade: frozenset[str] = frozenset()

    def preference_of(self, tenant: str) -> Preference:
        """By what a tenant's variants are chosen when its request says nothing."""
        return self.tenants_prefer.get(tenant, self.prefer)

    def cascades(self, tenant: str) -> bool:
        """Whether a small variant may begin a tenant's answers when its request says nothing."""
        return tenant in self.cascade or EVERYONE in self.cascade


def requested_tier(request: Generation) -> str:
    """The name of the tier in the request's `service_tier`."""
    return DEFAULT if request.service_tier in (None, "auto") else request.service_tier


def resolve_objective(
    request: Generation, policy: ServicePolicy, tenant: str, within_quota: Callable[[], bool]
) -> ServiceLevel:
    """Decides a request's tier, then its objective: its own limits, and its tier's where it sets none.

    A request for `priority` beyond its tenant's quota gets tier `default`. Without a stream, the tier's
    `itl_ms` does not apply, because the client sees no gaps between tokens. Raises InvalidRequest for limits
    that contradict each other, and for `on_miss: reject` under a schedule that never rejects.
    """
    own = request.objective or ObjectiveFields()
    if own.on_miss == "reject" and policy.schedule == "fcfs":
        path = "$.objective.on_miss"
        raise InvalidRequest(
            f"{path}: this server uses the schedule fcfs, which never rejects; send late or degrade",
            param=path,
        )
    _check_limits(own, streamed=bool(request.stream))
    tier = requested_tier(request)
    if tier == PRIORITY and not within_quota():
        tier = DEFAULT
    usual = policy.tiers[tier].objective
    itl_ms = usual.itl_ms if own.itl_ms is None else own.itl_ms
    objective = Objective(
        ttft_ms=usual.ttft_ms if own.ttft_ms is None else own.ttft_ms,
        itl_ms=itl_ms if request.stream else None,
        total_ms=usual.total_ms if own.total_ms is None else own.total_ms,
        min_quality=usual.min_quality if own.min_quality is None else own.min_quality,
        on_miss=usual.on_miss if own.on_miss is None else own.on_miss,
    )
    cascade = policy.cascades(tenant) if own.cascade is None else own.cascade
    return ServiceLevel(
        objective, tier, own.prefer or policy.preference_of(tenant), cascade, bool(own.cascade)
    )


def embedding_objective(own: TotalObjective | None) -> Objective:
    """The objective of an embedding: the request's own. The limits of tiers are for streams of tokens."""
    return Objective(total_ms=None if own is None else own.total_ms)


def _check_limits(own: ObjectiveFields, *, streamed: bool) -> None:
    if own.itl_ms is not None and not streamed:
        path = "$.objective.itl_ms"
        raise InvalidRequest(f"{path} needs stream: true; without a stream set total_ms", param=path)
    for name, limit in (("ttft_ms", own.ttft_ms), ("itl_ms", own.itl_ms)):
        if limit is not None and own.total_ms is not None and own.total_ms < limit:
            path = "$.objective.total_ms"
            raise InvalidRequest(f"{path} ({own.total_ms:g}) is less than {name} ({limit:g})", param=path)
