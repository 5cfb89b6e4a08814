"""How many tokens a long answer has, learnt from finished answers of each ladder and tenant.

Bounded: the tenants that asked last are remembered. It knows no clock and no request.
"""

from __future__ import annotations

from collections import OrderedDict

from stretto.engine.step_time import Window

LONG = 0.9  # the quantile that stands for a long answer
LONGEST = 0.98  # that for one of the longest
KEPT = 256  # answers of a tenant
ENOUGH = 8  # answers of a tenant before its own quantile counts
MOST_TENANTS = 512
UNKNOWN = 256  # tokens, before anything is known


class OutputLengths:
    """The lengths of recent answers of one ladder. `prior`: of a long answer before any has ended."""

    def __init__(self, prior: int = 0) -> None:
        self._prior = prior or UNKNOWN
        self._all = Window(KEPT)
        self._tenants: OrderedDict[str, Window] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tenants)

    def observe(self, tenant: str, tokens: int, *, cut: bool) -> None:
        """Record an answer. `cut`: it reached its limit of tokens, so it says only that answers may be as
        long; one that is shorter than a long answer says nothing."""
        if cut and tokens < self.predict(tenant):
            return
        self._all.add(tokens)
        own = self._tenants.get(tenant)
        if own is None:
            own = self._tenants[tenant] = Window(KEPT)
            if len(self._tenants) > MOST_TENANTS:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(tenant)
        own.add(tokens)

    def predict(self, tenant: str, max_tokens: int | None = None) -> int:
        """The tokens of a long answer to this tenant, at most `max_tokens`."""
        known = self._known(tenant)
        usual = self._prior if known is None else round(known.quantile(LONG, self._prior))
        return max(1, usual if max_tokens is None else min(usual, max_tokens))

    def longest(self, tenant: str, max_tokens: int | None = None) -> int:
        """The tokens of one of the longest answers to this tenant, at most `max_tokens`."""
        known = self._known(tenant)
        usual = self._prior if known is None else round(known.quantile(LONGEST, self._prior))
        return max(1, usual if max_tokens is None else min(usual, max_tokens))

    def mean(self, tenant: str, max_tokens: int | None = None) -> int:
        """The mean tokens of an answer to this tenant, at most `max_tokens`. Unknown: those of a long one."""
        known = self._known(tenant)
        usual = self._prior if known is None else round(sum(known) / len(known))
        return max(1, usual if max_tokens is None else min(usual, max_tokens))

    def _known(self, tenant: str) -> Window | None:
        """The lengths that stand for this tenant's."""
        own = self._tenants.get(tenant, self._all)
        known = own if len(own) >= ENOUGH else self._all
        return known if len(known) >= ENOUGH else None
