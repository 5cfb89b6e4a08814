"""The process of the API server, and its engine, get signals under streams of a real server.

Run with `-s` to see the figures: how each stream ended, and how soon.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.load import STREAMS, show, streams
from tests.server_process import ServerProcess, Streamed, serving
from tests.telemetry.test_log import LINE

pytestmark = pytest.mark.slow
STOPPED_S = 3.0
PATIENCE_S = 4  # after which an engine that does not respond is replaced
BRIEF = {"max_tokens": 60}  # at 20 ms each


def ends(seen: list[Streamed]) -> Counter[str]:
    return Counter(each.ended for each in seen)


async def engine_gone(pid: int, seconds: float) -> float:
    """Wait until a process has ended; returns the seconds that it took."""
    began = time.monotonic()
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < began + seconds, "the engine outlived its server"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    environ = {"STRETTO_ENGINE_TIMEOUT": f"{PATIENCE_S}"}
    with serving(tmp_path_factory.mktemp("chaos"), "null=null:20", environ=environ) as started:
        yield started


async def test_streams_go_on_after_the_server_was_stopped(server: ServerProcess) -> None:
    engine = server.engine
    async with streams(server, BRIEF) as seen:
        server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(STOPPED_S)
        server.process.send_signal(signal.SIGCONT)
    show(f"SIGSTOP of the server for {STOPPED_S:g} s under {STREAMS} streams: {dict(ends(seen))}")
    assert ends(seen) == {"done": STREAMS}
    assert max(each.longest_gap for each in seen) > STOPPED_S / 2, "the server was stopped while it answered"
    assert server.engine == engine, "the engine was not restarted"


async def test_the_engine_ignores_the_signals_that_a_terminal_sends_to_all(server: ServerProcess) -> None:
    engine = server.engine
    async with streams(server, BRIEF) as seen:
        server.signal_engine(signal.SIGTERM)
        server.signal_engine(signal.SIGINT)
    assert ends(seen) == {"done": STREAMS}
    assert server.engine == engine


async def test_streams_of_an_engine_that_stays_stopped_end_typed_and_it_is_replaced(
    server: ServerProcess,
) -> None:
    engine = server.engine
    async with streams(server) as seen:
        stopped = time.monotonic()
        server.signal_engine(signal.SIGSTOP)
    last = max(each.ended_at for each in seen) - stopped
    recovered = await asyncio.to_thread(server.wait_ready)
    show(
        f"SIGSTOP of the engine for ever: {dict(ends(seen))} after {last:.1f} s, "
        f"ready {recovered:.1f} s later"
    )
    assert ends(seen) == {"engine_stalled": STREAMS}
    assert last < PATIENCE_S + 2
    assert server.engine != engine


def test_an_engine_that_is_killed_again_and_again_comes_back(server: ServerProcess) -> None:
    """It is killed when it is ready, and then twice while it loads."""
    engines = [server.engine]
    for _ in range(3):
        server.signal_engine(signal.SIGKILL)
        server.wait_for("/state", lambda _, state: state["engine_pid"] not in (None, *engines))
        engines.append(server.engine)
    took = server.wait_ready(60)
    show(f"three kills, two of them while the engine loads: ready again after {took:.1f} s")
    lines = [line for line in server.log.read_text().splitlines() if "starting it again" in line]
    assert len(lines) >= 3 and all(re.fullmatch(LINE, line) for line in lines), lines


async def test_a_terminated_server_finishes_what_it_can_and_ends_the_rest_typed(tmp_path: Path) -> None:
    """It may take three seconds. Half of the streams are short enough for that."""
    with serving(tmp_path, "null=null:20", "--drain", "3") as server:
        engine = server.engine
        async with streams(server) as long, streams(server, BRIEF) as brief:
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
        code = await asyncio.to_thread(server.process.wait, 15)
        took = time.monotonic() - began
        await engine_gone(engine, 2)
        show(
            f"SIGTERM of the server: {dict(ends(brief))}, {dict(ends(long))}, "
            f"exit code {code} after {took:.1f} s"
        )
    assert ends(long) == {"draining": STREAMS}
    assert ends(brief).keys() <= {"done", "draining"} and ends(brief)["done"] > 0
    assert code == 0


async def test_a_killed_server_cuts_its_streams_at_once_and_takes_its_engine_with_it(tmp_path: Path) -> None:
    with serving(tmp_path, "null=null:20") as server:
        engine = server.engine
        async with streams(server) as seen:
            killed = time.monotonic()
            server.process.kill()
        gone = await engine_gone(engine, 5)
        last = max(each.ended_at for each in seen) - killed
        show(
            f"kill -9 of the server: {dict(ends(seen))} after {last:.2f} s, "
            f"the engine ended {gone:.2f} s later"
        )
    assert ends(seen) == {"cut": STREAMS}
    assert last < 2.0
