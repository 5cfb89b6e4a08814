"""When a token is due: the one rule that engine, server, admission, simulator and bench use.

The first token is due at arrival + `ttft_ms`. Token k (the first is token 0) is due k * `itl_ms` after the
first deadline, however early the first token came. Without `ttft_ms` it is due k * `itl_ms` after the first
token was emitted. The whole answer is due at arrival + `total_ms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from stretto.types import Objective

ROUNDING_S = 1e-9  # sums of floats differ by less, so a token is not late by so little


@dataclass(slots=True)
class Deadline:
    """The deadlines of one request, and how its tokens have met them so far.

    All times are seconds of one clock; inf means never. Only the methods change a value.
    """

    start: float  # when token 0 is due; without a TTFT objective, inf until token 0 is emitted at this time
    whole: float  # when the whole answer is due
    itl_s: float  # from one token's deadline to the next one's
    next: float  # when the next token is due, apart from `whole`
    target_itl_s: float  # the longest pause between two tokens that still meets every deadline
    latest: float  # by when the next token must be out to meet both `next` and `target_itl_s`
    emitted: int = 0  # tokens so far
    last_emission: float = inf
    slack: float = inf  # the least time that any token had to spare; negative when one was late
    late: bool = False  # whether a token was late

    @classmethod
    def of(cls, arrival: float, objective: Objective, emitted: int = 0, emitted_at: float = inf) -> Deadline:
        """The deadlines of a request that arrived at `arrival` and has `emitted` tokens already.

        `emitted_at`: when the first of them came. Without `ttft_ms` the deadlines of a request with tokens
        count from then, and if that is not known, from its next token.
        """
        first = arrival + _seconds(objective.ttft_ms)
        if first == inf and emitted:
            first = emitted_at
        itl_s = _seconds(objective.itl_ms)
        whole = arrival + _seconds(objective.total_ms)
        if not emitted or first == inf:
            return cls(start=first, whole=whole, itl_s=itl_s, next=first, target_itl_s=itl_s, latest=first)
        due = first + emitted * itl_s
        return cls(first, whole, itl_s, next=due, target_itl_s=itl_s, latest=due, emitted=emitted)

    def of_token(self, index: int) -> float:
        """When token `index` is due, `whole` included."""
        return min(self.start + index * self.itl_s if index else self.start, self.whole)

    def emit(self, now: float, count: int = 1) -> None:
        """Record that the next `count` tokens were emitted at `now`."""
        # Called once for each token: comparisons cost half of what `min` does.
        due = self.next if self.next < self.whole else self.whole
        if due - now < self.slack:
            self.slack = due - now
            self.late = self.slack < -ROUNDING_S
        if self.start == inf:
            self.start = now
        self.emitted += count
        self.next = self.start + self.emitted * self.itl_s
        self.last_emission = now
        by_target = now + self.target_itl_s
        self.latest = self.next if self.next < by_target else by_target

    def end(self, now: float) -> None:
        """Record that the answer ended at `now`, perhaps without a token."""
        self.slack = min(self.slack, self.whole - now)
        self.late = self.slack < -ROUNDING_S

    def keep_pace(self, now: float, tokens: int) -> None:
        """Lower `target_itl_s` so that `tokens` more tokens can be out when the whole answer is due."""
        self.target_itl_s = min(self.target_itl_s, max(self.whole - now, ROUNDING_S) / tokens)


def first_due(arrival: float, objective: Objective) -> float:
    """When the first token of a request is due. The same as with `Deadline`, without one."""
    first, whole = arrival + _seconds(objective.ttft_ms), arrival + _seconds(objective.total_ms)
    return first if first < whole else whole


def excess_ms(objective: Objective, first_ms: float, last_ms: float, tokens: int) -> float:
    """By how much an answer of `tokens` tokens would miss its deadlines; 0: it would be on time.

    `first_ms` and `last_ms`: when its first and its last token come, after the arrival. Tokens come evenly,
    so if these two are on time, all are. The same as with `Deadline`, without one.
    """
    whole, start = objective.total_ms, objective.ttft_ms
    excess = 0.0 if start is None else max(first_ms - start, 0.0)
    if whole is not None and last_ms - whole > excess:
        excess = last_ms - whole
    if objective.itl_ms is not None and tokens > 1:
        due = (first_ms if start is None else start) + (tokens - 1) * objective.itl_ms
        if last_ms - due > excess:
            excess = last_ms - due
    return excess


def _seconds(milliseconds: float | None) -> float:
    return inf if milliseconds is None else milliseconds / 1e3
