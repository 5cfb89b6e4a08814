"""32 streams of a real server that have all begun, for tests that then hurt one of its processes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.server_process import ServerProcess, Streamed, stream

STREAMS = 32
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 600}


@asynccontextmanager
async def streams(
    server: ServerProcess, changes: dict[str, Any] | None = None
) -> AsyncGenerator[list[Streamed]]:
    """Streams that have all begun. They are read to their ends afterwards. `changes` are of `BODY`."""
    seen = [Streamed() for _ in range(STREAMS)]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client, asyncio.TaskGroup() as group:
        for each in seen:
            group.create_task(stream(client, BODY | (changes or {}), each))
        while not all(each.arrivals for each in seen):
            await asyncio.sleep(0.01)
        yield seen


def show(text: str) -> None:
    sys.stdout.write(f"\n{text}\n")
