"""One response of a session: a call of the pipeline of all requests, whose client is the socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from stretto.errors import StrettoError
from stretto.http.errors import internal
from stretto.http.exchange import KEY, Exchange
from stretto.protocol.realtime.options import ConversationItem
from stretto.server.adapters.naming import fields_named, renamed
from stretto.server.generation import run
from stretto.server.realtime.conversation import RealtimeConversation
from stretto.server.realtime.options import AskedTurn
from stretto.server.realtime.outbox import Outbox
from stretto.server.realtime.writer import TurnWriter
from stretto.server.state import Call, ReadAhead, Server
from stretto.server.validation import AnswerSpec, check_chat
from stretto.text.output import NOWHERE, AnswerPlace

ENDPOINT = "realtime"


class SessionClient(NamedTuple):
    """Whose a session is. `model`: its name. `request_id`: of the handshake. `place`: where a gateway had it
    opened. `age_s`: how long its events are on their way, and what answers them."""

    tenant: str
    model: str
    request_id: str
    place: AnswerPlace = NOWHERE
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TurnPlace:
    """Where responses run: their server and client, and where their events go. `gone` returns when the client
    has left."""

    server: Server
    client: SessionClient
    outbox: Outbox
    conversation: RealtimeConversation
    gone: Callable[[], Awaitable[object]]


@dataclass(slots=True)
class RealtimeTurn:
    """`arrival`: when the client asked; deadlines count from it. `shown`: the response's own fields, as
    clients see them. `kept`: whether the answer is added to the conversation. `event_id`: of the client's
    event that asked for it. `read_ahead`: what of its prompt is computed."""

    place: TurnPlace
    asked: AskedTurn
    shown: dict[str, Any]
    arrival: float
    kept: bool
    event_id: str | None
    read_ahead: ReadAhead
    id: str = field(default_factory=lambda: f"resp_{token_hex(12)}")
    over: bool = False  # whether its last event was sent
    task: asyncio.Task[None] | None = None
    _call: Call | None = None
    _reason: str = ""  # why it was interrupted

    @property
    def variant(self) -> str | None:
        """The model that answers; None before one was asked."""
        outputs = [] if self._call is None else self._call.outputs
        return outputs[0].request.model if outputs else None

    def start(self, ended: Callable[[], None]) -> None:
        """Begins to answer. `ended()` is called before the last event of one that does not end well."""
        self.task = asyncio.create_task(self._run(ended))

    def interrupt(self, reason: str) -> None:
        """Ends the response within one step, with status `cancelled` and this reason."""
        if not self.over and not self._reason:
            self._reason = reason
            if self._call is not None:
                self._call.end(None)

    async def _run(self, ended: Callable[[], None]) -> None:
        place, conversation = self.place, self.place.conversation
        head = {"id": self.id, "object": "realtime.response", **self.shown}
        keep = self._keep if self.kept else None
        writer = TurnWriter(place.outbox, head, keep, lambda: conversation.last_id)
        place.outbox.put(writer.created())
        exchange = Exchange(place.client.request_id, self._send, status=200)
        request = Request({"type": "http", "headers": [], KEY: exchange}, self._receive)
        call = self._call = Call(place.server, request, self._send, b"", place.client.tenant, self.arrival)
        call.size, call.read_ahead, call.placed = conversation.size, self.read_ahead, place.client.place
        call.feedback_ids = self.id, place.client.request_id  # all turns of a session share the latter
        failure: StrettoError | None = None
        try:
            if not self._reason:
                await call.run(lambda call: self._answer(call, writer))
        except ClientDisconnect:
            call.client_gone = True
        except Exception as error:
            failure = error if isinstance(error, StrettoError) else internal(error)
        finally:
            place.server.ended(call.summary(ENDPOINT, failure))
            ended()
        if self.over:
            return
        self.over = True
        if failure is None:
            frames = writer.cancelled(call.outputs, self._reason or "client_cancelled")
        else:
            frames = writer.failed(call.outputs, failure)
            place.outbox.error(failure, self.event_id)
        self._put(frames)

    async def _answer(self, call: Call, writer: TurnWriter) -> None:
        def writer_of(spec: AnswerSpec, tier: str) -> TurnWriter:
            writer.relaxed = [renamed(path, self.asked.names) for path in spec.relaxed]
            return writer

        with fields_named(self.asked.names):
            await run(call, self.asked.chat, check_chat, writer_of)

    async def _send(self, message: Message) -> None:
        """Takes what the pipeline sends: the frames of events, each on a line."""
        if message["type"] == "http.response.body":
            self.over = not message.get("more_body", False)
            self._put(message["body"])
            await self.place.outbox.has_room()

    async def _receive(self) -> Message:
        await self.place.gone()
        return {"type": "http.disconnect"}

    def _put(self, frames: bytes) -> None:
        for frame in frames.split(b"\n"):
            self.place.outbox.put(frame)

    def _keep(self, item: ConversationItem) -> str | None:
        """Adds an item of the answer to the conversation; returns the id of the one before it."""
        return self.place.conversation.add(item)[1]
