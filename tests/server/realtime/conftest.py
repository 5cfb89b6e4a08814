"""A client of `/v1/realtime` on a real server with a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.server.conftest import (
    Served,
    app,
    checkpoint,
    client,
    config,
    engine,
    ids_of,
    served,
    set_answer,
    text,
)
from tests.server.fake_engine import FakeEngine

__all__ = ["app", "checkpoint", "client", "config", "engine", "ids_of", "served", "set_answer", "text"]
Opener = Callable[..., Any]


@dataclass
class Talk:
    """One open session. `seen` has all events so far."""

    socket: ClientConnection
    seen: list[dict[str, Any]] = field(default_factory=list[Any])

    async def send(self, type: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": type, **fields}))

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(20):
            event: dict[str, Any] = json.loads(await self.socket.recv())
        self.seen.append(event)
        return event

    async def until(self, type: str) -> dict[str, Any]:
        """The next event of that type."""
        while (event := await self.next())["type"] != type:
            pass
        return event

    async def answer(self) -> dict[str, Any]:
        """The response that ends next."""
        response: dict[str, Any] = (await self.until("response.done"))["response"]
        return response

    async def say(self, text: str, role: str = "user", **fields: Any) -> None:
        kind = "output_text" if role == "assistant" else "input_text"
        item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **fields}
        await self.send("conversation.item.create", item=item)

    async def type(self, text: str) -> None:
        """Appends to the message that is being typed, a word at a time."""
        for word in text.split(" "):
            await self.send("input_text.append", text=word + " ")

    async def error(self) -> dict[str, Any]:
        error: dict[str, Any] = (await self.until("error"))["error"]
        return error

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.seen]


@pytest.fixture
def open_session(served: Served) -> Opener:
    """A function that opens a session; an async context manager."""

    @asynccontextmanager
    async def opened(query: str = "", greeted: bool = True, **options: Any) -> AsyncIterator[Talk]:
        url = f"ws://127.0.0.1:{served.port}/v1/realtime{query}"
        async with connect(url, compression=None, **options) as socket:
            talk = Talk(socket)
            if greeted:
                assert (await talk.next())["type"] == "session.created"
                assert (await talk.next())["type"] == "conversation.created"
            yield talk

    return opened


@pytest.fixture
async def talk(open_session: Opener) -> AsyncIterator[Talk]:
    async with open_session() as opened:
        yield opened


async def settled(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds. Fails after 20 s."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def reads(engine: FakeEngine) -> list[Any]:
    """The requests that only compute a prompt."""
    return [request for request in engine.requests if request.spare_time]


def answers(engine: FakeEngine) -> list[Any]:
    return [request for request in engine.requests if not request.spare_time]
