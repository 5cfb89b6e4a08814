"""Deltas -> bytes of OpenAI's format: one server-sent event for each token, or one whole answer.

Chat and plain completions differ in a Style. Every chunk is a wire type that msgspec encodes. A ChunkTemplate
makes the same bytes faster for chunks in which only the delta varies, which are nearly all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec import UNSET, UnsetType, json, structs

from stretto.protocol.logprobs import ChatLogprobs, PromptLogprobs, TextLogprobs
from stretto.protocol.openai import (
    AnswerMessage,
    AnswerReport,
    CachedTokens,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Delta,
    FinishReason,
    MadeCall,
    TextChoice,
    TextCompletion,
    ToolCallDelta,
    Usage,
)
from stretto.protocol.relay import Continuation
from stretto.server.logprobs import chat_logprobs, prompt_logprobs, scored_prompt, text_logprobs
from stretto.server.validation import AnswerSpec
from stretto.text.detokenizer import Pieces
from stretto.text.output import AnswerEnergy, Output, OutputDelta
from stretto.types import TokenEvent

encode = json.Encoder().encode
DONE = b"data: [DONE]\n\n"
EMPTY = Delta()


class ResponseHead(NamedTuple):
    """The fields that all chunks of one response share. `created`: seconds since 1970."""

    id: str
    created: int
    model: str
    service_tier: str


class ChunkPart(NamedTuple):
    """What one chunk says of the output with the index `choice`."""

    choice: int
    delta: Delta = EMPTY
    logprobs: ChatLogprobs | TextLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ShownTokens(NamedTuple):
    """Which lists of tokens an answer has: log-probabilities of its own tokens, those of the prompt, ids."""

    logprobs: bool = False
    prompt: bool = False
    ids: bool = False


NO_LISTS = ShownTokens()


@dataclass(slots=True)
class WholeOutput:
    """The joined deltas of one output, for an answer that is not streamed. `pieces`: the text of each token.
    `shows`: which lists of tokens the answer has."""

    output: Output
    pieces: Pieces
    shows: ShownTokens = NO_LISTS
    content: list[str] = field(default_factory=list[str])
    reasoning: list[str] = field(default_factory=list[str])
    calls: list[ToolCallDelta] = field(default_factory=list[ToolCallDelta])
    events: list[TokenEvent] = field(default_factory=list[TokenEvent])

    def add(self, deltas: list[OutputDelta]) -> None:
        """Appends deltas."""
        for delta, event in deltas:
            if isinstance(delta.content, str):
                self.content.append(delta.content)
            if isinstance(delta.reasoning_content, str):
                self.reasoning.append(delta.reasoning_content)
            if isinstance(delta.tool_calls, list):
                self.calls += delta.tool_calls
            if event is not None:
                self.events.append(event)

    @property
    def text(self) -> str:
        """All content."""
        return "".join(self.content)

    @property
    def token_ids(self) -> list[int] | UnsetType:
        """The tokens of the answer, with the one that ended it."""
        if not self.shows.ids:
            return UNSET
        ids = [event.token for event in self.events if event.token is not None]
        return ids if self.output.stop_token is None else [*ids, self.output.stop_token]

    @property
    def tokens(self) -> list[TokenEvent]:
        """The tokens of the text, with those of a prompt that it begins with."""
        return (scored_prompt(self.output) if self.output.echo else []) + self.events

    @property
    def prompt_token_ids(self) -> list[int] | UnsetType:
        return list(self.output.request.prompt) if self.shows.ids else UNSET

    @property
    def prompt_logprobs(self) -> PromptLogprobs | UnsetType:
        return prompt_logprobs(self.pieces, scored_prompt(self.output)) if self.shows.prompt else UNSET


@dataclass(frozen=True, slots=True)
class Style:
    """Where chat and plain completions differ. `opening` changes the first delta of an output; `hole` is how
    a chunk spells an empty delta, and `fill` encodes a delta to put there."""

    id_prefix: str
    hole: bytes
    opening: Callable[[Output, Delta], Delta]
    fill: Callable[[Delta], bytes]
    logprobs: Callable[[Pieces, list[TokenEvent], int], ChatLogprobs | TextLogprobs]
    chunk: Callable[[ResponseHead, ChunkPart], ChatChunk | TextCompletion]
    whole: Callable[[ResponseHead, list[WholeOutput], Usage, AnswerReport], ChatCompletion | TextCompletion]


class ChunkTemplate:
    """Server-sent events that differ in their delta alone. `events` equals `event_of(chunk)` of a chunk with
    each delta, but the bytes around the delta are encoded only once.

    `chunk` has an empty delta. It is split at the key in front of it, which occurs once: inside a JSON string
    the key's quotes would be escaped.
    """

    __slots__ = ("_after", "_before", "_fill")

    def __init__(self, chunk: ChatChunk | TextCompletion, style: Style) -> None:
        before, after = event_of(chunk).split(style.hole)
        key, _, empty = style.hole.partition(b":")
        assert empty == style.fill(EMPTY)
        self._before = before + key + b":"
        self._after = after
        self._fill = style.fill

    def events(self, deltas: Sequence[OutputDelta]) -> bytes:
        """One event for each delta."""
        before, fill, after = self._before, self._fill, self._after
        events = b""
        for delta, _ in deltas:
            events += before + fill(delta) + after
        return events


def event_of(chunk: ChatChunk | TextCompletion) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(chunk) + b"\n\n"


class ResponseWriter:
    """Writes one response: streamed (`events`, then `end`) or in one piece (`keep`, then `whole`)."""

    def __init__(
        self,
        style: Style,
        spec: AnswerSpec,
        tier: str,
        request_id: str,
        continued: Continuation | None = None,
    ) -> None:
        """`continued`: the stream that this one goes on with."""
        options = spec.options
        ident = style.id_prefix + request_id if continued is None else continued.id
        created = int(time.time()) if continued is None else continued.created
        self._head = ResponseHead(ident, created, spec.model.name, tier)
        self._style = style
        self._pieces = spec.model.text.pieces
        self._metadata = spec.metadata or UNSET
        self._relaxed = spec.relaxed
        self._shows = ShownTokens(spec.sampling.logprobs is not None, spec.prompt_logprobs, spec.token_ids)
        self._usage = bool(options.include_usage)
        self._each_usage = bool(options.continuous_usage_stats)
        self._only_deltas = not (self._shows.logprobs or self._shows.ids or self._each_usage)
        # Made now, because the engine is at work on the first token, and nothing else is to do.
        self._templates = (
            [self._template(index) for index in range(spec.answers)]
            if spec.stream and self._only_deltas
            else []
        )
        self._opened: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._kept: dict[int, WholeOutput] = {}

    def events(self, output: Output, deltas: Sequence[OutputDelta]) -> bytes:
        """The events of new deltas. The last one of an output has its finish reason and its report."""
        if output.index not in self._opened:
            self._opened.add(output.index)
            first, event = deltas[0] if deltas else (EMPTY, None)
            deltas = [(self._style.opening(output, first), event), *deltas[1:]]
            opening = self._opening(output)
            if opening is not None:
                return opening + self.events(output, [(first, event), *deltas[1:]])
        if output.finish_reason is None:
            return self._unfinished(output, deltas)
        delta, event = deltas[-1] if deltas else (EMPTY, None)
        before = self._unfinished(output, deltas[:-1])
        return before + event_of(self.chunk(output, delta, event, ends=True))

    def _opening(self, output: Output) -> bytes | None:
        """The event of a prompt whose tokens the answer lists, before those of the answer's own tokens."""
        scored = scored_prompt(output) if output.echo and self._shows.logprobs else []
        if not scored and not self._shows.ids:
            return None
        delta = self._style.opening(output, EMPTY)
        offset = self._count(output, delta)
        part = ChunkPart(
            output.index,
            delta,
            self._style.logprobs(self._pieces, scored, offset) if scored else None,
            prompt_token_ids=list(output.request.prompt) if self._shows.ids else UNSET,
        )
        return event_of(self._with_usage(output, self._style.chunk(self._head, part)))

    def skip(self, output: Output, deltas: Sequence[OutputDelta]) -> None:
        """Counts deltas that the client has from another worker, which has also opened the answer."""
        if output.request.emitted:
            self._opened.add(output.index)
        for delta, _ in deltas:
            self._count(output, delta)

    def _template(self, index: int) -> ChunkTemplate:
        """The template of the output with that index, whose chunks say nothing but their delta."""
        chunk = self._style.chunk(self._head, ChunkPart(index))
        return ChunkTemplate(structs.replace(chunk, usage=None) if self._usage else chunk, self._style)

    def _unfinished(self, output: Output, deltas: Sequence[OutputDelta]) -> bytes:
        if self._only_deltas:
            return self._templates[output.index].events(deltas)
        return b"".join([event_of(self.chunk(output, delta, event)) for delta, event in deltas])

    def chunk(
        self, output: Output, delta: Delta, event: TokenEvent | None, *, ends: bool = False
    ) -> ChatChunk | TextCompletion:
        """One chunk as a wire type. `ends`: it is the last one of its output."""
        reason = output.finish_reason if ends else None
        ids: list[int] | UnsetType = UNSET
        if self._shows.ids:
            ids = [] if event is None or event.token is None else [event.token]
            if ends and output.stop_token is not None:
                ids.append(output.stop_token)
        part = ChunkPart(output.index, delta, self._logprobs_of(output, delta, event), reason, ids)
        chunk = self._with_usage(output, self._style.chunk(self._head, part))
        if ends:
            chunk = structs.replace(chunk, stretto=self._report([output]), metadata=self._metadata)
        return chunk

    def end(self, outputs: list[Output]) -> bytes:
        """What ends a stream that went well."""
        if not self._usage:
            return DONE
        chunk = self._style.chunk(self._head, ChunkPart(0))
        return event_of(structs.replace(chunk, choices=[], usage=usage_of(outputs))) + DONE

    def keep(self, output: Output, deltas: list[OutputDelta]) -> None:
        """Keeps new deltas for `whole`."""
        kept = self._kept.get(output.index)
        if kept is None:
            kept = self._kept[output.index] = WholeOutput(output, self._pieces, self._shows, [output.echo])
        kept.add(deltas)

    def whole(self, outputs: list[Output]) -> bytes:
        """The answer in one piece."""
        kept = [self._kept[output.index] for output in outputs]
        answer = self._style.whole(self._head, kept, usage_of(outputs), self._report(outputs))
        return encode(structs.replace(answer, metadata=self._metadata))

    def _logprobs_of(
        self, output: Output, delta: Delta, event: TokenEvent | None
    ) -> ChatLogprobs | TextLogprobs | None:
        offset = self._count(output, delta)
        if event is None or event.logprobs is None or not self._shows.logprobs:
            return None
        return self._style.logprobs(self._pieces, [event], offset)

    def _report(self, outputs: list[Output]) -> AnswerReport:
        return report_of(outputs, self._relaxed)

    def _count(self, output: Output, delta: Delta) -> int:
        """The characters of content before this delta."""
        offset = self._offsets.get(output.index, 0)
        if isinstance(delta.content, str):
            self._offsets[output.index] = offset + len(delta.content)
        return offset

    def _with_usage(self, output: Output, chunk: ChatChunk | TextCompletion) -> ChatChunk | TextCompletion:
        if self._each_usage:
            return structs.replace(chunk, usage=usage_of([output]))
        return structs.replace(chunk, usage=None) if self._usage else chunk


