"""The requests that a gateway is relaying: counted, drained, and ended by owner."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Container, Coroutine
from typing import Any

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

    async def run(
        self,
        work: Coroutine[Any, Any, None],
        watch: Callable[[Callable[[], None]], Callable[[], object]] | None,
        owner: str = "",
        whole: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Runs a call in the current task. Returns False when its client left before the call was done, or
        before it had the `whole` answer. Raises StrettoError.

        `watch(gone)` has `gone` called when the client leaves, and returns what ends that. None: the call
        notices itself when its client leaves.
        """
        task = asyncio.current_task()
        assert task is not None
        left = False

        def gone() -> None:
            nonlocal left
            left = True
            if task in self._tasks and not whole():
                task.cancel()

        self._tasks[task] = owner
        unwatch = None if watch is None else watch(gone)
        try:
            await work
            return True
        except asyncio.CancelledError:
            error = self._errors.pop(task, None)
            if error is None and not left:
                raise
            task.uncancel()
            if error is not None:
                raise error from None
            return False
        finally:
            del self._tasks[task]
            if unwatch is not None:
                unwatch()
