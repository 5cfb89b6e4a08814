"""Prometheus metrics of one worker: plain counters that a scrape turns into text.

Nothing here looks up a label per token: requests are counted when they end, steps when they are reported.
What there is to count is said in `catalogue`.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import inf
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from stretto.telemetry import catalogue
from stretto.telemetry.catalogue import METRICS, Metric
from stretto.types import StepStats

Labels = tuple[str, ...]
Verdict = Literal["on_time", "late", "refused", "failed", "cancelled"]
FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class Histogram:
    """Counts by upper bound. Adding costs a search in a short tuple."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_all(self, values: Sequence[float]) -> None:
        counts, bounds = self._counts, self._bounds
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self._sum += sum(values)

    def into(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, inf), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == inf else repr(bound), total))
        family.add_metric(labels, buckets, self._sum)


@dataclass(frozen=True, slots=True)
class Ended:
    """What one request was, once it ended. Times in seconds; None for what never happened.

    `verdict`: what became of its objective, None for a request that was never valid. `forecast`: what
    `queued` was expected to be. `slack`: how long before its due the token with the least time to spare
    came; below 0 when it was late.
    """

    endpoint: str
    outcome: str
    seconds: float
    verdict: Verdict | None = None
    tier: str = ""
    model: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    queued: float | None = None
    forecast: float | None = None
    first: float | None = None
    slack: float | None = None
    gaps: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Gauges:
    """What a scrape asks for because nothing tells it: waiting in the front, restarts, readiness."""

    open_requests: int
    ready: bool
    draining: bool
    restarts: int


@dataclass(slots=True)
class Series:
    """One metric's values, by its labels."""

    metric: Metric
    values: Counter[Labels] = field(default_factory=Counter[Labels])
    histograms: dict[Labels, Histogram] = field(default_factory=dict[Labels, Histogram])

    def histogram(self, labels: Labels) -> Histogram:
        found = self.histograms.get(labels)
        if found is None:
            found = self.histograms[labels] = Histogram(self.metric.buckets)
        return found

    def family(self) -> Family:
        metric = self.metric
        if metric.kind == "histogram":
            family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, histogram in sorted(self.histograms.items()):
                histogram.into(family, labels)
            return family
        family = FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels)
        for labels, value in sorted(self.values.items()):
            family.add_metric(labels, value)
        return family


@dataclass(slots=True)
class Steps:
    """The steps of one model, of which there may be thousands a second."""

    last: StepStats
    seconds: Histogram
    decode: Histogram
    prefill: Histogram
    error: Histogram
    preempted: int = 0
    proposed: int = 0
    accepted: int = 0

    def add(self, stats: StepStats) -> None:
        self.last = stats
        self.seconds.add(stats.ms / 1e3)
        if stats.decode_tokens:
            self.decode.add(stats.decode_tokens)
        if stats.prefill_tokens:
            self.prefill.add(stats.prefill_tokens)
        if stats.predicted_ms is not None and stats.ms > 0:
            self.error.add(abs(stats.predicted_ms - stats.ms) / stats.ms)
        self.preempted += stats.preempted
        self.proposed += stats.proposed
        self.accepted += stats.accepted


class Metrics(Collector):
    """One worker's numbers. `now` gives the gauges when a scrape comes."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, now: Callable[[], Gauges]) -> None:
        self._now = now
        self._series = {metric.name: Series(metric) for metric in METRICS}
        self._steps: dict[str, Steps] = {}
        self._set(catalogue.BUILD, (_version(), platform.python_version()), 1)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def ended(self, request: Ended) -> None:
        self._count(catalogue.REQUESTS, (request.endpoint, request.outcome))
        labels = (request.tier, request.model)
        for kind in ("prompt", "output", "cached"):
            self._count(catalogue.TOKENS, (kind, request.model), getattr(request, f"{kind}_tokens"))
        if request.verdict is not None:
            self._count(catalogue.JUDGED, (*labels, request.verdict))
        if request.verdict == "refused":
            self._count(catalogue.REFUSALS, (request.outcome, request.tier))
        if request.slack is not None and request.slack < inf:
            late = request.slack < 0
            self._observe(catalogue.LATENESS if late else catalogue.SLACK, labels, abs(request.slack))
        if request.queued is not None:
            self._observe(catalogue.QUEUE, labels, request.queued)
            if request.forecast is not None:
                self._observe(catalogue.FORECAST, labels, request.forecast)
                self._observe(catalogue.FORECAST_ERROR, labels, abs(request.forecast - request.queued))
        if request.first is not None:
            self._observe(catalogue.TTFT, labels, request.first)
            self._observe(catalogue.E2E, labels, request.seconds)
        if request.gaps:
            self._series[catalogue.ITL.name].histogram(labels).add_all(request.gaps)

    def step(self, stats: StepStats) -> None:
        steps = self._steps.get(stats.model)
        if steps is None:
            of = (catalogue.STEP, catalogue.STEP_DECODE, catalogue.STEP_PREFILL, catalogue.STEP_ERROR)
            took, decode, prefill, error = (self._series[one.name].histogram((stats.model,)) for one in of)
            steps = self._steps[stats.model] = Steps(stats, took, decode, prefill, error)
        steps.add(stats)

    def text(self) -> bytes:
        """The exposition that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Family]:
        for model, steps in self._steps.items():
            last = steps.last
            self._set(catalogue.RUNNING, (model,), last.running)
            self._set(catalogue.WAITING, (model,), last.waiting)
            self._set(catalogue.BLOCKS_FREE, (model,), last.blocks_free)
            self._set(catalogue.BLOCKS, (model,), last.blocks_total)
            self._set(catalogue.PREEMPTIONS, (model,), steps.preempted)
            self._set(catalogue.PROPOSED, (model,), steps.proposed)
            self._set(catalogue.ACCEPTED, (model,), steps.accepted)
        now = self._now()
        self._set(catalogue.OPEN, (), now.open_requests)
        self._set(catalogue.READY, (), now.ready)
        self._set(catalogue.DRAINING, (), now.draining)
        self._set(catalogue.RESTARTS, (), now.restarts)
        for series in self._series.values():
            yield series.family()

    def _count(self, metric: Metric, labels: Labels, by: int = 1) -> None:
        self._series[metric.name].values[labels] += by

    def _set(self, metric: Metric, labels: Labels, value: int) -> None:
        self._series[metric.name].values[labels] = value

    def _observe(self, metric: Metric, labels: Labels, value: float) -> None:
        self._series[metric.name].histogram(labels).add(value)


def _version() -> str:
    try:
        return version("stretto")
    except PackageNotFoundError:
        return "unknown"
