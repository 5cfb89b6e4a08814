"""One session: what each event of its client does. It knows no socket.

A session has one conversation, at most one response at a time, and one message that is being typed.
"""

from __future__ import annotations

import asyncio
import time
from secrets import token_hex

from msgspec import DecodeError, json, structs

from stretto.errors import ActiveResponse, InvalidRequest, NoActiveResponse, StrettoError, UnsupportedField
from stretto.http.errors import internal
from stretto.protocol.openai import ChatRequest
from stretto.protocol.parsing import as_it_is, parse
from stretto.protocol.realtime.events import (
    ClientEvent,
    EventHead,
    ItemCreate,
    ItemDelete,
    ItemRetrieve,
    ItemTruncate,
    ResponseCancel,
    ResponseCreate,
    SessionUpdate,
    TextAppend,
    TextClear,
    TextCommit,
    TextReplace,
)
from stretto.protocol.realtime.options import ConversationItem, ResponseFields, SessionFields
from stretto.server.realtime.conversation import RealtimeConversation, shown, user_message
from stretto.server.realtime.options import asked, shown_options, updated
from stretto.server.realtime.outbox import Outbox
from stretto.server.realtime.reading import PromptReader, TypedText
from stretto.server.realtime.turn import RealtimeTurn, SessionClient, TurnPlace
from stretto.server.state import Server
from stretto.server.validation import check_chat

DECODER = json.Decoder(ClientEvent)
HEAD = json.Decoder(EventHead)
AUDIO = ("input_audio_buffer.", "output_audio_buffer.")


