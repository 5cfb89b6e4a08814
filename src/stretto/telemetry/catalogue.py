"""The definition of every metric of a worker: type, name, help text and labels.

`stretto.telemetry.metrics` updates them. A test compares them with docs/metrics.md, docs/grafana.json and
docs/rules.yaml. A label has few values (tiers, models, error codes), never one that a client chooses.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

AnyMetric = Counter | Gauge | Histogram
M = TypeVar("M", bound=AnyMetric, covariant=True)

disable_created_metrics()  # Without this, every series gets a second one with the time of its creation.


class BulkHistogram(Histogram):
    """A histogram that takes many values in one call, at a sixth of the cost of `observe` for each."""

    def observe_all(self, values: Sequence[float]) -> None:
        """Count each value, in the histogram's unit."""
        counts = [0] * len(self._upper_bounds)
        for value in values:
            counts[bisect_left(self._upper_bounds, value)] += 1
        # prometheus_client gives these two no types.
        buckets: list[Any] = self._buckets  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        total: Any = self._sum
        for bucket, count in zip(buckets, counts, strict=True):
            if count:  # each has a lock
                bucket.inc(count)
        total.inc(sum(values))


@dataclass(frozen=True, slots=True)
class Metric(Generic[M]):
    """One metric, which `create` makes. Prometheus adds `_total` to the name of a counter."""

    create: Callable[..., M]
    name: str
    help: str
    labels: tuple[str, ...] = ()


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0)
TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)

Latency = partial(BulkHistogram, buckets=SECONDS)
Gaps = partial(BulkHistogram, buckets=GAP_S)
StepSeconds = partial(BulkHistogram, buckets=STEP_S)
TokenCounts = partial(BulkHistogram, buckets=TOKEN_COUNTS)
Ratio = partial(BulkHistogram, buckets=RATIOS)

TIER_MODEL = ("tier", "model")
MODEL = ("model",)

# Requests, counted when they end.
JUDGED = Metric(
    Counter,
    "stretto_judged_requests",
    "Finished requests by the outcome for their objective: on_time, late, refused, failed, or cancelled (the "
    "client left before a token was late). A request without an objective is on_time when it is answered. "
    "Attainment is on_time over all but cancelled.",
    ("tier", "model", "verdict"),
)
SLACK = Metric(
    Latency,
    "stretto_slack_seconds",
    "For requests on time: the smallest time by which a token was ahead of its deadline.",
    TIER_MODEL,
)
LATENESS = Metric(
    Latency,
    "stretto_lateness_seconds",
    "For late requests: the largest time by which a token missed its deadline.",
    TIER_MODEL,
)
TTFT = Metric(Latency, "stretto_ttft_seconds", "Seconds from arrival to the first token.", TIER_MODEL)
ITL = Metric(
    Gaps,
    "stretto_itl_seconds",
    "Seconds between consecutive tokens of an answer, as the API server received them.",
    TIER_MODEL,
)
E2E = Metric(
    Latency,
    "stretto_e2e_seconds",
    "Seconds from arrival to the end, for requests that had a first token.",
    TIER_MODEL,
)
QUEUE = Metric(
    Latency,
    "stretto_queue_seconds",
    "Seconds from arrival to the first step that reads the prompt.",
    TIER_MODEL,
)
FORECAST = Metric(
    Latency,
    "stretto_queue_forecast_seconds",
    "The stretto_queue_seconds that was predicted when the request was sent to the engine.",
    TIER_MODEL,
)
FORECAST_ERROR = Metric(
    Latency,
    "stretto_queue_forecast_error_seconds",
    "Absolute error of the predicted queue time.",
    TIER_MODEL,
)
VARIANTS = Metric(
    Counter,
    "stretto_variant_answers",
    "Answers of a ladder by the variant that gave them and the reason for it: best, deadline, floor, load, "
    "read_ahead, explored, below_floor, late, moved, cascade, unsure or no_forecast. A request that "
    "names a variant is not counted.",
    ("model", "variant", "reason"),
)
REQUESTS = Metric(
    Counter,
    "stretto_requests",
    "Finished requests by endpoint, outcome (ok, client_gone, or an error code), model, tier and HTTP status "
    "(499: the client left before a response). A stream that has begun keeps status 200. Model and tier are "
    "`unknown` for a request that was refused before they were read, or that names none of this server.",
    ("endpoint", "outcome", "model", "tier", "status"),
)
TOKENS = Metric(
    Counter,
    "stretto_tokens",
    "Tokens of finished requests by kind: prompt, cached (also part of prompt), output.",
    ("kind", "model"),
)
READ_AHEAD = Metric(
    Counter,
    "stretto_read_ahead_tokens",
    "Tokens of prompts that were computed in spare time, while somebody typed them.",
    MODEL,
)
REFUSALS = Metric(
    Counter,
    "stretto_refusals",
    "Requests refused with status 503, by error code and requested tier.",
    ("reason", "tier"),
)

