"""What operators do while requests run: change settings, and restart workers one after another."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from benchmarks.failover import Process, Seen, free_port, stream
from stretto.config import ServeConfig
from stretto.engine.client import EngineClient
from stretto.errors import StartError
from stretto.gateway.app import Gateway
from stretto.gateway.operations.reload import RELOADED, changes
from stretto.gateway.settings import GATEWAY, GatewayConfig, load
from stretto.http import serving
from stretto.server.app import build
from tests.gateway.cluster import ASK, CHAT, fake, running
from tests.server.fake_engine import FakeEngine

ADMIN = {"Authorization": "Bearer operator"}


async def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not become true in 20 s")


def test_a_change_that_needs_a_restart_is_refused_by_its_name():
    old = GatewayConfig(workers=("http://a:1",))
    assert changes(old, GatewayConfig(workers=("http://b:1",), route="sticky")) == ["workers", "route"]
    with pytest.raises(StartError, match=r"^port, access_log cannot change without a restart") as caught:
        changes(old, GatewayConfig(workers=("http://b:1",), port=1, access_log=True))
    assert "workers" not in caught.value.message
    assert RELOADED <= GATEWAY.infos.keys()


@pytest.mark.parametrize("name", ["answer_timeout", "silence_timeout"])
def test_the_bounds_of_silence_are_settings_above_zero(name: str):
    given = {"STRETTO_WORKERS": "http://a:1", f"STRETTO_{name.upper()}": "2.5"}
    assert 2.5 in load({}, given, None).patience and name in RELOADED
    for wrong in ("0", "-1", "nan", "soon"):
        with pytest.raises(StartError, match=name.upper()):
            load({}, given | {f"STRETTO_{name.upper()}": wrong}, None)


@contextlib.asynccontextmanager
async def reloading(
    checkpoint: Path, tmp_path: Path, engines: list[FakeEngine]
) -> AsyncGenerator[tuple[httpx.AsyncClient, Gateway, list[str], Callable[[str], None]]]:
    """A gateway with a settings file; the last value writes it. `{0}` is the first worker's URL."""
    file = tmp_path / "gateway.toml"
    async with contextlib.AsyncExitStack() as stack:
        urls: list[str] = []
        for engine in engines:
            worker = serving_worker(checkpoint, engine)
            urls.append(await stack.enter_async_context(running(serving.run, *worker)))

        def write(text: str) -> None:
            file.write_text(text.format(*urls))

        write('workers = ["{0}"]\nport = 0\ndrain = 0.3\n')
        gateway = Gateway(load({}, {}, file), reread=lambda: load({}, {}, file))
        url = await stack.enter_async_context(running(serving.run, gateway.config, gateway, gateway))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30))
        await wait_for(lambda: any(each.view.usable for each in gateway.registry.workers.values()))
        yield client, gateway, urls, write


def serving_worker(checkpoint: Path, engine: FakeEngine) -> tuple[Any, ...]:
    config = ServeConfig(port=0, drain_s=0.3)
    return config, build(config, cast(EngineClient, engine), {"tiny": checkpoint}), engine


