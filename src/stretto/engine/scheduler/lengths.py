"""What the recent past predicts: the tokens of an answer, the work that arrives, and the time left over.

The engine's loop records requests and steps, the scheduler asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp

from stretto.engine.sequence import Sequence
from stretto.engine.step_time import Window
from stretto.types import Request

KEPT_LENGTHS = 512
DEFAULT_LENGTH = 256  # tokens of a long answer, while nothing is known
LONG = 0.7  # the quantile that stands for a long answer
ARRIVALS_S = 120.0
OFFERED_S = 600.0  # the same for what comes, refused or not: a burst is no overload
RECENT_S = 10.0  # at most the same for what comes now, on a machine whose objectives are short
LEAST_RECENT_S = 1.0  # at least the same
RECENT_LUMPS = 50.0  # of so many prompts of the usual size the rate is known to about 10 %
IDLE_S = 1800.0  # the same for the time in which no step ran: bursts and the pauses between them


class AnswerLengths:
    """The lengths of recent answers, by tier. `usual`: of a long answer before any of its tier has ended."""

    def __init__(self, usual: int = DEFAULT_LENGTH) -> None:
        self._usual = usual
        self._lengths: dict[str, Window] = {}
        self._long: dict[str, int] = {}  # of those lengths, by tier

    def observe(self, tier: str, tokens: int) -> None:
        """Record an answer that came to its own end."""
        lengths = self._lengths.setdefault(tier, Window(KEPT_LENGTHS))
        lengths.add(tokens)
        self._long[tier] = int(lengths.quantile(LONG, self._usual))

    def predict(self, tier: str) -> int:
        """The tokens of a long answer of this tier."""
        return max(self._long.get(tier, self._usual), 1)

    def of(self, request: Request) -> int:
        """The tokens of an answer to a request, as its maker expects, or a long one of its tier."""
        return answer_tokens(request, self.predict(request.tier))

    def left(self, sequences: Iterable[Sequence]) -> list[int]:
        """The tokens that each of these still has if its answer is as expected, or a long one, at least 1.

        One that is longer already is expected to become half as long again.
        """
        usual: dict[str, int] = {}
        left = list[int]()
        for seq in sequences:
            tier, done = seq.request.tier, seq.output_len
            if tier not in usual:
                usual[tier] = self.predict(tier)
            more = max((seq.request.expected_tokens or usual[tier]) - done, done // 2)
            left.append(max(min(more, seq.limit - seq.length), 1))
        return left


def answer_tokens(request: Request, usual: int) -> int:
    """The tokens of an answer to a request, as its maker expects. `usual`: if that is not known."""
    tokens, most = request.expected_tokens or usual, request.sampling.max_tokens
    return max(tokens if most is None else min(tokens, most), 1)


class ArrivalRate:
    """How much prompt work has arrived recently, by the weight of its tier, fading over `ARRIVALS_S`.

    `recent_s`: over how many seconds `recent` fades at most. It fades sooner where prompts are short, because
    then fewer seconds tell how much comes.
    """

    def __init__(self, recent_s: float = RECENT_S) -> None:
        self._turned_away: dict[float, float] = {}  # by weight, when a newcomer was last refused
        self._ms: dict[float, float] = {}
        self._recent: dict[float, float] = {}
        self._offered = self._squares = self._count = 0.0
        self._recent_s = self._most_recent_s = recent_s
        self._faded = 0.0

    def observe(self, weight: float, ms: float) -> None:
        """Record a prompt of so many milliseconds in a tier of this weight."""
        self._ms[weight] = self._ms.get(weight, 0.0) + ms

    def offer(self, weight: float, ms: float) -> None:
        """Record a prompt of so many milliseconds in a tier of this weight, admitted or refused."""
        self._offered += ms
        self._squares += ms * ms
        self._count += 1
        self._recent[weight] = self._recent.get(weight, 0.0) + ms

    def turn_away(self, weight: float, ms: float, now: float) -> None:
        """Record that prompts of this weight and so many milliseconds were refused when they came."""
        self.offer(weight, ms)
        self._turned_away[weight] = now

    def turns_away(self, now: float) -> tuple[float, ...]:
        """The weights of which newcomers were refused a moment ago."""
        return tuple(weight for weight, at in self._turned_away.items() if now - at < self._recent_s)

    @property
    def lump_ms(self) -> float:
        """What a prompt of the usual size takes: the mean of the recent ones, each counted by its work."""
        return self._squares / (sum(self._recent.values()) or 1.0)

    @property
    def mean_ms(self) -> float:
        """What a recent prompt takes in the mean; 0 before the first."""
        return sum(self._recent.values()) / (self._count or 1.0)

    def recent(self, weights: Iterable[float]) -> dict[float, float]:
        """For each of these weights, in falling order: the work of this weight or more that comes now,
        refused or not, as a share of the time. Work of other weights does not count."""
        shares, ms = dict[float, float](), 0.0
        for weight in weights:
            ms += self._recent.get(weight, 0.0)
            shares[weight] = ms / (self._recent_s * 1e3)
        return shares

    @property
    def offered(self) -> float:
        """The work that comes, refused or not, as a share of the time."""
        return self._offered / (OFFERED_S * 1e3)

    def above(self, weight: float) -> float:
        """The work of greater weight that arrives, as a share of the time."""
        return sum(ms for heavier, ms in self._ms.items() if heavier > weight) / (ARRIVALS_S * 1e3)

    def above_each(self, weights: Iterable[float]) -> dict[float, float]:
        """The same for each of these weights, in falling order. Work of other weights does not count."""
        shares, ms = dict[float, float](), 0.0
        for weight in weights:
            shares[weight] = ms / (ARRIVALS_S * 1e3)
            ms += self._ms.get(weight, 0.0)
        return shares

    def fade(self, now: float) -> None:
        """Let the past count less. Called after every step, it acts ten times in `recent_s`."""
        passed = now - self._faded
        if passed >= self._recent_s / 10:
            share = exp(-passed / ARRIVALS_S)
            self._offered *= exp(-passed / OFFERED_S)
            lumps_s = RECENT_LUMPS * self.lump_ms / 1e3
            recent_s = min(max(lumps_s, LEAST_RECENT_S), self._most_recent_s) if lumps_s else self._recent_s
            recent = exp(-passed / self._recent_s)
            self._squares *= recent * recent_s / self._recent_s
            self._count *= recent * recent_s / self._recent_s
            self._recent = {
                weight: ms * recent * recent_s / self._recent_s for weight, ms in self._recent.items()
            }
            self._ms = {weight: ms * share for weight, ms in self._ms.items()}
            self._recent_s, self._faded = recent_s, now


class IdleTime:
    """The share of the time in which no step ran on the device, fading over `IDLE_S`.

    Time before the first step counts as busy, because nothing is known of it.
    """

    def __init__(self) -> None:
        self._busy_s = self._known = 0.0  # of `IDLE_S`
        self._faded: float | None = None

    def observe(self, ms: float, now: float) -> None:
        """Record a step that took `ms` and ended now."""
        if self._faded is None:
            self._faded = now
            return
        if now - self._faded >= 1.0:
            self._busy_s, self._known = self._at(now)
            self._faded = now
        self._busy_s += ms / 1e3

    def share(self, now: float) -> float:
        """The share of the time in which no step ran."""
        busy_s, known = self._at(now)
        return max(known - busy_s / IDLE_S, 0.0)

    def _at(self, now: float) -> tuple[float, float]:
        """The busy seconds and the share of the time that is known, faded until now."""
        left = 1.0 if self._faded is None else exp((self._faded - now) / IDLE_S)
        return self._busy_s * left, 1.0 - (1.0 - self._known) * left
