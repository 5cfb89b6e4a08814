"""Prometheus metrics of one gateway, and what the live page shows of its last seconds.

It counts a request when it ends; no token costs anything here.
"""

from __future__ import annotations

import platform
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import takewhile
from math import inf

from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client import Counter as PrometheusCounter

from stretto.gateway.accounts.usage import Tally
from stretto.gateway.cache.stats import CacheReport
from stretto.gateway.operations import catalogue
from stretto.gateway.operations.catalogue import METRICS, NAMES
from stretto.statistics import quantile
from stretto.telemetry.catalogue import Metric
from stretto.telemetry.series import Series

OTHER = "other"
TOGETHER = 32  # requests that the series count in one go
WINDOW_S = 10.0
KEPT = 2048
FRESH_S, MOST_SHOWN = 0.5, 64
BREAKERS = {"closed": 0, "half-open": 1, "open": 2}


class RelayedEnd(Struct, frozen=True, kw_only=True):
    """One request after its end. Times are seconds, None where the event never happened.

    `worker`: that answered or failed last. `upstream`: from sending to the first token. `first`: from arrival
    to it. `forecast`: what was predicted of `first`. Embeddings and answers in one piece have no first token.
    """

    tenant: str
    model: str
    outcome: str
    status: int
    at: float
    tally: Tally = Tally()
    worker: str = ""
    upstream: float | None = None
    first: float | None = None
    forecast: float | None = None


class WorkerGauge(Struct, frozen=True):
    """One worker at the time of a scrape."""

    name: str
    site: str
    state: str
    breaker: str


class GatewayGauges(Struct, frozen=True, kw_only=True):
    """The gateway at the time of a scrape. `counts` are the relay's, by metric."""

    open: int
    draining: bool
    keys_stale: bool
    shared_gone: bool
    log_dropped: int
    workers: Iterable[WorkerGauge]
    counts: Mapping[str, int]
    rejected: Mapping[str, int]
    cache: CacheReport


class BoundedNames:
    """The first names that come keep themselves; the others are `other`, so that series stay few."""

    def __init__(self, most: int = NAMES) -> None:
        self._most = most
        self._known: set[str] = set()

    def of(self, name: str) -> str:
        """The label for a name."""
        if name not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(name)
        return name


class Recently(Struct, frozen=True, kw_only=True):
    """The last seconds: rates per second, and milliseconds as median and 99th percentile."""

    requests_s: float
    tokens_s: float
    errors_s: float
    ttft_ms: tuple[float | None, float | None]
    forecast_error_ms: tuple[float | None, float | None]
    workers: dict[str, int]
    tenants: dict[str, int]


