"""Deltas -> Anthropic's format: blocks of text, reasoning and tool calls, streamed or in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import json, structs

from stretto.protocol.anthropic import (
    MadeBlock,
    MadeMessage,
    MadeText,
    MadeThinking,
    MadeToolUse,
    MessageUsage,
    StopReason,
)
from stretto.protocol.openai import FinishReason, ToolCallDelta
from stretto.server.adapters.naming import arguments_of
from stretto.server.responses import WholeOutput, made_calls, usage_of
from stretto.server.validation import AnswerSpec
from stretto.text.output import Output, OutputDelta

encode = json.Encoder().encode
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
END = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
REASONS: dict[FinishReason, StopReason] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "deadline": "max_tokens",
    "tool_calls": "tool_use",
}
TEXT, THINKING = "text", "thinking"
Kind = str | int


class MessageWriter:
    """Writes one message. In a stream, one block is open at a time: `TEXT`, `THINKING`, or the index of a
    tool call. The bytes around the text of a delta are encoded once for each block."""

    def __init__(self, spec: AnswerSpec, request_id: str) -> None:
        self._id = f"msg_{request_id}"
        self._model = spec.model.name
        self._pieces = spec.model.text.pieces
        self._relaxed = list(spec.relaxed)
        self._opened = False
        self._block = -1
        self._kind: Kind | None = None
        self._before = b""
        self._kept: WholeOutput | None = None

    def events(self, output: Output, deltas: Sequence[OutputDelta]) -> bytes:
        """The events of new deltas; with the last ones, those that end the message."""
        events = b"" if self._opened else self._open(output)
        for delta, _ in deltas:
            if isinstance(delta.content, str):
                events += self._part(TEXT, delta.content)
            elif isinstance(delta.reasoning_content, str):
                events += self._part(THINKING, delta.reasoning_content)
            elif isinstance(delta.tool_calls, list):
                for call in delta.tool_calls:
                    events += self._call(call)
        return events if output.finish_reason is None else events + self._close(output)

    def skip(self, output: Output, deltas: Sequence[OutputDelta]) -> None:
        """Takes deltas that the client has."""
        self.events(output, deltas)

    def end(self, outputs: list[Output]) -> bytes:
        """What ends a stream that went well."""
        return END

    def keep(self, output: Output, deltas: list[OutputDelta]) -> None:
        """Keeps new deltas for `whole`."""
        if self._kept is None:
            self._kept = WholeOutput(output, self._pieces)
        self._kept.add(deltas)

    def whole(self, outputs: list[Output]) -> bytes:
        """The message in one piece."""
        (output,) = outputs
        kept = self._kept or WholeOutput(output, self._pieces)
        blocks: list[MadeBlock] = []
        if kept.reasoning:
            blocks.append(MadeThinking(thinking="".join(kept.reasoning), signature=self._id))
        if kept.text:
            blocks.append(MadeText(text=kept.text))
        blocks += [
            MadeToolUse(id=made.id, name=made.function.name, input=arguments_of(made))
            for made in made_calls(kept)
        ]
        message = structs.replace(self._message(output), content=blocks, **self._ending(output))
        return encode(message)

    def _open(self, output: Output) -> bytes:
        self._opened = True
        return event("message_start", message=self._message(output)) + PING

    def _message(self, output: Output) -> MadeMessage:
        return MadeMessage(id=self._id, model=self._model, content=[], usage=_usage(output))

    def _ending(self, output: Output) -> dict[str, Any]:
        reason = REASONS[output.finish_reason or "stop"]
        found = self._stop_sequence(output) if reason == "end_turn" else None
        report = output.report()
        return {
            "stop_reason": reason if found is None else "stop_sequence",
            "stop_sequence": found,
            "stretto": structs.replace(report, schema_relaxed=self._relaxed) if self._relaxed else report,
        }

    def _stop_sequence(self, output: Output) -> str | None:
        """The stop string that ended the answer, which may be a special token."""
        if output.stop_string is not None or output.stop_token is None:
            return output.stop_string
        name = self._pieces.name(output.stop_token)
        return name if name in output.request.sampling.stop else None

    def _close(self, output: Output) -> bytes:
        ending = self._ending(output)
        report = ending.pop("stretto")
        return self._leave() + event("message_delta", delta=ending, usage=_usage(output), stretto=report)

    def _part(self, kind: Kind, text: str) -> bytes:
        if not text:
            return b""
        entered = b""
        if kind != self._kind:
            block = MadeText(text="") if kind == TEXT else MadeThinking(thinking="", signature="")
            entered = self._enter(kind, block)
        return entered + self._before + encode(text) + b"}}\n\n"

    def _call(self, call: ToolCallDelta) -> bytes:
        entered, function = b"", call.function
        if call.index != self._kind:
            name, id = function.name, call.id
            made = MadeToolUse(id=id if id else "", name=name if name else "", input={})
            entered = self._enter(call.index, made)
        if not function.arguments:
            return entered
        return entered + self._before + encode(function.arguments) + b"}}\n\n"

    def _enter(self, kind: Kind, block: MadeBlock) -> bytes:
        left = self._leave()
        self._kind = kind
        self._block += 1
        names = {TEXT: ("text_delta", "text"), THINKING: ("thinking_delta", "thinking")}
        delta, field = names.get(str(kind), ("input_json_delta", "partial_json"))
        whole = event("content_block_delta", index=self._block, delta={"type": delta, field: ""})
        self._before = whole.removesuffix(b'""}}\n\n')
        return left + event("content_block_start", index=self._block, content_block=block)

    def _leave(self) -> bytes:
        if self._kind is None:
            return b""
        signed = b""
        if self._kind == THINKING:
            delta = {"type": "signature_delta", "signature": self._id}
            signed = event("content_block_delta", index=self._block, delta=delta)
        self._kind = None
        return signed + event("content_block_stop", index=self._block)


def event(type: str, **fields: Any) -> bytes:
    """One server-sent event with its name."""
    return b"event: " + type.encode() + b"\ndata: " + encode({"type": type, **fields}) + b"\n\n"


def _usage(output: Output) -> MessageUsage:
    usage = usage_of([output])
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        output_tokens=usage.completion_tokens,
        cache_read_input_tokens=cached,
    )
