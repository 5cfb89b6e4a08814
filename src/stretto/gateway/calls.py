"""The requests that a gateway is relaying: counted, drained, and ended by owner."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Container, Coroutine
from typing import Any

from starlette.types import Receive

from stretto.errors import StrettoError
from stretto.gateway.settings import GatewayConfig
from stretto.telemetry.log import LineWriter

STDOUT = 1


class Calls:
    """The requests that a gateway is relaying. It is the service that `http.serving` limits and drains."""

    def __init__(self, config: GatewayConfig) -> None:
        self.access_log = LineWriter(STDOUT) if config.access_log else None
        self.rejections: Counter[str] = Counter()
        self.closing = asyncio.Event()  # set when no new calls are taken
        self._tasks: dict[asyncio.Task[None], str] = {}  # and whose they are
        self._errors: dict[asyncio.Task[None], StrettoError] = {}

    @property
    def draining(self) -> bool:
        """Whether new calls are refused."""
        return self.closing.is_set()

    @property
    def running(self) -> int:
        """How many calls are running."""
        return len(self._tasks)

    def rejected(self, reason: str) -> None:
        """Counts what was cut short."""
        self.rejections[reason] += 1

    def close(self) -> None:
        """Refuses new calls from now on."""
        self.closing.set()

    def end_calls(self, error: StrettoError, owners: Container[str] | None = None) -> None:
        """Ends all calls with `error`, or those of some owners."""
        for task, owner in self._tasks.items():
            if owners is None or owner in owners:
                self._errors[task] = error
                task.cancel()

    async def idle(self) -> None:
        """Returns when no call is running."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def run(self, work: Coroutine[Any, Any, None], receive: Receive | None, owner: str = "") -> bool:
        """Runs a call. Returns False when its client left before it was done. Raises StrettoError.

        `receive` None: the call notices itself when its client leaves.
        """
        task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
        self._tasks[task] = owner
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task in self._errors:
                raise self._errors.pop(task)
            if task.done():
                task.result()
            return task.done()
        finally:
            del self._tasks[task]
            gone.cancel()
            task.cancel()


async def _gone(receive: Receive | None) -> None:
    if receive is None:
        await asyncio.get_running_loop().create_future()
        return
    while (await receive())["type"] != "http.disconnect":
        pass
