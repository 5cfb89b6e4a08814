"""Measures the processor time of a gateway for each request and each token, of several versions in turns.

    python benchmarks/relaying.py [--rounds 5] [--tree /path/to/another/checkout ...] [--json]

A worker in this process replays a stream of the null worker: at each step, every stream gets the chunk of one
token, as from an engine. Requests of two tokens give the time of a request, and long ones that of a token. A
gateway's time is that of its process, in user and system mode. What it takes without requests is subtracted.
Other load hardly changes processor time, but it evicts caches. So the versions take turns, and each figure is
the median over the rounds, with the least in brackets.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import cast
from urllib.request import urlopen

import msgspec
import uvloop
from failover import free_port
from gateway import cpu_s, ready
from rich.table import Table
from serving import serving

from stretto import terminal
from stretto.protocol.relay import RELAY

HERE = Path(__file__).parents[1]
PROMPT = "The order left our warehouse on Monday and should reach you within the week. " * 6
SHORT, LONG = 2, 202  # tokens of an answer
END = b"0\r\n\r\n"
DONE = b"[DONE]\n\n"
HEADERS = """Host: {host}\r
Accept: application/json\r
Content-Type: application/json\r
User-Agent: OpenAI/Python 3.57.0\r
X-Stainless-Lang: python\r
X-Stainless-Package-Version: 3.57.0\r
X-Stainless-OS: Linux\r
X-Stainless-Arch: x64\r
X-Stainless-Runtime: CPython\r
X-Stainless-Runtime-Version: 3.11.7\r
Authorization: Bearer none\r
X-Stainless-Async: false\r
x-stainless-retry-count: 0\r
x-stainless-read-timeout: 600\r
"""


class Case(msgspec.Struct, frozen=True):
    """`clients` send requests one after the other, and a step takes `step_s`."""

    clients: int
    step_s: float
    short: int  # requests of each client
    long: int


CASES = (Case(1, 0.002, 60, 3), Case(32, 0.010, 6, 1))


class CostFigure(msgspec.Struct, frozen=True, kw_only=True):
    """Processor time in microseconds: medians over the rounds, and the least."""

    tree: str
    clients: int
    request_us: float
    request_least_us: float
    token_us: float
    token_least_us: float
    idle_ms: float  # in a second without requests
    ttft_p50_ms: float  # of the short requests


class Recording(msgspec.Struct):
    """What a null worker sent: its report, the head of a stream, and its first, middle and last chunk."""

    report: bytes
    head: bytes
    first: bytes
    middle: bytes
    last: bytes

    @classmethod
    def of(cls, url: str) -> Recording:
        """Asks the worker."""
        with urlopen(url + RELAY, timeout=10) as answer:
            report = answer.read()
        host, _, port = url.removeprefix("http://").rpartition(":")
        relayed = {"operation": "chat", "tenant": "local", "request": _body(6), "nonce": "ab" * 16}
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(_request(RELAY, f"{host}:{port}", msgspec.json.encode(relayed)))
            came = b""
            while not came.endswith(END):
                came += connection.recv(1 << 16)
        head, _, rest = came.partition(b"\r\n\r\n")
        chunks: list[bytes] = []
        while not rest.startswith(b"0"):
            size, _, after = rest.partition(b"\r\n")
            end = int(size, 16) + 2
            chunks.append(b"%b\r\n%b" % (size, after[:end]))
            rest = after[end:]
        return cls(report, head + b"\r\n\r\n", chunks[0], chunks[1], chunks[-1] + END)


class Replayed(asyncio.Protocol):
    """A connection of the worker that replays. `streams`: those that wait for chunks, and how many."""

    def __init__(self, recording: Recording, streams: dict[Replayed, int], tokens: Callable[[], int]) -> None:
        self.recording, self.streams, self.tokens = recording, streams, tokens
        self.transport: asyncio.Transport | None = None
        self.came = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self.came += data
        head, blank, body = self.came.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not blank or len(body) < int(length or 0):
            return
        self.came = b""
        assert self.transport is not None
        if head.startswith(b"GET"):
            report = self.recording.report
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(report), report))
        else:
            self.streams[self] = self.tokens()

    def step(self) -> None:
        """Sends the chunk of the next token."""
        assert self.transport is not None
        left, whole = self.streams[self], self.tokens()
        recording = self.recording
        if left == 1:
            del self.streams[self]
            self.transport.write(recording.last)
            return
        self.streams[self] = left - 1
        self.transport.write(recording.head + recording.first if left == whole else recording.middle)


class Client(asyncio.Protocol):
    """Sends requests one after the other."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] | None = None
        self.tail, self.end = b"", END
        self.first: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.first is None:
            self.first = time.perf_counter()
            if b"content-length" in data:  # all of it came at once
                self.end = DONE
        self.tail = (self.tail + data)[-len(self.end) :]
        if self.tail == self.end and self.done is not None:
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError("the gateway closed the connection"))

    async def ask(self, request: bytes, times: int) -> list[float]:
        """Sends it so many times. Returns the times to the first bytes, in seconds."""
        assert self.transport is not None
        taken: list[float] = []
        for _ in range(times):
            self.done, self.first = asyncio.get_running_loop().create_future(), None
            self.tail, self.end = b"", END
            sent = time.perf_counter()
            self.transport.write(request)
            await self.done
            taken.append((self.first or sent) - sent)
        self.transport.close()
        return taken


def _body(tokens: int) -> dict[str, object]:
    options = {"stream": True, "max_tokens": tokens, "stream_options": {"include_usage": True}}
    return {"model": "null", "messages": [{"role": "user", "content": PROMPT}], **options}


