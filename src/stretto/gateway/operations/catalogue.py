"""The definition of every metric of a gateway. `metrics` updates them, and a test compares docs/metrics.md.

A label has few values. Tenants and workers are the operator's names; the first NAMES of them have series of
their own, and the others are counted as `other`.
"""

from __future__ import annotations

from typing import cast

from prometheus_client import Counter, Gauge

from stretto.telemetry.catalogue import AnyMetric, Latency, Metric

NAMES = 100

# Requests, counted when they end.
REQUESTS = Metric(
    Counter,
    "stretto_gateway_requests",
    "Finished requests by tenant, model, outcome (ok, client_gone, worker_error, or an error code) and "
    "status (499: the client left before a response). The tenant is `none` for a request without a key. The "
    "model is `unknown` when no worker has it.",
    ("tenant", "model", "outcome", "status"),
)
TOKENS = Metric(
    Counter,
    "stretto_gateway_tokens",
    "Tokens by tenant, model and kind: prompt, cached (also part of prompt), output.",
    ("tenant", "model", "kind"),
)
COST = Metric(
    Counter,
    "stretto_gateway_cost",
    "Cost by tenant and model, in the unit of the setting prices.",
    ("tenant", "model"),
)
JOULES = Metric(
    Counter,
    "stretto_gateway_joules",
    "Energy by tenant and model in joules, as workers report it, else by the setting prices.",
    ("tenant", "model"),
)
ROUTED = Metric(
    Counter, "stretto_gateway_routed", "Requests by the worker that answered or failed last.", ("worker",)
)
TTFT = Metric(
    Latency,
    "stretto_gateway_ttft_seconds",
    "Seconds from arrival at the gateway to the first token of a stream.",
    ("model",),
)
UPSTREAM = Metric(
    Latency,
    "stretto_gateway_upstream_ttft_seconds",
    "Seconds from sending a request to a worker to the first token of its stream.",
    ("worker",),
)
FORECAST = Metric(
    Latency,
    "stretto_gateway_ttft_forecast_seconds",
    "The stretto_gateway_ttft_seconds that was predicted when the worker was chosen.",
    ("model",),
)
FORECAST_ERROR = Metric(
    Latency,
    "stretto_gateway_ttft_forecast_error_seconds",
    "Absolute error of the predicted time to the first token.",
    ("model",),
)
REJECTED = Metric(
    Counter,
    "stretto_gateway_rejected_requests",
    "Requests and connections that were ended before a handler answered, by reason.",
    ("reason",),
)

# What the relay has done.
FAILOVERS = Metric(
    Counter, "stretto_gateway_failovers", "Streams that went on at another worker in the middle of an answer."
)
RETRIES = Metric(
    Counter, "stretto_gateway_retries", "Requests that began again at another worker before the first token."
)
HEDGES = Metric(Counter, "stretto_gateway_hedges", "Second attempts that were started.")
HEDGES_WON = Metric(Counter, "stretto_gateway_hedges_won", "Second attempts that answered first.")

# The caches.
CACHED = Metric(
    Counter,
    "stretto_gateway_cache_lookups",
    "Requests that met the caches, by result: exact, semantic, joined (another's answer in flight), or miss.",
    ("result",),
)
CACHE_ENTRIES = Metric(Gauge, "stretto_gateway_cache_entries", "Answers in the cache of this process.")
CACHE_BYTES = Metric(Gauge, "stretto_gateway_cache_bytes", "Bytes of the answers in the cache.")
CACHE_FAILURES = Metric(
    Counter,
    "stretto_gateway_cache_shared_failures",
    "Calls of the Redis that gateways share which failed; the requests were served without.",
)
SHARED_GONE = Metric(
    Gauge,
    "stretto_gateway_shared_gone",
    "1 while the Redis that gateways share cannot be reached, by caches or limits, else 0.",
)

# The gateway, at the time of a scrape.
OPEN = Metric(Gauge, "stretto_gateway_open_requests", "Requests being answered.")
WORKERS = Metric(
    Gauge,
    "stretto_gateway_workers",
    "Workers by site and state: usable, draining, or lost (its breaker is open, or it has not reported).",
    ("site", "state"),
)
BREAKER = Metric(
    Gauge,
    "stretto_gateway_breaker",
    "The breaker of each worker: 0 closed, 1 half open, 2 open.",
    ("worker",),
)
KEYS_STALE = Metric(
    Gauge,
    "stretto_gateway_keys_stale",
    "1 while the key file cannot be read and older keys stay in force, else 0.",
)
DRAINING = Metric(Gauge, "stretto_gateway_draining", "1 while the gateway shuts down, else 0.")
LOG_DROPPED = Metric(
    Counter,
    "stretto_gateway_access_log_dropped",
    "Lines of the access log that were lost, because standard output was slow or could not be written.",
)
BUILD = Metric(
    Gauge,
    "stretto_gateway_build_info",
    "Always 1. The labels are the running versions.",
    ("version", "python"),
)

METRICS: tuple[Metric[AnyMetric], ...] = tuple(
    cast(Metric[AnyMetric], value) for value in list(globals().values()) if isinstance(value, Metric)
)
