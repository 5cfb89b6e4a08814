"""Statistics of the last seconds for the live page: one snapshot of steps and finished requests.

Memory is bounded. Work is per step and per request, never per token. This module knows no HTTP.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from msgspec import UNSET, Struct, UnsetType, structs

from stretto.statistics import quantile
from stretto.telemetry.metrics import Ended
from stretto.types import Objective, StepStats

WINDOW_S = 10.0
KEPT_STEPS = 4096
KEPT_REQUESTS = 1024
GAPS_PER_REQUEST = 64  # bounds the weight of a long answer and the cost of sorting
LISTED_STEPS = 120
HISTORY = 30  # windows of WINDOW_S: five minutes, of which KEPT_STEPS may cover less

MedianP99 = tuple[float | None, float | None]


class TierAttainment(Struct, frozen=True):
    """One tier's requests on time and all that count for attainment: since the start and in the window.

    Names with `recent` are for the window. `goodput`: requests on time per second of the window.
    """

    on_time: int
    judged: int
    recent_on_time: int
    recent_judged: int
    goodput: float


class Live(Struct, frozen=True, kw_only=True):
    """The last `WINDOW_S` seconds. A pair is the median and the 99th percentile, None without values.

    `step_tokens`: mean decode and prompt tokens of a step. `model_error`: median error of the step-time
    model, as a share of the measured time. `steps`: measured and predicted milliseconds of the last steps.
    `refused`: requests since the start, by error code. `ended`: requests since the start. `history`: the
    windows before this one, the oldest first, in the first event of a stream.
    """

    tokens_s: float
    prefill_s: float
    steps_s: float
    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    ttft_ms: MedianP99
    itl_ms: MedianP99
    step_ms: MedianP99
    step_tokens: tuple[float, float]
    model_error: float | None
    steps: tuple[tuple[float, float], ...]
    tiers: dict[str, TierAttainment]
    refused: dict[str, int]
    ended: int
    restarts: int
    ready: bool
    objectives: dict[str, Objective]
    history: tuple[Past, ...] | UnsetType = UNSET


class Past(Struct, frozen=True):
    """An earlier window that ended `ago_s` seconds ago. Its counts since the start are those of now."""

    ago_s: float
    live: Live


class Recent:
    """The steps and requests of the last seconds. `objectives`: those of the tiers, which are known once the
    models are loaded. `clock` is monotonic, in seconds."""

    def __init__(
        self,
        objectives: Callable[[], dict[str, Objective]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._objectives = objectives
        self._clock = clock
        self._steps: deque[tuple[float, StepStats]] = deque(maxlen=KEPT_STEPS)
        self._requests: deque[tuple[float, Ended]] = deque(maxlen=KEPT_REQUESTS)
        self._judged: Counter[str] = Counter()
        self._on_time: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._ended = 0

    def step(self, stats: StepStats) -> None:
        """Keep a step of the engine."""
        self._steps.append((self._clock(), stats))

    def ended(self, request: Ended) -> None:
        """Keep a request that is over."""
        self._requests.append((self._clock(), request))
        self._ended += 1
        self._judged[request.tier] += _judged(request)
        self._on_time[request.tier] += request.verdict == "on_time"
        if request.verdict == "refused":
            self._refused[request.outcome] += 1

    def snapshot(self, *, running: int, restarts: int, ready: bool) -> Live:
        """The statistics now. `running`: open requests; if 0, the counts of the last step are outdated."""
        since = self._clock() - WINDOW_S
        steps = [stats for at, stats in self._steps if at >= since]
        requests = [request for at, request in self._requests if at >= since]
        last = [stats for _, stats in self._steps] if running else []
        return self._live(steps, requests, last, restarts=restarts, ready=ready)

    def with_history(self, now: Live) -> Live:
        """`now` with the windows before it. The work is bounded by what is kept: each step is read once."""
        end = self._clock()
        steps: dict[int, list[StepStats]] = {}
        requests: dict[int, list[Ended]] = {}
        for at, stats in self._steps:
            steps.setdefault(int((end - at) // WINDOW_S), []).append(stats)
        for at, request in self._requests:
            requests.setdefault(int((end - at) // WINDOW_S), []).append(request)
        oldest = min(HISTORY, max((*steps, *requests), default=0))
        windows = range(oldest, 0, -1)
        past: list[Past] = []
        for index in windows:
            held = steps.get(index, [])
            live = self._live(held, requests.get(index, []), held, restarts=now.restarts, ready=True)
            past.append(Past(index * WINDOW_S, live))
        return structs.replace(now, history=tuple(past))

    def _live(
        self,
        steps: list[StepStats],
        requests: list[Ended],
        counted: list[StepStats],
        *,
        restarts: int,
        ready: bool,
    ) -> Live:
        """The statistics of a window. The last of the steps `counted` tells the sequences and blocks."""
        last = list({stats.model: stats for stats in counted}.values())
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
            ttft_ms=_median_p99(request.first * 1e3 for request in requests if request.first is not None),
            itl_ms=_median_p99(gap * 1e3 for each in requests for gap in each.gaps[:GAPS_PER_REQUEST]),
            step_ms=_median_p99(stats.ms for stats in steps),
            step_tokens=(decode / count, prefill / count),
            model_error=_median_p99(abs(predicted - ms) / ms for ms, predicted in timed)[0],
            steps=tuple(timed[-LISTED_STEPS:]),
            tiers=self._tiers(requests),
            refused=dict(self._refused),
            ended=self._ended,
            restarts=restarts,
            ready=ready,
            objectives=self._objectives(),
        )

    def _tiers(self, requests: Sequence[Ended]) -> dict[str, TierAttainment]:
        judged = Counter(request.tier for request in requests if _judged(request))
        on_time = Counter(request.tier for request in requests if request.verdict == "on_time")
        return {
            tier: TierAttainment(
                self._on_time[tier], count, on_time[tier], judged[tier], on_time[tier] / WINDOW_S
            )
            for tier, count in self._judged.items()
            if count
        }


def _judged(request: Ended) -> bool:
    return request.verdict not in (None, "cancelled")


def _median_p99(values: Iterable[float]) -> MedianP99:
    ordered = sorted(values)
    return (quantile(ordered, 0.5), quantile(ordered, 0.99)) if ordered else (None, None)
