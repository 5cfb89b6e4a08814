"""Measures what each attack on a server costs its other clients.

`python -m benchmarks.attacks` starts a server with the null model. A neighbour, in a process of its own,
reads four streams and asks for `/health` every 20 ms. Each attack runs between two measurements without it.
The table says what is left of the neighbour's tokens/s, its longest gap, how long `/health` took, how much
memory the server took, and what the attacker was answered. It needs quiet cores: the attacker takes one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from benchmarks.failover import Process, free_port
from stretto.statistics import quantile

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
STREAMS = 4
HEALTH_PAUSE_S = 0.02
MEBIBYTE = 2**20
WARM_UP_S = 1.0
Attack = Callable[[int, float, Counter[str]], Coroutine[Any, Any, None]]


@dataclass
class Measured:
    """What the neighbour saw in one measurement. Times in seconds."""

    rate: float
    longest_gap: float
    health: list[float] = field(default_factory=list[float])


def head(first: str, *headers: str) -> bytes:
    return "\r\n".join((first, "Host: localhost", *headers, "", "")).encode()


def post(path: str, body: Any, *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = ("Content-Type: application/json", f"Content-Length: {len(data)}")
    return head(f"POST {path} HTTP/1.1", *kind, *headers) + data


CLOSE = "Connection: close"


# The neighbour


def neighbour(port: int, pipe: Connection) -> None:
    """Answers each number of seconds that comes through the pipe with what it saw in them."""
    asyncio.run(_neighbour(port, pipe))


async def _neighbour(port: int, pipe: Connection) -> None:
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    streams = [asyncio.create_task(_stream(port, each)) for each in arrivals]
    while seconds := await asyncio.to_thread(pipe.recv):
        began = time.monotonic()
        health = await _health(port, began + seconds)
        ended = time.monotonic()
        spans = [[began, *(at for at in each if began <= at <= ended), ended] for each in arrivals]
        gap = max(after - before for span in spans for before, after in pairwise(span))
        tokens = sum(len(span) - 2 for span in spans)
        pipe.send(Measured(tokens / (ended - began), gap, health))
        for each in arrivals:
            each.clear()
    for each in streams:
        each.cancel()


async def _stream(port: int, arrivals: list[float]) -> None:
    """Reads one long answer after another, and notes when each token arrived."""
    request = post(CHAT, HELLO | {"max_tokens": 2000, "stream": True, "ignore_eos": True}, CLOSE)
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MEBIBYTE)
        writer.write(request)
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                arrivals.append(time.monotonic())
        writer.close()


async def _health(port: int, until: float) -> list[float]:
    """How long each `GET /health` took, over one connection."""
    took: list[float] = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (began := time.monotonic()) < until:
        writer.write(head("GET /health HTTP/1.1"))
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        await reader.readexactly(length)
        took.append(time.monotonic() - began)
        await asyncio.sleep(HEALTH_PAUSE_S)
    writer.close()
    return took


# The attacks


async def talk(port: int, request: bytes, answered: Counter[str], seconds: float) -> None:
    """Sends one request, reads until the server closes, and counts the status."""
    start = b""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            while chunk := await reader.read(65536):
                start = start or chunk[:12]
            writer.close()
    except (ConnectionError, TimeoutError):
        pass
    answered[start[9:12].decode() or "none"] += 1


def repeat(requests: Iterator[bytes], connections: int) -> Attack:
    """Sends requests over so many connections, each as soon as the one before was answered."""

    async def attack(port: int, until: float, answered: Counter[str]) -> None:
        async def one() -> None:
            while (left := until - time.monotonic()) > 0:
                await talk(port, next(requests), answered, left)

        await asyncio.gather(*(one() for _ in range(connections)))

    return attack


def feed(start: bytes, piece: bytes, connections: int, pause: float = 0.0) -> Attack:
    """Begins requests over so many connections and never ends them. One that was cut begins anew."""

    async def attack(port: int, until: float, answered: Counter[str]) -> None:
        async def one() -> None:
            while time.monotonic() < until:
                try:
                    async with asyncio.timeout(until - time.monotonic()):
                        reader, writer = await asyncio.open_connection("127.0.0.1", port)
                        reading = asyncio.create_task(reader.read(12))
                        writer.write(start)
                        while not reading.done():
                            writer.write(piece)
                            await writer.drain()
                            await asyncio.sleep(pause)
                        answered[reading.result()[9:12].decode() or "none"] += 1
                        writer.transport.abort()
                except (ConnectionError, TimeoutError):
                    answered["none"] += 1
                    await asyncio.sleep(0.01)

        await asyncio.gather(*(one() for _ in range(connections)))

    return attack


def blocked(connections: int) -> Attack:
    """Asks for long answers and never reads them."""
    request = post(CHAT, HELLO | {"max_tokens": 8000, "stream": True, "ignore_eos": True, "n": 2})

    async def attack(port: int, until: float, answered: Counter[str]) -> None:
        opened = [await asyncio.open_connection("127.0.0.1", port, limit=1) for _ in range(connections)]
        for _, writer in opened:
            writer.write(request)
        await asyncio.sleep(until - time.monotonic())
        for _, writer in opened:
            answered["never read"] += 1
            writer.transport.abort()

    return attack


def leaving(connections: int) -> Attack:
    """Begins streams and leaves all of them at once, again and again."""
    request = post(CHAT, HELLO | {"max_tokens": 500, "stream": True, "ignore_eos": True})

    async def attack(port: int, until: float, answered: Counter[str]) -> None:
        while time.monotonic() < until:
            opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
            for _, writer in opened:
                writer.write(request)
            await asyncio.gather(*(reader.read(1) for reader, _ in opened))
            for _, writer in opened:
                answered["left"] += 1
                writer.transport.abort()

    return attack


def attacks() -> dict[str, Attack]:
    """Each attack by what it sends."""
    prompts = ["word"] * 32
    large = HELLO | {"messages": [{"role": "user", "content": "word " * 800_000}]}
    deep: Any = "x"
    for _ in range(900):
        deep = {"a": deep}
    unfinished = post(CHAT, b"").replace(b"Content-Length: 0", b"Content-Length: 4000000")

    def chat(**changes: Any) -> Iterator[bytes]:
        return cycle([post(CHAT, HELLO | changes, CLOSE)])

    def regexes() -> Iterator[bytes]:
        for number in count():
            pattern = f"(?:a?){{200}}a{{200}}{number}"
            yield post(CHAT, HELLO | {"structured_outputs": {"regex": pattern}}, CLOSE)

    many = {"prompt": prompts, "n": 16, "max_tokens": 1, "stop_token_ids": list(range(200_000))}
    allowed = {
        "n": 16,
        "max_tokens": 1,
        "stop_token_ids": list(range(256)),
        "logit_bias": {str(id): 1 for id in range(300, 1324)},
        "stop": [f"{number:0>256}" for number in range(16)],
    }
    return {
        "1.9 million `stop_token_ids`": repeat(chat(stop_token_ids=list(range(1_900_000))), 4),
        "200,000 of them, 32 prompts, `n` 16": repeat(cycle([post(COMPLETIONS, many, CLOSE)]), 4),
        "300,000 entries of `logit_bias`": repeat(chat(logit_bias={str(id): 1 for id in range(300_000)}), 4),
        "the longest lists that are allowed": repeat(chat(**allowed), 1),
        "8,000 inputs of embeddings": repeat(cycle([post(EMBEDDINGS, {"input": ["a"] * 8000}, CLOSE)]), 4),
        "prompts of 4 MB": repeat(cycle([post(CHAT, large, CLOSE)]), 4),
        "a wrong value of 4 MB": repeat(chat(temperature="x" * 4_000_000), 4),
        "arguments 900 levels deep": repeat(chat(chat_template_kwargs={"a": deep}), 4),
        "40 slow regexes at once": repeat(regexes(), 40),
        "names of pages of 30 kB": repeat(cycle([head(f"GET /page/{'x' * 30_000} HTTP/1.1", CLOSE)]), 4),
        "header lines without an end": feed(head("GET / HTTP/1.1")[:-2] + b"X: ", b"a" * 65536, 8),
        "pipelines without an end": feed(b"", head("GET /health HTTP/1.1") * 1000, 4),
        "1,000 connections, a byte now and then": feed(b"GET / HTTP/1.1\r\nX-", b"a", 1000, 0.5),
        "200 unfinished bodies of 4 MB": feed(unfinished, b" " * 65536, 200, 0.2),
        "100 readers that never read": blocked(100),
        "32 streams that leave at once": leaving(32),
    }


# The measurement


@contextmanager
def neighbouring(port: int) -> Generator[Callable[[float], Coroutine[Any, Any, Measured]]]:
    """A neighbour: called with seconds, it says what it saw in them."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=neighbour, args=(port, theirs))
    process.start()

    async def measure(seconds: float) -> Measured:
        ours.send(seconds)
        return await asyncio.to_thread(ours.recv)

    try:
        yield measure
    finally:
        ours.send(0.0)
        process.join(5)
        process.kill()