def _request(path: str, host: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\n{HEADERS.format(host=host)}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Load:
    """Loads gateways that have the replaying worker behind them."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.streams: dict[Replayed, int] = {}
        self.tokens = SHORT

    async def serve(self, port: int) -> asyncio.Server:
        """The worker."""
        loop = asyncio.get_running_loop()
        worker = lambda: Replayed(self.recording, self.streams, lambda: self.tokens)  # noqa: E731
        return await loop.create_server(worker, "127.0.0.1", port)

    async def run(self, port: int, case: Case, tokens: int, times: int) -> list[float]:
        """All requests of a case. Returns the times to the first bytes."""
        self.tokens = tokens
        request = _request("/v1/chat/completions", f"127.0.0.1:{port}", msgspec.json.encode(_body(tokens)))
        loop = asyncio.get_running_loop()
        steps = asyncio.create_task(self._steps(case.step_s))
        try:
            made = [await loop.create_connection(Client, "127.0.0.1", port) for _ in range(case.clients)]
            asked = asyncio.gather(*(client.ask(request, times) for _, client in made))
            await asyncio.wait({steps, asked}, return_when=asyncio.FIRST_COMPLETED)
            if steps.done():
                steps.result()
            taken = await asked
        finally:
            steps.cancel()
        return [each for some in taken for each in some]

    async def _steps(self, step_s: float) -> None:
        due = time.monotonic()
        while True:
            due = max(due + step_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            for stream in list(self.streams):
                stream.step()


class Spent(msgspec.Struct, frozen=True):
    """Of one round: microseconds for a request and for a token, milliseconds to a first token."""

    request: float
    token: float
    ttft: list[float]


async def cost(load: Load, port: int, pid: int, case: Case, idle: float) -> Spent:
    """What a request and a token cost."""
    spent: dict[int, float] = {}
    taken: list[float] = []
    for tokens, times in ((SHORT, case.short), (LONG, case.long)):
        before, began = cpu_s((pid,)), time.monotonic()
        came = await load.run(port, case, tokens, times)
        used = cpu_s((pid,)) - before - idle * (time.monotonic() - began)
        spent[tokens] = used / (times * case.clients) * 1e6
        taken = taken or came
    each = (spent[LONG] - spent[SHORT]) / (LONG - SHORT)
    return Spent(spent[SHORT] - SHORT * each, each, taken)


async def idle_share(pid: int) -> float:
    """The share of a processor that the gateway takes without requests."""
    before, began = cpu_s((pid,)), time.monotonic()
    await asyncio.sleep(2.0)
    return (cpu_s((pid,)) - before) / (time.monotonic() - began)


async def compare(trees: list[Path], recording: Recording, rounds: int) -> list[CostFigure]:
    """All versions in turns."""
    load, port = Load(recording), free_port()
    server = await load.serve(port)
    figures: list[CostFigure] = []
    with ExitStack() as stack:
        gateways = [stack.enter_context(gateway(tree, port)) for tree in trees]
        for front, _ in gateways:
            await asyncio.to_thread(ready, f"http://127.0.0.1:{front}/v1/models")
            await load.run(front, CASES[0], SHORT, 50)
        idle = [await idle_share(pid) for _, pid in gateways]
        runs: dict[tuple[int, int], list[Spent]] = {}
        for turn in range(rounds):
            for case in CASES:
                for at in sorted(range(len(trees)), reverse=turn % 2 > 0):
                    front, pid = gateways[at]
                    runs.setdefault((at, case.clients), []).append(
                        await cost(load, front, pid, case, idle[at])
                    )
        for (at, clients), seen in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0])):
            requests, tokens = [each.request for each in seen], [each.token for each in seen]
            figures.append(
                CostFigure(
                    tree=str(trees[at]),
                    clients=clients,
                    request_us=median(requests),
                    request_least_us=min(requests),
                    token_us=median(tokens),
                    token_least_us=min(tokens),
                    idle_ms=idle[at] * 1e3,
                    ttft_p50_ms=median(time for each in seen for time in each.ttft) * 1e3,
                )
            )
    server.close()
    return figures


@contextmanager
def gateway(tree: Path, worker: int) -> Generator[tuple[int, int]]:
    """A gateway of that version in front of the worker's port. Yields its port and process."""
    port = free_port()
    options = ["--port", str(port), "--worker", f"http://127.0.0.1:{worker}"]
    environ = os.environ | {"PYTHONPATH": f"{tree / 'src'}:{tree}"}
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "stretto", "gateway", *options]
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, cwd=tree, env=environ)
    try:
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def show(figures: list[CostFigure]) -> None:
    """Print the table."""
    table = Table("clients", "version", "CPU us/request", "us/token", "idle ms/s", "TTFT p50 ms", box=None)
    for each in figures:
        request = f"{each.request_us:,.0f} ({each.request_least_us:,.0f})"
        token = f"{each.token_us:.1f} ({each.token_least_us:.1f})"
        rest = (f"{each.idle_ms:.1f}", f"{each.ttft_p50_ms:.2f}")
        table.add_row(str(each.clients), each.tree, request, token, *rest)
    terminal.out.print(table)


def main() -> None:
    """Record a stream, start the gateways, load them and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tree", action="append", default=[], type=Path, help="another checkout to compare")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with serving("null=null:50") as url:
        recording = Recording.of(url)
    trees = [*(tree.resolve() for tree in options.tree), HERE]
    figures = uvloop.run(compare(trees, recording, options.rounds))
    if options.json:
        terminal.print_json(figures)
    else:
        show(figures)


if __name__ == "__main__":
    main()
