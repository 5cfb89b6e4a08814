"""Compiles untrusted grammars in a child process with limits on time and memory, before the engine sees them.

This is the server's side: asyncio, and light to import. `sandbox_worker` is the child. Each exchange is one
line of JSON in each direction over the child's standard input and output.
"""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process

import msgspec

from stretto.errors import InvalidGrammar, Unavailable
from stretto.types import Grammar

START_S = 30.0
FOREVER = float("inf")


class GrammarSandbox:
    """One warm child process, started with the first grammar, and the results it has given.

    `seconds` and `memory` (bytes of address space) limit one grammar. A grammar that exceeds either is
    refused and the child is replaced. `remembered` results are kept; a refusal for time or memory is kept for
    `retry_s` seconds only, because it may be due to a busy machine. Grammars are compiled one at a time.
    """

    def __init__(
        self, *, seconds: float = 1.0, memory: int = 2**29, remembered: int = 512, retry_s: float = 30.0
    ) -> None:
        self.compilations = 0
        self._seconds = seconds
        self._memory = memory
        self._remembered = remembered
        self._retry_s = retry_s
        self._worker: Process | None = None
        self._lock = asyncio.Lock()
        self._results: dict[Grammar, tuple[str | None, float]] = {}

    @property
    def pid(self) -> int | None:
        """The process id of the child, None while there is none."""
        return None if self._worker is None else self._worker.pid

    async def validate(self, grammar: Grammar) -> None:
        """Return when the grammar compiles within the limits.

        Raises InvalidGrammar, which says what is wrong and where, and Unavailable when no child process can
        be started.
        """
        async with self._lock:
            error, until = self._results.pop(grammar, (None, 0.0))
            if time.monotonic() >= until:
                error, until = await self._compile(grammar)
            self._results[grammar] = error, until
            if len(self._results) > self._remembered:
                del self._results[next(iter(self._results))]
        if error is not None:
            raise InvalidGrammar(error)

    async def close(self) -> None:
        """End the child process; another call of `validate` would start a new one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            if worker.returncode is None:
                worker.kill()
            await worker.communicate()

    async def _compile(self, grammar: Grammar) -> tuple[str | None, float]:
        """The error of a grammar (None: it compiles), and until when this result holds."""
        label, retry = grammar.label, time.monotonic() + self._retry_s
        try:
            request = msgspec.json.encode(grammar)
        except UnicodeEncodeError:
            return f"the {label} is not Unicode text: it holds half a surrogate pair", FOREVER
        for _ in range(2):  # the child may have died of something else before it read this grammar
            try:
                return await self._exchange(await self._running(), request), FOREVER
            except TimeoutError:
                return f"the {label} takes more than {self._seconds:g} s to compile; make it simpler", retry
            except (asyncio.IncompleteReadError, ConnectionError):
                continue
        limit = f"{self._memory >> 20} MiB"
        return f"the {label} breaks the compiler, or takes more than {limit}; make it simpler", retry

    async def _exchange(self, worker: Process, request: bytes) -> str | None:
        assert worker.stdin is not None
        self.compilations += 1
        done = False
        try:
            async with asyncio.timeout(self._seconds):
                worker.stdin.write(request + b"\n")
                await worker.stdin.drain()
                error = await _receive(worker)
            done = True
            return error
        finally:
            if not done:  # also when cancelled: the next reply would belong to this request
                await self.close()

    async def _running(self) -> Process:
        """The child process, started if there is none. Raises Unavailable."""
        if self._worker is None or self._worker.returncode is not None:
            await self.close()
            command = (sys.executable, "-m", "stretto.engine.structured.sandbox_worker", str(self._memory))
            self._worker = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
            )
            ready = False
            try:
                async with asyncio.timeout(START_S):
                    await _receive(self._worker)
                ready = True
            except (TimeoutError, asyncio.IncompleteReadError) as error:
                raise Unavailable("no process to check grammars could be started; try again later") from error
            finally:
                if not ready:
                    await self.close()
        return self._worker


async def _receive(worker: Process) -> str | None:
    assert worker.stdout is not None
    return msgspec.json.decode(await worker.stdout.readuntil(), type=str | None)