def memory(pid: int) -> float:
    """Resident MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / MEBIBYTE


async def run(server: Process, seconds: float, names: list[str]) -> list[dict[str, Any]]:
    """One row for each attack, printed as soon as it is measured."""
    async with httpx.AsyncClient() as client:
        await server.ready(client)
    assert server.popen is not None
    pid, port, rows = server.popen.pid, int(server.url.rpartition(":")[2]), list[dict[str, Any]]()
    print("| attack | tokens/s without | left | longest gap | `/health` p50 / p99 / max | memory | answers |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with neighbouring(port) as measure:
        await measure(WARM_UP_S)
        for name, attack in attacks().items():
            if names and not any(part in name for part in names):
                continue
            answered, before = Counter[str](), memory(pid)
            quiet = [await measure(seconds / 2)]
            attacking = asyncio.create_task(attack(port, time.monotonic() + seconds + WARM_UP_S, answered))
            await asyncio.sleep(WARM_UP_S / 2)
            during = await measure(seconds)
            after = memory(pid)
            await attacking
            await measure(WARM_UP_S)
            quiet.append(await measure(seconds / 2))
            rate = sum(each.rate for each in quiet) / 2
            rows.append(
                {
                    "attack": name,
                    "tokens_per_s": rate,
                    "share": during.rate / rate,
                    "longest_gap_ms": during.longest_gap * 1e3,
                    "health_ms": [quantile(sorted(during.health), at) * 1e3 for at in (0.5, 0.99, 1.0)],
                    "grown_mib": after - before,
                    "answered": dict(answered),
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    answers = ", ".join(f"{times:,} x {status}" for status, times in sorted(row["answered"].items()))
    health = " / ".join(f"{ms:.0f}" for ms in row["health_ms"])
    rates = f"{row['tokens_per_s']:.0f} | {row['share']:.0%} | {row['longest_gap_ms']:.0f} ms"
    return f"| {row['attack']} | {rates} | {health} ms | {row['grown_mib']:+.0f} MiB | {answers} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="null=null:12", help="what to serve")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each attack is measured")
    parser.add_argument("--attacks", default="", help="parts of names of attacks, separated by commas; all")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    port = free_port()
    server = Process(["serve", args.model, "--port", str(port)], f"http://127.0.0.1:{port}")
    server.start()
    try:
        rows = asyncio.run(run(server, args.seconds, [part for part in args.attacks.split(",") if part]))
    finally:
        server.end()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
