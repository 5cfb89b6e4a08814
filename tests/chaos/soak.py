"""A mixed load for a real server, and how much its processes grow under it."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from tests.server_process import ServerProcess, Streamed, stream

CLIENTS = 8
SAMPLE_S = 0.5
WARM_UP = 0.6  # of the time: buffers, arenas and caches fill, for 50 s on a slow or a fast machine
HANG_S = 30.0
CHAT = "/v1/chat/completions"
QUESTION = "What is {}.53 + 32.62?"
# What the fitted line may grow by over the whole measured time, however long that is.
ALLOWED = {"MiB": 4.0, "files": 3.0, "threads": 1.0, "blocks": 24.0}


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the line with the least squares of vertical distances, in values per second."""
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((at - middle) ** 2 for at in times)
    return sum((at - middle) * (value - mean) for at, value in zip(times, values, strict=True)) / spread


@dataclass
class Growth:
    """Samples of what a server uses: each name, like `server MiB`, has a value at each of `times`."""

    times: list[float] = field(default_factory=list[float])
    values: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def add(self, at: float, values: dict[str, float]) -> None:
        """Add one sample."""
        self.times.append(at)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def grown(self) -> dict[str, float]:
        """By how much the fitted line of each value grows from the first sample to the last one."""
        seconds = self.times[-1] - self.times[0]
        return {name: slope(self.times, values) * seconds for name, values in self.values.items()}

    def leaks(self) -> dict[str, float]:
        """The values that grow by more than `ALLOWED` for their unit."""
        return {name: grown for name, grown in self.grown().items() if grown > ALLOWED[name.split()[-1]]}


def used(name: str, pid: int) -> dict[str, float]:
    """What a process uses now: memory of its own, open files and threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        f"{name} MiB": int(status["RssAnon"].split()[0]) / 1024,
        f"{name} files": len(os.listdir(f"/proc/{pid}/fd")),
        f"{name} threads": int(status["Threads"]),
    }


def chat(number: int, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION.format(number)}]
    return {"messages": messages, "max_tokens": 24, "temperature": 0} | changes


async def one(client: httpx.AsyncClient, number: int) -> str:
    """One request of the mix, and what became of it."""
    kind = number % 10
    if kind < 3:
        tier = ("default", "priority", "flex")[kind]
        return (await stream(client, chat(number, service_tier=tier), Streamed())).ended
    if kind == 3:
        return await left(client, chat(number, max_tokens=200, ignore_eos=True))
    changes: dict[str, Any] = (
        {},
        {"n": 3, "temperature": 1.0, "logprobs": True, "top_logprobs": 3},
        {"messages": [{"role": "user", "content": "word " * random.randrange(1, 60)}]},
        {"response_format": {"type": "json_object"}},
        {"model": f"made-up-{number}"},
        {"max_tokens": -2, "user": f"user-{number}"},
    )[kind - 4]
    response = await client.post(CHAT, json=chat(number) | changes)
    return str(response.status_code)


async def left(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """A stream that its client leaves after the first bytes."""
    async with client.stream("POST", CHAT, json=body | {"stream": True}) as response:
        async for _ in response.aiter_bytes():
            break
    return "left"


async def soak(server: ServerProcess, seconds: float) -> tuple[Growth, Counter[str]]:
    """Loads the server for so long; returns its growth after the warm-up, and what became of the requests."""
    growth, ends = Growth(), Counter[str]()
    began = time.monotonic()
    numbers = count()
    pid, engine = server.process.pid, server.engine

    async def user(client: httpx.AsyncClient) -> None:
        while time.monotonic() < began + seconds:
            try:
                ends[await one(client, next(numbers))] += 1
            except httpx.TimeoutException:
                ends["hung"] += 1

    async def watch(client: httpx.AsyncClient) -> None:
        while (at := time.monotonic()) < began + seconds:
            state = (await client.get("/state")).json()
            if at > began + WARM_UP * seconds:
                blocks = {"engine blocks": float(state["blocks_total"] - state["blocks_free"])}
                growth.add(at, blocks | used("server", pid) | used("engine", engine))
            await asyncio.sleep(SAMPLE_S)

    async with httpx.AsyncClient(base_url=server.url, timeout=HANG_S) as client, asyncio.TaskGroup() as group:
        group.create_task(watch(client))
        for _ in range(CLIENTS):
            group.create_task(user(client))
    return growth, ends
