"""Long prompts: those of one tenant delay neither short ones nor those of another."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from stretto.config import ServeConfig
from stretto.server.app import App
from stretto.server.state import VERY_LONG_TEXT
from stretto.text.tokenizer import TextModel
from tests.server.conftest import CHAT
from tests.server.fake_engine import FakeEngine, info


@pytest.fixture
def config() -> ServeConfig:
    return ServeConfig(port=0, api_keys={"key-greedy": "greedy", "key-other": "other"})


class Slow:
    """Holds every very long text up until `gate` is set; `order` lists the texts that were encoded."""

    def __init__(self, text: TextModel) -> None:
        self.gate = threading.Event()
        self.order: list[str] = []
        self._encode = text.encode_rendered
        text.encode_rendered = self.encode_rendered  # pyright: ignore[reportAttributeAccessIssue]

    def encode_rendered(self, rendered: str) -> list[int]:
        if len(rendered) > VERY_LONG_TEXT:
            assert self.gate.wait(30)
            self.order.append("other" if "other" in rendered[:40] else "greedy")
            return [1]
        self.order.append("short")
        return self._encode(rendered)


def chat(name: str, size: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": name + " a" * (size // 2)}], "max_tokens": 1}


async def test_long_prompts_of_one_tenant_delay_nobody_else(
    app: App, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.models["tiny"] = info(vocab=1000, context=10**6)
    slow = Slow(app.server.texts["tiny"])

    def ask(tenant: str, size: int) -> asyncio.Task[httpx.Response]:
        headers = {"authorization": f"Bearer key-{tenant}"}
        return asyncio.create_task(client.post(CHAT, json=chat(tenant, size), headers=headers))

    long = [ask("greedy", 2 * VERY_LONG_TEXT) for _ in range(4)]
    await asyncio.sleep(0.2)
    for tenant in ("other", "greedy"):
        response = await asyncio.wait_for(ask(tenant, 5000), 10)
        assert response.status_code == 200
    assert slow.order == ["short", "short"]
    long.append(ask("other", 2 * VERY_LONG_TEXT))
    await asyncio.sleep(0.2)
    slow.gate.set()
    responses = await asyncio.gather(*long)
    assert [response.status_code for response in responses] == [200] * 5
    assert slow.order[2:].index("other") <= 2


async def test_too_many_long_prompts_are_refused_with_a_time_to_come_back(
    app: App, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.models["tiny"] = info(vocab=1000, context=10**6)
    slow = Slow(app.server.texts["tiny"])
    headers = {"authorization": "Bearer key-greedy"}
    body = chat("greedy", 2 * VERY_LONG_TEXT)
    tasks = [asyncio.create_task(client.post(CHAT, json=body, headers=headers)) for _ in range(12)]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        response = task.result()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
    slow.gate.set()
    statuses = [response.status_code for response in await asyncio.gather(*tasks)]
    assert statuses.count(503) == 3  # one runs, and 8 of one tenant may wait
