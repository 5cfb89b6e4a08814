"""The supervision of a real engine process: failing starts, an engine that hangs, requests that break it."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from stretto.config import EngineConfig, ModelConfig
from stretto.engine import client as supervision
from stretto.engine.client import EngineClient, Stream
from stretto.errors import EngineDied, EngineStalled, StartError, Unavailable
from stretto.types import Grammar, Objective, Reason, Request, Sampling, TokenEvent

TIMEOUT_S = 4.0


@asynccontextmanager
async def running(path: str = "null:5", **settings: Any) -> AsyncGenerator[EngineClient]:
    model = ModelConfig(name="null", path=path)
    client = EngineClient(EngineConfig(models=(model,), engine_timeout_s=TIMEOUT_S, **settings))
    await client.start()
    await client.wait_ready()
    try:
        yield client
    finally:
        await client.shutdown(1.0)


def request(client: EngineClient, **fields: Any) -> Request:
    sampling = fields.pop("sampling", Sampling(max_tokens=fields.pop("max_tokens", 5), seed=7))
    every: dict[str, Any] = {
        "model": "null",
        "prompt": (1, 2, 3),
        "arrival": time.monotonic(),
        "sampling": sampling,
        **fields,
    }
    return Request(id=client.next_id(), **every)


async def read(stream: Stream) -> list[TokenEvent]:
    return [event async for events in stream for event in events]


async def until(condition: Callable[[], object], seconds: float = 20.0) -> float:
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
    return time.monotonic() - began


async def answers(client: EngineClient) -> bool:
    return len(await read(client.submit(request(client)))) == 6


def kill(client: EngineClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)


async def test_a_removed_folder_is_made_anew_for_the_next_engine() -> None:
    async with running() as client:
        (folder,) = {Path(client._folder.path)}  # pyright: ignore[reportPrivateUsage]
        shutil.rmtree(folder)
        kill(client)
        await until(lambda: client.restarts == 1 and client.ready)
        assert await answers(client)


async def test_a_restart_without_descriptors_is_tried_again_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running() as client:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            kill(client)
            await until(lambda: client.health().failures >= 2)
            health = client.health()
            assert (health.state, client.ready) == ("restarting", False)
            assert "Too many open files" in health.reason
            with pytest.raises(EngineDied, match="Too many open files"):
                client.submit(request(client))
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: client.ready)
        assert await answers(client) and client.health().failures == 0
    assert caplog.text.count("cannot be started") >= 2


async def test_many_failures_in_a_row_are_told_and_starts_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, failing = supervision.ChildProcess.start, True

    async def fail(*arguments: Any) -> Any:
        if failing:
            raise OSError("no more processes")
        return await start(*arguments)

    monkeypatch.setattr(supervision, "RESTART_S", (0.0, 0.01))
    async with running() as client:
        monkeypatch.setattr(supervision.ChildProcess, "start", fail)
        kill(client)
        await until(lambda: client.health().failures >= supervision.FAILING)
        assert client.health().state == "failing"
        assert "no more processes; " in client.health().reason
        assert "starts in a row have failed" in client.health().reason
        failing = False
        await until(lambda: client.ready)
        assert (client.health().state, client.health().failures) == ("ready", 0)
    assert caplog.text.count("no more processes") >= supervision.FAILING


async def test_a_first_start_that_fails_is_a_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> Any:
        raise OSError("no more processes")

    monkeypatch.setattr(supervision.ChildProcess, "start", fail)
    client = EngineClient(EngineConfig(models=(ModelConfig(name="null", path="null"),)))
    with pytest.raises(StartError, match="no more processes"):
        await client.start()
    await client.shutdown(0.0)


async def test_closing_during_a_pause_does_not_wait_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "RESTART_S", (60.0,))
    async with running() as client:
        kill(client)
        await until(lambda: client.health().state == "restarting")
        began = time.monotonic()
    assert time.monotonic() - began < 2.0


async def test_a_stopped_engine_is_noticed_and_its_streams_go_on_when_it_wakes() -> None:
    async with running() as client:
        begun = client.submit(request(client, max_tokens=400))
        await anext(begun)
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            reject = Objective(ttft_ms=60_000, on_miss="reject")
            unbegun = [client.submit(request(client, objective=each)) for each in (reject, Objective())]
            assert await until(lambda: not client.ready) < 2.0
            assert client.health().state == "stalled"
            assert "has not responded for" in client.health().reason
            with pytest.raises(EngineStalled, match="has not responded"):
                client.submit(request(client))
            with pytest.raises(EngineStalled):
                await read(unbegun[0])
        finally:
            os.kill(pid, signal.SIGCONT)
        assert len(await read(begun)) >= 398 and len(await read(unbegun[1])) == 6
        await until(lambda: client.ready)
        assert client.pid == pid and client.restarts == 0 and await answers(client)


async def test_streams_of_an_engine_that_hangs_end_in_a_typed_error_and_a_new_one_starts() -> None:
    async with running() as client:
        streams = [client.submit(request(client, max_tokens=8000)) for _ in range(8)]
        for stream in streams:
            await anext(stream)
        pid = client.pid
        assert pid is not None
        stopped = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        for stream in streams:
            with pytest.raises(EngineStalled, match="has not responded for 4 s and was stopped"):
                await read(stream)
        assert TIMEOUT_S - 1 < time.monotonic() - stopped < TIMEOUT_S + 3
        await until(lambda: client.ready)
        assert client.pid != pid and await answers(client)


async def test_a_long_step_is_no_stall() -> None:
    async with running("null:3000") as client:
        stream = client.submit(request(client, max_tokens=1))
        seen: set[bool] = set()
        reading = asyncio.create_task(read(stream))
        while not reading.done():
            seen.add(client.ready)
            await asyncio.sleep(0.05)
        assert seen == {True} and len(reading.result()) == 2


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"prompt": (1, 4096)}, "0 to 4095"),
    ({"prompt": (-1,)}, "0 to 4095"),
    ({"prompt": (1,) * 9000}, "9000 tokens"),
    ({"prompt": ()}, "0 tokens"),
    ({"sampling": Sampling(grammar=Grammar("regex", "a+"))}, "no tokenizer"),
    ({"sampling": Sampling(grammar=Grammar("json_object"))}, "no tokenizer"),
]


async def test_a_request_that_the_model_cannot_run_ends_alone() -> None:
    async with running() as client:
        neighbour = client.submit(request(client, max_tokens=40))
        await anext(neighbour)
        for fields, message in BROKEN:
            (event,) = await read(client.submit(request(client, **fields)))
            assert event.finish is not None and event.finish.reason is Reason.INVALID
            assert event.finish.error is not None and message in event.finish.error
        assert len(await read(neighbour)) >= 39 and client.restarts == 0


async def test_a_request_that_does_not_decode_ends_alone() -> None:
    """The server and the engine are one release, so this needs a bug; it must not end the engine."""
    async with running() as client:
        broken: Any = replace(request(client), task="dream")  # pyright: ignore[reportArgumentType]
        stream = client.submit(broken)
        (event,) = await read(stream)
        assert event.finish is not None and event.finish.reason is Reason.ERROR
        assert await answers(client) and client.restarts == 0


async def test_a_request_that_cannot_be_sent_leaves_no_stream() -> None:
    async with running() as client:
        with pytest.raises(UnicodeEncodeError):
            client.submit(request(client, salt="\ud83d"))
        assert client.worker_state().active == 0 and await answers(client)


async def test_the_gauges_are_true_when_all_clients_have_left() -> None:
    async with running() as client:
        (info,) = client.models.values()
        assert client.worker_state().blocks_free == info.blocks, "before the first step"
        streams = [client.submit(request(client, max_tokens=8000)) for _ in range(8)]
        for stream in streams:
            await anext(stream)
        assert client.worker_state().running == 8
        for stream in streams:
            stream.close()
        await until(lambda: client.worker_state().running == 0)
        state = client.worker_state()
        assert (state.running, state.waiting, state.blocks_free) == (0, 0, info.blocks)


async def test_a_message_that_breaks_an_observer_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(_: object) -> None:
        raise RuntimeError("a bug")

    async with running() as client:
        client.subscribe(breaks)
        assert await answers(client)
    assert "could not be handled" in caplog.text


async def test_a_reload_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of a running server was removed: its own sentence is the reason, not an exit code."""
    monkeypatch.setattr(supervision, "RESTART_S", (0.0, 0.05))
    async with running() as client:
        gone = ModelConfig(name="null", path=str(tmp_path))
        client._config = replace(client._config, models=(gone,))  # pyright: ignore[reportPrivateUsage]
        kill(client)
        await until(lambda: client.health().failures >= 1 and client.health().state == "restarting")
        assert "config.json is missing" in client.health().reason
        with pytest.raises(Unavailable, match=r"config\.json is missing"):
            client.submit(request(client))
