"""Answers -> bytes in OpenAI's format: streamed as server-sent events, one per token, or whole.

A streamed token costs one small encoding between bytes that are made once per choice. Chat and plain
completions differ in a Style; a whole answer is the same deltas, joined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType, json, structs

from stretto.protocol.openai import (
    AnswerMessage,
    AnswerReport,
    CachedTokens,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    MadeCall,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from stretto.text.detokenizer import Pieces
from stretto.text.output import Output, OutputDelta
from stretto.types import TokenEvent

encode = json.Encoder().encode
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Header:
    """What every part of one response repeats; `usage` and `each_usage` are the stream options."""

    id: str
    created: int
    model: str
    pieces: Pieces
    tier: str = "default"
    metadata: dict[str, str] | None = None
    logprobs: bool = False
    usage: bool = False
    each_usage: bool = False


@dataclass(slots=True)
class Kept:
    """The parts of one choice of an answer that is not streamed."""

    choice: Output
    content: list[str] = field(default_factory=list[str])
    reasoning: list[str] = field(default_factory=list[str])
    calls: list[ToolCallDelta] = field(default_factory=list[ToolCallDelta])
    events: list[TokenEvent] = field(default_factory=list[TokenEvent])

    def add(self, spoken: list[OutputDelta]) -> None:
        for delta, event in spoken:
            if isinstance(delta.content, str):
                self.content.append(delta.content)
            if isinstance(delta.reasoning_content, str):
                self.reasoning.append(delta.reasoning_content)
            if isinstance(delta.tool_calls, list):
                self.calls += delta.tool_calls
            if event is not None and event.logprobs is not None:
                self.events.append(event)

    @property
    def text(self) -> str:
        return "".join(self.content)


@dataclass(frozen=True, slots=True)
class Style:
    """Where chat and plain completions differ: names, a delta's bytes, log probabilities, the whole."""

    stream_object: str
    slot: str
    first: Callable[[Output, Delta], Delta]
    body: Callable[[Delta], bytes]
    logprobs: Callable[[Pieces, list[TokenEvent], int], ChatLogprobs | TextLogprobs]
    whole: Callable[[Header, list[Kept], Usage, AnswerReport], ChatCompletion | TextCompletion]


class Writer:
    """Writes one response, streamed (`events`, then `trailer`) or whole (`keep`, then `whole`)."""

    def __init__(self, header: Header, style: Style) -> None:
        self._header = header
        self._style = style
        common = {"id": header.id, "object": style.stream_object, "created": header.created}
        self._common = b"data: " + encode(common | _named(header))[:-1] + b',"choices":['
        self._quiet = b',"usage":null' if header.usage else b""
        self._tail = b',"logprobs":null,"finish_reason":null}]' + self._quiet + b"}\n\n"
        self._plain = not header.logprobs and not header.each_usage
        self._heads: dict[int, bytes] = {}
        self._offsets: dict[int, int] = {}
        self._kept: dict[int, Kept] = {}

    def events(self, choice: Output, spoken: list[OutputDelta]) -> bytes:
        """The events of what was just said; the last one of a choice has its finish reason and report."""
        parts: list[bytes] = []
        body = self._style.body
        head = self._heads.get(choice.index)
        if head is None:
            head = self._head(choice.index)
            delta, event = spoken[0] if spoken else (Delta(), None)
            spoken[:1] = [(self._style.first(choice, delta), event)]
        last = None
        if choice.finish_reason is not None:
            last = spoken.pop() if spoken else (Delta(), None)
        if self._plain:
            tail = self._tail
            for delta, _ in spoken:
                parts += (head, body(delta), tail)
        else:
            for delta, event in spoken:
                parts += (head, body(delta), self._logged(choice, delta, event), b',"finish_reason":null}]')
                parts += (self._usage_so_far(choice), b"}\n\n")
        if last is not None:
            delta, event = last
            parts += (head, body(delta), self._logged(choice, delta, event), b',"finish_reason":')
            parts += (encode(choice.finish_reason), b'}],"stretto":', encode(choice.report()))
            if self._header.metadata:
                parts += (b',"metadata":', encode(self._header.metadata))
            parts += (self._usage_so_far(choice), b"}\n\n")
        return b"".join(parts)

    def trailer(self, choices: list[Output]) -> bytes:
        """What ends a stream that went well."""
        if not self._header.usage:
            return DONE
        return self._common + b'],"usage":' + encode(usage_of(choices)) + b"}\n\n" + DONE

    def keep(self, choice: Output, spoken: list[OutputDelta]) -> None:
        kept = self._kept.get(choice.index)
        if kept is None:
            kept = self._kept[choice.index] = Kept(choice)
            if choice.echo:
                kept.content.append(choice.echo)
        kept.add(spoken)

    def whole(self, choices: list[Output]) -> bytes:
        kept = [self._kept[choice.index] for choice in choices]
        return encode(self._style.whole(self._header, kept, usage_of(choices), report_of(choices)))

    def _head(self, index: int) -> bytes:
        head = self._heads[index] = self._common + f'{{"index":{index},"{self._style.slot}":'.encode()
        return head

    def _logged(self, choice: Output, delta: Delta, event: TokenEvent | None) -> bytes:
        offset = self._offsets.get(choice.index, 0)
        if isinstance(delta.content, str):
            self._offsets[choice.index] = offset + len(delta.content)
        if event is None or event.logprobs is None or not self._header.logprobs:
            return b',"logprobs":null'
        return b',"logprobs":' + encode(self._style.logprobs(self._header.pieces, [event], offset))

    def _usage_so_far(self, choice: Output) -> bytes:
        return b',"usage":' + encode(usage_of([choice])) if self._header.each_usage else self._quiet


