"""Deltas -> Ollama's format: one line of JSON for each delta, or one object. Tool calls come whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from msgspec import UNSET, UnsetType, json, structs

from stretto.protocol.logprobs import TokenLogprob
from stretto.protocol.ollama import CalledTool, OllamaAnswer, OllamaMade, OllamaSaid
from stretto.protocol.openai import FinishReason
from stretto.server.adapters.naming import arguments_of
from stretto.server.logprobs import chat_logprobs
from stretto.server.responses import WholeOutput, made_calls, usage_of
from stretto.server.validation import AnswerSpec
from stretto.text.output import Output, OutputDelta
from stretto.types import TokenEvent

NDJSON = b"application/x-ndjson"
NS = 1e9
encode = json.Encoder().encode
CUT: tuple[FinishReason, ...] = ("length", "deadline")


def stamp() -> str:
    """The time now, as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class OllamaWriter:
    """Writes one answer. `chat`: in the shape of `/api/chat`. In a stream, the parts of tool calls wait until
    the answer goes on, or ends: then it is known that they are calls."""

    def __init__(self, spec: AnswerSpec, model: str, *, chat: bool) -> None:
        self._chat = chat
        self._head = OllamaAnswer(model=model, created_at=stamp())
        self._pieces = spec.model.text.pieces
        self._logprobs = spec.sampling.logprobs is not None
        self._relaxed = list(spec.relaxed)
        self._kept: WholeOutput | None = None
        self._sent_calls = 0
        before, after = encode(self._said("\0")).split(encode("\0"))
        self._before, self._after = before, after + b"\n"

    def events(self, output: Output, deltas: Sequence[OutputDelta]) -> bytes:
        """The lines of new deltas. The last line of an answer has its counts."""
        lines = b""
        for delta, event in deltas:
            if isinstance(delta.tool_calls, list):
                self.keep(output, [(delta, None)])
            elif isinstance(delta.reasoning_content, str):
                lines += encode(self._said("", thinking=delta.reasoning_content)) + b"\n"
            elif isinstance(delta.content, str):
                lines += self._calls() + self._text(delta.content, event)
            elif self._logprobs and event is not None:
                lines += self._text("", event)
        if output.finish_reason is None:
            return lines
        return lines + self._calls() + encode(self._ended(output, self._said(""))) + b"\n"

    def skip(self, output: Output, deltas: Sequence[OutputDelta]) -> None:
        """Takes deltas that the client has."""
        self.events(output, deltas)

    def end(self, outputs: list[Output]) -> bytes:
        """Nothing: the last line of the answer is the end of the stream."""
        return b""

    def keep(self, output: Output, deltas: list[OutputDelta]) -> None:
        """Keeps new deltas for `whole`, and the parts of tool calls."""
        if self._kept is None:
            self._kept = WholeOutput(output, self._pieces, content=[output.echo])
        self._kept.add(deltas)

    def whole(self, outputs: list[Output]) -> bytes:
        """The answer in one piece."""
        (output,) = outputs
        kept = self._kept or WholeOutput(output, self._pieces)
        said = self._said(
            kept.text,
            thinking="".join(kept.reasoning) or UNSET,
            calls=_made(kept),
            logprobs=self._of(kept.events),
        )
        return encode(self._ended(output, said))

    def _text(self, text: str, event: TokenEvent | None) -> bytes:
        if self._logprobs and event is not None:
            return encode(self._said(text, logprobs=self._of([event]))) + b"\n"
        return self._before + encode(text) + self._after if text else b""

    def _calls(self) -> bytes:
        """A line with the calls that are complete and not sent."""
        if self._kept is None:
            return b""
        made = _made(self._kept)[self._sent_calls :]
        self._sent_calls += len(made)
        return encode(self._said("", calls=made)) + b"\n" if made else b""

    def _said(
        self,
        text: str,
        *,
        thinking: str | UnsetType = UNSET,
        calls: Sequence[OllamaMade] = (),
        logprobs: list[TokenLogprob] | UnsetType = UNSET,
    ) -> OllamaAnswer:
        if not self._chat:
            return structs.replace(self._head, response=text, thinking=thinking, logprobs=logprobs)
        said = OllamaSaid(content=text, thinking=thinking, tool_calls=list(calls) or UNSET)
        return structs.replace(self._head, message=said, logprobs=logprobs)

    def _of(self, events: list[TokenEvent]) -> list[TokenLogprob] | UnsetType:
        return chat_logprobs(self._pieces, events, 0).content or UNSET if self._logprobs else UNSET

    def _ended(self, output: Output, said: OllamaAnswer) -> OllamaAnswer:
        report = output.report()
        return structs.replace(
            said,
            done=True,
            done_reason="length" if output.finish_reason in CUT else "stop",
            stretto=structs.replace(report, schema_relaxed=self._relaxed) if self._relaxed else report,
            **_counts(output),
        )


def _counts(output: Output) -> dict[str, Any]:
    """The tokens of an answer, and how long they took: a queued request counts in `total_duration` only."""
    usage, times = usage_of([output]), output.times
    queued = 0.0 if output.began is None else output.began.queue_ms / 1e3
    first = times.last if times.first is None else times.first
    return {
        "total_duration": int((time.monotonic() - times.arrival) * NS),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": int(max(first - times.arrival - queued, 0.0) * NS),
        "eval_count": usage.completion_tokens,
        "eval_duration": int(max(times.last - first, 0.0) * NS),
    }


def _made(kept: WholeOutput) -> list[OllamaMade]:
    return [
        OllamaMade(
            id=made.id,
            function=CalledTool(index=at, name=made.function.name, arguments=arguments_of(made)),
        )
        for at, made in enumerate(made_calls(kept))
    ]
