"""A refusal leaves nothing behind that only the garbage collector would find: memory stays flat."""

from __future__ import annotations

import asyncio
import gc
import json
from types import CoroutineType, FrameType, TracebackType
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from stretto.server.app import App
from stretto.server.state import Call
from stretto.types import Reason
from tests.server.conftest import CHAT, HELLO
from tests.server.fake_engine import FakeEngine

LONG = "The quick fox. " * 20_000
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" + "1," * 50_000}}
REFUSED: dict[str, Any] = {
    "long prompt": {"messages": [{"role": "user", "content": LONG}]},
    "wrong value": {"service_tier": LONG},
    "unknown field": {"messages": [{"role": "user", "content": LONG}], "x": 1},
    "long list": {"stop_token_ids": [1] * 100_000},
    "arguments": {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
    "deep": {
        "messages": [{"role": "user", "content": LONG}],
        "chat_template_kwargs": {"a": [[[[1]]]] * 30_000},
    },
    "unknown model": {"messages": [{"role": "user", "content": LONG}], "model": "x"},
    "variable": {"messages": [{"role": "user", "content": LONG}], "chat_template_kwargs": {"colour": 1}},
    "not json": None,
}

HOLDERS = (BaseException, FrameType, TracebackType, CoroutineType, Call, Request, asyncio.Future)


def left() -> list[str]:
    """The objects of a request among those that are unreachable but not freed."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [repr(each)[:80] for each in gc.garbage if isinstance(each, HOLDERS)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize("name", REFUSED)
async def test_a_refusal_leaves_no_cycle_that_keeps_the_body(
    app: App, client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    content = b'{"user":"%s' % LONG.encode() if REFUSED[name] is None else json.dumps(HELLO | REFUSED[name])
    await client.post(CHAT, content=content)
    gc.collect()
    gc.disable()
    try:
        response = await client.post(CHAT, content=content)
        assert 400 <= response.status_code < 500
        del response
        assert left() == []
    finally:
        gc.enable()


async def test_an_error_of_the_engine_leaves_no_cycle(
    app: App, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [5, Reason.ERROR]
    body = HELLO | {
        "metadata": {"a": "b"},
        "user": "u" * 1000,
        "messages": [{"role": "user", "content": "Hi" * 90}],
    }
    gc.collect()
    gc.disable()
    try:
        for stream in (False, True):
            await client.post(CHAT, json=body | {"stream": stream})
        assert left() == []
    finally:
        gc.enable()