FEEDBACK = Metric(
    Counter,
    "stretto_feedback",
    "Feedback by model, variant that answered, and vote: up (a reward of at least 0.5) or down.",
    ("model", "variant", "vote"),
)

LEARNT = Metric(
    Gauge,
    "stretto_learnt_correction",
    "What feedback adds to the measured quality of a variant (from -1 to 1), for the mean of the rated "
    "prompts: the mean of all tenants that gave feedback, by its weight. 0 without feedback.",
    ("model", "variant"),
)

REJECTED = Metric(
    Counter,
    "stretto_rejected_requests",
    "Requests and connections that were ended before a handler answered: an error code, blocked_send (the "
    "client did not read its answer), evicted (it had owed a request for longest when all connections were "
    "taken), or flood (it kept sending after it was refused).",
    ("reason",),
)

# Steps of the engine.
STEP = Metric(StepSeconds, "stretto_step_seconds", "Seconds per step of the engine.", MODEL)
STEP_DECODE = Metric(
    TokenCounts, "stretto_step_decode_tokens", "Decode tokens per step, over steps with any.", MODEL
)
STEP_PREFILL = Metric(
    TokenCounts, "stretto_step_prefill_tokens", "Prompt tokens per step, over steps with any.", MODEL
)
STEP_ERROR = Metric(
    Ratio,
    "stretto_step_time_error_ratio",
    "Absolute error of the step-time model, as a share of the measured step time.",
    MODEL,
)
PREEMPTIONS = Metric(
    Counter,
    "stretto_preemptions",
    "Running sequences that lost their KV blocks and were queued to be computed again.",
    MODEL,
)
PROPOSED = Metric(
    Counter, "stretto_draft_tokens_proposed", "Draft tokens verified by a step (speculative decoding).", MODEL
)
ACCEPTED = Metric(
    Counter, "stretto_draft_tokens_accepted", "Draft tokens that were the token the model drew.", MODEL
)
RUNNING = Metric(Gauge, "stretto_running_sequences", "Sequences that run.", MODEL)
WAITING = Metric(Gauge, "stretto_waiting_sequences", "Sequences waiting for a step.", MODEL)
BLOCKS_FREE = Metric(Gauge, "stretto_kv_blocks_free", "Free blocks of the KV cache.", MODEL)
BLOCKS = Metric(Gauge, "stretto_kv_blocks", "All blocks of the KV cache.", MODEL)

# The worker, at the time of a scrape.
OPEN = Metric(Gauge, "stretto_open_requests", "Requests being answered.")
READY = Metric(Gauge, "stretto_engine_ready", "1 while the engine accepts requests, else 0.")
SESSIONS = Metric(Gauge, "stretto_realtime_sessions", "Open sockets of /v1/realtime.")
DRAINING = Metric(Gauge, "stretto_draining", "1 while the worker shuts down, else 0.")
LOG_DROPPED = Metric(
    Counter,
    "stretto_access_log_dropped",
    "Lines of the access log that were lost, because standard output was slow or could not be written.",
)
RESTARTS = Metric(Counter, "stretto_engine_restarts", "Restarts of the engine process.")
BUILD = Metric(
    Gauge, "stretto_build_info", "Always 1. The labels are the running versions.", ("version", "python")
)

METRICS: tuple[Metric[AnyMetric], ...] = tuple(
    cast(Metric[AnyMetric], value) for value in list(globals().values()) if isinstance(value, Metric)
)