class GatewayMetrics:
    """One gateway's metrics. `now` returns the gauges when a scrape comes."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, now: Callable[[], GatewayGauges]) -> None:
        self._now = now
        self._series = Series(METRICS)
        self._of = self._series.of
        self._tenants, self._workers, self._sites = BoundedNames(), BoundedNames(), BoundedNames()
        self._gauged: set[tuple[str, ...]] = set()
        self._shown: dict[str | None, tuple[float, Recently]] = {}  # by tenant, and when
        self._recent: deque[RelayedEnd] = deque(maxlen=KEPT)
        self._uncounted: list[RelayedEnd] = []
        self._of(catalogue.BUILD, version("stretto"), platform.python_version()).set(1)

    def ended(self, request: RelayedEnd) -> None:
        """Counts a request that is over. The series count several together, because each has a lock."""
        self._recent.append(request)
        self._uncounted.append(request)
        if len(self._uncounted) >= TOGETHER:
            self._count_ended()

    def _count_ended(self) -> None:
        ended, self._uncounted = self._uncounted, []
        alike: defaultdict[tuple[str, str, str, str, str], list[RelayedEnd]] = defaultdict(list)
        for each in ended:
            alike[each.tenant, each.model, each.outcome, str(each.status), each.worker].append(each)
        for (tenant, model, outcome, status, worker), requests in alike.items():
            tenant = self._tenants.of(tenant)
            self._of(catalogue.REQUESTS, tenant, model, outcome, status).inc(len(requests))
            used = [each.tally for each in requests]
            for metric, labels, amount in (
                (catalogue.TOKENS, (tenant, model, "prompt"), sum(each.prompt_tokens for each in used)),
                (catalogue.TOKENS, (tenant, model, "cached"), sum(each.cached_tokens for each in used)),
                (
                    catalogue.TOKENS,
                    (tenant, model, "output"),
                    sum(each.completion_tokens for each in used),
                ),
                (catalogue.COST, (tenant, model), sum(each.cost for each in used)),
                (catalogue.JOULES, (tenant, model), sum(each.joules for each in used)),
            ):
                if amount:
                    self._of(metric, *labels).inc(amount)
            if worker:
                self._of(catalogue.ROUTED, self._workers.of(worker)).inc(len(requests))
            self._count_times(model, worker, requests)

    def _count_times(self, model: str, worker: str, requests: Sequence[RelayedEnd]) -> None:
        """Counts the times of requests to one model that one worker answered."""
        upstream = [each.upstream for each in requests if each.upstream is not None]
        if upstream:
            self._of(catalogue.UPSTREAM, self._workers.of(worker)).observe_all(upstream)
        firsts = [each.first for each in requests if each.first is not None]
        forecasts = [
            (each.forecast, abs(each.forecast - each.first))
            for each in requests
            if each.first is not None and each.forecast is not None and each.forecast < inf
        ]
        for metric, seconds in (
            (catalogue.TTFT, firsts),
            (catalogue.FORECAST, [forecast for forecast, _ in forecasts]),
            (catalogue.FORECAST_ERROR, [error for _, error in forecasts]),
        ):
            if seconds:
                self._of(metric, model).observe_all(seconds)

    def recently(self, clock: float, tenant: str | None) -> Recently:
        """The last WINDOW_S seconds before `clock`; of one tenant, None for all."""
        held = self._shown.get(tenant)
        if held is not None and clock - held[0] < FRESH_S:
            return held[1]  # several may watch
        if len(self._shown) >= MOST_SHOWN:
            self._shown.clear()
        shown = self._summary(clock, tenant)
        self._shown[tenant] = clock, shown
        return shown

    def _summary(self, clock: float, tenant: str | None) -> Recently:
        latest = takewhile(lambda each: each.at >= clock - WINDOW_S, reversed(self._recent))
        seen = [each for each in latest if tenant in (None, each.tenant)]
        errors = [
            abs(each.forecast - each.first)
            for each in seen
            if each.first is not None and each.forecast is not None and each.forecast < inf
        ]
        return Recently(
            requests_s=len(seen) / WINDOW_S,
            tokens_s=sum(each.tally.completion_tokens for each in seen) / WINDOW_S,
            errors_s=sum(each.outcome not in ("ok", "client_gone") for each in seen) / WINDOW_S,
            ttft_ms=_median_p99(each.first for each in seen if each.first is not None),
            forecast_error_ms=_median_p99(errors),
            workers=dict(Counter(each.worker for each in seen if each.worker)),
            tenants=dict(Counter(each.tenant for each in seen).most_common(NAMES)),
        )

    def text(self) -> bytes:
        """The exposition that Prometheus reads."""
        self._count_ended()
        now = self._now()
        self._of(catalogue.OPEN).set(now.open)
        self._of(catalogue.DRAINING).set(now.draining)
        self._of(catalogue.KEYS_STALE).set(now.keys_stale)
        self._of(catalogue.SHARED_GONE).set(now.shared_gone)
        totals = {catalogue.LOG_DROPPED: now.log_dropped} | {
            metric: now.counts[metric.name]
            for metric in (catalogue.FAILOVERS, catalogue.RETRIES, catalogue.HEDGES, catalogue.HEDGES_WON)
        }
        for metric, value in totals.items():
            self._total(value, metric)
        for reason, value in now.rejected.items():
            self._total(value, catalogue.REJECTED, reason)
        self._count_cache(now.cache)
        self._count_workers(now.workers)
        return self._series.text()

    def _total(self, value: int, metric: Metric[PrometheusCounter], *labels: str) -> None:
        """Sets a counter to what somebody else has counted."""
        counter = self._of(metric, *labels)
        counter.reset()
        counter.inc(value)

    def _count_cache(self, cache: CacheReport) -> None:
        results = {
            "exact": cache.exact_hits,
            "semantic": cache.semantic_hits,
            "joined": cache.joined,
            "miss": cache.misses,
        }
        for result, value in results.items():
            self._total(value, catalogue.CACHED, result)
        self._total(cache.shared_failures, catalogue.CACHE_FAILURES)
        self._of(catalogue.CACHE_ENTRIES).set(cache.entries)
        self._of(catalogue.CACHE_BYTES).set(cache.bytes)

    def _count_workers(self, workers: Iterable[WorkerGauge]) -> None:
        """Sets the gauges of the present workers, and those of workers that left to 0. Of a gateway that has
        had no worker yet, too: an alert looks for 0."""
        states: Counter[tuple[str, ...]] = Counter(dict.fromkeys(self._gauged or {("", "usable")}, 0))
        for worker in workers:
            states[self._sites.of(worker.site), worker.state] += 1
            self._of(catalogue.BREAKER, self._workers.of(worker.name)).set(BREAKERS[worker.breaker])
        self._gauged = set(states)
        for labels, count in states.items():
            self._of(catalogue.WORKERS, *labels).set(count)


def _median_p99(seconds: Iterable[float]) -> tuple[float | None, float | None]:
    ordered = sorted(each * 1e3 for each in seconds)
    return (quantile(ordered, 0.5), quantile(ordered, 0.99)) if ordered else (None, None)
