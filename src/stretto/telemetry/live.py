"""The live view's numbers: steps and ended requests of the last seconds, as one small snapshot.

Bounded memory, and no work per token; the HTTP front sends the snapshot. It must not know HTTP.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

from msgspec import Struct

from stretto.telemetry.metrics import Ended
from stretto.types import StepStats

WINDOW_S = 10.0
KEPT_STEPS = 4096
KEPT_ENDS = 1024
KEPT_GAPS = 64


class Live(Struct, frozen=True, kw_only=True):
    """The last WINDOW_S seconds. Times in milliseconds; None for what was not seen. `on_time` is
    [on time, judged] of all requests since the start."""

    tokens_s: float
    prefill_s: float
    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    ttft_ms: tuple[float | None, float | None]
    itl_ms: tuple[float | None, float | None]
    model_error: float | None
    on_time: dict[str, tuple[int, int]]
    ended: int
    restarts: int
    ready: bool


class Recent:
    """What happened lately. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, StepStats]] = deque(maxlen=KEPT_STEPS)
        self._ends: deque[tuple[float, Ended]] = deque(maxlen=KEPT_ENDS)
        self._judged: Counter[str] = Counter()
        self._kept: Counter[str] = Counter()
        self._ended = 0

    def step(self, stats: StepStats) -> None:
        self._steps.append((self._clock(), stats))

    def ended(self, request: Ended, tier: str, on_time: bool | None) -> None:
        self._ends.append((self._clock(), request))
        self._ended += 1
        if on_time is not None:
            self._judged[tier] += 1
            self._kept[tier] += on_time

    def snapshot(self, *, running: int, restarts: int, ready: bool) -> Live:
        """`running`: requests open in the front, which an idle engine's last step may not know ended."""
        since = self._clock() - WINDOW_S
        steps = [stats for at, stats in self._steps if at >= since]
        ends = [request for at, request in self._ends if at >= since]
        last = {stats.model: stats for _, stats in self._steps}.values() if running else []
        used = sum(stats.blocks_total - stats.blocks_free for stats in last)
        errors = [abs(s.predicted_ms - s.ms) / s.ms for s in steps if s.predicted_ms is not None and s.ms > 0]
        gaps = [gap for request in ends for gap in request.gaps[:KEPT_GAPS]]
        return Live(
            tokens_s=sum(stats.decode_tokens for stats in steps) / WINDOW_S,
            prefill_s=sum(stats.prefill_tokens for stats in steps) / WINDOW_S,
            running=sum(stats.running for stats in last),
            waiting=sum(stats.waiting for stats in last),
            blocks_used=used,
            blocks_total=sum(stats.blocks_total for stats in last),
            ttft_ms=_quantiles(request.first for request in ends),
            itl_ms=_quantiles(gaps),
            model_error=_at(sorted(errors), 0.5),
            on_time={tier: (self._kept[tier], judged) for tier, judged in self._judged.items()},
            ended=self._ended,
            restarts=restarts,
            ready=ready,
        )


def _quantiles(seconds: Iterable[float | None]) -> tuple[float | None, float | None]:
    """The median and the 99th percentile, in milliseconds."""
    values = sorted(value * 1e3 for value in seconds if value is not None)
    return _at(values, 0.5), _at(values, 0.99)


def _at(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
