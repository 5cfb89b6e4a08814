"""The metrics of the API server: their values, their labels and the check by promtool."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stretto.telemetry.metrics import Ended, Gauges, Metrics
from stretto.types import Finish, Reason, StepStats, TokenEvent
from tests.server.conftest import CHAT, HELLO
from tests.server.fake_engine import FakeEngine

USUAL = ("default", "tiny")
ORDER = (
    "endpoint",
    "outcome",
    "kind",
    "reason",
    "tier",
    "model",
    "verdict",
    "status",
    "le",
    "version",
    "python",
)


def step(**changes: float) -> StepStats:
    values = (
        {"predicted_ms": 9.0}
        | {"decode_tokens": 3, "prefill_tokens": 40, "running": 4, "waiting": 2, "preempted": 1}
        | changes
    )
    return StepStats("tiny", 0.0, 12.0, context_tokens=9, blocks_free=60, blocks_total=64, **values)  # type: ignore[arg-type]


def samples(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(text.decode())
    return {
        (s.name, tuple(s.labels[name] for name in ORDER if name in s.labels)): s.value
        for family in families
        for s in family.samples
    }


async def test_a_finished_request_is_counted_in_every_metric(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post(CHAT, json=HELLO)
    await client.post(CHAT, json=HELLO | {"max_tokens": 0})
    engine.publish(step())
    engine.publish(step(decode_tokens=5, prefill_tokens=0))
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = samples(response.content)
    assert found["stretto_requests_total", ("chat", "ok", *USUAL, "200")] == 1
    assert found["stretto_requests_total", ("chat", "invalid_value", "unknown", "unknown", "400")] == 1
    emitted = engine.streams[0].emitted
    assert found["stretto_tokens_total", ("output", "tiny")] == emitted
    assert found["stretto_tokens_total", ("prompt", "tiny")] == len(engine.requests[0].prompt)
    assert found["stretto_tokens_total", ("cached", "tiny")] == 3
    assert found["stretto_ttft_seconds_count", USUAL] == 1
    assert found["stretto_itl_seconds_count", USUAL] == emitted, (
        "one gap less than events, the end among them"
    )
    assert found["stretto_queue_seconds_sum", USUAL] == 0.0015
    assert found["stretto_judged_requests_total", (*USUAL, "on_time")] == 1
    assert found["stretto_slack_seconds_count", USUAL] == 1
    assert found["stretto_step_seconds_sum", ("tiny",)] == 0.024
    assert found["stretto_step_decode_tokens_sum", ("tiny",)] == 8
    assert found["stretto_step_prefill_tokens_count", ("tiny",)] == 1
    assert found["stretto_step_time_error_ratio_bucket", ("tiny", "0.2")] == 0
    assert found["stretto_step_time_error_ratio_bucket", ("tiny", "0.3")] == 2
    assert found["stretto_preemptions_total", ("tiny",)] == 2
    assert found["stretto_kv_blocks_free", ("tiny",)] == 60
    assert found["stretto_engine_ready", ()] == 1
    assert found["stretto_open_requests", ()] == 0


async def test_judged_requests_are_counted_by_tier_and_verdict(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    say = engine.script
    late = HELLO | {"objective": {"ttft_ms": 5}, "service_tier": "priority"}
    engine.script = lambda request: [0.03, 65]
    await client.post(CHAT, json=late)
    engine.script = lambda request: [Reason.ERROR]
    await client.post(CHAT, json=HELLO | {"service_tier": "flex"})
    engine.script = lambda request: [TokenEvent(0, finish=Finish(Reason.REFUSED, 3, 0, 0, 0.0))]
    await client.post(CHAT, json=HELLO)
    engine.script, engine.ready = say, False
    await client.post(CHAT, json=HELLO | {"service_tier": "priority"})
    found = samples((await client.get("/metrics")).content)
    verdicts = {labels: n for (name, labels), n in found.items() if name == "stretto_judged_requests_total"}
    assert verdicts == {
        ("priority", "tiny", "late"): 1,
        ("flex", "tiny", "failed"): 1,
        ("default", "tiny", "refused"): 1,
        ("priority", "tiny", "refused"): 1,
    }
    assert found["stretto_lateness_seconds_bucket", ("priority", "tiny", "0.01")] == 0
    assert found["stretto_lateness_seconds_count", ("priority", "tiny")] == 1
    assert found["stretto_refusals_total", ("cannot_be_on_time", "default")] == 1
    assert found["stretto_refusals_total", ("unavailable", "priority")] == 1


async def test_requests_are_counted_by_status_and_never_under_a_made_up_model(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """A stream that fails has begun with status 200. An unknown model makes no series of its own."""
    await client.post(CHAT, json=HELLO | {"model": "made-up", "service_tier": "flex"})
    engine.script = lambda request: [65, Reason.ERROR]
    await client.post(CHAT, json=HELLO | {"stream": True})
    await client.post(CHAT, json=HELLO)
    found = samples((await client.get("/metrics")).content)
    counted = {labels: n for (name, labels), n in found.items() if name == "stretto_requests_total"}
    assert counted == {
        ("chat", "model_not_found", "flex", "unknown", "404"): 1,
        ("chat", "engine_error", *USUAL, "200"): 1,
        ("chat", "engine_error", *USUAL, "500"): 1,
    }
    assert not [labels for _, labels in found if "" in labels or "made-up" in labels]


async def test_the_usual_metrics_of_both_processes_are_there(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    """A process of this test stands for the engine. Without an engine only the server's metrics are there."""
    usual = ("cpu_seconds_total", "resident_memory_bytes", "virtual_memory_bytes", "start_time_seconds")
    names = [f"process_{name}" for name in (*usual, "open_fds", "max_fds")]
    child = await asyncio.create_subprocess_exec("sleep", "60")
    engine.pid = child.pid
    found = samples((await client.get("/metrics")).content)
    child.kill()
    await child.wait()
    assert all(found[name, ()] > 0 for name in names)
    assert all((f"stretto_engine_{name}", ()) in found for name in names)
    engine_bytes = found["stretto_engine_process_resident_memory_bytes", ()]
    assert engine_bytes < 16 * 2**20 < found["process_resident_memory_bytes", ()]
    gone = samples((await client.get("/metrics")).content)
    engine.pid = None
    none = samples((await client.get("/metrics")).content)
    for later in (gone, none):
        assert later["process_open_fds", ()] > 0
        assert not [name for name, _ in later if name.startswith("stretto_engine_process")]


