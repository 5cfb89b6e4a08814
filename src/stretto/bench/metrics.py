"""The figures of a load test, computed from the times at which tokens arrived. No clock, no network.

TTFT, TPOT, ITL, E2E and goodput are defined as in `vllm bench serve` and `sglang.benchmark.serving`. Where
the two differ, the docstring names the one that Stretto follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from msgspec import Struct

from stretto.errors import StartError
from stretto.statistics import Spread, spread


class Sample(Struct, frozen=True, kw_only=True):
    """The client's measurements of one request. All times are seconds of one clock.

    `stamps`: when each event with text arrived. `ended`: when the last event with a choice arrived. `reason`:
    the finish_reason. `error`: the kind of failure, None for an answered request; `detail`: its message;
    `retry_after`: after how many seconds the server wants to be asked again.
    """

    started: float
    stamps: tuple[float, ...] = ()
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    reason: str | None = None
    error: str | None = None
    detail: str = ""
    retry_after: float | None = None

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first event with text. As SGLang; vLLM counts a role-only event too."""
        return self.stamps[0] - self.started

    @property
    def e2e(self) -> float:
        """Seconds from sending to the last event with a choice. As vLLM; SGLang counts the usage event."""
        return self.ended - self.started

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first: (E2E - TTFT) / (output tokens - 1). None for a single token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls(self) -> list[float]:
        """Seconds between consecutive events with text."""
        return [late - early for early, late in pairwise(self.stamps)]


class GoodputLimits(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The limits, in milliseconds, that a request must keep to count for goodput. None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @classmethod
    def of(cls, text: str) -> GoodputLimits:
        """Parse `ttft:200,tpot:50,e2e:3000`, in milliseconds. Raises StartError."""
        limits: dict[str, float] = {}
        for part in text.replace(",", " ").split():
            name, _, value = part.partition(":")
            try:
                limits[f"{name}_ms"] = float(value)
            except ValueError:
                raise StartError(f"--goodput: {part!r} is not a limit; write it like ttft:200") from None
            if f"{name}_ms" not in cls.__struct_fields__ or not limits[f"{name}_ms"] > 0:
                raise StartError(f"--goodput: {part!r} is wrong; limits are ttft, tpot and e2e, above 0 ms")
        return cls(**limits)


NO_LIMITS = GoodputLimits()


class LoadReport(Struct, frozen=True, kw_only=True):
    """The figures of a load test. Throughputs are per second of `duration_s`. The server counts input tokens.

    `goodput`: good requests per second (vLLM). `good_share`: good requests over all sent, failed ones
    included (SGLang). Both are None without limits. A spread is None when there was nothing to measure.
    """

    sent: int
    completed: int
    failed: int
    errors: dict[str, int]
    duration_s: float
    input_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    peak_concurrency: int
    limits: GoodputLimits
    goodput: float | None
    good_share: float | None
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None


def report(samples: Sequence[Sample], duration_s: float, limits: GoodputLimits = NO_LIMITS) -> LoadReport:
    """Compute the figures. `duration_s`: from the first request's start to the last one's end."""
    done = [sample for sample in samples if sample.error is None]
    output = sum(sample.output_tokens for sample in done)
    total = output + sum(sample.prompt_tokens for sample in done)
    good = sum(is_good(sample, limits) for sample in done) if limits != NO_LIMITS else None
    return LoadReport(
        sent=len(samples),
        completed=len(done),
        failed=len(samples) - len(done),
        errors=dict(Counter(sample.error for sample in samples if sample.error is not None).most_common()),
        duration_s=duration_s,
        input_tokens=total - output,
        output_tokens=output,
        requests_per_s=len(done) / duration_s,
        output_tokens_per_s=output / duration_s,
        total_tokens_per_s=total / duration_s,
        peak_concurrency=peak_concurrency(done),
        limits=limits,
        goodput=None if good is None else good / duration_s,
        good_share=None if good is None else good / len(samples),
        ttft_ms=spread(sample.ttft * 1e3 for sample in done),
        tpot_ms=spread(sample.tpot * 1e3 for sample in done if sample.tpot is not None),
        itl_ms=spread(gap * 1e3 for sample in done for gap in sample.itls),
        e2e_ms=spread(sample.e2e * 1e3 for sample in done),
    )


def is_good(sample: Sample, limits: GoodputLimits) -> bool:
    """Whether an answered request kept every limit. The TPOT of a single token is 0, as in vLLM."""
    checks = (
        (limits.ttft_ms, sample.ttft),
        (limits.tpot_ms, sample.tpot or 0.0),
        (limits.e2e_ms, sample.e2e),
    )
    return all(limit is None or seconds * 1e3 <= limit for limit, seconds in checks)


def peak_concurrency(samples: Sequence[Sample]) -> int:
    """The largest number of open requests. One that ends when another starts does not overlap it."""
    events = [(sample.started, 1) for sample in samples] + [(sample.ended, -1) for sample in samples]
    now = peak = 0
    for _, change in sorted(events):
        now += change
        peak = max(peak, now)
    return peak
