"""A real `stretto serve` process for tests that kill, stop or starve it, and clients that stream from it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_S = 120.0


@dataclass
class ServerProcess:
    """A server that is ready. `log` is a file with its standard output and standard error."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def get(self, path: str) -> tuple[int, Any]:
        """The status of a GET, and the JSON of its body."""
        response = httpx.get(self.url + path, timeout=10)
        return response.status_code, response.json()

    @property
    def engine(self) -> int:
        """The process id of the engine."""
        return self.get("/state")[1]["engine_pid"]

    def signal_engine(self, number: signal.Signals) -> None:
        os.kill(self.engine, number)

    def wait_for(self, path: str, condition: Callable[[int, Any], bool], seconds: float = 30.0) -> float:
        """GET `path` until the condition holds for status and body; returns the seconds that it took."""
        began = time.monotonic()
        while not condition(*(last := self.get(path))):
            assert time.monotonic() < began + seconds, f"{path} is still {last} after {seconds} s"
            time.sleep(0.02)
        return time.monotonic() - began

    def wait_ready(self, seconds: float = 60.0) -> float:
        """Wait until `/ready` is 200; returns the seconds that it took."""
        return self.wait_for("/ready", lambda status, _: status == 200, seconds)


@contextmanager
def serving(
    folder: Path, *arguments: str, command: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Generator[ServerProcess]:
    """A server process with these arguments of `stretto serve` and these variables, ended afterwards.

    `command` goes in front, for example `["prlimit", "--nofile=64"]`.
    """
    log = folder / "server.log"
    serve = [*command, sys.executable, "-m", "stretto", "serve", "--port", "0", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(serve, stdout=out, stderr=out, env=os.environ | dict(environ or {}))
    try:
        deadline = time.monotonic() + START_S
        while not (ready := re.search(r"^ready .* (http://\S+)$", log.read_text(), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield ServerProcess(process, ready[1], log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Streamed:
    """What one streaming client saw. `ended`: `done`, the code of a typed error, or `cut`."""

    ended: str = "cut"
    status: int = 0
    arrivals: list[float] = field(default_factory=list[float])  # of chunks with a token, monotonic seconds
    ended_at: float = 0.0

    @property
    def longest_gap(self) -> float:
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return max((after - before for before, after in pairs), default=0.0)


async def stream(
    client: httpx.AsyncClient, body: dict[str, Any], seen: Streamed, path: str = "/v1/chat/completions"
) -> Streamed:
    """Stream one answer into `seen`. A connection that breaks leaves `seen.ended` as `cut`."""
    try:
        async with client.stream("POST", path, json=body | {"stream": True}) as response:
            seen.status = response.status_code
            if response.status_code != 200:
                seen.ended = json.loads(await response.aread())["error"]["code"]
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    seen.ended = "done"
                elif line.startswith('data: {"error"'):
                    seen.ended = json.loads(line[6:])["error"]["code"]
                elif line.startswith("data: "):
                    seen.arrivals.append(time.monotonic())
    except httpx.HTTPError:
        pass
    seen.ended_at = time.monotonic()
    return seen
