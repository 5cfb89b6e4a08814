"""What tenants have used: one row for each day (UTC), tenant and model, as JSON and as CSV. Bounded.

With a file, the rows and what is spent of each budget outlive the process. One gateway holds the file at a
time. What was used in the last seconds before a crash is lost.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal

from msgspec import DecodeError, Raw, Struct, ValidationError, json
from msgspec.structs import fields

from stretto.errors import StartError
from stretto.gateway.accounts.keys import MODE, replace
from stretto.gateway.accounts.limits import Period, Quantity

DAYS = 62  # kept
DAY_S = 86_400
MOST_ROWS = 20_000
MOST_PER_DAY = 2_000  # tenants times models; the rest of a day is one row, `other`
OTHER = "other"


class UsageRow(Struct, frozen=True, kw_only=True):
    """The use of one model by one tenant on one day. `cost` is in the unit of the prices."""

    day: str
    tenant: str
    model: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: float
    joules: float


class Tally(Struct, frozen=True, kw_only=True):
    """What one answer took. `joules`: as the worker reports, or by the price list; 0 when neither knows."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    joules: float = 0.0

    def less(self, other: Tally) -> Tally:
        """What it has more than another one."""
        return Tally(
            **{name: max(0, getattr(self, name) - getattr(other, name)) for name in self.__struct_fields__}
        )


class SpentBudget(Struct, frozen=True, kw_only=True):
    """What was spent of a budget in the window that begins at `start`. `owner`: a key or a tenant."""

    owner: str
    quantity: Quantity
    period: Period
    start: float | None
    spent: float


class Saved(Struct, frozen=True, kw_only=True):
    """The content of a usage file."""

    days: dict[str, tuple[UsageRow, ...]] = {}
    budgets: tuple[SpentBudget, ...] = ()
    version: Literal[1] = 1


@dataclass(slots=True)
class _Sum:
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    joules: float = 0.0


@lru_cache(4)
def _day(number: float) -> str:
    """The name of a day, by its number since 1970."""
    return datetime.fromtimestamp(number * DAY_S, UTC).strftime("%Y-%m-%d")


class UsageTable:
    """The rows in memory."""

    def __init__(self, rows: Iterable[UsageRow] = ()) -> None:
        self._days: dict[str, dict[tuple[str, str], _Sum]] = {}
        self._encoded: dict[str, Raw] = {}  # of the days that have not changed since
        for row in rows:
            values = {name: getattr(row, name) for name in _Sum.__slots__}
            self._days.setdefault(row.day, {})[row.tenant, row.model] = _Sum(**values)

    def add(self, wall: float, tenant: str, model: str, tally: Tally) -> None:
        """Counts one request that ended at `wall` seconds since 1970."""
        day = _day(wall // DAY_S)
        rows = self._days.get(day)
        if rows is None:
            rows = self._days[day] = {}
            self._forget()
        self._encoded.pop(day, None)
        key = (tenant, model) if (tenant, model) in rows or len(rows) < MOST_PER_DAY else (OTHER, OTHER)
        held = rows.setdefault(key, _Sum())
        held.requests += 1
        held.prompt_tokens += tally.prompt_tokens
        held.cached_tokens += tally.cached_tokens
        held.completion_tokens += tally.completion_tokens
        held.cost += tally.cost
        held.joules += tally.joules

    def rows(self, tenant: str | None = None, since: str = "", until: str = "9") -> list[UsageRow]:
        """The rows of a tenant, None for all, from day `since` to day `until`, the oldest first."""
        return [
            UsageRow(day=day, tenant=key[0], model=key[1], **{n: getattr(held, n) for n in _Sum.__slots__})
            for day, rows in sorted(self._days.items())
            if since <= day <= until
            for key, held in sorted(rows.items())
            if tenant in (None, key[0])
        ]

    def encoded(self) -> dict[str, Raw]:
        """The rows of each day as JSON. Only days that have changed are encoded again."""
        for day in self._days.keys() - self._encoded.keys():
            self._encoded[day] = Raw(json.encode(self.rows(None, day, day)))
        return dict(self._encoded)

    def _forget(self) -> None:
        days = sorted(self._days)
        while len(days) > DAYS or sum(map(len, self._days.values())) > MOST_ROWS:
            self._encoded.pop(days[0], None)
            del self._days[days.pop(0)]


def csv_of(rows: Iterable[UsageRow]) -> str:
    """The rows as CSV with a header. A text that a spreadsheet would take for a formula begins with `'`."""
    names = [info.name for info in fields(UsageRow)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values: list[object] = [getattr(row, name) for name in names]
        writer.writerow([_plain(value) if isinstance(value, str) else value for value in values])
    return out.getvalue()


def _plain(text: str) -> str:
    return f"'{text}" if text[:1] in "=+-@\t\r" else text


class UsageFile:
    """The file that keeps the usage. Holds its lock until `close`."""

    def __init__(self, path: Path) -> None:
        """Raises StartError when the file cannot be written, or another gateway has it."""
        self.path = path
        self._writing = threading.Lock()
        try:
            self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
        except OSError as error:
            raise StartError(f"cannot write beside the usage file {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise StartError(
                f"another gateway keeps its usage in {path}: give each gateway a usage_file of its own"
            ) from None

    def read(self) -> Saved:
        """What is saved; nothing yet for no file. Raises StartError for a file that is no usage file."""
        try:
            return json.decode(self.path.read_bytes(), type=Saved)
        except FileNotFoundError:
            return Saved()
        except OSError as error:
            raise StartError(f"cannot read the usage file {self.path}: {error.strerror}") from error
        except (DecodeError, ValidationError, RecursionError) as error:
            raise StartError(
                f"{self.path} is no usage file: {error}; move it away to begin with no usage"
            ) from error

    def write(self, days: Mapping[str, Raw], budgets: Sequence[SpentBudget]) -> None:
        """Replaces the content. Raises StartError; then the old file is as it was."""
        with self._writing:  # an earlier write may still run in another thread
            replace(self.path.resolve(), json.encode({"days": days, "budgets": budgets, "version": 1}))

    def close(self) -> None:
        """Lets another gateway have the file."""
        os.close(self._lock)


def spent_of(budgets: Iterable[SpentBudget]) -> Mapping[tuple[str, Quantity, Period], SpentBudget]:
    """The budgets by owner, quantity and period."""
    return {(each.owner, each.quantity, each.period): each for each in budgets}
