"""Prometheus metrics of one worker: creates the metrics that `catalogue` lists, and counts in them.

It counts a request when it ends, and steps in batches, so no token costs a look-up of labels.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from math import inf
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, ProcessCollector

from stretto.telemetry import catalogue
from stretto.telemetry.catalogue import METRICS
from stretto.telemetry.series import Series
from stretto.types import QueueState, StepStats

Verdict = Literal["on_time", "late", "refused", "failed", "cancelled"]
STEPS_TOGETHER = 64
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Ended:
    """One request after its end. Times are seconds, and None where the event never happened.

    `verdict`: what became of its objective; None for a request that was never valid. `model` is the one asked
    for and `variant` the one that answered, both empty for an unknown one; `variant_reason`: why this one was
    chosen, empty when nothing was. `queued`: until a step read the
    prompt; `forecast`: the prediction of it. `first`: until the first token. `slack`: the smallest time by
    which a token was ahead of its deadline, negative when one was late. `gaps`: between tokens.
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
    status: int = 200
    variant: str = ""
    variant_reason: str = ""
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Gauges:
    """The worker's state at the time of a scrape. `learnt`: by ladder and variant, the correction of the
    measured quality."""

    open_requests: int
    ready: bool
    draining: bool
    restarts: int
    queues: Mapping[str, QueueState | StepStats] = field(default_factory=dict[str, QueueState | StepStats])
    engine_pid: int | None = None
    log_dropped: int = 0
    sessions: int = 0
    learnt: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])


class Metrics:
    """One worker's metrics. `now` returns the gauges when a scrape comes."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, now: Callable[[], Gauges]) -> None:
        self._now = now
        self._engine_pid: int | None = None
        self._series = Series(METRICS)
        self._of = self._series.of
        engine = "stretto_engine"
        ProcessCollector(engine, pid=lambda: self._engine_pid or "none", registry=self._series.registry)
        self._steps: defaultdict[str, list[StepStats]] = defaultdict(list)
        self._of(catalogue.BUILD, version("stretto"), platform.python_version()).set(1)

    def ended(self, request: Ended) -> None:
        """Count a request that is over."""
        tier, model = request.tier, request.model
        labels = (request.endpoint, request.outcome, model or UNKNOWN, tier or UNKNOWN, str(request.status))
        self._of(catalogue.REQUESTS, *labels).inc()
        if request.prompt_tokens:
            self._of(catalogue.TOKENS, "prompt", model).inc(request.prompt_tokens)
            self._of(catalogue.TOKENS, "output", model).inc(request.output_tokens)
            self._of(catalogue.TOKENS, "cached", model).inc(request.cached_tokens)
        if request.verdict is not None:
            self._of(catalogue.JUDGED, tier, model, request.verdict).inc()
        if request.variant_reason and request.output_tokens:
            self._of(catalogue.VARIANTS, model, request.variant, request.variant_reason).inc()
        if request.verdict == "refused":
            self._of(catalogue.REFUSALS, request.outcome, tier).inc()
        if request.slack is not None and request.slack < inf:
            slack = catalogue.LATENESS if request.slack < 0 else catalogue.SLACK
            self._of(slack, tier, model).observe(abs(request.slack))
        if request.queued is not None:
            self._of(catalogue.QUEUE, tier, model).observe(request.queued)
            if request.forecast is not None:
                error = abs(request.forecast - request.queued)
                self._of(catalogue.FORECAST, tier, model).observe(request.forecast)
                self._of(catalogue.FORECAST_ERROR, tier, model).observe(error)
        if request.first is not None:
            self._of(catalogue.TTFT, tier, model).observe(request.first)
            self._of(catalogue.E2E, tier, model).observe(request.seconds)
        if request.gaps:
            self._of(catalogue.ITL, tier, model).observe_all(request.gaps)

    def rewarded(self, model: str, variant: str, reward: float) -> None:
        """Count a reward, from 0 to 1."""
        self._of(catalogue.FEEDBACK, model, variant, "up" if reward >= 0.5 else "down").inc()

    def rejected(self, reason: str) -> None:
        """Count a request or a connection that was ended before a handler answered."""
        self._of(catalogue.REJECTED, reason).inc()

    def read_ahead(self, model: str, tokens: int) -> None:
        """Count the tokens of a prompt that were computed while it was typed."""
        self._of(catalogue.READ_AHEAD, model).inc(tokens)

    def step(self, stats: StepStats) -> None:
        """Count a step of the engine. There may be thousands a second, so they are counted in batches."""
        steps = self._steps[stats.model]
        steps.append(stats)
        if len(steps) == STEPS_TOGETHER:
            self._count_steps(stats.model)

    def text(self) -> bytes:
        """The exposition that Prometheus reads."""
        for model in self._steps:
            self._count_steps(model)
        now = self._now()
        self._engine_pid = now.engine_pid
        self._of(catalogue.OPEN).set(now.open_requests)
        self._of(catalogue.SESSIONS).set(now.sessions)
        self._of(catalogue.READY).set(now.ready)
        self._of(catalogue.DRAINING).set(now.draining)
        for metric, value in ((catalogue.RESTARTS, now.restarts), (catalogue.LOG_DROPPED, now.log_dropped)):
            counter = self._of(metric)
            counter.reset()
            counter.inc(value)
        for model, queue in now.queues.items():
            self._of(catalogue.RUNNING, model).set(queue.running)
            self._of(catalogue.WAITING, model).set(queue.waiting)
            self._of(catalogue.BLOCKS, model).set(queue.blocks_total)
            self._of(catalogue.BLOCKS_FREE, model).set(queue.blocks_free)
        for model, variants in now.learnt.items():
            for variant, correction in variants.items():
                self._of(catalogue.LEARNT, model, variant).set(correction)
        return self._series.text()

    def _count_steps(self, model: str) -> None:
        steps, self._steps[model] = self._steps[model], []
        if not steps:
            return
        errors = [
            abs(step.predicted_ms - step.ms) / step.ms
            for step in steps
            if step.predicted_ms is not None and step.ms > 0
        ]
        decode = [step.decode_tokens for step in steps if step.decode_tokens]
        prefill = [step.prefill_tokens for step in steps if step.prefill_tokens]
        self._of(catalogue.STEP, model).observe_all([step.ms / 1e3 for step in steps])
        self._of(catalogue.STEP_DECODE, model).observe_all(decode)
        self._of(catalogue.STEP_PREFILL, model).observe_all(prefill)
        self._of(catalogue.STEP_ERROR, model).observe_all(errors)
        self._of(catalogue.PREEMPTIONS, model).inc(sum(step.preempted for step in steps))
        self._of(catalogue.PROPOSED, model).inc(sum(step.proposed for step in steps))
        self._of(catalogue.ACCEPTED, model).inc(sum(step.accepted for step in steps))
