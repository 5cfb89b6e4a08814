"""The real tracer: OpenTelemetry's SDK, which sends spans to a collector from a thread of its own.

Spans hold no content, no key and no text of the client. The sampler is chosen by the SDK's own environment
variables (`OTEL_TRACES_SAMPLER`); a client's decision counts for the whole trace.
"""

from __future__ import annotations

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace import Tracer as SdkTracer

from stretto.telemetry.tracing import Attributes, TracedStage, TraceParent

TIMEOUT_S = 2.0  # of one request to the collector
PATH = "/v1/traces"


class OtelSpan:
    """An open span of the SDK."""

    def __init__(self, tracer: SdkTracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._below = set_span_in_context(span, Context())

    @property
    def parent(self) -> TraceParent:
        """What spans below it name as their parent."""
        context = self._span.get_span_context()
        return TraceParent(context.trace_id, context.span_id, context.trace_flags.sampled)

    def child(self, name: str, attributes: Attributes) -> OtelSpan:
        """Begins a span of a request that this process sends."""
        span = self._tracer.start_span(name, self._below, SpanKind.CLIENT, attributes)
        return OtelSpan(self._tracer, span)

    def stage(self, stage: TracedStage) -> None:
        """Adds a finished span below it, with an event for each arrival of tokens."""
        span = self._tracer.start_span(stage.name, self._below, start_time=stage.start)
        for index, when in enumerate(stage.tokens):
            span.add_event("arrival", {"stretto.index": index}, when)
        span.end(stage.end)

    def end(self, attributes: Attributes, error: str = "") -> None:
        """Ends it."""
        self._span.set_attributes(dict(attributes))
        if route := attributes.get("http.route"):
            self._span.update_name(f"{attributes['http.request.method']} {route}")
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class OtelTracer:
    """Makes spans, and hands finished ones to `processor`."""

    def __init__(self, service: str, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("stretto")

    def request(self, name: str, parent: TraceParent | None) -> OtelSpan:
        """Begins the span of a request that this process answers."""
        context = Context()
        if parent is not None:
            flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
            above = SpanContext(parent.trace, parent.span, is_remote=True, trace_flags=flags)
            context = set_span_in_context(NonRecordingSpan(above), context)
        return OtelSpan(self._tracer, self._tracer.start_span(name, context, SpanKind.SERVER))


def connect(endpoint: str, service: str) -> OtelTracer:
    """A tracer that sends to the OTLP collector at a URL like http://127.0.0.1:4318."""
    url = endpoint.rstrip("/")
    url = url if url.endswith(PATH) else url + PATH
    return OtelTracer(service, BatchSpanProcessor(OTLPSpanExporter(url, timeout=TIMEOUT_S)))