def usage_of(outputs: list[Output]) -> Usage:
    """The tokens of some outputs. A prompt counts once, however many answers it has."""
    firsts = [output for output in outputs if output.prompt_counts]
    prompt = sum(output.prompt_tokens for output in firsts)
    completion = sum(output.tokens for output in outputs)
    cached = sum(output.began.cached_tokens for output in firsts if output.began is not None)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached),
    )


def report_of(outputs: list[Output], relaxed: Sequence[str] = ()) -> AnswerReport:
    """One report for all outputs: the longest of each time, and the sum of the cached tokens. `relaxed`:
    paths of the parts of a schema that are not enforced."""
    report = outputs[0].report() if len(outputs) == 1 else _joined_report(outputs)
    return structs.replace(report, schema_relaxed=list(relaxed)) if relaxed else report


def _joined_report(outputs: list[Output]) -> AnswerReport:
    reports = [output.report() for output in outputs]
    on_time = [report.on_time for report in reports if report.on_time is not None]
    cached = [report.cached_tokens for report in reports if report.cached_tokens is not None]
    energy = AnswerEnergy.of_all([output.energy() for output in outputs])
    return AnswerReport(
        variant=reports[0].variant,
        on_time=all(on_time) if on_time else None,
        queue_ms=_longest(report.queue_ms for report in reports),
        ttft_ms=_longest(report.ttft_ms for report in reports),
        itl_p99_ms=_longest(report.itl_p99_ms for report in reports),
        cached_tokens=sum(cached) if cached else None,
        energy_j=None if energy is None else round(energy.joules, 6),
        energy_source=None if energy is None else energy.source,
        site=reports[0].site,
        degraded=reports[0].degraded,
    )


