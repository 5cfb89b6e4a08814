"""Two predictions from recent requests: how many tokens an answer will have, and how much work arrives.

The engine's loop records requests, the scheduler asks.
"""

from __future__ import annotations

from math import exp

from stretto.engine.step_time import Window

KEPT_LENGTHS = 512
DEFAULT_LENGTH = 256  # tokens of a long answer, while nothing is known
LONG = 0.7  # the quantile that stands for a long answer
ARRIVALS_S = 120.0
OFFERED_S = 600.0  # the same for what comes, refused or not: a burst is no overload


class AnswerLengths:
    """The lengths of recent answers, by tier. `usual`: of a long answer before any of its tier has ended."""

    def __init__(self, usual: int = DEFAULT_LENGTH) -> None:
        self._usual = usual
        self._lengths: dict[str, Window] = {}

    def observe(self, tier: str, tokens: int) -> None:
        """Record an answer that came to its own end."""
        self._lengths.setdefault(tier, Window(KEPT_LENGTHS)).add(tokens)

    def predict(self, tier: str, max_tokens: int | None = None) -> int:
        """The tokens of a long answer of this tier, at most `max_tokens`."""
        lengths = self._lengths.get(tier)
        usual = self._usual if lengths is None else int(lengths.quantile(LONG, self._usual))
        return max(1, usual if max_tokens is None else min(usual, max_tokens))


class ArrivalRate:
    """How much prompt work has arrived recently, by the weight of its tier, fading over `ARRIVALS_S`."""

    def __init__(self) -> None:
        self._ms: dict[float, float] = {}
        self._offered = 0.0
        self._faded = 0.0

    def observe(self, weight: float, ms: float) -> None:
        """Record a prompt of so many milliseconds in a tier of this weight."""
        self._ms[weight] = self._ms.get(weight, 0.0) + ms

    def offer(self, ms: float) -> None:
        """Record a prompt of so many milliseconds, admitted or refused."""
        self._offered += ms

    @property
    def offered(self) -> float:
        """The work that comes, refused or not, as a share of the time."""
        return self._offered / (OFFERED_S * 1e3)

    def above(self, weight: float) -> float:
        """The work of greater weight that arrives, as a share of the time."""
        return sum(ms for heavier, ms in self._ms.items() if heavier > weight) / (ARRIVALS_S * 1e3)

    def of(self, weight: float) -> float:
        """The work of this weight that arrives, as a share of the time."""
        return self._ms.get(weight, 0.0) / (ARRIVALS_S * 1e3)

    def fade(self, now: float) -> None:
        """Let the past count less. Called after every step, it acts once a second."""
        if now - self._faded >= 1.0:
            share = exp((self._faded - now) / ARRIVALS_S)
            self._offered *= exp((self._faded - now) / OFFERED_S)
            self._ms = {weight: ms * share for weight, ms in self._ms.items()}
            self._faded = now
