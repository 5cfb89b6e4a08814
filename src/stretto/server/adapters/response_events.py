"""Deltas -> the typed events of `/v1/responses`, or one whole answer made of the same items.

An answer is a list of items: reasoning, a message, function calls. One item is open at a time. A delta of
another kind closes it and opens the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import json, structs

from stretto.errors import StrettoError
from stretto.protocol.openai import ToolCallDelta
from stretto.protocol.responses import (
    IncompleteDetails,
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    ReasoningTokens,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
    item_id,
)
from stretto.server.responses import report_of, usage_of
from stretto.text.output import Output, OutputDelta

encode = json.Encoder().encode
ItemKind = Literal["message", "reasoning", "function_call"]
PREFIXES: dict[ItemKind, str] = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
DELTAS: dict[ItemKind, str] = {
    "message": "output_text",
    "reasoning": "reasoning_text",
    "function_call": "function_call_arguments",
}


@dataclass(slots=True)
class OpenItem:
    """The item that new deltas belong to. `call`: the first delta of a function call.

    `around`: the bytes of a delta's event before its number, before its text, and after it.
    """

    kind: ItemKind
    id: str
    call: ToolCallDelta | None = None
    texts: list[str] = field(default_factory=list[str])
    around: tuple[bytes, bytes, bytes] = (b"", b"", b"")

    def delta(self, number: int, text: str) -> bytes:
        """The event of one delta: what `framed` makes of it, five times faster."""
        before, between, after = self.around
        return b"%b%d%b%b%b" % (before, number, between, encode(text), after)

    def item(self, status: ItemStatus) -> OutputItem:
        """The item as far as it has come; without content when it has just begun."""
        text = "".join(self.texts)
        if self.call is not None:
            name, call_id = self.call.function.name, self.call.id
            assert isinstance(name, str) and isinstance(call_id, str)
            return OutputCall(id=self.id, status=status, call_id=call_id, name=name, arguments=text)
        began = status != "in_progress"
        if self.kind == "reasoning":
            thoughts = [ReasoningText(text=text)] if began else []
            return OutputReasoning(id=self.id, status=status, content=thoughts)
        return OutputMessage(id=self.id, status=status, content=[OutputText(text=text)] if began else [])


class EventWriter:
    """Writes one response: streamed (`events`, then `end`) or in one piece (`keep`, then `whole`).

    `response` is the answer without its output. `done` gets the whole answer. `streamed`: the client sees the
    events. `relaxed`: paths of the parts of a schema that are not enforced.
    """

    def __init__(
        self,
        response: ResponseObject,
        done: Callable[[ResponseObject], None],
        *,
        streamed: bool,
        relaxed: Sequence[str] = (),
    ) -> None:
        self._response = response
        self._streamed = streamed
        self._done = done
        self._relaxed = relaxed
        self._sequence = 0
        self._items: list[OutputItem] = []
        self._open: OpenItem | None = None
        self._reasoning_tokens = 0

    def events(self, output: Output, deltas: Sequence[OutputDelta]) -> bytes:
        """The events of new deltas, after those that open the response."""
        begun = self._sequence > 0
        opening = b"" if begun else self._state("created") + self._state("in_progress")
        return opening + self._add(output, deltas)

    def skip(self, output: Output, deltas: Sequence[OutputDelta]) -> None:
        """Takes deltas that the client has from another worker."""
        if output.request.emitted:
            self.events(output, deltas)

    def end(self, outputs: list[Output]) -> bytes:
        """What ends a stream that went well."""
        closing = self._end(outputs)
        return closing + self._state(self._response.status)

    def keep(self, output: Output, deltas: list[OutputDelta]) -> None:
        """Keeps new deltas for `whole`."""
        self._add(output, deltas)

    def whole(self, outputs: list[Output]) -> bytes:
        """The answer in one piece."""
        self._end(outputs)
        return encode(self._response)

    def failed(self, error: StrettoError) -> bytes:
        """The last event of a stream that ended in an error."""
        problem = ResponseError(
            code="server_error" if error.status >= 500 else "invalid_prompt",
            message=error.message,
            type=error.code,
            param=error.param,
        )
        self._response = structs.replace(
            self._response, status="failed", error=problem, output=list(self._items)
        )
        return self._state("failed")

    def _add(self, output: Output, deltas: Sequence[OutputDelta]) -> bytes:
        events: list[bytes] = []
        for delta, event in deltas:
            if isinstance(delta.reasoning_content, str) and delta.reasoning_content:
                self._write(output, "reasoning", delta.reasoning_content, events)
            if isinstance(delta.content, str) and delta.content:
                self._write(output, "message", delta.content, events)
            if isinstance(delta.tool_calls, list):
                for part in delta.tool_calls:
                    self._write_call(output, part, events)
            if event is not None and self._open is not None and self._open.kind == "reasoning":
                self._reasoning_tokens += 1
        return b"".join(events)

    def _write_call(self, output: Output, part: ToolCallDelta, events: list[bytes]) -> None:
        if isinstance(part.id, str):
            self._begin(output, "function_call", events, part)
        if isinstance(part.function.arguments, str) and part.function.arguments:
            self._write(output, "function_call", part.function.arguments, events)

    def _write(self, output: Output, kind: ItemKind, text: str, events: list[bytes]) -> None:
        opened = self._open
        if opened is None or opened.kind != kind:
            opened = self._begin(output, kind, events)
        opened.texts.append(text)
        if self._streamed:
            events.append(opened.delta(self._sequence, text))
            self._sequence += 1

    def _begin(
        self, output: Output, kind: ItemKind, events: list[bytes], call: ToolCallDelta | None = None
    ) -> OpenItem:
        self._close(output, "completed", events)
        at = len(self._items)
        id = item_id(PREFIXES[kind], self._response.id, at)
        opened = self._open = OpenItem(kind, id, call)
        events.append(self._event("output_item.added", output_index=at, item=opened.item("in_progress")))
        if kind != "function_call":
            events.append(self._item_event("content_part.added", opened, part=_part(kind, "")))
        if self._streamed:
            name = f"response.{DELTAS[kind]}.delta"
            plain = ResponseEvent(type=name, sequence_number=0, **self._placed(opened, delta=""))
            opened.around = around_delta(plain)
        return opened

    def _close(self, output: Output, status: ItemStatus, events: list[bytes]) -> None:
        """Closes the open item, if there is one."""
        opened, self._open = self._open, None
        if opened is None:
            return
        if opened.call is not None and output.parser is not None:
            if opened.call.index in output.parser.abandoned:
                if not self._streamed:
                    return  # its text is content
                status = "incomplete"
            elif opened.call.index < output.parser.calls:
                status = "completed"  # the answer was cut after it
        item = opened.item(status)
        if isinstance(item, OutputCall):
            events.append(
                self._item_event(
                    "function_call_arguments.done", opened, name=item.name, arguments=item.arguments
                )
            )
        else:
            (part,) = item.content
            events.append(self._item_event(f"{DELTAS[opened.kind]}.done", opened, text=part.text))
            events.append(self._item_event("content_part.done", opened, part=part))
        events.append(self._event("output_item.done", output_index=len(self._items), item=item))
        self._items.append(item)

    def _end(self, outputs: list[Output]) -> bytes:
        """Completes the response; returns the events that close its last item."""
        (output,) = outputs
        events: list[bytes] = []
        reason = output.finish_reason
        status = "incomplete" if reason in ("length", "deadline") else "completed"
        if self._open is None and not self._items:
            self._begin(output, "message", events)
        self._close(output, status, events)
        usage = usage_of(outputs)
        details = None
        if status == "incomplete":
            details = IncompleteDetails("deadline" if reason == "deadline" else "max_output_tokens")
        self._response = structs.replace(
            self._response,
            status=status,
            incomplete_details=details,
            output=self._items,
            usage=ResponseUsage(
                input_tokens=usage.prompt_tokens,
                output_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
                input_tokens_details=usage.prompt_tokens_details,
                output_tokens_details=ReasoningTokens(self._reasoning_tokens),
            ),
            stretto=report_of(outputs, self._relaxed),
        )
        self._done(self._response)
        return b"".join(events)

    def _state(self, name: str) -> bytes:
        return self._event(name, response=self._response)

    def _item_event(self, event: str, opened: OpenItem, /, **fields: Any) -> bytes:
        return self._event(event, **self._placed(opened, **fields))

    def _placed(self, opened: OpenItem, **fields: Any) -> dict[str, Any]:
        """The fields of an event of the open item, which has one part of content unless it is a call."""
        placed: dict[str, Any] = {"item_id": opened.id, "output_index": len(self._items)}
        if opened.kind != "function_call":
            placed["content_index"] = 0
        if opened.kind == "message" and ("delta" in fields or "text" in fields):
            placed["logprobs"] = []
        return placed | fields

    def _event(self, event: str, /, **fields: Any) -> bytes:
        if not self._streamed:
            return b""
        made = ResponseEvent(type=f"response.{event}", sequence_number=self._sequence, **fields)
        self._sequence += 1
        return framed(made)


def framed(event: ResponseEvent) -> bytes:
    """One server-sent event."""
    return b"event: " + event.type.encode() + b"\ndata: " + encode(event) + b"\n\n"


def around_delta(event: ResponseEvent) -> tuple[bytes, bytes, bytes]:
    """The bytes of an event before its number, which is 0, before its delta, which is empty, and after it."""
    before, _, rest = framed(event).partition(b'"sequence_number":0')
    between, _, after = rest.partition(b'"delta":""')
    return before + b'"sequence_number":', between + b'"delta":', after


def _part(kind: ItemKind, text: str) -> OutputText | ReasoningText:
    return ReasoningText(text=text) if kind == "reasoning" else OutputText(text=text)