async def test_settings_reload_on_sighup_without_a_lost_stream(checkpoint: Path, tmp_path: Path):
    engines = [fake(10, 2.0, 11), fake(10, 11)]
    async with reloading(checkpoint, tmp_path, engines) as (client, gateway, _, write):
        before = asyncio.create_task(client.post(CHAT, json=ASK))
        await wait_for(lambda: len(engines[0].open) == 1)
        write(
            'workers = ["{0}", "edge={1}"]\nport = 0\ndrain = 0.3\nroute = "round-robin"\n'
            'hedge_share = 0.5\n[api_keys]\nk = "ann"\n[prices.tiny]\noutput = 1.0\n'
        )
        os.kill(os.getpid(), signal.SIGHUP)
        await wait_for(lambda: gateway.config.route == "round-robin" and len(gateway.registry.workers) == 2)
        assert (await client.post(CHAT, json=ASK)).status_code == 401, "keys are needed now"
        await wait_for(lambda: all(each.view.usable for each in gateway.registry.workers.values()))
        assert (await client.post(CHAT, json=ASK, headers={"x-api-key": "k"})).status_code == 200
        assert (
            gateway.relay.hedging.budget.share == 0.5 and gateway.ledger.accounts.prices["tiny"].output == 1.0
        )
        assert [each.view.site for each in gateway.registry.workers.values()] == ["", "edge"]
        write('workers = ["{1}"]\nport = 0\ndrain = 0.3\nroute = "round-robin"\n')
        os.kill(os.getpid(), signal.SIGHUP)
        await wait_for(lambda: len(gateway.registry.workers) == 1)
        answer = await before
        assert "[DONE]" in answer.text and "error" not in answer.text, "its worker left; it went on elsewhere"
        assert gateway.relay.failovers == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('workers = ["{0}"]\nport = 1\n', "port"),
        ("workers = [", "cannot read the configuration"),
        ('workers = ["{0}"]\nroute = "best"\n', "route"),
        ('workers = ["ftp://x"]\nport = 0\ndrain = 0.3\n', "is no URL of a worker"),
        ('workers = ["http://a:b"]\nport = 0\ndrain = 0.3\n', "is no URL of a worker"),
        ('workers = ["http://[::1"]\nport = 0\ndrain = 0.3\n', "is no URL of a worker"),
        ('rout = "sticky"\n', "did you mean route"),
        ("a = " + "[" * 5000, "cannot read the configuration"),
    ],
)
async def test_a_reload_with_something_wrong_changes_nothing(
    checkpoint: Path, tmp_path: Path, text: str, message: str
):
    async with reloading(checkpoint, tmp_path, [fake(10)]) as (client, gateway, _, write):
        before, names = gateway.config, list(gateway.registry.workers)
        write(text)
        await gateway.reloader.reload()
        assert message in gateway.reloader.error
        assert gateway.config is before and list(gateway.registry.workers) == names
        assert (await client.post(CHAT, json=ASK)).status_code == 200
        write('workers = ["{0}"]\nport = 0\ndrain = 0.3\n')
        await gateway.reloader.reload()
        assert gateway.reloader.error == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_workers_restart_one_after_another_without_a_lost_stream():
    """Three workers under load: each is drained, ends, starts again and is undrained."""
    ports = [free_port() for _ in range(4)]
    workers = [
        Process(["serve", "null=null:4", "--port", str(port)], f"http://127.0.0.1:{port}")
        for port in ports[:3]
    ]
    urls = [part for worker in workers for part in ("--worker", worker.url)]
    gateway = Process(["gateway", "--port", str(ports[3]), *urls], f"http://127.0.0.1:{ports[3]}")
    stop = asyncio.Event()
    seen: list[Seen] = []

    async def load_it(client: httpx.AsyncClient, number: int) -> None:
        while not stop.is_set():
            body = {
                "messages": [{"role": "user", "content": f"stream {number}"}],
                "stream": True,
                "max_tokens": 120,
                "ignore_eos": True,
                "seed": number,
            }
            seen.append(await stream(client, gateway.url, body, asyncio.Event()))

    os.environ["STRETTO_GATEWAY_KEY"] = "operator"
    try:
        for process in (*workers, gateway):
            process.start()
        async with httpx.AsyncClient(timeout=120) as client:
            for process in (*workers, gateway):
                await process.ready(client)
            loads = [asyncio.create_task(load_it(client, number)) for number in range(12)]
            for worker in workers:
                await restart(client, gateway.url, worker)
            stop.set()
            await asyncio.gather(*loads)
            state = (await client.get(f"{gateway.url}/state")).json()
    finally:
        del os.environ["STRETTO_GATEWAY_KEY"]
        for process in (gateway, *workers):
            process.end()
    assert [each.error for each in seen if each.error or not each.ended] == []
    assert len(seen) >= 12 and len({each.text for each in seen}) <= 12, "equal seeds give equal answers"
    assert (state["failovers"], state["retries"]) == (0, 0), "no stream had to move"


async def restart(client: httpx.AsyncClient, url: str, worker: Process) -> None:
    name = worker.url.removeprefix("http://")

    async def row() -> dict[str, Any]:
        state = (await client.get(f"{url}/state")).json()
        return next(each for each in state["workers"] if each["name"] == name)

    assert (await client.post(f"{url}/v1/workers/{name}/drain", headers=ADMIN)).status_code == 200
    for _ in range(1500):
        if (await row())["active"] == 0:
            break
        await asyncio.sleep(0.02)
    assert worker.popen is not None
    worker.popen.terminate()
    assert await asyncio.to_thread(worker.popen.wait, 60) == 0
    assert not (await row())["usable"]
    worker.start()
    await worker.ready(client)
    assert (await client.post(f"{url}/v1/workers/{name}/undrain", headers=ADMIN)).status_code == 200
    for _ in range(1500):
        if (await row())["usable"]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{name} did not come back")
