"""Prometheus metrics of one worker: plain counters that a scrape turns into text.

Nothing here looks up a label per token: requests are counted when they end, steps when they are reported.
Every name, unit and help text of the product's metrics is in this file.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from stretto.types import StepStats

LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0)


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
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
        family.add_metric(labels, buckets, self._sum)


@dataclass(frozen=True, slots=True)
class Ended:
    """What one request was, once it ended. Times in seconds; None for what never happened."""

    endpoint: str
    outcome: str
    seconds: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    queued: float | None = None
    first: float | None = None
    gaps: Sequence[float] = ()


@dataclass(slots=True)
class Steps:
    """The steps of one model."""

    seconds: Histogram = field(default_factory=lambda: Histogram(STEP_S))
    decode: Histogram = field(default_factory=lambda: Histogram(SIZES))
    prefill: Histogram = field(default_factory=lambda: Histogram(SIZES))
    preempted: int = 0
    last: StepStats | None = None


@dataclass(frozen=True, slots=True)
class Gauges:
    """What a scrape asks for because nothing tells it: waiting in the front, restarts, readiness."""

    open_requests: int
    ready: bool
    draining: bool
    restarts: int


class Metrics(Collector):
    """One worker's numbers. `now` gives the gauges when a scrape comes."""

    def __init__(self, now: Callable[[], Gauges]) -> None:
        self._now = now
        self._requests: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._steps: dict[str, Steps] = {}
        self._ttft = Histogram(LATENCY_S)
        self._gap = Histogram(GAP_S)
        self._whole = Histogram(LATENCY_S)
        self._queue = Histogram(LATENCY_S)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def ended(self, request: Ended) -> None:
        self._requests[request.endpoint, request.outcome] += 1
        self._tokens["prompt"] += request.prompt_tokens
        self._tokens["output"] += request.output_tokens
        self._tokens["cached"] += request.cached_tokens
        if request.queued is not None:
            self._queue.add(request.queued)
        if request.first is not None:
            self._ttft.add(request.first)
            self._whole.add(request.seconds)
        self._gap.add_all(request.gaps)

    def step(self, stats: StepStats) -> None:
        steps = self._steps.get(stats.model)
        if steps is None:
            steps = self._steps[stats.model] = Steps()
        steps.last = stats
        steps.preempted += stats.preempted
        steps.seconds.add(stats.ms / 1e3)
        if stats.decode_tokens:
            steps.decode.add(stats.decode_tokens)
        if stats.prefill_tokens:
            steps.prefill.add(stats.prefill_tokens)

    content_type = CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """The exposition that Prometheus reads."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._of_requests()
        yield from self._of_steps()
        yield from self._of_worker()

    def _of_requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "stretto_requests",
            "Requests that ended, by endpoint and outcome.",
            labels=("endpoint", "outcome"),
        )
        for labels, count in sorted(self._requests.items()):
            requests.add_metric(labels, count)
        yield requests
        tokens = CounterMetricFamily(
            "stretto_tokens",
            "Tokens of requests that ended: prompt (cached among them) and output.",
            labels=("kind",),
        )
        for kind in ("prompt", "cached", "output"):
            tokens.add_metric((kind,), self._tokens[kind])
        yield tokens
        for name, text, histogram in (
            ("ttft", "Seconds from arrival to the first token.", self._ttft),
            ("itl", "Seconds between the tokens of an answer, as the front received them.", self._gap),
            ("e2e", "Seconds from arrival to the end, of requests that had a token.", self._whole),
            ("queue", "Seconds from arrival to the first step that read the prompt.", self._queue),
        ):
            family = HistogramMetricFamily(f"stretto_{name}_seconds", text)
            histogram.into(family)
            yield family

    def _of_steps(self) -> Iterator[Metric]:
        for name, text, pick in (
            ("step_seconds", "Seconds per step of the engine.", lambda steps: steps.seconds),
            ("step_decode_tokens", "Decode tokens per step that had any.", lambda steps: steps.decode),
            ("step_prefill_tokens", "Prompt tokens per step that had any.", lambda steps: steps.prefill),
        ):
            family = HistogramMetricFamily(f"stretto_{name}", text, labels=("model",))
            for model, steps in sorted(self._steps.items()):
                pick(steps).into(family, (model,))
            yield family
        preempted = CounterMetricFamily(
            "stretto_preemptions", "Sequences put back to be computed again.", labels=("model",)
        )
        for model, steps in sorted(self._steps.items()):
            preempted.add_metric((model,), steps.preempted)
        yield preempted
        last = [(model, steps.last) for model, steps in sorted(self._steps.items()) if steps.last is not None]
        yield _gauge("running_sequences", "Sequences in the last step.", ((m, s.running) for m, s in last))
        yield _gauge("waiting_sequences", "Sequences waiting for a step.", ((m, s.waiting) for m, s in last))
        yield _gauge("kv_blocks_free", "Free blocks of KV cache.", ((m, s.blocks_free) for m, s in last))
        yield _gauge("kv_blocks", "All blocks of KV cache.", ((m, s.blocks_total) for m, s in last))

    def _of_worker(self) -> Iterator[Metric]:
        now = self._now()
        yield GaugeMetricFamily("stretto_open_requests", "Requests being answered.", now.open_requests)
        yield GaugeMetricFamily(
            "stretto_engine_ready", "1 while the engine takes requests.", float(now.ready)
        )
        yield GaugeMetricFamily("stretto_draining", "1 while the worker shuts down.", float(now.draining))
        yield CounterMetricFamily(
            "stretto_engine_restarts", "Times the engine process was started again.", now.restarts
        )
        build = GaugeMetricFamily(
            "stretto_build_info", "Always 1; the labels say what runs.", labels=("version", "python")
        )
        build.add_metric((_version(), platform.python_version()), 1.0)
        yield build


def _gauge(name: str, text: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"stretto_{name}", text, labels=("model",))
    for model, value in values:
        family.add_metric((model,), value)
    return family


def _version() -> str:
    try:
        return version("stretto")
    except PackageNotFoundError:
        return "unknown"
