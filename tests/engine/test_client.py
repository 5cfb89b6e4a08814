"""The engine process and its client over the null model: start, crash, restart and shutdown."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from errno import ENOSPC
from pathlib import Path

import msgspec
import pytest

from stretto.config import TIERS, EngineConfig, ModelConfig, Tier
from stretto.engine.client import EngineClient, Stream
from stretto.engine.kv_cache import BlockPool
from stretto.engine.scheduler.admission import Outlook, snapshot
from stretto.engine.scheduler.default_tiers import default_tiers
from stretto.engine.scheduler.types import History, Limits, Queues, SchedulingContext
from stretto.engine.step_time import StepCost, StepTime
from stretto.errors import EngineDied, StartError
from stretto.types import Objective, Reason, Request, Sampling, TokenEvent

NULL = EngineConfig(models=(ModelConfig(name="null", path="null"),))


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient(NULL)
    await client.start()
    await client.wait_ready()
    yield client
    await client.shutdown(1.0)


def request(client: EngineClient, *, max_tokens: int = 5) -> Request:
    return Request(
        id=client.next_id(),
        model="null",
        prompt=(1, 2, 3),
        arrival=time.monotonic(),
        sampling=Sampling(max_tokens=max_tokens, seed=7),
    )


async def read(stream: Stream) -> list[TokenEvent]:
    return [event async for events in stream for event in events]


async def test_a_request_is_answered_by_the_engine_process(client: EngineClient):
    events = await read(client.submit(request(client)))
    assert [event.token is not None for event in events] == [True] * 5 + [False]
    assert events[-1].finish is not None and events[-1].finish.reason is Reason.LENGTH
    assert client.worker_state().active == 0 and client.worker_state().steps >= 5


async def test_the_tiers_of_a_slow_machine_come_from_the_engine_that_knows_its_step_times():
    slow = ModelConfig(name="null", path="null:38:1.5:2.9")
    config = EngineConfig(models=(slow,), tiers={"default": Objective(ttft_ms=900)})
    client = EngineClient(config)
    assert client.tiers["priority"] == TIERS["priority"], "nothing is known of the machine yet"
    await client.start()
    await client.wait_ready()
    try:
        promised = default_tiers([StepCost(38.0, 1.5, 2.9)])
        assert client.tiers == promised | {"default": Tier(objective=Objective(ttft_ms=900), weight=2.0)}
        assert (promised["priority"].objective.ttft_ms or 0) > 35_000
        told = client.worker_state().objectives
        assert told == {name: tier.objective for name, tier in client.tiers.items()}
    finally:
        await client.shutdown(1.0)


async def test_the_engine_learns_what_was_refused_before_it_came(client: EngineClient):
    await read(client.submit(request(client)))
    impossible = Objective(ttft_ms=0.001, on_miss="reject")
    asked = msgspec.structs.replace(request(client), prompt=(1,) * 4000, objective=impossible)
    (refused,) = await read(client.submit(asked))
    assert refused.finish is not None and refused.finish.reason is Reason.REFUSED
    assert client.snapshots()["null"].backlog.turns_away == ()
    await read(client.submit(request(client)))
    assert client.snapshots()["null"].backlog.turns_away == (TIERS["default"].weight,)


async def test_concurrent_requests_are_batched_into_shared_steps(client: EngineClient):
    seen: list[int] = []
    client.subscribe(lambda step: seen.append(step.running))
    answers = await asyncio.gather(*(read(client.submit(request(client, max_tokens=50))) for _ in range(100)))
    assert {len(events) for events in answers} == {51}
    assert max(seen) > 10


async def test_closing_a_stream_stops_its_decoding(client: EngineClient):
    stream = client.submit(request(client, max_tokens=8000))
    await anext(stream)
    stream.close()
    stream.close()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    steps = -1
    while steps != client.worker_state().steps:
        steps = client.worker_state().steps
        await asyncio.sleep(0.1)
    assert steps < 8000


async def test_a_killed_engine_fails_its_streams_at_once_and_restarts(client: EngineClient):
    streams = [client.submit(request(client, max_tokens=8000)) for _ in range(20)]
    for stream in streams:
        await anext(stream)
    first = client.pid
    assert first is not None
    killed = time.monotonic()
    os.kill(first, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineDied, match="exit code -9"):
            await read(stream)
    assert time.monotonic() - killed < 1.0
    assert not client.ready
    with pytest.raises(EngineDied):
        client.submit(request(client))
    while not client.ready:
        await asyncio.sleep(0.05)
    assert client.pid != first and client.restarts == 1
    assert len(await read(client.submit(request(client)))) == 6


async def test_an_engine_that_cannot_load_reports_the_reason(tmp_path: Path):
    client = EngineClient(EngineConfig(models=(ModelConfig(name="x", path=str(tmp_path)),)))
    await client.start()
    with pytest.raises(StartError, match=r"config\.json"):
        await client.wait_ready()
    await client.shutdown(1.0)


def test_a_full_disk_is_a_start_error(monkeypatch: pytest.MonkeyPatch):
    def full(**_: str) -> str:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(StartError, match="No space left on device; free some space, or set TMPDIR"):
        EngineClient(NULL)


async def test_shutting_down_while_loading_leaves_no_process():
    client = EngineClient(NULL)
    await client.start()
    pid = client.pid
    assert pid is not None
    await client.shutdown(1.0)
    assert not Path(f"/proc/{pid}").exists()


ORPHAN = """
import asyncio, sys
from stretto.config import TIERS, EngineConfig, ModelConfig
from stretto.engine.scheduler.admission import Outlook, snapshot
from stretto.engine.client import EngineClient

