"""How much of the machine's time each tenant has had, and what best-effort requests have been promised.

The engine's loop records it, the scheduler reads it. It knows neither queues nor blocks.
"""

from __future__ import annotations

from math import exp

MEMORY_S = 60.0
DEBT_STEP_MS = 3000.0  # tenants whose recent use differs by less count as equal


class Fairness:
    """Predicted milliseconds by tenant, fading over `MEMORY_S`, and the scheduler's promises."""

    def __init__(self) -> None:
        self.debts: dict[str, float] = {}  # milliseconds that each tenant has had
        self.tags: dict[
            str, float
        ] = {}  # when each tenant's best-effort requests would end on its own machine
        self.owed = 0.0  # milliseconds promised to best-effort requests and not yet given
        self._faded = 0.0

    def worth(self) -> dict[str, float]:
        """What a prompt of each tenant is worth, by recent use: less than 0, or 0 if the tenant is not named.
        None is named while there is only one."""
        if len(self.debts) < 2:
            return {}
        return {t: -(debt // DEBT_STEP_MS) for t, debt in self.debts.items() if debt >= DEBT_STEP_MS}

    def charge(self, tenant: str, ms: float) -> None:
        """Record that a tenant's requests took so much of a step."""
        self.debts[tenant] = self.debts.get(tenant, 0.0) + ms

    def promise(self, tags: dict[str, float], owed: float) -> None:
        """Take over the tags and the debt to best-effort requests that a plan has decided."""
        self.tags.update(tags)
        self.owed = owed

    def fade(self, now: float) -> None:
        """Let the past count less. Called after every step, it acts once a second."""
        if now - self._faded < 1.0:
            return
        share = exp((self._faded - now) / MEMORY_S)
        self._faded = now
        self.debts = {tenant: ms * share for tenant, ms in self.debts.items() if ms * share >= 1.0}
        self.tags = {tenant: tag for tenant, tag in self.tags.items() if tag > now}
