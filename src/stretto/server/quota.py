"""How much of the machine's time each tenant may use at tier `priority`.

A quota counts predicted milliseconds of the work that was submitted. Old work counts less and less: its
weight falls by a factor of e each minute. It knows no queue, no message and no clock.
"""

from __future__ import annotations

from math import exp

DECAY_S = 60.0
MAX_TENANTS = 1024


class PriorityQuota:
    """The work of each tenant at tier `priority`. `share` is the part of the time that one tenant may use.

    The tenants that used most are remembered, at most `max_tenants`. Times are seconds of any one clock.
    """

    def __init__(self, share: float, max_tenants: int = MAX_TENANTS) -> None:
        self._limit_ms = share * DECAY_S * 1e3
        self._max_tenants = max_tenants
        self._used: dict[str, tuple[float, float]] = {}

    def allows(self, tenant: str, now: float) -> bool:
        """True while the tenant has used less than its share of the last minute."""
        return self._used_ms(tenant, now) < self._limit_ms

    def charge(self, tenant: str, ms: float, now: float) -> None:
        """Adds the predicted work of one request."""
        if len(self._used) >= self._max_tenants and tenant not in self._used:
            del self._used[min(self._used, key=lambda other: self._used_ms(other, now))]
        self._used[tenant] = self._used_ms(tenant, now) + ms, now

    def __len__(self) -> int:
        return len(self._used)

    def _used_ms(self, tenant: str, now: float) -> float:
        ms, since = self._used.get(tenant, (0.0, now))
        return ms * exp((since - now) / DECAY_S)
