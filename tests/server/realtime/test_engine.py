"""Reading ahead with a real model: the answer is the same, and only the tail of its prompt is left."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.server.realtime.conftest import Talk
from tests.server_process import serving

pytestmark = pytest.mark.slow
WORDS = (
    "please order number help refund late box blue small when where thanks deliver street paid twice".split()
)
LONG = " ".join(random.Random(3).choices(WORDS, k=300))

MODEL = "desk"


def socket_of(url: str, model: str = "") -> Any:
    wanted = f"?model={model}" if model else ""
    return connect(url.replace("http", "ws") + f"/v1/realtime{wanted}", compression=None)


async def read(talk: Talk, least: int) -> int:
    """Waits until so many tokens of the prompt are read; returns how many."""
    while (tokens := (await talk.until("input_text.read"))["tokens"]) < least:
        pass
    return tokens


async def test_a_typed_prompt_has_the_same_answer_and_is_read_once(desk_url: str) -> None:
    unhurried = {"ttft_ms": 60_000, "itl_ms": 20_000}
    options = {"temperature": 0.0, "max_output_tokens": 24, "objective": unhurried}
    async with (
        socket_of(desk_url, MODEL) as socket,
        httpx.AsyncClient(base_url=desk_url, timeout=60) as client,
    ):
        talk = Talk(socket)
        await talk.send("session.update", session={"type": "realtime", "instructions": "Be kind.", **options})
        for word in LONG.split(" "):
            await talk.send("input_text.append", text=word + " ")
        await talk.send("input_text.replace", text="Finally", start=len(LONG) - 12)
        body = {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": LONG[: len(LONG) - 12] + "Finally"},
            ],
        }
        count = (await client.post("/tokenize", json=body)).json()["count"]
        tokens = await read(talk, count - 60)
        await talk.send("input_text.commit")
        response = await talk.answer()
        usage = response["usage"]
        assert usage["input_tokens"] == count
        cached = usage["input_token_details"]["cached_tokens"]
        assert count - 60 <= tokens <= cached < count
        body["model"] = response["stretto"]["variant"]
        posted = await client.post(
            "/v1/chat/completions", json={**body, "temperature": 0.0, "max_tokens": 24}
        )
        answer = posted.json()
        assert answer["choices"][0]["message"]["content"] == response["output"][0]["content"][0]["text"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "sessions share with nobody"


async def test_a_closed_socket_costs_no_step(desk_url: str) -> None:
    async with httpx.AsyncClient(base_url=desk_url, timeout=60) as client:

        async def state() -> dict[str, Any]:
            found: dict[str, Any] = (await client.get("/state")).json()
            return found

        for commit in (False, True):
            async with socket_of(desk_url, MODEL) as socket:
                talk = Talk(socket)
                await talk.send("input_text.append", text=LONG)
                if commit:
                    await talk.send("input_text.commit", response={"max_output_tokens": 1500})
                    await talk.until("response.output_text.delta")
                socket.transport.abort()
            async with asyncio.timeout(30):
                while "stretto_realtime_sessions 0.0" not in (await client.get("/metrics")).text:
                    await asyncio.sleep(0.02)
            steps = (await state())["steps"]
            await asyncio.sleep(1.0)
            now = await state()
            assert (now["active"], now["running"], now["waiting"]) == (0, 0, 0)
            assert now["steps"] - steps <= 1, "but for the step that ran when it closed"


async def test_the_engine_dies_and_the_server_drains(tmp_path: Path) -> None:
    slow = ["null:20", "--port", "0", "--drain", "20"]
    with serving(tmp_path, *slow) as server:
        async with socket_of(server.url) as socket:
            talk = Talk(socket)
            await talk.send("input_text.append", text=LONG)
            await talk.send("input_text.commit", response={"max_output_tokens": 2000})
            await talk.until("response.output_text.delta")
            await asyncio.to_thread(server.signal_engine, signal.SIGKILL)
            error = await talk.error()
            assert (error["code"], error["type"]) == ("engine_died", "unavailable_error")
            assert (await talk.answer())["status"] == "failed"
            await asyncio.to_thread(server.wait_ready)
            await talk.send("input_text.append", text=LONG)
            await talk.until("input_text.read")
            await talk.send("input_text.commit", response={"max_output_tokens": 60})
            await talk.until("response.output_text.delta")
            server.process.send_signal(signal.SIGTERM)
            assert (await talk.answer())["status_details"]["reason"] == "max_output_tokens", "it may end"
            assert (await talk.error())["code"] == "draining"
            with pytest.raises(ConnectionClosed):
                await talk.next()
            assert socket.close_code == 1001
        assert await asyncio.to_thread(server.process.wait, 30) == 0
