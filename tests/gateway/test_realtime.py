"""Sessions of `/v1/realtime` through a gateway: relayed, charged, and ended with a code that says why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from stretto.errors import Draining
from stretto.gateway.accounts import issue
from stretto.gateway.accounts.keys import KeyFile
from stretto.gateway.app import Gateway
from stretto.gateway.realtime.upstream import open_socket
from stretto.gateway.upstream.connection import Pool
from tests.gateway.cluster import cluster, fake
from tests.server.fake_engine import FakeEngine, info
from tests.server.realtime.conftest import Talk

LONG = [item for _ in range(2000) for item in (0.005, 10)]


def endless() -> FakeEngine:
    """An engine whose answers take ten seconds."""
    return FakeEngine(lambda request: list(LONG), {"tiny": info(vocab=600)})


@asynccontextmanager
async def session(client: httpx.AsyncClient, query: str = "", **options: Any) -> AsyncGenerator[Talk]:
    url = f"ws://127.0.0.1:{client.base_url.port}/v1/realtime{query}"
    async with connect(url, compression=None, **options) as socket:
        talk = Talk(socket)
        assert (await talk.next())["type"] == "session.created"
        assert (await talk.next())["type"] == "conversation.created"
        yield talk


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def refused(client: httpx.AsyncClient, query: str = "", **options: Any) -> tuple[int, dict[str, Any]]:
    """The status and the error of a handshake that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with session(client, query, **options):
            pass
    response = caught.value.response
    return response.status_code, json.loads(response.body)["error"]


async def closed(talk: Talk) -> int:
    """The code with which the session is closed next."""
    with pytest.raises(ConnectionClosed) as caught:
        async with asyncio.timeout(20):
            while True:
                await talk.next()
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def create(file: KeyFile, tenant: str, **fields: Any) -> dict[str, str]:
    """The header of a new key."""
    return {"Authorization": f"Bearer {issue.create(file, datetime.now(UTC), tenant=tenant, **fields).key}"}


def locked(file: KeyFile) -> dict[str, Any]:
    return {"gateway_key": "g", "keys_file": str(file.path)}


def active(gateway: Gateway) -> list[int]:
    return [worker.view.active for worker in gateway.registry.workers.values()]


async def test_a_conversation_is_that_of_a_worker(checkpoint: Path):
    """The events are the same as without a gateway, in the same order; only ids differ."""
    engine = fake(10, 11)
    async with cluster(checkpoint, engine) as (client, gateway):
        (worker,) = gateway.registry.workers
        seen: list[list[str]] = []
        async with httpx.AsyncClient(base_url=f"http://{worker}") as direct:
            for each in (direct, client):
                async with session(each, "?model=tiny") as talk:
                    await talk.say("Hi")
                    await talk.send("response.create", event_id="mine")
                    answer = await talk.answer()
                    assert answer["status"] == "completed" and answer["usage"]["output_tokens"] == 2
                    await talk.type("a b")
                    await talk.send("input_text.commit")
                    await talk.answer()
                    await talk.send("response.cancel", event_id="late")
                    error = await talk.error()
                    assert (error["code"], error["event_id"]) == ("response_cancel_not_active", "late")
                seen.append(talk.types)
        assert seen[0] == seen[1] and "response.output_text.delta" in seen[0]
        await settled(lambda: active(gateway) == [0])


async def test_sessions_spread_over_the_workers_and_stay_where_they_are(checkpoint: Path):
    first, second = fake(10), fake(10)
    async with cluster(checkpoint, first, second) as (client, gateway):
        async with session(client) as one, session(client) as other:
            assert active(gateway) == [1, 1]
            for talk in (one, one, one, other):
                await talk.say("Hi")
                await talk.send("response.create")
                id = (await talk.answer())["id"]
                assert (await client.post("/v1/feedback", json={"request_id": id, "thumbs": "up"})).is_success
                response = talk.socket.response
                assert response is not None
                known = gateway.relay.answered
                at = known.worker("local", [response.headers["x-request-id"]])
                assert at is not None and known.worker("local", [id]) == at
            assert sorted([len(first.requests), len(second.requests)]) == [1, 3]
        await settled(lambda: active(gateway) == [0, 0])


