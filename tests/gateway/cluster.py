"""A gateway on a real socket, in front of workers with fake engines: what the tests of the gateway share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx

from stretto.config import ServeConfig
from stretto.engine.client import EngineClient
from stretto.gateway.app import Gateway
from stretto.gateway.settings import GatewayConfig
from stretto.http import serving
from stretto.server.app import App, build
from tests.server.fake_engine import FakeEngine, info

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}


def fake(*script: Any) -> FakeEngine:
    """An engine that plays the script for every request, without what a continued request already has."""
    return FakeEngine(lambda request: list(script)[len(request.emitted) :], {"tiny": info(vocab=600)})


@asynccontextmanager
async def running(run: Any, *arguments: Any) -> AsyncGenerator[str]:
    """A server task; yields its URL."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(*arguments, ready.set_result))
    await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
    try:
        yield ready.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def cluster(
    checkpoint: Path,
    *engines: FakeEngine,
    worker: dict[str, Any] | None = None,
    make: Callable[[ServeConfig, FakeEngine], App] | None = None,
    **extra: Any,
) -> AsyncGenerator[tuple[httpx.AsyncClient, Gateway]]:
    """Workers over these engines, and a client of the gateway in front of them. `make`: a worker that serves
    something else than the model `tiny`."""
    async with AsyncExitStack() as stack:
        urls: list[str] = []
        for engine in engines:
            config = ServeConfig(
                port=0, drain_s=0.3, gateway_key=extra.get("gateway_key", ""), **(worker or {})
            )
            if make is None:
                app = build(config, cast(EngineClient, engine), {"tiny": checkpoint})
            else:
                app = make(config, engine)
            urls.append(await stack.enter_async_context(running(serving.run, config, app, engine)))
        gateway = Gateway(GatewayConfig(workers=tuple(urls), port=0, drain_s=0.3, **extra), seed=0)
        url = await stack.enter_async_context(running(serving.run, gateway.config, gateway, gateway))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20))
        for _ in range(200):
            usable = [each.view.usable for each in gateway.registry.workers.values()]
            if len(usable) == len(engines) and all(usable):
                break
            await asyncio.sleep(0.02)
        yield client, gateway


@asynccontextmanager
async def in_front(*urls: str, **extra: Any) -> AsyncGenerator[tuple[httpx.AsyncClient, Gateway]]:
    """A gateway with these workers, all of which are usable, and a client of it."""
    gateway = Gateway(GatewayConfig(workers=urls, port=0, drain_s=0.3, **extra), seed=0)
    async with (
        running(serving.run, gateway.config, gateway, gateway) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        await until(lambda: all(each.view.usable for each in gateway.registry.workers.values()))
        yield client, gateway


async def until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds. Raises TimeoutError after 30 seconds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def text_of(answer: httpx.Response) -> str:
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    assert answer.text.count("data: [DONE]") == 1 and ":~" not in answer.text, answer.text
    return "".join(
        choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"]
    )
