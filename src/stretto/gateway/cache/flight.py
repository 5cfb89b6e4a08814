"""One answer in flight that several clients with the same request read. One upstream makes it.

The answer's first reader starts it, and the others join while all of it is still at hand. A reader that
leaves ends nothing for the others; when the last one leaves, the work is cancelled. The reader that came
first pays; when it leaves, the next one pays what is still to come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from stretto.gateway.accounts.usage import Tally
from stretto.gateway.exchange import Send

HIGH_WATER = 256 * 1024  # unread bytes for which the upstream waits


class Piece(NamedTuple):
    """One send of the upstream."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    more: bool


class FlightFailed(Exception):
    """The upstream raised `error`. `begun`: whether this reader has a part of the answer."""

    def __init__(self, error: Exception, *, begun: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.begun = begun


class AnswerFlight:
    """The pieces of an answer as they come. Up to `limit` bytes all of them stay, so that others may join and
    the answer may be kept. Beyond, the slowest reader sets the pace, and what all have read is forgotten."""

    def __init__(self, limit: int, took: Callable[[], Tally]) -> None:
        """`took()`: what the answer has taken so far."""
        self.pieces: list[Piece] = []
        self.size = 0  # bytes of all pieces so far
        self.landed = False
        self._took = took
        self._paid = Tally()
        self._limit = limit
        self._forgotten = 0  # pieces
        self._error: Exception | None = None
        self._ended = False  # whether the last piece has come
        self._cancelled = False
        self._readers: dict[int, tuple[int, int]] = {}  # pieces and bytes that each has read
        self._serial = 0
        self._changed = asyncio.Event()
        self._read = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def whole(self) -> bool:
        """Whether all pieces so far are at hand."""
        return self.size <= self._limit

    @property
    def joinable(self) -> bool:
        """Whether another reader would get all of the answer."""
        return self.whole and not self.landed and not self._cancelled

    def bill(self) -> Tally:
        """What the answer has taken that nobody has paid yet; it counts as paid from now on."""
        took = self._took()
        due, self._paid = took.less(self._paid), took
        return due

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Starts the upstream, which calls `send`. Its first reader must follow at once."""
        self._task = asyncio.create_task(self._run(work))

    async def send(self, status: int, headers: Mapping[str, str], body: bytes, more: bool) -> None:
        """Takes a piece from the upstream. Waits while too many bytes are unread."""
        self.pieces.append(Piece(status, headers, body, more))
        self.size += len(body)
        self._ended = not more
        self._wake()
        while self._unread() > HIGH_WATER:
            self._read.clear()
            await self._read.wait()

    async def follow(self, send: Send, pay: Callable[[], None]) -> None:
        """Passes the answer on to one client. `pay()` is called when the client leaves or has all, if it is
        the one that came first of those that are left. Raises FlightFailed."""
        reader, self._serial = self._serial, self._serial + 1
        self._readers[reader] = (0, 0)
        try:
            while True:
                done, size = self._readers[reader]
                if done - self._forgotten < len(self.pieces):
                    piece = self.pieces[done - self._forgotten]
                    await send(*piece)
                    self._readers[reader] = (done + 1, size + len(piece.body))
                    self._read.set()
                    self._forget()
                    if not piece.more:
                        return
                elif self._error is not None:
                    raise FlightFailed(self._error, begun=done > 0)
                elif self.landed:
                    return
                else:
                    await self._changed.wait()
        finally:
            if reader == next(iter(self._readers)):
                pay()
            del self._readers[reader]
            self._read.set()
            if not self._readers and not self._ended and self._task is not None:
                self._cancelled = True
                self._task.cancel()

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:
            self._error = error
        finally:
            self.landed = True
            self._wake()

    def _unread(self) -> int:
        """Unread bytes: of the fastest reader while everything is kept anyway, and else of the slowest."""
        if not self._readers:
            return 0 if self._serial else self.size  # all have left, or none has come yet
        read = [size for _, size in self._readers.values()]
        return self.size - (max(read) if self.whole else min(read))

    def _forget(self) -> None:
        if not self.whole and self._readers:
            count = min(done for done, _ in self._readers.values()) - self._forgotten
            if count > 0:
                del self.pieces[:count]
                self._forgotten += count

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