async def test_the_answer_names_its_site_and_deadlines_count_from_the_gateway(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """The network is taken to need 5 s there and back."""

    def far(pool: Pool, seconds: float) -> None:
        pool.round_trip = 5.0

    monkeypatch.setattr(Pool, "note_round_trip", far)
    engine = fake(10)
    async with cluster(checkpoint, engine) as (client, gateway):
        (worker,) = gateway.registry.workers.values()
        worker.view.site = "edge"
        loop = asyncio.get_running_loop()
        async with session(client) as talk:
            await talk.say("Hi")
            sent = loop.time()
            await talk.send("response.create")
            assert (await talk.answer())["stretto"]["site"] == "edge"
        assert sent - 5.1 < engine.requests[0].arrival < loop.time() - 4.9


async def test_keys_are_asked_at_the_handshake(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann")
    other, reader = create(file, "bob", models=("large",)), create(file, "ann", scopes=("usage",))
    key = ann["Authorization"].removeprefix("Bearer ")
    engine = fake(10)
    async with cluster(checkpoint, engine, **locked(file)) as (client, _):
        assert (await refused(client))[0] == 401
        assert (await refused(client, additional_headers=reader))[0] == 403
        status, error = await refused(client, additional_headers=other)
        assert (status, error["code"]) == (403, "not_allowed")
        assert (await refused(client, "?model=large", additional_headers=ann))[0] == 404
        protocols = ["realtime", f"openai-insecure-api-key.{key}"]
        async with session(client, subprotocols=protocols) as talk:
            assert talk.socket.subprotocol == "realtime"
            await talk.say("Hi")
            await talk.send("response.create")
            await talk.answer()
        assert {request.tenant for request in engine.requests} == {"ann"}
        plain = await client.get("/v1/realtime", headers=ann)
        assert plain.status_code == 426 and plain.json()["error"]["code"] == "upgrade_required"


async def test_only_a_gateway_may_open_a_session_for_another_tenant(checkpoint: Path):
    engine = fake(10)
    async with cluster(checkpoint, engine, gateway_key="g") as (_, gateway):
        (worker,) = gateway.registry.workers
        for headers in ({}, {"Authorization": "Bearer x"}):
            with pytest.raises(InvalidStatus) as caught:
                await connect(f"ws://{worker}/v1/relay?tenant=ann&model=tiny", additional_headers=headers)
            assert caught.value.response.status_code == 401
        own = {"Authorization": "Bearer g"}
        with pytest.raises(InvalidStatus) as caught:
            await connect(f"ws://{worker}/v1/relay?model=tiny", additional_headers=own)
        assert caught.value.response.status_code == 400


async def test_each_response_is_charged_like_a_request(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann", limits=("requests=2/day", "tokens=100000/day"))
    engine = fake(10, 11, 12)
    async with cluster(checkpoint, engine, **locked(file)) as (client, gateway):
        async with session(client, additional_headers=ann) as talk:
            await talk.say("Hi")
            prompts = 0
            for _ in range(2):
                await talk.send("response.create")
                usage = (await talk.answer())["usage"]
                prompts += usage["input_tokens"]
            for event in ("response.create", "input_text.commit"):
                await talk.send("input_text.append", text="More ")
                await talk.send(event, event_id="third")
                error = await talk.error()
                assert (error["code"], error["event_id"]) == ("budget_exceeded", "third")
                assert "requests=2/day" in error["message"]
            await talk.send("session.update", session={"instructions": "Be brief."})
            await talk.until("session.updated")
        assert len([request for request in engine.requests if not request.spare_time]) == 2
        report = (await client.get("/v1/usage", headers=ann)).json()
        (row,) = report["rows"]
        assert (row["requests"], row["completion_tokens"], row["prompt_tokens"]) == (2, 6, prompts)
        used = {each["limit"]: each["used"] for each in report["limits"]}
        assert used == {"requests=2/day": 2, "tokens=100000/day": 6 + prompts}
        assert 'outcome="budget_exceeded"' in gateway.monitor.metrics.text().decode()


async def test_events_that_the_worker_refuses_cost_a_request_and_no_tokens(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann", limits=("requests=100/day",))
    async with cluster(checkpoint, fake(10), **locked(file)) as (client, _):
        async with session(client, additional_headers=ann) as talk:
            await talk.send("response.create", event_id="empty")
            assert (await talk.error())["event_id"] == "empty"
            await talk.send("response.create", response={"voice": "x"})
            assert (await talk.error())["event_id"] is None
            await talk.say("Hi")
            await talk.send("response.create")
            assert (await talk.answer())["status"] == "completed"
        (row,) = (await client.get("/v1/usage", headers=ann)).json()["rows"]
        assert (row["requests"], row["completion_tokens"]) == (3, 1)


async def test_half_of_an_emoji_in_an_event_hides_no_response(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann", limits=("requests=100/day",))
    async with cluster(checkpoint, fake(10), **locked(file)) as (client, _):
        async with session(client, additional_headers=ann) as talk:
            await talk.say("Hi")
            await talk.socket.send(r'{"type": "response.create", "event_id": "\ud83d"}')
            assert (await talk.answer())["status"] == "completed"
        (row,) = (await client.get("/v1/usage", headers=ann)).json()["rows"]
        assert (row["requests"], row["completion_tokens"]) == (1, 1)


async def test_no_response_escapes_its_charge(checkpoint: Path, file: KeyFile):
    """Events may come before the last response has ended, or be written so that two readers differ."""
    ann = create(file, "ann", limits=("requests=3/day",), tiers=("default", "flex"))
    engine = fake(10)
    async with cluster(checkpoint, engine, **locked(file)) as (client, _):
        async with session(client, additional_headers=ann) as talk:
            await talk.say("Hi")
            for _ in range(6):
                await talk.send("response.create")
            codes: list[str] = []
            while len(codes) < 6:
                event = await talk.next()
                if event["type"] == "response.done":
                    codes.append("ok")
                elif event["type"] == "error":
                    codes.append(event["error"]["code"])
            assert codes.count("budget_exceeded") == 3
            assert set(codes) <= {"ok", "budget_exceeded", "conversation_already_has_active_response"}
            await talk.send("session.update", session={"service_tier": "priority"}, event_id="tier")
            error = await talk.error()
            assert (error["code"], error["event_id"]) == ("not_allowed", "tier")
            asked = len(engine.requests)
            await talk.socket.send('{"type": "response.create", "type": "input_text.clear"}')
            await talk.socket.send('{"type": "input_text.clear", "type": "response.create"}')
            try:
                await talk.until("error")
                assert len(engine.requests) == asked
            except ConnectionClosed as end:
                assert end.rcvd is not None and end.rcvd.code == 1008


async def test_a_client_that_leaves_cancels_its_response(checkpoint: Path, file: KeyFile):
    ann = create(file, "ann")
    engine = endless()
    async with cluster(checkpoint, engine, **locked(file)) as (client, gateway):
        async with session(client, additional_headers=ann) as talk:
            await talk.say("Hi")
            await talk.send("response.create")
            await talk.until("response.output_text.delta")
            assert len(engine.open) == 1
            talk.socket.transport.abort()
        await settled(lambda: not engine.open and active(gateway) == [0])
        (row,) = (await client.get("/v1/usage", headers=ann)).json()["rows"]
        assert row["requests"] == 1 and 0 < row["completion_tokens"] < 2000 and row["prompt_tokens"] > 0


@pytest.mark.parametrize("how", ["silent", "broken"])
async def test_a_worker_that_dies_ends_its_sessions_and_the_next_one_is_elsewhere(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    """Its reports stop, or its connection breaks."""
    opened: list[ClientConnection] = []

    async def open_and_keep(*arguments: Any) -> ClientConnection:
        opened.append(await open_socket(*arguments))
        return opened[-1]

    monkeypatch.setattr("stretto.gateway.realtime.socket.open_socket", open_and_keep)
    engines = endless(), endless()
    async with cluster(checkpoint, *engines) as (client, gateway):
        workers = list(gateway.registry.workers.values())
        async with session(client) as talk:
            await talk.say("Hi")
            await talk.send("response.create")
            await talk.until("response.output_text.delta")
            (index,) = [at for at, worker in enumerate(workers) if worker.view.active]
            if how == "silent":
                workers[index].pool.lose()
            else:
                opened[0].transport.abort()
            assert (await talk.error())["code"] == "worker_lost"
            assert await closed(talk) == 1014
        workers[index].hold(on=True)
        await settled(lambda: not workers[index].view.usable and not engines[index].open)
        async with session(client) as talk:
            await talk.say("Hi")
            await talk.send("response.create")
            await talk.until("response.output_text.delta")
            assert len(engines[1 - index].open) == 1
        await settled(lambda: active(gateway) == [0, 0])


async def test_a_drained_worker_completes_the_response_and_then_ends_the_session(checkpoint: Path):
    gate = asyncio.Event()
    engine = FakeEngine(lambda request: [10, 1.0, 11], {"tiny": info(vocab=600)})
    engine.pause = lambda seconds: gate.wait()
    async with cluster(checkpoint, engine) as (client, gateway):
        (name,) = gateway.registry.workers
        async with session(client) as talk, session(client) as resting:
            await talk.say("Hi")
            await talk.send("response.create")
            await talk.until("response.output_text.delta")
            gateway.registry.workers[name].hold(on=True)
            assert (await resting.error())["code"] == "draining"
            assert await closed(resting) == 1001
            gate.set()
            assert (await talk.answer())["usage"]["output_tokens"] == 2
            assert (await talk.error())["code"] == "draining"
            assert await closed(talk) == 1001
        assert (await refused(client))[0] == 503
        await settled(lambda: active(gateway) == [0])


async def test_a_gateway_that_shuts_down_ends_its_sessions(checkpoint: Path):
    engine = endless()
    async with cluster(checkpoint, engine) as (client, gateway):
        async with session(client) as talk, session(client) as resting:
            await talk.say("Hi")
            await talk.send("response.create")
            await talk.until("response.output_text.delta")
            gateway.server.close()
            assert (await resting.error())["code"] == "draining"
            assert await closed(resting) == 1001
            assert (await refused(client))[0] == 503
            gateway.server.end_calls(Draining("the server shut down before the answer was complete"))
            assert (await talk.error())["code"] == "draining"
            assert await closed(talk) == 1001
        await settled(lambda: not engine.open)
        assert gateway.server.running == 0


async def test_a_revoked_key_loses_its_session_and_an_expired_one_its_next_response(
    checkpoint: Path, file: KeyFile
):
    made = issue.create(file, datetime.now(UTC), tenant="ann")
    ann = {"Authorization": f"Bearer {made.key}"}
    short = create(file, "bob", expires=datetime.now(UTC) + timedelta(hours=1))
    engine = endless()
    async with cluster(checkpoint, engine, **locked(file)) as (client, gateway):
        async with (
            session(client, additional_headers=ann) as talk,
            session(client, additional_headers=short) as other,
        ):
            await talk.say("Hi")
            await talk.send("response.create")
            await talk.until("response.output_text.delta")
            issue.revoke(file, made.record.id, datetime.now(UTC))
            assert (await talk.error())["code"] == "key_revoked"
            assert await closed(talk) == 1008
            await settled(lambda: not engine.open)
            present = gateway.ledger.now()
            gateway.ledger.now = lambda: present._replace(wall=present.wall + 7200)
            await other.say("Hi")
            await other.send("response.create", event_id="late")
            error = await other.error()
            assert (error["code"], error["event_id"]) == ("key_expired", "late")


async def test_limits_of_a_worker_reach_the_client(checkpoint: Path):
    """Too many sessions: another worker, then its refusal. An event that is too large: close code 1009."""
    one, other = fake(10), fake(10)
    async with cluster(checkpoint, one, other, worker={"max_sessions": 1}, max_body_bytes=4096) as (
        client,
        gateway,
    ):
        async with session(client), session(client) as talk:
            gateway.registry.workers[next(iter(gateway.registry.workers))].view.active = 0
            status, error = await refused(client)
            assert (status, error["code"]) == (503, "overloaded")
            await talk.socket.send('{"type": "input_text.append", "text": "%s"}' % ("x" * 5000))
            assert await closed(talk) == 1009
        assert "lost" not in {worker.error for worker in gateway.registry.workers.values()}


async def test_a_web_page_of_another_origin_may_not_connect(checkpoint: Path):
    async with cluster(checkpoint, fake(10)) as (client, _):
        status, error = await refused(client, origin="https://evil.example")
        assert (status, error["code"]) == (403, "origin_not_allowed")
        async with session(client, origin=f"http://127.0.0.1:{client.base_url.port}"):
            pass


async def test_pings_are_answered_and_a_slow_client_stops_the_worker(checkpoint: Path):
    """A client that reads nothing stops the engine's stream before it has all of it."""
    engine = FakeEngine(lambda request: [[10] * 200 for _ in range(2000)], {"tiny": info(vocab=600)})
    async with cluster(checkpoint, engine, worker={"max_waiting": 8}) as (client, _):
        async with session(client, max_queue=4) as talk:
            await asyncio.wait_for(await talk.socket.ping(), 10)
            await talk.say("Hi")
            await talk.send("response.create")
            await talk.until("response.output_text.delta")
            before = -1
            while engine.streams[-1].emitted != before:
                before = engine.streams[-1].emitted
                await asyncio.sleep(0.3)
            assert before < 400_000