async def main():
    client = EngineClient(EngineConfig(models=(ModelConfig(name="null", path="null"),)))
    await client.start()
    await client.wait_ready()
    sys.stdout.write(f"{client.pid}\\n")
    sys.stdout.flush()
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_the_engine_exits_when_the_api_server_is_killed():
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        engine = int(server.stdout.readline())
        assert Path(f"/proc/{engine}").exists()
        server.kill()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{engine}").exists() and "(zombie)" not in Path(f"/proc/{engine}/status").read_text():
        assert time.monotonic() < deadline, "the engine outlived its server"
        time.sleep(0.02)


async def test_an_infeasible_request_is_refused_while_a_step_is_running():
    model = ModelConfig(name="null", path="null:300")
    client = EngineClient(EngineConfig(models=(model,), schedule="deadline"))
    await client.start()
    await client.wait_ready()
    infeasible = Objective(ttft_ms=100, on_miss="reject")
    try:
        running = client.submit(request(client, max_tokens=3))
        await anext(running)  # The next step is running and takes 300 ms.
        steps = client.worker_state().steps
        submitted = msgspec.structs.replace(request(client), objective=infeasible)
        stream = client.submit(submitted)
        (event,) = await anext(stream)
        assert client.worker_state().steps == steps and client.worker_state().active == 1
        assert event.finish is not None and event.finish.reason is Reason.REFUSED
        assert event.finish.retry_after is not None and event.finish.output_tokens == 0
        late = msgspec.structs.replace(submitted, id=client.next_id(), objective=Objective(ttft_ms=100))
        events = await read(client.submit(late))
        began, answered = events[0].began, events[-1].finish
        assert answered is not None and answered.reason is Reason.LENGTH and answered.late
        assert began is not None and began.forecast_ms is not None and began.forecast_ms >= 0
        await read(running)
    finally:
        await client.shutdown(1.0)


async def test_a_stream_reports_the_predicted_work_of_its_request():
    """Quotas are charged with this figure. A refused request counts as no work."""
    model = ModelConfig(name="null", path="null:5")
    client = EngineClient(EngineConfig(models=(model,), schedule="deadline"))
    await client.start()
    await client.wait_ready()
    try:
        await read(client.submit(request(client)))
        submitted = request(client)
        stream = client.submit(submitted)
        await read(stream)
        assert stream.work_ms > 0
        infeasible = Objective(ttft_ms=1e-6, on_miss="reject")
        refused = client.submit(msgspec.structs.replace(submitted, id=client.next_id(), objective=infeasible))
        await read(refused)
        assert refused.work_ms == 0
    finally:
        await client.shutdown(1.0)


async def test_the_forecast_counts_requests_sent_since_the_last_snapshot():
    """Each request sent reduces the capacity left for the next one, before the engine reports a snapshot."""
    outlook = Outlook(TIERS)
    history = History(StepTime(StepCost(base=10.0, per_prefill=1.0)))
    context = SchedulingContext("null", Queues(), BlockPool(64, 16), Limits(16, 512), history, 0.0)
    outlook.see(snapshot(context, 0))
    promised = 0
    for ident in range(1, 20):
        submitted = Request(
            id=ident, model="null", prompt=(1,) * 100, arrival=0.0, objective=Objective(ttft_ms=500)
        )
        forecast = outlook.forecast(submitted, 0.0)
        assert forecast is not None
        promised += forecast.feasible
        if forecast.feasible:
            outlook.sent(submitted)
    assert 1 <= promised <= 5
    outlook.see(snapshot(context, 19))
    forecast = outlook.forecast(submitted, 0.0)
    assert forecast is not None and forecast.feasible and forecast.queue_ms == 0.0
