"""Compiles untrusted grammars in a child process with limits on time and memory, before the engine sees them.

This is the server's side: asyncio, and light to import. `sandbox_worker` is the child. Each exchange is one
line of JSON in each direction over the child's standard input and output.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process

import msgspec

from stretto.errors import InvalidGrammar, Unavailable
from stretto.queueing.turns import Turns
from stretto.types import Grammar, GrammarKind

START_S = 30.0
FOREVER = float("inf")
GrammarResult = tuple[
    str | None, float
]  # the error of a grammar (None: it compiles), and until when this holds
GrammarKey = tuple[GrammarKind, bytes]


class GrammarSandbox:
    """One warm child process, started with the first grammar, and the results it has given.

    `seconds` and `memory` (bytes of address space) limit one grammar. A grammar that exceeds either is
    refused and the child is replaced. `remembered` results are kept; a refusal for time or memory is kept for
    `retry_s` seconds only, because it may be due to a busy machine. Grammars are compiled one at a time, and
    tenants take turns; `waiting` may wait, each for `patience_s`. A grammar with a known result never waits.
    """

    def __init__(
        self,
        *,
        seconds: float = 1.0,
        memory: int = 2**29,
        remembered: int = 512,
        retry_s: float = 30.0,
        waiting: int = 256,
        patience_s: float = 5.0,
    ) -> None:
        self.compilations = 0
        self._seconds = seconds
        self._memory = memory
        self._remembered = remembered
        self._retry_s = retry_s
        self._worker: Process | None = None
        self._turns = Turns("grammars", limit=waiting, patience_s=patience_s)
        self._results: dict[GrammarKey, GrammarResult] = {}

    @property
    def pid(self) -> int | None:
        """The process id of the child, None while there is none."""
        return None if self._worker is None else self._worker.pid

    async def validate(self, grammar: Grammar, tenant: str = "local") -> None:
        """Return when the grammar compiles within the limits.

        Raises InvalidGrammar, which says what is wrong and where, Overloaded when too many grammars wait, and
        Unavailable when no child process can be started.
        """
        if grammar.kind == "json_object":
            return  # it is ours, and compiles
        # A digest, because a grammar may have 100 kB.
        key = grammar.kind, hashlib.blake2b(grammar.source.encode(errors="surrogatepass")).digest()
        result = self._known(key)
        if result is None:
            async with self._turns.turn(tenant):
                # The same grammar may have been compiled while this one waited.
                result = self._known(key) or await self._compile(grammar)
            self._remember(key, result)
        if result[0] is not None:
            raise InvalidGrammar(result[0])

    def _known(self, key: GrammarKey) -> GrammarResult | None:
        """The result for a grammar, if it still holds. Known results outlive those not asked for."""
        result = self._results.pop(key, None)
        if result is None or time.monotonic() >= result[1]:
            return None
        self._results[key] = result
        return result

    def _remember(self, key: GrammarKey, result: GrammarResult) -> None:
        self._results[key] = result
        if len(self._results) > self._remembered:
            del self._results[next(iter(self._results))]

    async def close(self) -> None:
        """End the child process; another call of `validate` would start a new one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            if worker.returncode is None:
                worker.kill()
            await worker.communicate()

    async def _compile(self, grammar: Grammar) -> GrammarResult:
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
