"""Traces of requests, as far as the rest of Stretto needs to know them. Off, nothing of it runs.

`http.exchange` has a span for each request. A gateway adds one for each attempt on a worker and sends its
W3C `traceparent` along; a worker's span is its child. When a request ends, the times that were recorded
anyway become spans of its stages. `telemetry.otel` is the real tracer, imported only when traces are on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple, Protocol

from stretto.errors import StartError
from stretto.telemetry.metrics import Ended

TRACEPARENT = b"traceparent"
# W3C Trace Context, level 2: version, trace id, parent id, flags. A later version may have more fields.
FORM = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
NANO = 1_000_000_000
MOST_EVENTS = 100  # arrivals of tokens in one span
Attributes = Mapping[str, str | int | float | bool]


class TraceParent(NamedTuple):
    """A span that another process, or a client, is in."""

    trace: int
    span: int
    sampled: bool

    @classmethod
    def of(cls, text: str) -> TraceParent | None:
        """Reads a `traceparent` header; None for one that is not well-formed."""
        match = FORM.fullmatch(text)
        if match is None or (match[1] == "00" and match[5] is not None):
            return None
        return cls(int(match[2], 16), int(match[3], 16), bool(int(match[4], 16) & 1))

    def __str__(self) -> str:
        return f"00-{self.trace:032x}-{self.span:016x}-{int(self.sampled):02x}"


class TracedStage(NamedTuple):
    """A part of a request that is over. Times are nanoseconds since 1970; `tokens` are arrivals."""

    name: str
    start: int
    end: int
    tokens: Sequence[int] = ()


class TraceSpan(Protocol):
    """An open span."""

    @property
    def parent(self) -> TraceParent:
        """What spans below it name as their parent, here or in another process."""
        ...

    def child(self, name: str, attributes: Attributes) -> TraceSpan:
        """Begins a span of a request that this process sends."""
        ...

    def stage(self, stage: TracedStage) -> None:
        """Adds a finished span below it."""
        ...

    def end(self, attributes: Attributes, error: str = "") -> None:
        """Ends it. `error`: the code of what went wrong."""
        ...


class Tracer(Protocol):
    """Makes spans."""

    def request(self, name: str, parent: TraceParent | None) -> TraceSpan:
        """Begins the span of a request that this process answers."""
        ...


def connect(endpoint: str, service: str) -> Tracer | None:
    """A tracer that sends to an OTLP collector; None for an empty endpoint. Raises StartError without the
    extra `otel`."""
    if not endpoint:
        return None
    try:
        return import_module("stretto.telemetry.otel").connect(endpoint, service)
    except ModuleNotFoundError as error:
        raise StartError(
            f"trace_endpoint needs {error.name}, which is not installed: pip install 'stretto[otel]'"
        ) from error


def parent_of(headers: Iterable[tuple[bytes, bytes]]) -> TraceParent | None:
    """The client's span, if it sent exactly one well-formed `traceparent`."""
    found = [value for name, value in headers if name == TRACEPARENT]
    return TraceParent.of(found[0].decode("latin-1")) if len(found) == 1 else None


def stages_of(ended: Ended) -> list[TracedStage]:
    """The stages of a request that has just ended: queue, prefill and decode, as far as they are known."""
    end = time.time_ns()
    arrival = end - int(ended.seconds * NANO)
    stages: list[TracedStage] = []
    begun = 0.0
    if ended.queued is not None:
        stages.append(TracedStage("queue", arrival, arrival + int(ended.queued * NANO)))
        begun = ended.queued
    if ended.first is not None:
        first = arrival + int(ended.first * NANO)
        name = "first token" if ended.queued is None else "prefill"  # a gateway does not know the queue
        stages.append(TracedStage(name, arrival + int(begun * NANO), first))
        if ended.gaps:
            arrivals = [first]
            for gap in ended.gaps:
                arrivals.append(arrivals[-1] + int(gap * NANO))
            stages.append(TracedStage("decode", first, min(arrivals[-1], end), arrivals[:MOST_EVENTS]))
    return stages


def attributes_of(ended: Ended) -> dict[str, str | int | float | bool]:
    """What a span says of a request, in the words of OpenTelemetry's conventions for generative AI."""
    found: dict[str, str | int | float | bool | None] = {
        "gen_ai.request.model": ended.model or None,
        "gen_ai.response.model": ended.variant or None,
        "gen_ai.usage.input_tokens": ended.prompt_tokens or None,
        "gen_ai.usage.output_tokens": ended.output_tokens or None,
        "gen_ai.response.finish_reasons": ended.finish_reason,
        "stretto.cached_tokens": ended.cached_tokens or None,
        "stretto.tier": ended.tier or None,
        "stretto.outcome": ended.outcome or None,
        "stretto.verdict": ended.verdict,
        "stretto.ttft_s": ended.first,
    }
    return {name: value for name, value in found.items() if value is not None}
