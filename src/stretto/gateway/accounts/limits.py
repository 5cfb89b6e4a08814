"""What a key or a tenant may use: limits, and meters that count against them. Pure; the time is an argument.

A limit per second or minute is a rate: a token bucket that fills evenly (Turner, New directions in
communications, 1986). A limit per hour, day, week, month or for ever is a budget: it is renewed when the
next calendar period begins (UTC), so that gateways agree on it without asking each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Literal, NamedTuple, cast, get_args

from msgspec import Struct

Quantity = Literal["requests", "tokens", "cost", "joules"]
Period = Literal["second", "minute", "hour", "day", "week", "month", "ever"]
RATES: dict[str, float] = {"second": 1.0, "minute": 60.0}
LIMIT = re.compile(r"(\w+)=(\d+(?:\.\d+)?(?:[eE]\d+)?)/(\w+)")
ROUNDING = 1e-9  # of a bucket's size: what adding many parts may be off
HELD_S = 1.0  # after which to ask again for what running requests hold
WEEK = timedelta(days=7)


class Now(NamedTuple):
    """One moment on both clocks, in seconds. `steady` never jumps; `wall` counts from 1970 and may jump."""

    steady: float
    wall: float


class KeyLimit(Struct, frozen=True):
    """The most of a quantity in a period. Tokens are those of prompts and answers together."""

    quantity: Quantity
    most: float
    period: Period

    @classmethod
    def of(cls, text: str) -> KeyLimit:
        """Reads `requests=60/minute`. Raises ValueError that says how to write a limit."""
        match = LIMIT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no limit: write one like requests=60/minute or cost=10/month")
        quantity, most, period = match.groups()
        for value, known in ((quantity, get_args(Quantity)), (period, get_args(Period))):
            if value not in known:
                raise ValueError(f"{text!r} is no limit: {value!r} is none of {', '.join(known)}")
        if not 0 <= float(most) < inf:
            raise ValueError(f"{text!r} is no limit: the amount is too large")
        return cls(cast(Quantity, quantity), float(most), cast(Period, period))

    @property
    def rate(self) -> bool:
        """Whether it is a rate, and not a budget."""
        return self.period in RATES

    def __str__(self) -> str:
        return f"{self.quantity}={self.most:.15g}/{self.period}"


class CalendarWindow(NamedTuple):
    """A calendar period, in seconds since 1970. It holds `start` and not `end`."""

    start: float
    end: float


def window_of(period: Period, wall: float) -> CalendarWindow:
    """The calendar period (UTC) that holds the moment `wall`."""
    if period == "ever":
        return CalendarWindow(-inf, inf)
    hour = datetime.fromtimestamp(wall, UTC).replace(minute=0, second=0, microsecond=0)
    if period == "hour":
        return _window(hour, hour + timedelta(hours=1))
    day = hour.replace(hour=0)
    if period == "day":
        return _window(day, day + timedelta(days=1))
    if period == "week":
        monday = day - timedelta(days=day.weekday())
        return _window(monday, monday + WEEK)
    first = day.replace(day=1)
    return _window(first, (first + timedelta(days=32)).replace(day=1))


def _window(start: datetime, end: datetime) -> CalendarWindow:
    return CalendarWindow(start.timestamp(), end.timestamp())


@dataclass(slots=True)
class RateMeter:
    """The meter of a rate. `share`: the part of the limit that this gateway may give out.

    It holds one period's worth at most. What a request took beyond its reservation is a debt, which the
    next requests wait for.
    """

    limit: KeyLimit
    share: float = 1.0
    level: float = field(init=False)
    filled: float = -inf  # when `level` was right, on the steady clock

    def __post_init__(self) -> None:
        self.level = self.size

    @property
    def size(self) -> float:
        """The most that it holds."""
        return self.limit.most * self.share

    def used(self, now: Now) -> float:
        """What is taken of it now."""
        self._fill(now.steady)
        return self.size - self.level

    def wait(self, need: float, now: Now) -> float:
        """Seconds until `need` can be taken: 0 at once, inf never. A need of more than all waits for all."""
        self._fill(now.steady)
        if self.size <= 0:
            return inf
        missing = min(need, self.size) - self.level
        return missing / self._rate if missing > ROUNDING * self.size else 0.0

    def reserve(self, amount: float, now: Now) -> None:
        """Takes an amount."""
        self._fill(now.steady)
        self.level -= amount

    def settle(self, reserved: float, actual: float, since: Now, now: Now) -> None:
        """Takes the actual amount in place of what was reserved at `since`."""
        self._fill(now.steady)
        self.level = min(self.size, self.level + reserved - actual)

    def resets(self, now: Now) -> float:
        """Seconds until it is full again."""
        return self.used(now) / self._rate if self.size > 0 else inf

    def change(self, limit: KeyLimit, share: float) -> None:
        """The limit is another one now. What is used stays used."""
        before = self.size
        self.limit, self.share = limit, share
        self.level += self.size - before

    @property
    def _rate(self) -> float:
        return self.size / RATES[self.limit.period]

    def _fill(self, steady: float) -> None:
        if steady > self.filled > -inf:
            self.level = min(self.size, self.level + (steady - self.filled) * self._rate)
        self.filled = max(self.filled, steady)


@dataclass(slots=True)
class BudgetMeter:
    """The meter of a budget. `spent` is what this gateway gave out in the window, with what is `held` for
    requests that run and may take less.

    A request may start while anything is left, so the last one may go beyond by its size. The window moves on
    with the wall clock. When that jumps back, the window follows and what is spent stays spent. When
    gateways tell each other what they gave out, `elsewhere` is what others did.
    """

    limit: KeyLimit
    share: float = 1.0
    spent: float = 0.0
    held: float = 0.0
    elsewhere: float = 0.0
    window: CalendarWindow | None = None
    seen: float = 0.0  # the wall clock when it was asked last

    @property
    def size(self) -> float:
        """The most that may be used in a window."""
        return self.limit.most * self.share

    def used(self, now: Now) -> float:
        """What is spent in the present window."""
        self._turn(now.wall)
        return self.spent + self.elsewhere

    def wait(self, need: float, now: Now) -> float:
        """Seconds until a request may start: 0 at once, inf never. What is held may soon be given back."""
        used = self.used(now)
        if used < self.size:
            return 0.0
        return HELD_S if used - self.held < self.size else self.resets(now)

    def reserve(self, amount: float, now: Now) -> None:
        """Takes an amount."""
        self._turn(now.wall)
        self.spent += amount
        if self.limit.quantity != "requests":  # of which none is given back
            self.held += amount

    def settle(self, reserved: float, actual: float, since: Now, now: Now) -> None:
        """Takes the actual amount in place of what was reserved at `since`, perhaps in an earlier window."""
        window = self._turn(now.wall)
        held = reserved if since.wall >= window.start else 0.0
        self.spent = max(0.0, self.spent + actual - held)
        self.held = max(0.0, self.held - held)

    def resets(self, now: Now) -> float:
        """Seconds until the next window."""
        return self._turn(now.wall).end - now.wall

    def change(self, limit: KeyLimit, share: float) -> None:
        """The limit is another one now. What is used stays used."""
        self.limit, self.share = limit, share

    def _turn(self, wall: float) -> CalendarWindow:
        held = self.window
        self.seen = wall
        if held is not None and held.start <= wall < held.end:
            return held
        if held is not None and wall >= held.end:
            self.spent = self.held = self.elsewhere = 0.0
        self.window = window_of(self.limit.period, wall)
        return self.window


Meter = RateMeter | BudgetMeter


def meter_of(limit: KeyLimit, share: float) -> Meter:
    """A fresh meter."""
    return RateMeter(limit, share) if limit.rate else BudgetMeter(limit, share)
