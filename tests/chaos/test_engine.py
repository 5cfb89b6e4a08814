"""The engine process is killed and stopped under streams of a real server.

Run with `-s` to see the figures: how each stream ended, how soon, and how long the recovery took.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.load import BODY, STREAMS, show, streams
from tests.server_process import ServerProcess, Streamed, serving, stream

pytestmark = pytest.mark.slow

STOPPED_S = 10.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serving(tmp_path_factory.mktemp("chaos"), "null=null:20") as started:
        yield started


async def test_all_streams_of_a_killed_engine_end_typed_and_the_server_recovers(
    server: ServerProcess,
) -> None:
    async with streams(server) as seen:
        killed = time.monotonic()
        server.signal_engine(signal.SIGKILL)
    ends = Counter(each.ended for each in seen)
    last = max(each.ended_at for each in seen) - killed
    await asyncio.to_thread(server.wait_for, "/health", lambda _, body: body["engine"]["state"] == "ready")
    recovered = time.monotonic() - killed
    show(
        f"kill -9 under {STREAMS} streams: {dict(ends)}, the last after {last:.2f} s, "
        f"ready in {recovered:.2f} s"
    )
    assert ends == {"engine_died": STREAMS}
    assert last < 2.0


async def test_streams_go_on_after_an_engine_was_stopped(server: ServerProcess) -> None:
    server.wait_ready()
    engine = server.engine
    async with streams(server) as seen:
        stopped = time.monotonic()
        server.signal_engine(signal.SIGSTOP)
        try:
            noticed = await asyncio.to_thread(server.wait_for, "/ready", lambda status, _: status == 503)
            health = (await asyncio.to_thread(server.get, "/health"))[1]
            refusals, slowest = await refused(server)
            await asyncio.sleep(STOPPED_S - (time.monotonic() - stopped))
        finally:
            server.signal_engine(signal.SIGCONT)
    ends = Counter(each.ended for each in seen)
    tokens = [len(each.arrivals) for each in seen]
    show(
        f"SIGSTOP for {STOPPED_S:g} s under {STREAMS} streams: not ready after {noticed:.2f} s, "
        f"new requests {dict(refusals)} within {slowest * 1e3:.0f} ms, then {dict(ends)}, longest gap "
        f"{max(each.longest_gap for each in seen):.2f} s\n{health}"
    )
    assert noticed < 2.0
    assert (health["status"], health["engine"]["state"]) == ("degraded", "stalled")
    assert refusals == {(503, "engine_stalled"): 20} and slowest < 0.5
    assert ends == {"done": STREAMS} and min(tokens) >= BODY["max_tokens"]
    assert server.engine == engine


async def refused(server: ServerProcess) -> tuple[Counter[tuple[int, str]], float]:
    """The answers to 20 new requests, half of them with `on_miss: reject`, and the slowest one's seconds."""
    found: Counter[tuple[int, str]] = Counter()
    slowest = 0.0
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        for number in range(20):
            objective = {"objective": {"ttft_ms": 5000, "on_miss": "reject"}} if number % 2 else {}
            began = time.monotonic()
            response = await client.post("/v1/chat/completions", json=BODY | objective)
            slowest = max(slowest, time.monotonic() - began)
            found[response.status_code, response.json()["error"]["code"]] += 1
    return found, slowest


def test_gauges_are_true_after_all_clients_have_left(server: ServerProcess) -> None:
    server.wait_ready()

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            tasks = [asyncio.create_task(stream(client, BODY, Streamed())) for _ in range(STREAMS)]
            while server.get("/state")[1]["running"] < STREAMS:
                await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(leave())
    server.wait_for("/state", lambda _, state: state["running"] == 0 and state["active"] == 0, 5)
    state = server.get("/state")[1]
    assert state["blocks_free"] == state["blocks_total"]
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'stretto_running_sequences{model="null"} 0.0' in metrics
    assert f'stretto_kv_blocks_free{{model="null"}} {float(state["blocks_total"])}' in metrics


def test_a_grammar_for_a_model_without_a_tokenizer_is_refused_alone(server: ServerProcess) -> None:
    server.wait_ready()
    engine = server.engine
    body = BODY | {"structured_outputs": {"regex": "a+"}}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 400 and "no tokenizer" in response.json()["error"]["message"]
    assert server.engine == engine


def test_the_runtime_folder_of_a_killed_server_is_removed_by_the_next(tmp_path_factory: Any) -> None:
    base: Path = tmp_path_factory.mktemp("t")
    folders: Callable[[], list[Path]] = lambda: list(base.glob("stretto-*"))  # noqa: E731
    environ = {"TMPDIR": str(base), "XDG_RUNTIME_DIR": ""}
    with serving(base, "null=null", environ=environ) as first:
        engine = first.engine
        first.process.kill()
        first.process.wait()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{engine}").exists():
            assert time.monotonic() < deadline, "the engine outlived its server"
            time.sleep(0.02)
        (left,) = folders()
    with serving(base, "null=null", environ=environ):
        (own,) = folders()
        assert own != left
    assert folders() == []
