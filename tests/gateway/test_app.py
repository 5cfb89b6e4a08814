"""A gateway on a real socket, in front of workers with fake engines."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from benchmarks import failover
from stretto.errors import EngineDied, StartError
from stretto.gateway import settings
from stretto.gateway.app import Gateway
from stretto.gateway.cache.policy import CachePolicy
from stretto.gateway.settings import GatewayConfig
from stretto.http import serving
from tests.gateway.cluster import ASK, CHAT, cluster, fake, running, text_of

KEY = {"Authorization": "Bearer secret"}


async def test_streams_and_whole_answers_pass(checkpoint: Path):
    async with cluster(checkpoint, fake(10, 11, 12)) as (client, _):
        streamed = await client.post(CHAT, json=ASK)
        whole = await client.post(CHAT, json=ASK | {"stream": False})
        assert text_of(streamed) == whole.json()["choices"][0]["message"]["content"]
        assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
        models = (await client.get("/v1/models")).json()
        assert [card["id"] for card in models["data"]] == ["tiny"]
        assert (await client.get("/ready")).status_code == 200


async def test_the_workers_errors_reach_the_client(checkpoint: Path):
    async with cluster(checkpoint, fake(10)) as (client, _):
        wrong = await client.post(CHAT, json=ASK | {"temperature": "hot"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "$.temperature")
        unknown = await client.post(CHAT, json=ASK | {"model": "gpt-9"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        for body in (b"", b"[1]", b'{"a":1},"tenant":"root"', b"{", b"[" * 5000):
            answer = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, body
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.get(CHAT)).status_code == 405


NUMBERS = ["true", "2147483648", "9" * 30, "9" * 400, "1e300", "1e999", '"x"', "[1]", "{}"]


@pytest.mark.parametrize(
    "name", ["n", "max_tokens", "max_output_tokens", "model", "seed", "cache", "objective"]
)
async def test_a_value_that_nobody_takes_is_the_clients_mistake(checkpoint: Path, name: str):
    """With and without a cache, which reads all of a request."""
    for caches in ({}, {"*": CachePolicy(sampled=True, semantic=True)}):
        async with cluster(checkpoint, fake(10), caches=caches) as (client, _):
            for path in (CHAT, "/v1/responses", "/v1/messages", "/api/generate"):
                for value in NUMBERS:
                    body = b'{"messages":[{"role":"user","content":"Hi"}],"input":"Hi","prompt":"Hi","%b":%b}'
                    answer = await client.post(
                        path,
                        content=body % (name.encode(), value.encode()),
                        headers={"content-type": "application/json"},
                    )
                    assert answer.status_code < 500, (path, name, value, answer.text)


async def test_without_workers_requests_are_refused_at_once(checkpoint: Path):
    async with cluster(checkpoint, gateway_key="secret") as (client, _):
        answer = await client.post(CHAT, json=ASK)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert (await client.get("/ready")).status_code == 503


async def test_a_new_request_waits_a_moment_for_a_worker_to_be_usable(checkpoint: Path):
    """It was refused at once, as in a rolling restart on a busy machine, where reports came late."""
    async with cluster(checkpoint, fake(10, 11)) as (client, gateway):
        (worker,) = gateway.registry.workers.values()
        worker.hold(on=True)
        waiting = asyncio.create_task(client.post(CHAT, json=ASK))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        worker.hold(on=False)
        worker.view.usable = True
        assert (await waiting).status_code == 200
        worker.hold(on=True)
        soon = ASK | {"objective": {"ttft_ms": 100}}
        began = asyncio.get_running_loop().time()
        assert (await client.post(CHAT, json=soon)).status_code == 503
        assert asyncio.get_running_loop().time() - began < 0.9, "no longer than its objective"


async def test_an_engine_that_dies_in_mid_answer_is_replaced_by_another_worker(checkpoint: Path):
    dying = fake(10, 11, EngineDied("the engine ended"))
    healthy = fake(10, 11, 12, 13)
    async with cluster(checkpoint, dying, healthy, route="round-robin") as (client, gateway):
        answers = [await client.post(CHAT, json=ASK) for _ in range(2)]
        assert len({text_of(answer) for answer in answers}) == 1
        assert gateway.relay.failovers == 1
        assert healthy.requests[-1].emitted in ((10, 11), ()) and dying.requests[0].emitted == ()


async def test_a_client_that_leaves_cancels_the_work(checkpoint: Path):
    engine = fake(10, 30.0)
    async with cluster(checkpoint, engine) as (client, gateway):
        async with client.stream("POST", CHAT, json=ASK) as answer:
            async for _ in answer.aiter_bytes():
                break
        for _ in range(100):
            if not engine.open and not gateway.server.running:
                break
            await asyncio.sleep(0.02)
        assert not engine.open and not gateway.server.running
        assert [each.view.active for each in gateway.registry.workers.values()] == [0]


async def test_a_client_may_leave_at_any_moment(checkpoint: Path):
    engine = fake(10, 30.0)
    async with cluster(checkpoint, engine) as (client, gateway):
        for turns in range(50):
            task = asyncio.create_task(client.post(CHAT, json=ASK))
            while not gateway.server.running:
                await asyncio.sleep(0)
            for _ in range(turns):  # until just before and just after the answer begins
                await asyncio.sleep(0)
            task.cancel()
            while gateway.server.running:
                await asyncio.sleep(0.005)
        for _ in range(400):
            if not engine.open:
                break
            await asyncio.sleep(0.02)
        assert not engine.open
        assert [each.view.active for each in gateway.registry.workers.values()] == [0]


async def test_a_drained_worker_gets_no_new_requests(checkpoint: Path):
    engines = fake(10), fake(10)
    async with cluster(checkpoint, *engines, gateway_key="secret") as (client, gateway):
        name = next(iter(gateway.registry.workers))
        assert (await client.post(f"/v1/workers/{name}/drain")).status_code == 401
        assert (await client.post(f"/v1/workers/{name}/drain", headers=KEY)).status_code == 200
        await asyncio.sleep(0.2)
        for _ in range(4):
            await client.post(CHAT, json=ASK)
        assert (len(engines[0].requests), len(engines[1].requests)) == (0, 4)
        await client.post(f"/v1/workers/{name}/undrain", headers=KEY)
        await client.delete(f"/v1/workers/{list(gateway.registry.workers)[1]}", headers=KEY)
        await asyncio.sleep(0.2)
        await client.post(CHAT, json=ASK)
        assert len(engines[0].requests) == 1


async def test_a_worker_joins_with_the_key_and_an_address_alone(checkpoint: Path):
    async with cluster(checkpoint, fake(10), gateway_key="secret") as (client, gateway):
        (configured,) = gateway.registry.workers.values()
        url = f"https://{configured.name}"
        assert (await client.post("/v1/workers", json={"url": url})).status_code == 401
        assert (await client.post("/v1/workers", json={"url": url}, headers=KEY)).status_code == 200
        assert list(gateway.registry.workers.values()) == [configured] and configured.lease is None
        for wrong in ({"url": "http://a b"}, {"url": "http://u:p@a"}, {"url": 5}, {"url": "x", "lease_s": 9}):
            answer = await client.post("/v1/workers", json=wrong, headers=KEY)
            assert answer.status_code == 400 and "$." in answer.json()["error"]["param"], answer.text
        large = await client.post("/v1/workers", json={"url": "x" * (5 << 20)}, headers=KEY)
        assert large.status_code == 413
        for site in ("edge", "core"):
            await client.post("/v1/workers", json={"url": "http://127.0.0.1:1", "site": site}, headers=KEY)
        assert gateway.registry.workers["127.0.0.1:1"].view.site == "core"
        assert (await client.post(CHAT, json=ASK)).status_code == 200


async def test_a_worker_at_two_addresses_is_one(checkpoint: Path):
    async with cluster(checkpoint, fake(10), fake(10)) as (client, gateway):
        first, _ = gateway.registry.workers.values()
        twin = gateway.registry.join(f"http://localhost:{first.address.port}")
        while twin.error == "no report yet":
            await asyncio.sleep(0.01)
        assert not twin.view.usable and f"it is the worker {first.name} at another address" in twin.error
        gateway.registry.leave(first.name)
        async with asyncio.timeout(10):
            while not twin.view.usable:
                await asyncio.sleep(0.01)
        assert (await client.post(CHAT, json=ASK)).status_code == 200


async def test_tenants_have_keys_at_the_gateway_and_reach_the_engine(checkpoint: Path):
    engine = fake(10)
    async with cluster(checkpoint, engine, gateway_key="secret", api_keys={"k-ann": "ann"}) as (client, _):
        assert (await client.post(CHAT, json=ASK)).status_code == 401
        answer = await client.post(CHAT, json=ASK, headers={"Authorization": "Bearer k-ann"})
        assert answer.status_code == 200 and engine.requests[-1].tenant == "ann"


async def test_a_server_of_another_kind_is_a_worker_too(checkpoint: Path):
    async def plain(scope: Any, receive: Any, send: Any) -> None:
        body, status = b'{"error":{}}', 404
        if scope["path"] == "/v1/models":
            body, status = b'{"object":"list","data":[{"id":"other","created":1}]}', 200
        elif scope["path"] == CHAT:
            body, status = b'{"choices":[],"by":"other"}', 200
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        await send({"type": "http.response.body", "body": body})

    server = uvicorn.Server(uvicorn.Config(plain, port=0, log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    gateway = Gateway(GatewayConfig(workers=(f"http://127.0.0.1:{port}",), port=0))
    async with (
        running(serving.run, gateway.config, gateway, gateway) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        for _ in range(100):
            if (await client.get("/ready")).status_code == 200:
                break
            await asyncio.sleep(0.02)
        answer = await client.post(CHAT, json=ASK | {"stream": False})
        assert answer.json() == {"choices": [], "by": "other"}
    server.should_exit = True
    await task


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({}, {}, "a gateway needs workers"),
        ({"workers": ["u"], "port": 70000}, {}, "--port"),
        ({"workers": ["u"]}, {"STRETTO_ROUTE": "best"}, "STRETTO_ROUTE"),
    ],
)
def test_wrong_settings_are_named(flags: dict[str, Any], environ: dict[str, str], message: str):
    with pytest.raises(StartError, match=message):
        settings.load(flags, environ, None)


def test_settings_come_from_flags_environment_and_file(tmp_path: Path):
    file = tmp_path / "gateway.toml"
    file.write_text('workers = ["http://a:1"]\nroute = "sticky"\nport = 1\n[api_keys]\nk = "ann"\n')
    read = settings.load({"port": 3}, {"STRETTO_PORT": "2", "STRETTO_GATEWAY_KEY": "g"}, file)
    assert (read.workers, read.route, read.port) == (("http://a:1",), "sticky", 3)
    assert (read.gateway_key, read.api_keys) == ("g", {"k": "ann"})
    file.write_text("rout = 1\n")
    with pytest.raises(StartError, match=r"unknown setting rout; did you mean route\?"):
        settings.load({}, {}, file)


@pytest.mark.parametrize("how", ["kill", "stop", "gateway"])
async def test_no_stream_is_lost_wrong_or_repeated_when_a_process_fails(how: str):
    options = failover.parser().parse_args(
        ["--rounds", "1", "--streams", "8", "--workers", "2", "--how", how]
    )
    for _ in range(3):  # the instant of the failure is drawn; all streams may have ended by then
        counts = await failover.measure(options)
        if counts.running:
            break
    assert counts.running > 0 and counts._replace(running=0, cut=0, tied=0) == failover.Counts()
    assert (counts.cut > 0) == (how == "gateway")  # the dead gateway's streams, in an error that says so