def _longest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _with_role(output: Output, delta: Delta) -> Delta:
    return structs.replace(delta, role="assistant")


def _with_echo(output: Output, delta: Delta) -> Delta:
    return Delta(content=output.echo + _text_of(delta)) if output.echo else delta


def _text_of(delta: Delta) -> str:
    return delta.content if isinstance(delta.content, str) else ""


def _text_bytes(delta: Delta) -> bytes:
    return encode(_text_of(delta))


def _chat_chunk(head: ResponseHead, part: ChunkPart) -> ChatChunk:
    assert not isinstance(part.logprobs, TextLogprobs)
    choice = ChunkChoice(
        index=part.choice,
        delta=part.delta,
        logprobs=part.logprobs,
        finish_reason=part.finish_reason,
        token_ids=part.token_ids,
    )
    return ChatChunk(**head._asdict(), choices=[choice], prompt_token_ids=part.prompt_token_ids)


def _text_chunk(head: ResponseHead, part: ChunkPart) -> TextCompletion:
    assert not isinstance(part.logprobs, ChatLogprobs)
    text = _text_of(part.delta)
    choice = TextChoice(
        index=part.choice,
        text=text,
        logprobs=part.logprobs,
        finish_reason=part.finish_reason,
        token_ids=part.token_ids,
        prompt_token_ids=part.prompt_token_ids,
    )
    return TextCompletion(**head._asdict(), choices=[choice])