async def test_client_supplied_values_never_become_metric_labels(client: httpx.AsyncClient) -> None:
    async def series() -> int:
        return len(samples((await client.get("/metrics")).content))

    await client.post(CHAT, json=HELLO)
    await client.post(CHAT, json=HELLO | {"model": "0", "service_tier": "priority"})
    await client.post(CHAT, json=HELLO | {"service_tier": "gold"})
    before = await series()
    for number in range(20):
        made_up = {"model": f"m{number}", "service_tier": "priority", "user": f"u{number}"}
        assert (await client.post(CHAT, json=HELLO | made_up)).status_code == 404
        assert (await client.post(CHAT, json=HELLO | {"service_tier": f"t{number}"})).status_code == 400
        assert (await client.post(CHAT, json=HELLO | {"user": f"u{number}"})).status_code == 200
    assert await series() == before


def test_inter_token_gaps_fall_into_buckets_by_upper_bound() -> None:
    metrics = Metrics(lambda: Gauges(0, True, False, 0))
    metrics.ended(Ended("chat", "ok", 1.0, tier="flex", model="m", first=0.5, gaps=[0.01, 0.02]))
    found = samples(metrics.text())
    assert found["stretto_itl_seconds_bucket", ("flex", "m", "0.01")] == 1
    assert found["stretto_itl_seconds_bucket", ("flex", "m", "0.02")] == 2
    assert found["stretto_itl_seconds_bucket", ("flex", "m", "+Inf")] == 2
    assert found["stretto_e2e_seconds_sum", ("flex", "m")] == 1.0


def test_requests_counted_together_are_counted_as_one_by_one() -> None:
    ended = Ended("chat", "ok", 1.0, "on_time", "flex", "m", 5, 6, 2, 0.01, 0.02, 0.5, 0.2, [0.01, 0.3])
    late = replace(ended, verdict="late", slack=-0.4, gaps=(), variant="s", variant_reason="load")
    refused = Ended("chat", "cannot_be_on_time", 0.1, "refused", "default", "m", status=503)
    requests = [ended, late, refused, Ended("tokenize", "invalid", 0.1, status=400)] * 25
    together, apart = (Metrics(lambda: Gauges(0, True, False, 0)) for _ in range(2))
    for each in requests:
        together.ended(each)
        apart.ended(each)
        apart.text()
    found, wanted = (
        {key: value for key, value in samples(metrics.text()).items() if not key[0].startswith("process")}
        for metrics in (together, apart)
    )
    assert found == pytest.approx(wanted)
    assert found["stretto_requests_total", ("chat", "ok", "flex", "m", "200")] == 50
    assert found["stretto_lateness_seconds_sum", ("flex", "m")] == pytest.approx(10.0)
    assert found["stretto_slack_seconds_count", ("flex", "m")] == 25
    assert found["stretto_itl_seconds_count", ("flex", "m")] == 50
    assert found["stretto_variant_answers_total", ("load", "m")] == 25
    assert found["stretto_refusals_total", ("cannot_be_on_time", "default")] == 25


def test_promtool_accepts_the_metrics() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    metrics = Metrics(lambda: Gauges(1, True, False, 2))
    ended = Ended("chat", "ok", 1.0, "late", "flex", "m", 5, 6, 2, 0.01, 0.02, 0.5, -0.2, [0.01])
    metrics.ended(ended)
    metrics.ended(replace(ended, slack=0.2, verdict="refused"))
    metrics.step(step())
    checked = subprocess.run([promtool, "check", "metrics"], input=metrics.text(), capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
