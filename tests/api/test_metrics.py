"""Metrics: what they count, and that Prometheus' own checker finds no fault with them."""

from __future__ import annotations

import shutil
import subprocess

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stretto.telemetry.metrics import Ended, Gauges, Histogram, Metrics
from stretto.types import StepStats
from tests.api.conftest import CHAT, HELLO
from tests.api.fake_engine import FakeEngine


def step(**changes: float) -> StepStats:
    values = {"decode_tokens": 3, "prefill_tokens": 40, "running": 4, "waiting": 2, "preempted": 1} | changes
    return StepStats("tiny", 0.0, 12.0, context_tokens=9, blocks_free=60, blocks_total=64, **values)  # type: ignore[arg-type]


def samples(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(text.decode())
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


async def test_a_request_is_counted_once_it_ended(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(CHAT, json=HELLO)
    await client.post(CHAT, json=HELLO | {"max_tokens": 0})
    for observe in engine.steps:
        observe(step())
        observe(step(decode_tokens=5, prefill_tokens=0))
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = samples(response.content)
    assert found["stretto_requests_total", ("chat", "ok")] == 1
    assert found["stretto_requests_total", ("chat", "invalid_value")] == 1
    said = engine.streams[0].said
    assert found["stretto_tokens_total", ("output",)] == said
    assert found["stretto_tokens_total", ("prompt",)] == len(engine.requests[0].prompt)
    assert found["stretto_tokens_total", ("cached",)] == 3
    assert found["stretto_ttft_seconds_count", ()] == 1
    assert found["stretto_itl_seconds_count", ()] == said, "one gap less than events, the end among them"
    assert found["stretto_queue_seconds_sum", ()] == 0.0015
    assert found["stretto_step_seconds_sum", ("tiny",)] == 0.024
    assert found["stretto_step_decode_tokens_sum", ("tiny",)] == 8
    assert found["stretto_step_prefill_tokens_count", ("tiny",)] == 1
    assert found["stretto_preemptions_total", ("tiny",)] == 2
    assert found["stretto_kv_blocks_free", ("tiny",)] == 60
    assert found["stretto_engine_ready", ()] == 1
    assert found["stretto_open_requests", ()] == 0


def test_histograms_count_by_upper_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5):
        histogram.add(value)
    histogram.add_all([2.0, 99.0])
    metrics = Metrics(lambda: Gauges(0, True, False, 0))
    metrics.ended(Ended("chat", "ok", 1.0, first=0.5, gaps=[0.01, 0.02]))
    found = samples(metrics.text())
    assert found["stretto_itl_seconds_bucket", ("0.01",)] == 1
    assert found["stretto_itl_seconds_bucket", ("0.02",)] == 2
    assert found["stretto_itl_seconds_bucket", ("+Inf",)] == 2
    assert found["stretto_e2e_seconds_sum", ()] == 1.0


def test_promtool_finds_no_fault() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    metrics = Metrics(lambda: Gauges(1, True, False, 2))
    metrics.ended(Ended("chat", "ok", 1.0, 5, 6, 2, 0.01, 0.5, [0.01]))
    metrics.step(step())
    checked = subprocess.run([promtool, "check", "metrics"], input=metrics.text(), capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