def usage_of(choices: list[Output]) -> Usage:
    """A prompt counts once, however many choices it has."""
    firsts = [choice for choice in choices if choice.prompt_counts]
    prompt = sum(choice.prompt_tokens for choice in firsts)
    said = sum(choice.tokens for choice in choices)
    cached = sum(choice.began.cached_tokens for choice in firsts if choice.began is not None)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=said,
        total_tokens=prompt + said,
        prompt_tokens_details=CachedTokens(cached),
    )


def report_of(choices: list[Output]) -> AnswerReport:
    """One report for all choices: the slowest of each time, the sum of what was cached."""
    reports = [choice.report() for choice in choices]

    def worst(values: list[float | None]) -> float | None:
        return max((value for value in values if value is not None), default=None)

    on_time = [report.on_time for report in reports if report.on_time is not None]
    cached = [report.cached_tokens for report in reports if report.cached_tokens is not None]
    return AnswerReport(
        rung=reports[0].rung,
        on_time=all(on_time) if on_time else None,
        queue_ms=worst([report.queue_ms for report in reports]),
        ttft_ms=worst([report.ttft_ms for report in reports]),
        itl_p99_ms=worst([report.itl_p99_ms for report in reports]),
        cached_tokens=sum(cached) if cached else None,
    )


def _named(header: Header) -> dict[str, str]:
    return {"model": header.model, "service_tier": header.tier}


def _top(pieces: Pieces, token: int, logprob: float) -> TopLogprob:
    raw = pieces[token]
    return TopLogprob(raw.decode("utf-8", "replace"), logprob, list(raw))


def chat_logprobs(pieces: Pieces, events: list[TokenEvent], offset: int) -> ChatLogprobs:
    content: list[TokenLogprob] = []
    for event in events:
        if event.token is not None and event.logprobs is not None:
            own = _top(pieces, event.token, event.logprobs.chosen)
            top = [_top(pieces, token, logprob) for token, logprob in event.logprobs.top]
            content.append(TokenLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(content)


def text_logprobs(pieces: Pieces, events: list[TokenEvent], offset: int) -> TextLogprobs:
    said = TextLogprobs([], [], [], [])
    for event in events:
        if event.token is not None and event.logprobs is not None:
            token = pieces[event.token].decode("utf-8", "replace")
            said.tokens.append(token)
            said.token_logprobs.append(event.logprobs.chosen)
            said.top_logprobs.append(
                {pieces[id].decode("utf-8", "replace"): logprob for id, logprob in event.logprobs.top}
            )
            said.text_offset.append(offset)
            offset += len(token)
    return said


def _with_role(choice: Output, delta: Delta) -> Delta:
    return structs.replace(delta, role="assistant")


def _with_echo(choice: Output, delta: Delta) -> Delta:
    content = delta.content if isinstance(delta.content, str) else ""
    return Delta(content=choice.echo + content) if choice.echo else delta


def _text_body(delta: Delta) -> bytes:
    return encode(delta.content) if delta.content is not UNSET else b'""'


def _tool_calls(kept: Kept) -> list[MadeCall]:
    parser = kept.choice.parser
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


def _chat(header: Header, kept: list[Kept], usage: Usage, report: AnswerReport) -> ChatCompletion:
    choices: list[ChatChoice] = []
    for part in kept:
        calls: list[MadeCall] | UnsetType = _tool_calls(part) or UNSET
        message = AnswerMessage(
            content=part.text or (None if calls or part.reasoning else ""),
            reasoning_content="".join(part.reasoning) if part.reasoning else UNSET,
            tool_calls=calls,
        )
        assert part.choice.finish_reason is not None
        choices.append(
            ChatChoice(
                index=part.choice.index,
                message=message,
                finish_reason=part.choice.finish_reason,
                logprobs=chat_logprobs(header.pieces, part.events, 0) if header.logprobs else None,
            )
        )
    return ChatCompletion(
        id=header.id,
        created=header.created,
        model=header.model,
        choices=choices,
        usage=usage,
        stretto=report,
        metadata=header.metadata or UNSET,
        service_tier=header.tier,
    )


def _text(header: Header, kept: list[Kept], usage: Usage, report: AnswerReport) -> TextCompletion:
    choices = [
        TextChoice(
            index=part.choice.index,
            text=part.text,
            finish_reason=part.choice.finish_reason,
            logprobs=text_logprobs(header.pieces, part.events, 0) if header.logprobs else None,
        )
        for part in kept
    ]
    return TextCompletion(
        id=header.id,
        created=header.created,
        model=header.model,
        choices=choices,
        usage=usage,
        stretto=report,
        metadata=header.metadata or UNSET,
        service_tier=header.tier,
    )


CHAT = Style("chat.completion.chunk", "delta", _with_role, encode, chat_logprobs, _chat)
TEXT = Style("text_completion", "text", _with_echo, _text_body, text_logprobs, _text)
