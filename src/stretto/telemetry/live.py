"""The live view's numbers: steps and ended requests of the last seconds, as one small snapshot.

Bounded memory, and no work per token; the HTTP front sends the snapshot. It must not know HTTP.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from stretto.statistics import spread
from stretto.telemetry.metrics import Ended
from stretto.types import Objective, StepStats

WINDOW_S = 10.0
KEPT_STEPS = 4096
KEPT_ENDS = 1024
KEPT_GAPS = 64
SHOWN_STEPS = 120

Pair = tuple[float | None, float | None]


class Kept(Struct, frozen=True):
    """Requests that were on time, of all judged: since the start, and of late; `goodput`: on time, per second
    of the window."""

    on_time: int
    judged: int
    lately_on_time: int
    lately_judged: int
    goodput: float


class Live(Struct, frozen=True, kw_only=True):
    """The last WINDOW_S seconds. Times in milliseconds, pairs are median and 99th percentile; None for what
    was not seen. `step_tokens`: decode and prompt tokens of a step, mean; `steps`: what the last ones took
    and what was predicted; `refused`: by reason, since the start; `objectives`: what each tier asks."""

    tokens_s: float
    prefill_s: float
    steps_s: float
    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    ttft_ms: Pair
    itl_ms: Pair
    step_ms: Pair
    step_tokens: tuple[float, float]
    model_error: float | None
    steps: tuple[tuple[float, float], ...]
    tiers: dict[str, Kept]
    refused: dict[str, int]
    ended: int
    restarts: int
    ready: bool
    objectives: dict[str, Objective]


class Recent:
    """What happened lately, and what each tier asks. `clock` is monotonic, in seconds."""

    def __init__(self, objectives: dict[str, Objective], clock: Callable[[], float] = time.monotonic) -> None:
        self._objectives = objectives
        self._clock = clock
        self._steps: deque[tuple[float, StepStats]] = deque(maxlen=KEPT_STEPS)
        self._ends: deque[tuple[float, Ended]] = deque(maxlen=KEPT_ENDS)
        self._judged: Counter[str] = Counter()
        self._on_time: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._ended = 0

    def step(self, stats: StepStats) -> None:
        self._steps.append((self._clock(), stats))

    def ended(self, request: Ended) -> None:
        self._ends.append((self._clock(), request))
        self._ended += 1
        self._judged[request.tier] += _judged(request)
        self._on_time[request.tier] += request.verdict == "on_time"
        if request.verdict == "refused":
            self._refused[request.outcome] += 1

    def snapshot(self, *, running: int, restarts: int, ready: bool) -> Live:
        """`running`: requests open in the front, which an idle engine's last step may not know ended."""
        since = self._clock() - WINDOW_S
        steps = [stats for at, stats in self._steps if at >= since]
        ends = [request for at, request in self._ends if at >= since]
        last = {stats.model: stats for _, stats in self._steps}.values() if running else []
        timed = [(s.ms, s.predicted_ms) for s in steps if s.predicted_ms is not None and s.ms > 0]
        decode, prefill = sum(s.decode_tokens for s in steps), sum(s.prefill_tokens for s in steps)
        count = max(1, len(steps))
        return Live(
            tokens_s=decode / WINDOW_S,
            prefill_s=prefill / WINDOW_S,
            steps_s=len(steps) / WINDOW_S,
            running=sum(stats.running for stats in last),
            waiting=sum(stats.waiting for stats in last),
            blocks_used=sum(stats.blocks_total - stats.blocks_free for stats in last),
            blocks_total=sum(stats.blocks_total for stats in last),
            ttft_ms=_pair(request.first * 1e3 for request in ends if request.first is not None),
            itl_ms=_pair(gap * 1e3 for request in ends for gap in request.gaps[:KEPT_GAPS]),
            step_ms=_pair(stats.ms for stats in steps),
            step_tokens=(decode / count, prefill / count),
            model_error=_pair(abs(predicted - ms) / ms for ms, predicted in timed)[0],
            steps=tuple(timed[-SHOWN_STEPS:]),
            tiers=self._tiers(ends),
            refused=dict(self._refused),
            ended=self._ended,
            restarts=restarts,
            ready=ready,
            objectives=self._objectives,
        )

    def _tiers(self, ends: Sequence[Ended]) -> dict[str, Kept]:
        judged = Counter(request.tier for request in ends if _judged(request))
        on_time = Counter(request.tier for request in ends if request.verdict == "on_time")
        return {
            tier: Kept(self._on_time[tier], count, on_time[tier], judged[tier], on_time[tier] / WINDOW_S)
            for tier, count in self._judged.items()
            if count
        }


def _judged(request: Ended) -> bool:
    return request.verdict not in (None, "cancelled")


def _pair(values: Iterable[float]) -> Pair:
    """The median and the 99th percentile; None twice when there are no values."""
    seen = spread(values)
    return (None, None) if seen is None else (seen.p50, seen.p99)
