"""A full disk, no file descriptors and no memory, for each process of a real server under streams.

Run with `-s` to see the figures: how each stream ended, and what became of other requests.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import subprocess
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.load import BODY, STREAMS, show, streams
from tests.server_process import ServerProcess, serving
from tests.telemetry.test_log import TIME

pytestmark = pytest.mark.slow
CHAT = "/v1/chat/completions"
BRIEF = {"max_tokens": 100}  # at 20 ms each
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    environ = {"STRETTO_ACCESS_LOG": "true"}
    with serving(tmp_path_factory.mktemp("chaos"), "null=null:20", environ=environ) as started:
        yield started


@contextmanager
def limited(pid: int, kind: int, most: int) -> Generator[None]:
    """Limits a running process to `most` of a resource, for a while."""
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, before)


def metric(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return sum(each.value for each in samples if each.name == name)


def virtual_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


async def outcomes(server: ServerProcess, bodies: list[dict[str, Any]]) -> Counter[str]:
    """What became of requests that are sent together: a status, or `cut`."""

    async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        try:
            return str((await client.post(CHAT, json=body)).status_code)
        except httpx.TimeoutException:
            return "hung"
        except httpx.TransportError:
            return "cut"

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:
        return Counter(await asyncio.gather(*(one(client, body) for body in bodies)))


async def test_a_full_disk_for_the_logs_costs_lines_and_no_request(server: ServerProcess) -> None:
    """Neither process can make a file longer than the log already is. The lost lines are counted."""
    lost = metric(server, "stretto_access_log_dropped_total")
    size = server.log.stat().st_size + 500
    with (
        limited(server.process.pid, resource.RLIMIT_FSIZE, size),
        limited(server.engine, resource.RLIMIT_FSIZE, size),
    ):
        async with streams(server, BRIEF) as seen:
            answered = await outcomes(server, [BODY | {"max_tokens": 2}] * 100)
        await asyncio.sleep(0.2)
        assert server.log.stat().st_size <= size
    lost = metric(server, "stretto_access_log_dropped_total") - lost
    ends = Counter(each.ended for each in seen)
    show(f"a full disk for the logs: {answered}, streams {ends}, {lost:g} lines lost")
    assert answered == {"200": 100}
    assert [each.ended for each in seen] == ["done"] * STREAMS
    assert lost > 100
    await outcomes(server, [BODY | {"max_tokens": 2, "user": "u"}])
    await asyncio.sleep(0.2)
    assert server.log.read_text().splitlines()[-1].startswith('{"time"'), "a whole line again"


async def test_without_file_descriptors_streams_go_on_and_the_engine_comes_back_afterwards(
    server: ServerProcess,
) -> None:
    """100 connections come while the server can open 8 more files. Then the engine dies, too."""
    pid, engine = server.process.pid, server.engine
    async with streams(server, BRIEF) as seen:
        with limited(pid, resource.RLIMIT_NOFILE, len(os.listdir(f"/proc/{pid}/fd")) + 8):
            port = int(server.url.rpartition(":")[2])
            opening = (asyncio.open_connection("127.0.0.1", port) for _ in range(100))
            opened = [asyncio.create_task(each) for each in opening]
            await asyncio.sleep(1)
            while any(not each.ended_at for each in seen):
                await asyncio.sleep(0.05)
            os.kill(engine, 9)
            await asyncio.sleep(2)
            writers = [each.result()[1] for each in opened if each.done() and not each.exception()]
            for each in opened:
                each.cancel()
            for writer in writers:
                writer.close()
    ready = await asyncio.to_thread(server.wait_ready)
    answered = await outcomes(server, [BODY | {"max_tokens": 2}] * 100)
    show(
        f"no descriptors: {Counter(each.ended for each in seen)}, ready {ready:.1f} s later, then {answered}"
    )
    assert [each.ended for each in seen] == ["done"] * STREAMS
    assert server.engine != engine
    assert answered == {"200": 100}


@pytest.mark.parametrize("spare", [2, 16])
async def test_a_server_without_memory_answers_or_refuses_and_recovers(
    server: ServerProcess, spare: int
) -> None:
    """40 requests of 4 MB come while the server may take only `spare` MiB more. None may hang."""
    pid = server.process.pid
    large = BODY | {"messages": [{"role": "user", "content": "word " * 800_000}]}
    async with streams(server, BRIEF) as seen:
        with limited(pid, resource.RLIMIT_AS, virtual_bytes(pid) + spare * MEBIBYTE):
            answered = await outcomes(server, [large] * 40)
    after = await outcomes(server, [BODY | {"max_tokens": 2}] * 50)
    ends = Counter(each.ended for each in seen)
    show(f"{spare} MiB more for the server: {answered}, streams {ends}, afterwards {after}")
    assert server.process.poll() is None, server.log.read_text()[-5000:]
    assert answered.keys() <= {"200", "400", "503", "cut"} and sum(answered.values()) == 40
    assert ends["done"] >= STREAMS - 2
    assert after == {"200": 50}


@contextmanager
def full_disk(folder: Path) -> Generator[tuple[dict[str, str], list[str]]]:
    """Environment and command of a server whose cache is on a full disk. Where nothing can be mounted, no
    file of it may be larger than a page."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", folder], capture_output=True)
    try:
        yield {"XDG_CACHE_HOME": str(folder)}, ["prlimit", "--fsize=4096"] if mounted.returncode else []
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)


async def test_a_full_disk_for_the_caches_and_an_engine_without_memory_hurt_no_request(
    tmp_path: Path,
) -> None:
    """The bundled model with quantised weights, which are kept in the cache if they can be."""
    cache = tmp_path / "cache"
    cache.mkdir()
    asked = {"messages": [{"role": "user", "content": "What is 22.53 + 32.62?"}], "max_tokens": 8}
    long = {
        "messages": [{"role": "user", "content": "What is 22.53 + 32.62? " * 40}],
        "max_tokens": 64,
        "n": 4,
    }
    with (
        full_disk(cache) as (environ, command),
        serving(tmp_path, "desk", "--quantise", "int8", command=command, environ=environ) as server,
    ):
        log = server.log.read_text()
        assert re.search(rf"^{TIME} warning engine \S+: .*(not kept|cannot be stored)", log, re.MULTILINE), (
            log
        )
        first = await outcomes(server, [asked] * 20)
        engine = server.engine
        with limited(engine, resource.RLIMIT_AS, virtual_bytes(engine)):
            tight = await outcomes(server, [long] * 20)
        await asyncio.to_thread(server.wait_ready)
        after = await outcomes(server, [asked] * 20)
        show(f"a full disk for the cache: {first}; an engine without memory: {tight}, afterwards {after}")
    assert first == after == {"200": 20}
    assert "hung" not in tight and tight.keys() <= {"200", "500", "503"}
