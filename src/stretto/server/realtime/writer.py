"""Turns deltas into the events of one response: one JSON object on each line.

An answer is a list of items: messages and calls of functions. One is open at a time. Reasoning is not an
item: it has events of its own, because OpenAI's protocol has none for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Literal

from stretto.errors import InvalidRequest, StrettoError
from stretto.protocol.openai import ToolCallDelta
from stretto.protocol.realtime.options import ConversationItem
from stretto.protocol.responses import InputPart
from stretto.server.realtime.conversation import shown
from stretto.server.realtime.outbox import Outbox
from stretto.server.responses import report_of, usage_of
from stretto.text.output import Output, OutputDelta

Begun = Literal["in_progress", "completed", "incomplete"]
INCOMPLETE = {"length": "max_output_tokens", "deadline": "deadline"}
TEXT, CALL, REASONING = "output_text", "function_call_arguments", "reasoning_text"


@dataclass(slots=True)
class OpenPart:
    """What new deltas belong to: the text of a message, the arguments of a call, or reasoning. `placed`: the
    fields of each of its events."""

    kind: Literal["output_text", "function_call_arguments", "reasoning_text"]
    id: str
    placed: dict[str, Any]
    call: ToolCallDelta | None = None
    texts: list[str] = field(default_factory=list[str])

    def item(self, status: Begun) -> ConversationItem:
        """The item as far as it has come; without content when it has just begun."""
        text = "".join(self.texts)
        if self.call is not None:
            name, call_id = self.call.function.name, self.call.id
            assert isinstance(name, str) and isinstance(call_id, str)
            return ConversationItem(
                id=self.id, type="function_call", status=status, call_id=call_id, name=name, arguments=text
            )
        content = [] if status == "in_progress" else [InputPart(type="output_text", text=text)]
        return ConversationItem(id=self.id, type="message", role="assistant", status=status, content=content)


class TurnWriter:
    """Writes one response. `head` is the response without status and output. `keep` adds an item to the
    conversation, and returns the id of the one before it; None: the response is not added."""

    def __init__(
        self,
        outbox: Outbox,
        head: dict[str, Any],
        keep: Callable[[ConversationItem], str | None] | None,
        previous: Callable[[], str | None],
    ) -> None:
        self.relaxed: Sequence[str] = ()
        self._outbox = outbox
        self._head = head
        self._keep = keep
        self._previous = previous
        self._items: list[ConversationItem] = []
        self._open: OpenPart | None = None
        self._reasoning_tokens = 0

    def created(self) -> bytes:
        """The first event."""
        return self._event("response.created", response=self._response("in_progress", None))

    def events(self, output: Output, deltas: Sequence[OutputDelta]) -> bytes:
        """The events of new deltas."""
        events: list[bytes] = []
        for delta, event in deltas:
            if isinstance(delta.reasoning_content, str) and delta.reasoning_content:
                self._write(output, REASONING, delta.reasoning_content, events)
            if isinstance(delta.content, str) and delta.content:
                self._write(output, TEXT, delta.content, events)
            if isinstance(delta.tool_calls, list):
                for part in delta.tool_calls:
                    self._write_call(output, part, events)
            if event is not None and self._open is not None and self._open.kind == REASONING:
                self._reasoning_tokens += 1
        return b"".join(events)

    def end(self, outputs: list[Output]) -> bytes:
        """What ends a response that went well."""
        (output,) = outputs
        events: list[bytes] = []
        reason = INCOMPLETE.get(output.finish_reason or "")
        status = "completed" if reason is None else "incomplete"
        if not self._items and (self._open is None or self._open.kind == REASONING):
            self._begin(output, TEXT, events)
        self._close(output, status, events)
        details = None if reason is None else {"type": "incomplete", "reason": reason}
        return self._done(events, status, details, outputs)

    def cancelled(self, outputs: list[Output], reason: str) -> bytes:
        """What ends a response that was interrupted. What has come of it stays in the conversation."""
        events: list[bytes] = []
        if outputs:
            self._close(outputs[0], "incomplete", events)
        return self._done(events, "cancelled", {"type": "cancelled", "reason": reason}, outputs)

    def failed(self, outputs: list[Output], error: StrettoError) -> bytes:
        """What ends a response that failed."""
        events: list[bytes] = []
        if outputs:
            self._close(outputs[0], "incomplete", events)
        problem = {"type": error.type, "code": error.code, "message": error.message}
        return self._done(events, "failed", {"type": "failed", "error": problem}, outputs)

    def skip(self, output: Output, deltas: Sequence[OutputDelta]) -> None:
        """A session ends with its worker, so none of its responses is continued."""
        raise InvalidRequest("a response of /v1/realtime cannot be continued")

    def keep(self, output: Output, deltas: list[OutputDelta]) -> None:
        """All responses are streamed."""
        raise InvalidRequest("a response of /v1/realtime is a stream")

    def whole(self, outputs: list[Output]) -> bytes:
        """All responses are streamed."""
        raise InvalidRequest("a response of /v1/realtime is a stream")

    def _write_call(self, output: Output, part: ToolCallDelta, events: list[bytes]) -> None:
        if isinstance(part.id, str):
            self._begin(output, CALL, events, part)
        if isinstance(part.function.arguments, str) and part.function.arguments:
            self._write(output, CALL, part.function.arguments, events)

    def _write(
        self,
        output: Output,
        kind: Literal["output_text", "function_call_arguments", "reasoning_text"],
        text: str,
        events: list[bytes],
    ) -> None:
        opened = self._open
        if opened is None or opened.kind != kind:
            opened = self._begin(output, kind, events)
        opened.texts.append(text)
        events.append(self._event(f"response.{kind}.delta", **opened.placed, delta=text))

    def _begin(
        self,
        output: Output,
        kind: Literal["output_text", "function_call_arguments", "reasoning_text"],
        events: list[bytes],
        call: ToolCallDelta | None = None,
    ) -> OpenPart:
        self._close(output, "completed", events)
        id, place = (
            f"item_{token_hex(12)}",
            {"response_id": self._head["id"], "output_index": len(self._items)},
        )
        if kind == REASONING:
            opened = self._open = OpenPart(kind, "", place)
            return opened
        placed = place | {"item_id": id}
        if kind == TEXT:
            placed["content_index"] = 0
        elif call is not None:
            placed["call_id"] = call.id
        opened = self._open = OpenPart(kind, id, placed, call)
        item = self._shown(opened.item("in_progress"))
        events.append(self._event("response.output_item.added", **place, item=item))
        if self._keep is not None:
            events.append(
                self._event("conversation.item.added", item=item, previous_item_id=self._previous())
            )
        if kind == TEXT:
            part = {"type": "text", "text": ""}
            events.append(self._event("response.content_part.added", **placed, part=part))
        return opened

    def _close(self, output: Output, status: Begun, events: list[bytes]) -> None:
        """Closes what is open, if anything is."""
        opened, self._open = self._open, None
        if opened is None:
            return
        text = "".join(opened.texts)
        if opened.call is not None:
            status = _call_status(output, opened.call, status)
            done = {"name": opened.call.function.name, "arguments": text}
        else:
            done = {"text": text}
        events.append(self._event(f"response.{opened.kind}.done", **opened.placed, **done))
        if opened.kind == REASONING:
            return
        if opened.kind == TEXT:
            part = {"type": "text", "text": text}
            events.append(self._event("response.content_part.done", **opened.placed, part=part))
        item = opened.item(status)
        place = {"response_id": self._head["id"], "output_index": len(self._items)}
        events.append(self._event("response.output_item.done", **place, item=self._shown(item)))
        self._items.append(item)
        if self._keep is not None:
            previous = self._keep(item)
            events.append(
                self._event("conversation.item.done", item=self._shown(item), previous_item_id=previous)
            )

    def _done(
        self, events: list[bytes], status: str, details: dict[str, Any] | None, outputs: list[Output]
    ) -> bytes:
        response = self._response(status, details)
        if outputs:
            usage = usage_of(outputs)
            response["usage"] = {
                "total_tokens": usage.total_tokens,
                "input_tokens": usage.prompt_tokens,
                "output_tokens": usage.completion_tokens,
                "input_token_details": {
                    "text_tokens": usage.prompt_tokens,
                    "audio_tokens": 0,
                    "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                },
                "output_token_details": {
                    "text_tokens": usage.completion_tokens,
                    "audio_tokens": 0,
                    "reasoning_tokens": self._reasoning_tokens,
                },
            }
            response["stretto"] = report_of(outputs, self.relaxed)
        events.append(self._event("response.done", response=response))
        return b"".join(events)

    def _response(self, status: str, details: dict[str, Any] | None) -> dict[str, Any]:
        output = [self._shown(item) for item in self._items]
        return {**self._head, "status": status, "status_details": details, "output": output, "usage": None}

    def _shown(self, item: ConversationItem) -> dict[str, Any]:
        return shown(item, older=self._outbox.older)

    def _event(self, type: str, /, **fields: Any) -> bytes:
        event = self._outbox.event(type, **fields)
        return event + b"\n" if event else event


def _call_status(output: Output, call: ToolCallDelta, status: Begun) -> Begun:
    """The status of a call: `incomplete` for text that turned out to be none, too."""
    if output.parser is not None:
        if call.index in output.parser.abandoned:
            return "incomplete"
        if call.index < output.parser.calls:
            return "completed"  # the answer was cut after it
    return status
