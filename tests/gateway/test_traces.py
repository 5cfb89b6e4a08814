"""One trace from the client through gateway and worker to the stages of the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stretto.errors import EngineDied
from stretto.telemetry import tracing
from stretto.types import Began, TokenEvent
from tests.gateway.cluster import ASK, CHAT, cluster, fake

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stretto.telemetry.otel import OtelTracer

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FIRST = TokenEvent(0, 10, began=Began(5.0, 2))


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The finished spans of all servers."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(
        tracing, "connect", lambda _, service: OtelTracer(service, SimpleSpanProcessor(exporter))
    )
    return exporter


def of(spans: InMemorySpanExporter, service: str, name: str) -> list[ReadableSpan]:
    return [
        span
        for span in spans.get_finished_spans()
        if span.resource.attributes["service.name"] == service and span.name == name
    ]


def above(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


async def test_one_trace_leads_from_the_client_to_the_tokens(checkpoint: Path, spans: Any):
    async with cluster(checkpoint, fake(FIRST, 0.01, 11, 0.01, 12)) as (client, _):
        headers = {"traceparent": f"00-{TRACE}-{CLIENT}-01", "x-request-id": "r-1"}
        assert (await client.post(CHAT, json=ASK, headers=headers)).status_code == 200
        (gateway,) = of(spans, "stretto-gateway", f"POST {CHAT}")
        (relay,) = of(spans, "stretto-gateway", "relay")
        (worker,) = of(spans, "stretto-worker", "POST /v1/relay")
    assert above(gateway) == int(CLIENT, 16)
    assert (above(relay), above(worker)) == (gateway.context.span_id, relay.context.span_id)
    stages = [
        span for span in spans.get_finished_spans() if span.parent and above(span) == worker.context.span_id
    ]
    assert {span.name for span in stages} == {"queue", "prefill", "decode"}
    traced = (gateway, relay, worker, *stages)
    assert {f"{span.context.trace_id:032x}" for span in traced} == {TRACE}
    (decode,) = (span for span in stages if span.name == "decode")
    assert len(decode.events) == 4, "three tokens, and the end"
    for span in (gateway, worker):
        assert span.attributes is not None
        assert span.attributes["stretto.request_id"] == "r-1"
        assert span.attributes["gen_ai.usage.output_tokens"] == 3
        assert span.attributes["http.response.status_code"] == 200
    assert relay.attributes is not None and relay.attributes["stretto.worker"]


async def test_each_attempt_on_a_worker_has_a_span(checkpoint: Path, spans: Any):
    dying, healthy = fake(10, 11, EngineDied("the engine ended")), fake(10, 11, 12, 13)
    async with cluster(checkpoint, dying, healthy, route="round-robin") as (client, gateway):
        for _ in range(2):
            assert "[DONE]" in (await client.post(CHAT, json=ASK)).text
        assert gateway.relay.failovers == 1
        attempts = of(spans, "stretto-gateway", "relay")
    assert len(attempts) == 3
    assert sum(not span.status.is_ok for span in attempts) <= 1
    traces = {span.context.trace_id for span in attempts}
    assert len(traces) == 2, "each request has a trace of its own"


async def test_errors_are_named_and_no_span_holds_content(checkpoint: Path, spans: Any):
    secret = {"messages": [{"role": "user", "content": "my-secret-question"}]}
    async with cluster(checkpoint, fake(10), gateway_key="g", api_keys={"k-secret": "ann"}) as (client, _):
        key = {"x-api-key": "k-secret", "traceparent": "nonsense-secret"}
        await client.post(CHAT, json=ASK | secret, headers=key)
        await client.post(CHAT, json=ASK | {"model": "my-secret-model"}, headers=key)
        await client.post(CHAT, json=ASK, headers={"x-api-key": "wrong-secret"})
        gateway = of(spans, "stretto-gateway", f"POST {CHAT}")
    errors = [(span.attributes or {}).get("error.type") for span in gateway]
    assert errors == [None, "model_not_found", "invalid_api_key"]
    looks = [span for span in spans.get_finished_spans() if span.name.startswith("GET")]
    assert looks == [], "a gateway asks for reports many times a second"
    assert [span.status.is_ok for span in gateway] == [True, False, False]
    assert "secret" not in json.dumps([span.to_json() for span in spans.get_finished_spans()])


async def test_a_trace_that_is_not_sampled_stays_so(checkpoint: Path, spans: Any):
    async with cluster(checkpoint, fake(10)) as (client, _):
        headers = {"traceparent": f"00-{TRACE}-{CLIENT}-00"}
        assert (await client.post(CHAT, json=ASK, headers=headers)).status_code == 200
    assert [span for span in spans.get_finished_spans() if f"{span.context.trace_id:032x}" == TRACE] == []
