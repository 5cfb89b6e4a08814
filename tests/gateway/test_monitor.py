"""What a gateway counts: its metrics, and the lines of its access log."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from stretto.errors import EngineDied
from stretto.gateway.accounts import issue
from stretto.gateway.accounts.keys import KeyFile
from stretto.gateway.app import Gateway
from stretto.gateway.operations.metrics import BoundedNames
from stretto.gateway.settings import GatewayConfig
from tests.gateway.cluster import ASK, CHAT, cluster, fake

promtool = shutil.which("promtool") or ""
WHOLE = ASK | {"stream": False}


def series(text: str) -> dict[str, float]:
    """The values of a page of metrics by name and labels."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
    return {name: float(value) for name, value in pairs}


def total(found: dict[str, float], name: str, **labels: str) -> float:
    """The sum of the series that have these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        value
        for each, value in found.items()
        if each.partition("{")[0] == name and all(part in each for part in wanted)
    )


async def test_requests_are_counted_by_tenant_model_outcome_and_status(checkpoint: Path):
    keys = {"k-ann": "ann", "k-bob": "bob"}
    ann, bob, gateway_key = ({"x-api-key": key} for key in ("k-ann", "k-bob", "g"))
    async with cluster(checkpoint, fake(10, 11), gateway_key="g", api_keys=keys) as (client, _):
        for body in (ASK, WHOLE):
            assert (await client.post(CHAT, json=body, headers=ann)).status_code == 200
        assert (await client.post(CHAT, json=ASK | {"model": "made-up-1"}, headers=bob)).status_code == 404
        assert (await client.post(CHAT, json=ASK | {"temperature": "hot"}, headers=bob)).status_code == 400
        assert (await client.post(CHAT, json=ASK)).status_code == 401
        found = series((await client.get("/metrics", headers=gateway_key)).text)
    name = "stretto_gateway_requests_total"
    assert total(found, name, tenant="ann", model="tiny", outcome="ok", status="200") == 2
    assert total(found, name, tenant="bob", model="unknown", outcome="model_not_found", status="404") == 1
    assert total(found, name, tenant="bob", outcome="worker_error", status="400") == 1
    assert total(found, name, tenant="none", outcome="invalid_api_key", status="401") == 1
    assert total(found, name) == 5
    assert total(found, "stretto_gateway_tokens_total", tenant="ann", kind="output") == 4
    assert total(found, "stretto_gateway_tokens_total", tenant="ann", kind="prompt") > 0
    assert total(found, "stretto_gateway_routed_total") == 3
    assert total(found, "stretto_gateway_ttft_seconds_count") == 1, "an answer in one piece has none"
    assert total(found, "stretto_gateway_upstream_ttft_seconds_count") == 1
    assert total(found, "stretto_gateway_workers", state="usable") == 1
    assert not [each for each in found if "made-up" in each], "no label is a client's"


async def test_with_keys_the_metrics_need_one_with_the_scope(checkpoint: Path, tmp_path: Path):
    file = KeyFile(tmp_path / "keys.json")
    scrape, other = (
        {"Authorization": f"Bearer {issue.create(file, datetime.now(UTC), tenant='ops', scopes=scopes).key}"}
        for scopes in (("metrics",), ("infer", "usage"))
    )
    async with cluster(checkpoint, fake(10), gateway_key="g", keys_file=str(file.path)) as (client, _):
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers=other)).status_code == 403
        assert (await client.get("/metrics", headers=scrape)).status_code == 200


async def test_without_keys_everybody_may_read_the_metrics(checkpoint: Path):
    async with cluster(checkpoint, fake(10)) as (client, _):
        assert (await client.get("/metrics")).status_code == 200


async def test_failovers_workers_and_breakers_are_gauged(checkpoint: Path):
    dying, healthy = fake(10, 11, EngineDied("the engine ended")), fake(10, 11, 12, 13)
    async with cluster(checkpoint, dying, healthy, route="round-robin", gateway_key="g") as (client, gateway):
        for _ in range(2):
            await client.post(CHAT, json=ASK)
        found = series((await client.get("/metrics")).text)
        assert total(found, "stretto_gateway_failovers_total") == gateway.relay.failovers == 1
        name = next(iter(gateway.registry.workers))
        await client.post(f"/v1/workers/{name}/drain", headers={"x-api-key": "g"})
        found = series((await client.get("/metrics")).text)
        assert total(found, "stretto_gateway_workers", state="draining") == 1
        await client.delete(f"/v1/workers/{name}", headers={"x-api-key": "g"})
        found = series((await client.get("/metrics")).text)
        assert total(found, "stretto_gateway_workers", state="draining") == 0


async def test_open_requests_and_clients_that_leave_are_counted(checkpoint: Path):
    async with cluster(checkpoint, fake(10, 30.0)) as (client, gateway):
        async with client.stream("POST", CHAT, json=ASK) as answer:
            async for _ in answer.aiter_bytes():
                break
            found = series((await client.get("/metrics")).text)
            assert total(found, "stretto_gateway_open_requests") == 1
        for _ in range(200):
            found = series((await client.get("/metrics")).text)
            if total(found, "stretto_gateway_requests_total", outcome="client_gone", status="200"):
                break
            await asyncio.sleep(0.02)
        assert total(found, "stretto_gateway_requests_total", outcome="client_gone", status="200") == 1
        assert total(found, "stretto_gateway_open_requests") == gateway.server.running == 0


@pytest.mark.skipif(not promtool, reason="promtool is not installed (package prometheus)")
async def test_promtool_accepts_the_metrics(checkpoint: Path):
    async with cluster(checkpoint, fake(10), api_keys={"k": 'a "quoted" \\ tenant'}, gateway_key="g") as (
        client,
        _,
    ):
        await client.post(CHAT, json=ASK, headers={"x-api-key": "k"})
        page = (await client.get("/metrics", headers={"x-api-key": "g"})).content
    checked = await asyncio.to_thread(
        subprocess.run, [promtool, "check", "metrics"], input=page, capture_output=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_labels_are_bounded():
    names = BoundedNames(3)
    assert [names.of(each) for each in ("a", "b", "c", "d", "a", "e")] == [
        "a",
        "b",
        "c",
        "other",
        "a",
        "other",
    ]


async def test_the_access_log_has_one_line_without_content_for_each_request(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
):
    keys = {"k-secret": "ann"}
    async with cluster(checkpoint, fake(10, 11), access_log=True, gateway_key="g", api_keys=keys) as (
        client,
        _,
    ):
        ann = {"x-api-key": "k-secret", "x-request-id": "from-the-client"}
        body = ASK | {"messages": [{"role": "user", "content": "my secret question"}]}
        answer = await client.post(CHAT, json=body, headers=ann)
        assert answer.headers["x-request-id"] == "from-the-client"
        await client.post(CHAT, json=ASK, headers={"x-request-id": 'forged"id'})
        await client.get("/v1/models", headers=ann)
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")
    ]
    first, second = (line for line in lines if line["route"] == CHAT)
    assert (first["request_id"], first["tenant"], first["model"]) == ("from-the-client", "ann", "tiny")
    assert (first["status"], first["outcome"], first["tier"]) == (200, "ok", "default")
    assert first["completion_tokens"] == 2 and first["prompt_tokens"] > 0 and first["ttft_ms"] > 0
    assert (second["status"], second["outcome"], second["tenant"]) == (401, "invalid_api_key", None)
    assert re.fullmatch(r"[0-9a-f]{24}", second["request_id"])
    assert "secret" not in json.dumps(lines) and "forged" not in json.dumps(lines)


async def test_the_request_id_reaches_the_engine(checkpoint: Path):
    engine = fake(10)
    async with cluster(checkpoint, engine) as (client, _):
        answer = await client.post(CHAT, json=WHOLE, headers={"x-request-id": "abc-1"})
        assert engine.requests[-1].request_id == "abc-1" and answer.json()["id"].endswith("abc-1")


async def test_a_gateway_that_had_no_worker_yet_says_that_it_has_none():
    """An alert compares with 0, and a series that is absent equals nothing."""
    text = Gateway(GatewayConfig(port=0)).monitor.metrics.text().decode()
    assert 'stretto_gateway_workers{site="",state="usable"} 0.0' in text