def made_calls(kept: WholeOutput) -> list[MadeCall]:
    """The tool calls of an answer, without those that turned out to be none."""
    parser = kept.output.parser
    abandoned = parser.abandoned if parser is not None else set[int]()
    names: dict[int, tuple[str, str]] = {}
    arguments: dict[int, list[str]] = {}
    for part in kept.calls:
        if part.index in abandoned:
            continue
        if isinstance(part.id, str) and isinstance(part.function.name, str):
            names[part.index] = part.id, part.function.name
        if isinstance(part.function.arguments, str):
            arguments.setdefault(part.index, []).append(part.function.arguments)
    return [
        MadeCall(id=id, function=CalledFunction(name=name, arguments="".join(arguments.get(index, []))))
        for index, (id, name) in names.items()
    ]


def _whole_chat(
    head: ResponseHead, kept: list[WholeOutput], usage: Usage, report: AnswerReport
) -> ChatCompletion:
    choices: list[ChatChoice] = []
    for part in kept:
        calls: list[MadeCall] | UnsetType = made_calls(part) or UNSET
        message = AnswerMessage(
            content=part.text or (None if calls or part.reasoning else ""),
            reasoning_content="".join(part.reasoning) if part.reasoning else UNSET,
            tool_calls=calls,
        )
        assert part.output.finish_reason is not None
        choices.append(
            ChatChoice(
                index=part.output.index,
                message=message,
                finish_reason=part.output.finish_reason,
                logprobs=chat_logprobs(part.pieces, part.events, 0) if part.shows.logprobs else None,
                token_ids=part.token_ids,
            )
        )
    return ChatCompletion(
        **head._asdict(),
        choices=choices,
        usage=usage,
        stretto=report,
        prompt_logprobs=kept[0].prompt_logprobs,
        prompt_token_ids=kept[0].prompt_token_ids,
    )


def _whole_text(
    head: ResponseHead, kept: list[WholeOutput], usage: Usage, report: AnswerReport
) -> TextCompletion:
    choices = [
        TextChoice(
            index=part.output.index,
            text=part.text,
            finish_reason=part.output.finish_reason,
            logprobs=text_logprobs(part.pieces, part.tokens, 0) if part.shows.logprobs else None,
            token_ids=part.token_ids,
            prompt_logprobs=part.prompt_logprobs,
            prompt_token_ids=part.prompt_token_ids,
        )
        for part in kept
    ]
    return TextCompletion(**head._asdict(), choices=choices, usage=usage, stretto=report)


CHAT = Style("chatcmpl-", b'"delta":{}', _with_role, encode, chat_logprobs, _chat_chunk, _whole_chat)
TEXT = Style("cmpl-", b'"text":""', _with_echo, _text_bytes, text_logprobs, _text_chunk, _whole_text)
