"""What the caches of one gateway have done, for metrics and the live page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

CacheKind = Literal["exact", "semantic"]


class CacheReport(Struct, frozen=True):
    """The counts at one moment. All but `entries`, `bytes` and `shared` only grow.

    `shared`: how the Redis is that gateways share: `none`, `ok`, or `gone` while answers are served without.
    """

    exact_hits: int
    semantic_hits: int
    misses: int
    joined: int
    kept: int
    not_kept: int
    evicted: int
    expired: int
    erased: int
    verified: int
    verified_wrong: int
    shared_failures: int
    entries: int
    bytes: int
    shared: str


@dataclass(slots=True)
class CacheStats:
    """Counts of one gateway.

    `joined`: requests that shared another one's answer in flight. `not_kept`: answers that were too large,
    cut or failed. `verified`: similar requests that went to a worker to learn whether the kept answer would
    have been right; `verified_wrong`: it would not. `shared_failures`: calls of Redis that failed.
    """

    hits: dict[CacheKind, int] = field(default_factory=lambda: {"exact": 0, "semantic": 0})
    misses: int = 0
    joined: int = 0
    kept: int = 0
    not_kept: int = 0
    evicted: int = 0
    expired: int = 0
    erased: int = 0
    verified: int = 0
    verified_wrong: int = 0
    shared_failures: int = 0
    entries: int = 0
    bytes: int = 0
    shared: str = "none"

    def report(self) -> CacheReport:
        """The counts now."""
        names = CacheReport.__struct_fields__[2:]
        return CacheReport(
            self.hits["exact"], self.hits["semantic"], *(getattr(self, name) for name in names)
        )