class Session:
    """The state of one session."""

    def __init__(self, server: Server, client: SessionClient, outbox: Outbox) -> None:
        model, tenant, request_id = client.model, client.tenant, client.request_id
        self.id = f"sess_{token_hex(12)}"
        self.turn: RealtimeTurn | None = None
        self._server = server
        self._model = model
        self._outbox = outbox
        self._gone = asyncio.Event()
        self._fields = SessionFields(model=model)
        self._conversation = RealtimeConversation(server.config.max_body_bytes)
        self._typed = TypedText()
        self._age_s = client.age_s
        self._place = TurnPlace(server, client, outbox, self._conversation, self._gone.wait)
        self._reader = PromptReader(
            server,
            self._conversation,
            tenant,
            request_id,
            self._chat_typed,
            lambda tokens, characters: outbox.post("input_text.read", tokens=tokens, characters=characters),
        )

    def greet(self) -> None:
        """Sends the first events."""
        self._outbox.post("session.created", session=self._shown())
        conversation = {"id": self._conversation.id, "object": "realtime.conversation"}
        self._outbox.post("conversation.created", conversation=conversation)

    async def handle(self, body: bytes) -> None:
        """Does what an event asks for, or sends an error. Deadlines count from its arrival."""
        arrival = time.monotonic() - self._age_s
        head = EventHead()
        try:
            head = _head(body)
            if (head.type or "").startswith(AUDIO):
                raise UnsupportedField("$.type: this server has no audio; send text", param="$.type")
            await self._do(parse(DECODER, body, as_it_is), arrival)
        except Exception as error:
            known = error if isinstance(error, StrettoError) else internal(error)
            self._outbox.error(known, head.event_id)

    async def leave(self) -> None:
        """Ends all work: the client has gone, or the session is over."""
        self._reader.stop()
        self._gone.set()
        if self.turn is not None and self.turn.task is not None:
            await asyncio.wait({self.turn.task})

    async def _do(self, event: ClientEvent, arrival: float) -> None:
        match event:
            case TextAppend():
                self._ensure_room(event.text)
                self._typed.append(event.text)
                self._read()
            case TextReplace():
                self._ensure_room(event.text)
                self._typed.replace(event.start, event.end, event.text)
                self._read(edited=True)
            case TextClear():
                self._drop_typed()
                self._outbox.post("input_text.cleared")
            case TextCommit():
                await self._commit(event, arrival)
            case ResponseCreate():
                await self._respond(event.response or ResponseFields(), arrival, event.event_id)
            case ResponseCancel():
                if self.turn is None or event.response_id not in (None, self.turn.id):
                    raise NoActiveResponse("no such response is running", param="$.response_id")
                self.turn.interrupt("client_cancelled")
            case SessionUpdate():
                self._update(event.session)
            case _:
                self._change_items(event)

    def _change_items(self, event: ItemCreate | ItemDelete | ItemRetrieve | ItemTruncate) -> None:
        conversation, post = self._conversation, self._outbox.post
        match event:
            case ItemCreate(item=item, previous_item_id=previous):
                self._add(item, previous)
            case ItemDelete(item_id=id):
                conversation.delete(id)
                post("conversation.item.deleted", item_id=id)
            case ItemRetrieve(item_id=id):
                item = shown(conversation.get(id), older=self._outbox.older)
                post("conversation.item.retrieved", item=item)
            case ItemTruncate(item_id=id):
                conversation.truncate(id, event.text_end)
                where = {"item_id": id, "content_index": event.content_index}
                post(
                    "conversation.item.truncated",
                    **where,
                    audio_end_ms=event.audio_end_ms or 0,
                    text_end=event.text_end,
                )

    def _add(self, item: ConversationItem, previous: str | None = None) -> ConversationItem:
        item, before = self._conversation.add(item, previous)
        wire = shown(item, older=self._outbox.older)
        for event in ("conversation.item.added", "conversation.item.done"):
            self._outbox.post(event, item=wire, previous_item_id=before)
        return item

    async def _commit(self, event: TextCommit, arrival: float) -> None:
        """Makes the typed text a message, and answers it."""
        text = str(self._typed)
        if not text.strip():
            raise InvalidRequest("no text was typed: send input_text.append first", param="$.type")
        options = event.response or ResponseFields()
        await self._interrupt("turn_detected")
        self._drop_typed()
        before = self._conversation.last_id
        item = self._conversation.add(user_message(text))[0]
        self._outbox.post("input_text.committed", item_id=item.id, previous_item_id=before)
        wire = shown(item, older=self._outbox.older)
        for name in ("conversation.item.added", "conversation.item.done"):
            self._outbox.post(name, item=wire, previous_item_id=before)
        if event.create_response:
            await self._respond(options, arrival, event.event_id)

    async def _interrupt(self, reason: str) -> None:
        """Ends the running response, if there is one."""
        turn = self.turn
        if turn is not None and turn.task is not None:
            turn.interrupt(reason)
            await asyncio.wait({turn.task})

    async def _respond(self, options: ResponseFields, arrival: float, event_id: str | None) -> None:
        if self.turn is not None and self.turn.over and self.turn.task is not None:
            await asyncio.wait({self.turn.task})  # its last event was sent
        if self.turn is not None:
            raise ActiveResponse(
                f"the response {self.turn.id} runs: wait for response.done, or send response.cancel",
                param="$.type",
            )
        self._reader.stop()
        conversation = self._conversation
        items = conversation.items if options.input is None else conversation.resolved(options.input)
        if not items and not (options.instructions or self._fields.instructions):
            raise InvalidRequest("the conversation is empty: create an item first", param="$.type")
        kept = options.conversation != "none"
        wire = {
            "conversation_id": conversation.id if kept else None,
            **shown_options(self._fields, options),
            "metadata": options.metadata,
        }
        turn = RealtimeTurn(
            place=self._place,
            asked=asked(self._fields, options, items, self.id),
            shown=wire,
            arrival=arrival,
            kept=kept,
            event_id=event_id,
            read_ahead=self._reader.read,
        )
        self.turn = turn
        turn.start(self._turn_ended)

    def _turn_ended(self) -> None:
        if self.turn is not None and self.turn.variant is not None:
            self._reader.variant = self.turn.variant
        self.turn = None
        if not self._gone.is_set():
            self._read()

    def _update(self, new: SessionFields) -> None:
        """Sets fields of the session. Raises InvalidRequest for values that no response could use."""
        if new.model not in (None, self._model):
            raise InvalidRequest(
                f"$.session.model: this session uses {self._model}; open another session",
                param="$.session.model",
            )
        fields = updated(self._fields, new)
        tried = asked(fields, ResponseFields(), [user_message("text")], self.id)
        check_chat(tried.chat, self._server.model(self._model), self._server.limits)
        self._fields = fields
        self._outbox.post("session.updated", session=self._shown())

    def _read(self, *, edited: bool = False) -> None:
        """Reads ahead in the typed text, unless a response is running."""
        if self.turn is None and self._typed.size:
            self._reader.look(self._typed, edited=edited)

    def _chat_typed(self, text: str) -> ChatRequest:
        """The request that ends with the text of a message that goes on."""
        items = [*self._conversation.items, user_message(text)]
        chat = asked(self._fields, ResponseFields(), items, self.id).chat
        return structs.replace(chat, continue_final_message=True, add_generation_prompt=False)

    def _drop_typed(self) -> None:
        self._reader.next_message()
        self._typed = TypedText()

    def _ensure_room(self, text: str) -> None:
        most = self._server.config.max_body_bytes
        if self._typed.size + len(text) > most:
            raise InvalidRequest(f"$.text: a message may have {most} bytes; send less", param="$.text")

    def _shown(self) -> dict[str, object]:
        expires = int(time.time() + self._server.config.session_timeout_s)
        return {
            "id": self.id,
            "object": "realtime.session",
            "type": "realtime",
            "model": self._model,
            "expires_at": expires,
            **shown_options(self._fields),
        }


def _head(body: bytes) -> EventHead:
    """The type and the id of an event, as far as they can be read."""
    try:
        return HEAD.decode(body)
    except (DecodeError, UnicodeDecodeError, RecursionError):
        return EventHead()
