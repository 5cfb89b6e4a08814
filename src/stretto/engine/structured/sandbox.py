"""Has grammars of strangers judged before the engine sees them, in a process that may die of one.

This is the front's side, asyncio and light to import; `sandbox_worker` is the process. They exchange
msgpack behind its length over the process's standard input and output.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process

import msgspec

from stretto.errors import InvalidGrammar, Unavailable
from stretto.types import Grammar

START_S = 30.0
DOUBT_S = 30.0
REMEMBERED = 512
LENGTH = struct.Struct("<I")


class Checker:
    """One warm worker and the verdicts it gave. `seconds` and `memory` (bytes of address space) are what one
    grammar may take; whatever takes more is refused, and the worker replaced.
    """

    def __init__(self, *, seconds: float = 1.0, memory: int = 2**29) -> None:
        self._seconds = seconds
        self._memory = memory
        self._worker: Process | None = None
        self._turn = asyncio.Lock()
        self._verdicts: dict[Grammar, tuple[str | None, float]] = {}

    @property
    def pid(self) -> int | None:
        """The worker's process, None before the first grammar."""
        return None if self._worker is None else self._worker.pid

    async def check(self, grammar: Grammar) -> None:
        """Return when the grammar compiles within the caps. Raises InvalidGrammar saying what is wrong and
        where, and Unavailable when no worker can be started.
        """
        async with self._turn:
            message, until = self._verdicts.pop(grammar, (None, 0.0))
            if time.monotonic() >= until:
                message, until = await self._judge(grammar)
            self._verdicts[grammar] = message, until
            if len(self._verdicts) > REMEMBERED:
                del self._verdicts[next(iter(self._verdicts))]
        if message is not None:
            raise InvalidGrammar(message)

    async def close(self) -> None:
        """End the worker; the next check would start another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            if worker.returncode is None:
                worker.kill()
            await worker.communicate()

    async def _judge(self, grammar: Grammar) -> tuple[str | None, float]:
        """The worker's verdict, and until when it holds: a refusal for time or memory says as much of the
        machine's load as of the grammar, so it is soon in doubt again.
        """
        kind, doubt = grammar.spoken, time.monotonic() + DOUBT_S
        try:
            body = msgspec.msgpack.encode(grammar)
        except UnicodeEncodeError:
            return f"the {kind} is not Unicode text: it holds half a surrogate pair", float("inf")
        for _ in range(2):  # it may have died of something else before it saw this grammar
            try:
                return await self._ask(await self._running(), body), float("inf")
            except TimeoutError:
                return f"the {kind} takes more than {self._seconds:g} s to compile; make it simpler", doubt
            except (asyncio.IncompleteReadError, ConnectionError):
                continue
        limit = f"{self._memory >> 20} MiB"
        return f"the {kind} breaks the compiler, or takes more than {limit}; make it simpler", doubt

    async def _ask(self, worker: Process, body: bytes) -> str | None:
        assert worker.stdin is not None and worker.stdout is not None
        done = False
        try:
            async with asyncio.timeout(self._seconds):
                worker.stdin.write(LENGTH.pack(len(body)) + body)
                await worker.stdin.drain()
                verdict = await _receive(worker.stdout)
            done = True
            return verdict
        finally:
            if not done:  # cancelled as well: half an exchange is no state to go on from
                await self.close()

    async def _running(self) -> Process:
        """The worker, started when there is none."""
        if self._worker is None or self._worker.returncode is not None:
            await self.close()
            command = (sys.executable, "-m", "stretto.engine.structured.sandbox_worker", str(self._memory))
            self._worker = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
            )
            assert self._worker.stdout is not None
            ready = False
            try:
                async with asyncio.timeout(START_S):
                    await _receive(self._worker.stdout)
                ready = True
            except (TimeoutError, asyncio.IncompleteReadError) as error:
                raise Unavailable("no process to check grammars could be started; try again later") from error
            finally:
                if not ready:
                    await self.close()
        return self._worker


async def _receive(stream: asyncio.StreamReader) -> str | None:
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    return msgspec.msgpack.decode(await stream.readexactly(length), type=str | None)
