"""The events on their way to one client, in order. One that reads slowly holds up its own session alone."""

from __future__ import annotations

import asyncio
from collections import deque
from secrets import token_hex
from typing import Any

from msgspec import json
from starlette.requests import ClientDisconnect
from starlette.types import Send

from stretto.errors import StrettoError
from stretto.http.errors import internal

FULL = 256  # events that wait; who makes more of them waits too
# What clients of the older protocol, which say so in a header, call these events. None: they know no such.
OLDER: dict[str, str | None] = {
    "response.output_text.delta": "response.text.delta",
    "response.output_text.done": "response.text.done",
    "conversation.item.added": "conversation.item.created",
    "conversation.item.done": None,
}
encode = json.Encoder().encode


class Outbox:
    """`send` takes ASGI messages. `older`: the client knows the older names."""

    def __init__(self, send: Send, *, older: bool) -> None:
        self.older = older
        self._send = send
        self._prefix = f"event_{token_hex(6)}"
        self._count = 0
        self._frames: deque[bytes] = deque()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = self._dropped = False

    def event(self, type: str, /, **fields: Any) -> bytes:
        """One event as JSON; empty when the client knows none of this type."""
        name = OLDER.get(type, type) if self.older else type
        if name is None:
            return b""
        self._count += 1
        return encode({"type": name, "event_id": f"{self._prefix}_{self._count}", **fields})

    def post(self, type: str, /, **fields: Any) -> None:
        """Sends one event, after those that wait."""
        self.put(self.event(type, **fields))

    def error(self, error: StrettoError, event_id: str | None = None) -> None:
        """Sends an error. `event_id`: of the client's event that caused it."""
        self.post("error", error={**error.body()["error"], "event_id": event_id})

    def put(self, frame: bytes) -> None:
        """Sends one event that `event` made."""
        if frame and not self._closed:
            self._frames.append(frame)
            self._filled.set()
            if len(self._frames) >= FULL:
                self._room.clear()

    async def has_room(self) -> None:
        """Returns when few enough events wait. Raises ClientDisconnect when nobody reads them any more."""
        await self._room.wait()
        if self._dropped:
            raise ClientDisconnect

    async def run(self) -> None:
        """Sends until `finish` was called and nothing waits. Ends silently when the client has gone."""
        try:
            while self._frames or not self._closed:
                if not self._frames:
                    self._filled.clear()
                    await self._filled.wait()
                    continue
                frame = self._frames.popleft()
                await self._send({"type": "websocket.send", "text": frame.decode()})
                if len(self._frames) < FULL:
                    self._room.set()
        except OSError:  # uvicorn raises it once the client has gone
            self.drop()
        except Exception as error:
            internal(error)
            self.drop()

    def finish(self) -> None:
        """Takes no more events; `run` ends after the last one."""
        self._closed = True
        self._filled.set()

    def drop(self) -> None:
        """Takes no more events, and sends none."""
        self._dropped = True
        self._frames.clear()
        self._room.set()
        self.finish()
