"""What a schedule remembers between steps: who has had how much of the machine, and how long answers get.

The loop writes it, schedules read it. Of queues and blocks it knows nothing.
"""

from __future__ import annotations

from math import exp

from stretto.engine.step_time import Window

MEMORY_S = 60.0
INFLOW_S = 120.0
LENGTHS = 512
FIRST_GUESS = 256


class Ledger:
    """`debts`: predicted milliseconds each tenant has had, fading over a minute. `tags`: how far (in time of
    the clock) each tenant's requests without a due already reach, if it had the machine alone. `owed`:
    milliseconds that those requests have been promised and not had. Both are decided by the schedule."""

    def __init__(self) -> None:
        self.debts: dict[str, float] = {}
        self.tags: dict[str, float] = {}
        self.owed = 0.0
        self._inflow: dict[float, float] = {}
        self._lengths: dict[str, Window] = {}
        self._faded = 0.0

    def charge(self, tenant: str, ms: float) -> None:
        """The tenant's requests took this much of a step."""
        self.debts[tenant] = self.debts.get(tenant, 0.0) + ms

    def promise(self, tags: dict[str, float], owed: float) -> None:
        """Take over what a plan has promised: tags of tenants, and milliseconds still owed."""
        self.tags.update(tags)
        self.owed = owed

    def arrived(self, weight: float, ms: float) -> None:
        """A prompt of so much work has come, in a tier of this weight."""
        self._inflow[weight] = self._inflow.get(weight, 0.0) + ms

    def inflow_above(self, weight: float) -> float:
        """How much work of greater weight has come of late, as a share of the time."""
        return sum(ms for heavier, ms in self._inflow.items() if heavier > weight) / (INFLOW_S * 1e3)

    def fade(self, now: float) -> None:
        """Let what is past count less; forget who is even. Called every step, it acts once a second."""
        if now - self._faded < 1.0:
            return
        share, slower = exp((self._faded - now) / MEMORY_S), exp((self._faded - now) / INFLOW_S)
        self._inflow = {weight: ms * slower for weight, ms in self._inflow.items()}
        self._faded = now
        self.debts = {tenant: ms * share for tenant, ms in self.debts.items() if ms * share >= 1.0}
        self.tags = {tenant: tag for tenant, tag in self.tags.items() if tag > now}

    def ended(self, tier: str, output_tokens: int) -> None:
        """An answer of this tier came to its own end after so many tokens."""
        self._lengths.setdefault(tier, Window(LENGTHS)).add(output_tokens)

    def expected(self, tier: str, wanted: int | None, q: float = 0.7) -> int:
        """How many tokens an answer will have: the q-quantile of the tier's last ones, within `wanted`."""
        lengths = self._lengths.get(tier)
        usual = FIRST_GUESS if lengths is None else int(lengths.quantile(q, FIRST_GUESS))
        return max(1, usual if wanted is None else min(usual, wanted))
