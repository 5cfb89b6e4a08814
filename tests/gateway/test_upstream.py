"""A connection to a worker whose bytes are passed on as they arrive."""

from __future__ import annotations

import asyncio
import ssl
import time
from functools import partial
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.gateway.upstream import connection
from stretto.gateway.upstream.connection import (
    Address,
    ClosedWhenIdle,
    Pool,
    UpstreamConnection,
    WorkerLost,
)
from stretto.gateway.upstream.progress import Progress
from stretto.protocol.relay import error_mark, mark, variant_mark
from tests.gateway.cluster import ASK, CHAT, in_front, until
from tests.gateway.test_bad_workers import report
from tests.gateway.test_other_servers import WORDS, other, sized, whole, words_of

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"id":"c1","created":7,"choices":[]}\n\n'


class Wire:
    """A transport that does nothing."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


async def answering() -> UpstreamConnection:
    """A connection with a response that has begun."""
    connection = UpstreamConnection()
    connection.connection_made(cast(Any, Wire()))
    asking = asyncio.create_task(connection.exchange(b"GET / HTTP/1.1\r\n\r\n"))
    await asyncio.sleep(0)
    connection.data_received(HEAD)
    assert (await asking).status == 200
    return connection


async def waiting(connection: UpstreamConnection) -> asyncio.Task[bytes]:
    reading = asyncio.create_task(connection.read())
    await asyncio.sleep(0)
    return reading


async def test_what_arrives_goes_past_the_reader_only_while_it_has_all_before():
    connection, taken, willing = await answering(), list[bytes](), [True]

    def take(data: bytes) -> bool:
        if willing[0]:
            taken.append(data)
        return willing[0]

    connection.hand_over(take)
    connection.data_received(chunk(b"a"))  # nobody waits
    assert taken == [] and await connection.read() == b"a"
    reading = await waiting(connection)
    connection.data_received(chunk(b"b") + chunk(b"c"))
    assert taken == [b"bc"] and not reading.done()
    willing[0] = False  # the client's buffer is full
    connection.data_received(chunk(b"d"))
    willing[0] = True  # and empty again, before the reader has run
    connection.data_received(chunk(b"e"))
    assert taken == [b"bc"] and await reading == b"de"
    reading = await waiting(connection)
    connection.data_received(chunk(b"f") + b"0\r\n\r\n")  # the end is the reader's
    assert taken == [b"bc"] and await reading == b"f" and await connection.read() == b""
    assert connection.reusable


async def test_a_malformed_stream_that_is_passed_on_ends_the_exchange():
    connection, progress = await answering(), Progress(lambda: 0.0)
    connection.hand_over(partial(progress.take, lambda data: True))
    reading = await waiting(connection)
    connection.data_received(chunk(EVENT + b":~x y\n\n"))
    with pytest.raises(WorkerLost, match="malformed"):
        await reading
    assert not connection.reusable


@pytest.mark.parametrize("ending", [mark(0, [5], complete=True, last=True), error_mark("draining")])
def test_the_end_of_a_stream_is_seen_wherever_it_is_split(ending: bytes):
    """Whatever completes the last mark is left to the reader, which writes the end of the body."""
    stream = EVENT + mark(0, [4], complete=False, last=False) + EVENT + ending
    for cut in range(1, len(stream)):
        progress, left = Progress(lambda: 0.0), list[bool]()
        for part in (stream[:cut], stream[cut:]):
            left.append(not progress.take(lambda data: True, part))
            if left[-1]:
                progress.push(part)
            assert left[-1] or not (progress.ended or progress.error)
        assert any(left)


def said(index: int, tokens: list[int], *, complete: bool = False, late: bool = False) -> bytes:
    """A mark."""
    return mark(index, tokens, complete=complete, last=False, late=late)


PARTS = [
    EVENT + said(0, [4]),
    EVENT + said(0, [5, 61]),
    (EVENT + said(0, [7])) * 3,
    b"event: a\n" + EVENT + said(0, [8]) + EVENT + said(0, [9]),
    EVENT + said(0, [10]) + said(0, [11], late=True),
    EVENT + said(1, [12]) + EVENT + said(0, [13]),
    said(0, [14]) + said(0, [15]),
    b": a comment\n\n" + EVENT + said(0, [16], complete=True),
    EVENT + said(0, []) + EVENT + said(0, [17]),
    b"\n\n" + EVENT + variant_mark(1, "m:int8") + EVENT + said(1, [18]),
]  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6), st.integers(0, 40))
def test_a_stream_that_is_taken_is_that_which_is_read_mark_by_mark(parts: list[bytes], cut: int):
    """However little is looked at of what has the usual form."""
    stream = PARTS[0] + b"".join(parts)
    taking, reading, passed = Progress(lambda: 0.0), Progress(lambda: 0.0), list[bytes]()
    whole = reading.push(stream)

    def write(data: bytes) -> bool:
        passed.append(data)
        return True

    passed.append(taking.push(PARTS[0]))
    for part in [*parts[:-1], parts[-1][:cut], parts[-1][cut:]]:
        assert taking.take(write, part)
    assert b"".join(passed) == whole
    assert taking.emitted == reading.emitted
    assert taking.continuation(0.0) == reading.continuation(0.0)
    assert taking.written == len(whole) - len(passed[0])


@pytest.mark.parametrize("part", PARTS)
def test_what_the_client_cannot_take_changes_nothing(part: bytes):
    progress = Progress(lambda: 0.0)
    progress.push(PARTS[0])
    assert not progress.take(lambda data: False, part)
    assert progress.emitted == 1 and progress.written == 0


async def test_trusted_certificates_are_read_once_and_again_when_one_is_not_valid(
    monkeypatch: pytest.MonkeyPatch,
):
    async def refuse(*_: Any, **__: Any) -> None:
        error = ssl.SSLCertVerificationError("not valid")
        error.verify_message = "certificate has expired"
        raise error

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", refuse)
    pool = Pool(Address.of("https://worker.example"))
    before = pool.context()
    with pytest.raises(WorkerLost, match="certificate"):
        await pool.acquire(1.0)
    assert pool.context() is before, "an invalid one is tried 20 times a second"
    monkeypatch.setattr(connection, "RELOAD_S", 0.0)
    with pytest.raises(WorkerLost):
        await pool.acquire(1.0)
    assert pool.context() is not before


async def test_a_kept_connection_that_its_worker_closes_costs_no_request_and_no_worker():
    """It closes each connection when a second request comes on it, as one that was idle for too long."""
    used, begun = set[asyncio.StreamWriter](), 0

    async def once(writer: asyncio.StreamWriter) -> bool:
        nonlocal begun
        if writer in used:
            return False
        used.add(writer)
        begun += 1
        return await whole(writer)

    async with other(once) as server, in_front(server.url) as (client, gateway):
        (worker,) = gateway.registry.workers.values()
        for number in range(6):
            got = await client.post(CHAT, json=ASK)
            assert got.status_code == 200 and words_of(got) == list(WORDS), got.text
            assert worker.view.usable and begun == number + 1
        assert server.asked > 6 and not worker.breaker.failures
        assert gateway.relay.retries == 0 and len(worker.pool.streams) <= 1


async def test_a_worker_that_closes_new_connections_too_is_lost_and_asked_no_third_time():
    async def closing(writer: asyncio.StreamWriter) -> bool:
        return False

    async with other(closing) as server, in_front(server.url) as (client, gateway):
        (worker,) = gateway.registry.workers.values()
        await until(lambda: worker.pool.idle > 0)
        assert (await client.post(CHAT, json=ASK)).status_code == 503
        assert server.asked == 2 and worker.breaker.broken and len(worker.pool.streams) <= 1


async def test_reports_too_go_on_over_a_new_connection_when_the_worker_closes_theirs():
    reports = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal reports
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(sized(report()))
            reports += 1
            await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with in_front(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as (_, gateway):
        (worker,) = gateway.registry.workers.values()
        first = reports
        await until(lambda: reports > first + 5)
        assert worker.view.usable and not worker.breaker.opened > 0
    server.close()


@pytest.mark.parametrize(("head", "kept"), [(b"timeout=1", False), (b"max=5, timeout=9", True), (b"", True)])
async def test_a_connection_is_kept_no_longer_than_its_worker_says(head: bytes, kept: bool):
    made = UpstreamConnection()
    made.connection_made(cast(Any, Wire()))
    asking = asyncio.create_task(made.exchange(b""))
    await asyncio.sleep(0)
    made.data_received(b"HTTP/1.1 200 OK\r\nKeep-Alive: %b\r\nContent-Length: 2\r\n\r\n{}" % head)
    assert (await asking).status == 200 and await made.read() == b"{}" and made.reusable
    pool = Pool(Address.of("http://a:1"))
    pool.release(made)
    assert (pool.idle == 1) is made.lasting is kept


@pytest.mark.parametrize(
    ("race_s", "heard", "closed"), [(60.0, b"", True), (0.0, b"", False), (60.0, b"HTTP", False)]
)
async def test_only_a_kept_connection_that_is_closed_at_once_was_closed_because_it_was_idle(
    monkeypatch: pytest.MonkeyPatch, race_s: float, heard: bytes, closed: bool
):
    """Else the worker may have begun on the request. The response before had no body and no length."""
    monkeypatch.setattr(connection, "RACE_S", race_s)
    made = UpstreamConnection()
    made.connection_made(cast(Any, Wire()))
    for again in (False, True):
        asking = asyncio.create_task(made.exchange(b""))
        await asyncio.sleep(0)
        if not again:
            made.data_received(b"HTTP/1.1 204 No Content\r\n\r\n")
            assert (await asking).status == 204 and made.reusable
    if heard:
        made.data_received(heard)
    made.connection_lost(None)
    with pytest.raises(WorkerLost) as caught:
        async with asyncio.timeout(5):
            await asking
    assert (type(caught.value) is ClosedWhenIdle) is closed


async def test_a_gateway_that_was_stopped_reads_what_has_come_before_it_takes_it_to_be_late():
    made = UpstreamConnection()
    made.connection_made(cast(Any, Wire()))
    made.patience = 0.05
    asking = asyncio.create_task(made.exchange(b""))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(time.sleep, 0.3)
    for _ in range(3):
        await asyncio.sleep(0)
    made.data_received(HEAD)
    assert (await asking).status == 200
    with pytest.raises(WorkerLost, match="not begun its answer"):
        await made.read()
