"""Kept answers in the memory of one gateway. Each tenant has a budget of bytes and no effect on another.

Eviction is GDSF (Cherkasova, HPL-98-69R1, 1998): an answer is worth its uses times its cost over its size,
and what has not been used for long loses its worth as others are evicted. The clock is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple, Protocol

from stretto.gateway.cache.stats import CacheStats

NO_ERASURE = b""
OVERHEAD = 512  # bytes of an entry besides its value


class Keeping(NamedTuple):
    """How to keep an answer: for `ttl` seconds, within the tenant's `budget` of bytes. `cost`: the seconds
    that the answer took. `subjects`: keys of whom it is about. `fence`: what `look` told when the request
    came; after an erasure since then the answer is not kept."""

    ttl: float
    budget: int
    cost: float = 1.0
    subjects: tuple[bytes, ...] = ()
    fence: bytes = NO_ERASURE


class StoredAnswer(NamedTuple):
    """What a store has for a key. `fence`: changes with each erasure; None: the store cannot be reached."""

    value: bytes | None
    fence: bytes | None


class AnswerStore(Protocol):
    """Where kept answers are. `tenant` is the key of a tenant."""

    async def look(self, tenant: bytes, key: bytes, subjects: Sequence[bytes]) -> StoredAnswer: ...
    async def put(self, tenant: bytes, key: bytes, value: bytes, keeping: Keeping) -> bool: ...
    async def erase(self, tenant: bytes, subject: bytes | None) -> int: ...
    async def close(self) -> None: ...


@dataclass(slots=True)
class StoredValue:
    """One answer."""

    value: bytes
    expires: float
    cost: float
    subjects: tuple[bytes, ...]
    uses: int = 1
    worth: float = 0.0

    @property
    def size(self) -> int:
        """Bytes, with what the store needs for it."""
        return len(self.value) + OVERHEAD


@dataclass(slots=True)
class Shelf:
    """The answers of one tenant. The heaps may hold what is no longer true; `entries` decides."""

    entries: dict[bytes, StoredValue] = field(default_factory=dict[bytes, StoredValue])
    used: int = 0  # bytes
    floor: float = 0.0  # the worth of what was evicted last
    by_worth: list[tuple[float, bytes]] = field(default_factory=list[tuple[float, bytes]])
    by_end: list[tuple[float, bytes]] = field(default_factory=list[tuple[float, bytes]])


class MemoryStore:
    """The answers of all tenants. What has expired is deleted at the next call, whoever makes it."""

    def __init__(self, clock: Callable[[], float], stats: CacheStats) -> None:
        self._clock = clock
        self._stats = stats
        self._shelves: dict[bytes, Shelf] = {}
        self._soonest = inf  # when the next answer expires, or before

    async def look(self, tenant: bytes, key: bytes, subjects: Sequence[bytes]) -> StoredAnswer:
        """The value of a key. Whoever owns the store knows of its erasures, so the fence says nothing."""
        return StoredAnswer(await self.get(tenant, key), NO_ERASURE)

    async def get(self, tenant: bytes, key: bytes) -> bytes | None:
        """The value of a key; None when there is none."""
        self.expire()
        shelf = self._shelves.get(tenant)
        kept = None if shelf is None else shelf.entries.get(key)
        if shelf is None or kept is None:
            return None
        kept.uses += 1
        self._weigh(shelf, key, kept)
        return kept.value

    async def put(self, tenant: bytes, key: bytes, value: bytes, keeping: Keeping) -> bool:
        """Keeps a value; False for one that is larger than an eighth of the budget."""
        self.expire()
        kept = StoredValue(value, self._clock() + keeping.ttl, keeping.cost, keeping.subjects)
        if kept.size > keeping.budget // 8:
            return False
        shelf = self._shelves.setdefault(tenant, Shelf())
        if key in shelf.entries:
            self._drop(shelf, key)
        while shelf.used + kept.size > keeping.budget:
            self._evict(shelf)
        shelf.entries[key] = kept
        self._count(shelf, 1, kept.size)
        self._weigh(shelf, key, kept)
        heappush(shelf.by_end, (kept.expires, key))
        self._soonest = min(self._soonest, kept.expires)
        return True

    async def erase(self, tenant: bytes, subject: bytes | None) -> int:
        """Deletes a tenant's answers about a subject, or all; returns how many there were."""
        shelf = self._shelves.get(tenant, Shelf())
        about = [key for key, kept in shelf.entries.items() if subject is None or subject in kept.subjects]
        for key in about:
            self._drop(shelf, key)
        if subject is None:
            self._shelves.pop(tenant, None)
        return len(about)

    async def close(self) -> None:
        """Forgets everything."""
        self._shelves.clear()

    def expire(self) -> None:
        """Deletes what has been kept for long enough."""
        now = self._clock()
        if now < self._soonest:
            return
        self._soonest = inf
        for tenant, shelf in list(self._shelves.items()):
            while shelf.by_end and shelf.by_end[0][0] <= now:
                _, key = heappop(shelf.by_end)
                kept = shelf.entries.get(key)
                if kept is not None and kept.expires <= now:
                    self._drop(shelf, key)
                    self._stats.expired += 1
            if shelf.entries:
                self._soonest = min(self._soonest, shelf.by_end[0][0])
            else:
                del self._shelves[tenant]

    def _weigh(self, shelf: Shelf, key: bytes, kept: StoredValue) -> None:
        kept.worth = shelf.floor + kept.uses * kept.cost / kept.size
        heappush(shelf.by_worth, (kept.worth, key))
        if len(shelf.by_worth) > 64 + 4 * len(shelf.entries):
            shelf.by_worth = sorted((each.worth, name) for name, each in shelf.entries.items())
            shelf.by_end = sorted((each.expires, name) for name, each in shelf.entries.items())

    def _evict(self, shelf: Shelf) -> None:
        while True:
            worth, key = heappop(shelf.by_worth)
            kept = shelf.entries.get(key)
            if kept is not None and kept.worth == worth:
                shelf.floor = worth
                self._drop(shelf, key)
                self._stats.evicted += 1
                return

    def _drop(self, shelf: Shelf, key: bytes) -> None:
        self._count(shelf, -1, -shelf.entries.pop(key).size)

    def _count(self, shelf: Shelf, entries: int, size: int) -> None:
        shelf.used += size
        self._stats.bytes += size
        self._stats.entries += entries
