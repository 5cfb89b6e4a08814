"""Objectives and tiers in the API server: what reaches the engine, what is reported, what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.config import TIERS, ServeConfig, load, tiers_of
from stretto.engine.client import EngineClient
from stretto.engine.scheduler.default_tiers import default_tiers
from stretto.errors import StartError
from stretto.simulator.setting import SMALL_CPU
from stretto.text.output import Times
from stretto.types import Finish, Objective, Reason, Request, Sampling, TokenEvent
from tests.engine.test_client import NULL, read
from tests.server.conftest import CHAT, HELLO
from tests.server.fake_engine import FakeEngine, build
from tests.server.sse import events

TEXT = "/v1/completions"
ASKED = {"ttft_ms": 100.0, "itl_ms": 20.0, "total_ms": 900.0, "on_miss": "reject"}


async def answer(client: httpx.AsyncClient, path: str = CHAT, **body: Any) -> httpx.Response:
    return await client.post(path, json=({"prompt": "Hi"} if path == TEXT else HELLO) | body)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_objective_and_tier_reach_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    streamed = await answer(client, path, stream=True, objective=ASKED, service_tier="priority")
    assert engine.requests[0].objective == Objective(
        ttft_ms=100.0, itl_ms=20.0, total_ms=900.0, on_miss="reject"
    )
    assert engine.requests[0].tier == "priority"
    assert {chunk["service_tier"] for chunk in events(streamed.text)} == {"priority"}


@pytest.mark.parametrize(
    ("service_tier", "tier"),
    [(None, "default"), ("auto", "default"), ("priority", "priority"), ("flex", "flex")],
)
async def test_each_tier_sets_its_default_objective(
    client: httpx.AsyncClient, engine: FakeEngine, service_tier: str | None, tier: str
) -> None:
    whole = await answer(client, service_tier=service_tier)
    await answer(client, service_tier=service_tier, stream=True)
    usual = TIERS[tier].objective
    assert [request.tier for request in engine.requests] == [tier, tier]
    assert engine.requests[0].objective == Objective(ttft_ms=usual.ttft_ms), "no gap is seen without a stream"
    assert engine.requests[1].objective == usual
    assert whole.json()["service_tier"] == tier
    assert whole.json()["stretto"]["on_time"] is (None if tier == "flex" else True)


async def test_a_late_answer_reports_on_time_false(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [0.03, 65, 66]
    late = await answer(client, objective={"ttft_ms": 5})
    soon = await answer(client, objective={"ttft_ms": 60_000})
    assert late.json()["stretto"]["on_time"] is False
    assert soon.json()["stretto"]["on_time"] is True


async def test_an_answer_cut_off_by_its_deadline_has_finish_reason_deadline(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [65, Reason.DEADLINE]
    choice = (await answer(client, objective={"total_ms": 60_000})).json()
    assert choice["choices"][0]["finish_reason"] == "deadline"
    assert choice["stretto"]["on_time"] is False


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("after", "header"), [(2.3, "3"), (float("inf"), None), (None, None)])
async def test_an_infeasible_request_gets_503_with_retry_after(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool, after: float | None, header: str | None
) -> None:
    end = TokenEvent(0, finish=Finish(Reason.REFUSED, 3, 0, 0, 0.0, late=True, retry_after=after))
    engine.script = lambda request: [end]
    refused = await answer(client, stream=stream, objective={"ttft_ms": 1, "on_miss": "reject"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "cannot_be_on_time")
    assert refused.headers.get("retry-after") == header
    assert not engine.open


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_on_miss_reject_is_refused_under_the_fcfs_schedule(
    checkpoint: Path, engine: FakeEngine, path: str
) -> None:
    app = build(ServeConfig(schedule="fcfs"), engine, {"tiny": checkpoint})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        refused = await answer(client, path, objective={"ttft_ms": 9, "on_miss": "reject"})
        judged = await answer(client, path, objective={"ttft_ms": 60_000, "on_miss": "late"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "$.objective.on_miss")
    assert judged.json()["stretto"]["on_time"] is True


async def test_nan_and_infinite_objectives_are_refused(client: httpx.AsyncClient) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"messages": [{{"role": "user", "content": "Hi"}}], "objective": {{"ttft_ms": {number}}}}}'
        refused = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert refused.status_code == 400, number
        assert refused.json()["error"]["code"] == "invalid_value"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_objectives_are_judged_without_streaming(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    engine.script = lambda request: [65, 0.05, 66]
    late = await answer(client, path, objective={"total_ms": 40})
    early = await answer(client, path, objective={"total_ms": 60_000, "ttft_ms": 30_000})
    assert late.json()["stretto"]["on_time"] is False
    assert early.json()["stretto"]["on_time"] is True


async def test_embeddings_accept_only_total_ms(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [
        TokenEvent(0, finish=Finish(Reason.STOP, 1, 0, 0, 0.0), embedding=(1.0, 0.0))
    ]
    body = {"input": "Hi", "objective": {"total_ms": 700}}
    assert (await client.post("/v1/embeddings", json=body)).status_code == 200
    assert engine.requests[0].objective == Objective(total_ms=700)
    bad = await client.post("/v1/embeddings", json={"input": "Hi", "objective": {"ttft_ms": 7}})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "$.objective.ttft_ms")


def test_on_time_is_judged_by_every_token_deadline() -> None:
    times = Times.of(10.0, Objective(ttft_ms=1000, itl_ms=100))
    times.mark(11.0, 3)
    times.mark(11.3, 1)
    assert times.on_time is True, "token 3 is due three gaps after the first was, however early that came"
    late = Times.of(10.0, Objective(ttft_ms=1000, itl_ms=100))
    late.mark(11.0, 3)
    late.mark(11.31, 1)
    assert late.on_time is False
    early = Times.of(10.0, Objective(itl_ms=100))
    early.mark(10.5, 1)
    early.mark(10.6, 1)
    assert early.on_time is True
    early.mark(10.71, 1)
    assert early.on_time is False, "without a deadline for the first token, gaps count from that token"
    assert Times.of(10.0, Objective()).on_time is None


def test_tiers_are_read_from_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "stretto.toml"
    file.write_text("[tiers.priority]\nttft_ms = 800\n")
    server, engine = load({}, {}, file)
    assert server.tiers == engine.tiers == {"priority": Objective(ttft_ms=800)}
    tiers = tiers_of(server.tiers)
    assert tiers["priority"].objective == Objective(ttft_ms=800)
    assert (tiers["priority"].weight, tiers["default"]) == (TIERS["priority"].weight, TIERS["default"])
    for wrong in (
        'schedule = "fcfs"\n[tiers.flex]\non_miss = "reject"\n',
        "[tiers.gold]\nttft_ms = 1\n",
        "[tiers.flex]\nttft_ms = 0\n",
        "[tiers.flex]\nspeed = 1\n",
    ):
        file.write_text(wrong)
        with pytest.raises(StartError, match="tiers"):
            load({}, {}, file)


async def test_the_api_server_uses_the_tiers_of_its_config(checkpoint: Path, engine: FakeEngine) -> None:
    config = ServeConfig(tiers={"default": Objective(ttft_ms=123)})
    engine.tiers = tiers_of(config.tiers)
    app = build(config, engine, {"tiny": checkpoint})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        await answer(client)
    assert engine.requests[0].objective == Objective(ttft_ms=123)


async def test_a_request_that_names_no_objective_gets_what_the_machine_can_keep(
    checkpoint: Path, engine: FakeEngine
) -> None:
    config = ServeConfig(tiers={"flex": Objective(ttft_ms=7)})
    app = build(config, engine, {"tiny": checkpoint})
    engine.tiers = tiers_of(config.tiers, default_tiers([SMALL_CPU]))  # known once the models are loaded
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        await answer(client)
    objectives = app.server.recent.snapshot(running=0, restarts=0, ready=True).objectives
    promised = engine.tiers["default"].objective.ttft_ms
    assert engine.requests[0].objective.ttft_ms == promised
    assert objectives["default"].ttft_ms == promised
    assert objectives["flex"].ttft_ms == 7, "a table of the configuration replaces the default"


async def test_a_tenant_over_its_priority_quota_is_served_as_default(
    checkpoint: Path, engine: FakeEngine
) -> None:
    keys = {"key-of-one": "one", "key-of-two": "two"}
    app = build(ServeConfig(api_keys=keys), engine, {"tiny": checkpoint})
    engine.work_ms = 31_000.0
    body = {"messages": [{"role": "user", "content": "hi"}], "service_tier": "priority"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        served = [
            await client.post(
                "/v1/chat/completions",
                json=body | {"objective": {"ttft_ms": 700}},
                headers={"Authorization": f"Bearer {key}"},
            )
            for key in ("key-of-one", *keys)
        ]
        flex = await client.post(
            "/v1/chat/completions",
            json=body | {"service_tier": "flex"},
            headers={"Authorization": "Bearer key-of-one"},
        )
    assert [answer.json()["service_tier"] for answer in served] == ["priority", "default", "priority"]
    assert [request.tier for request in engine.requests[:3]] == ["priority", "default", "priority"]
    assert flex.json()["service_tier"] == "flex", "only priority has a quota"
    assert {request.objective.ttft_ms for request in engine.requests[:3]} == {700}, "its own limits stay"


async def test_the_engine_process_meets_misses_and_refuses_objectives() -> None:
    """Three requests to a real engine: one is on time, one expires and one is refused."""
    client = EngineClient(type(NULL)(models=NULL.models, schedule="deadline"))
    await client.start()
    await client.wait_ready()
    try:
        ends: list[Finish] = []
        for objective in (
            Objective(ttft_ms=60_000, itl_ms=10_000),
            Objective(total_ms=1e-6, on_miss="late"),
            Objective(ttft_ms=1e-6, on_miss="reject"),
        ):
            request = Request(
                id=client.next_id(),
                model="null",
                prompt=tuple(range(1, 200)),
                arrival=time.monotonic(),
                sampling=Sampling(max_tokens=4, seed=1),
                objective=objective,
            )
            finish = (await read(client.submit(request)))[-1].finish
            assert finish is not None
            ends.append(finish)
    finally:
        await client.shutdown(1.0)
    assert [end.reason for end in ends] == [Reason.LENGTH, Reason.DEADLINE, Reason.REFUSED]
    assert [end.late for end in ends] == [False, True, True]
    assert [end.output_tokens for end in ends] == [4, 0, 0], "no work for a request that is already dead"
