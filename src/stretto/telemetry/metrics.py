"""Prometheus metrics of one worker: creates the metrics that `catalogue` lists, and counts in them.

It counts requests that have ended and steps in batches, so no token costs a look-up of labels.
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
ENDED_TOGETHER = 32
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
        self._ended: list[Ended] = []
        self._steps: defaultdict[str, list[StepStats]] = defaultdict(list)
        self._of(catalogue.BUILD, version("stretto"), platform.python_version()).set(1)

    def ended(self, request: Ended) -> None:
        """Count a request that is over. They are counted in batches, at a third of the cost of one by one."""
        self._ended.append(request)
        if len(self._ended) == ENDED_TOGETHER:
            self._count_ended()

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
        self._count_ended()
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

    def _count_ended(self) -> None:
        ended, self._ended = self._ended, []
        alike: defaultdict[tuple[str, ...], list[Ended]] = defaultdict(list)
        for each in ended:
            labels = (each.endpoint, each.outcome, each.model or UNKNOWN, each.tier or UNKNOWN)
            alike[*labels, str(each.status), each.verdict or ""].append(each)
        for (*labels, verdict), requests in alike.items():
            count, tier, model = len(requests), requests[0].tier, requests[0].model
            self._of(catalogue.REQUESTS, *labels).inc(count)
            if verdict:
                self._of(catalogue.JUDGED, tier, model, verdict).inc(count)
            if verdict == "refused":
                self._of(catalogue.REFUSALS, requests[0].outcome, tier).inc(count)
            self._count_tokens(model, requests)
            self._count_times(tier, model, requests)

    def _count_tokens(self, model: str, requests: Sequence[Ended]) -> None:
        """Count the tokens of requests to this model, and the variants that answered them."""
        prompted = [each for each in requests if each.prompt_tokens]
        if prompted:
            self._of(catalogue.TOKENS, "prompt", model).inc(sum(each.prompt_tokens for each in prompted))
            self._of(catalogue.TOKENS, "output", model).inc(sum(each.output_tokens for each in prompted))
            self._of(catalogue.TOKENS, "cached", model).inc(sum(each.cached_tokens for each in prompted))
        for each in requests:
            if each.variant_reason and each.output_tokens:
                self._of(catalogue.VARIANTS, model, each.variant, each.variant_reason).inc()

    def _count_times(self, tier: str, model: str, requests: Sequence[Ended]) -> None:
        slacks = [each.slack for each in requests if each.slack is not None and each.slack < inf]
        begun = [each for each in requests if each.first is not None]
        forecasts = [
            (each.forecast, abs(each.forecast - each.queued))
            for each in requests
            if each.queued is not None and each.forecast is not None
        ]
        for metric, values in (
            (catalogue.SLACK, [slack for slack in slacks if slack >= 0]),
            (catalogue.LATENESS, [-slack for slack in slacks if slack < 0]),
            (catalogue.QUEUE, [each.queued for each in requests if each.queued is not None]),
            (catalogue.FORECAST, [forecast for forecast, _ in forecasts]),
            (catalogue.FORECAST_ERROR, [error for _, error in forecasts]),
            (catalogue.TTFT, [each.first for each in begun if each.first is not None]),
            (catalogue.E2E, [each.seconds for each in begun]),
            (catalogue.ITL, [gap for each in requests for gap in each.gaps]),
        ):
            if values:
                self._of(metric, tier, model).observe_all(values)

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
