"""How much of the machine's time each tenant asks for at `priority`: none can ask for all of it there.

It counts predicted milliseconds of what was sent, fading over a minute. Of queues and messages it knows
nothing.
"""

from __future__ import annotations

from math import exp

MEMORY_S = 60.0
MOST_TENANTS = 1024


class Shares:
    """`share`: the part of the time that one tenant may have. Times are seconds of the clock."""

    def __init__(self, share: float) -> None:
        self._most = share * MEMORY_S * 1e3
        self._used: dict[str, tuple[float, float]] = {}

    def allows(self, tenant: str, now: float) -> bool:
        """Whether the tenant has not had its share of the last minute."""
        return self._left(tenant, now) < self._most

    def charge(self, tenant: str, ms: float, now: float) -> None:
        """The tenant asked for this much."""
        if len(self._used) >= MOST_TENANTS and tenant not in self._used:
            del self._used[min(self._used, key=lambda other: self._left(other, now))]
        self._used[tenant] = self._left(tenant, now) + ms, now

    def _left(self, tenant: str, now: float) -> float:
        ms, since = self._used.get(tenant, (0.0, now))
        return ms * exp((since - now) / MEMORY_S)
