"""One answer while it comes: token events in, deltas out, and what is to be said of it at the end.

A Choice belongs to one sequence. It decodes, finds stop strings, reasoning and tool calls, and keeps time; it
closes its stream when the answer ends in the text. It knows neither HTTP nor JSON.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from math import inf, isfinite
from time import monotonic
from typing import Protocol

from stretto.errors import CannotBeOnTime, EngineError
from stretto.protocol.openai import AnswerReport, Delta, FinishReason
from stretto.statistics import quantile
from stretto.text.detokenizer import Detokenizer
from stretto.text.reasoning_parser import Reasoning
from stretto.text.tool_parser import Abandoned, NamedCall, Said, ToolParser
from stretto.types import Began, Finish, Objective, Reason, TokenEvent

Spoken = tuple[Delta, TokenEvent | None]
FINISH: dict[Reason, FinishReason] = {
    Reason.STOP: "stop",
    Reason.LENGTH: "length",
    Reason.DEADLINE: "deadline",
}


class Stream(Protocol):
    """The events of one sequence, as `engine.client` gives them: lists of all that came since the last."""

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]: ...
    async def __anext__(self) -> list[TokenEvent]: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Times:
    """When things happened, on the monotonic clock. `gaps` are the seconds between token lists; `slack` how
    long before its due the token with the least time to spare came, below 0 when it was late; `cut`: the
    engine gave the answer up."""

    arrival: float
    objective: Objective = field(default_factory=Objective)
    cut: bool = False
    slack: float = inf
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list[float])

    def mark(self, now: float) -> None:
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now

    def judge(self, now: float, spoken: int) -> None:
        """Something is here after `spoken` tokens: token k is due k gaps after the first one was."""
        ttft, itl, total = self.objective.ttft_ms, self.objective.itl_ms, self.objective.total_ms
        slack = inf if total is None else self.arrival + total / 1e3 - now
        start = self.first if ttft is None else self.arrival + ttft / 1e3
        if spoken and itl is not None and start is not None:
            slack = min(slack, start + spoken * itl / 1e3 - now)
        elif not spoken and ttft is not None:
            slack = min(slack, self.arrival + ttft / 1e3 - now)
        self.slack = min(self.slack, slack)

    def end(self, now: float, *, cut: bool) -> None:
        """The answer is over."""
        self.slack = min(self.slack, self.arrival + _seconds(self.objective.total_ms) - now)
        self.cut = cut

    @property
    def late(self) -> bool:
        return self.cut or self.slack < 0

    @property
    def on_time(self) -> bool | None:
        """None when nothing was asked."""
        asked = (self.objective.ttft_ms, self.objective.itl_ms, self.objective.total_ms)
        return None if asked == (None, None, None) else not self.late

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.arrival

    def itl_p99(self) -> float | None:
        """The 99th percentile of the gaps, in seconds; None before the second token."""
        return quantile(sorted(self.gaps), 0.99) if self.gaps else None


class Shape:
    """Text -> deltas for models that think or call tools."""

    def __init__(
        self, reasoning: Reasoning | None, tools: ToolParser | NamedCall | None, *, folded: bool = False
    ) -> None:
        """`folded`: nobody has seen a delta when a call turns out to be none: all its text is content."""
        self._reasoning = reasoning
        self._tools = tools
        self._folded = folded
        self.abandoned: set[int] = set()

    @property
    def calls(self) -> int:
        return 0 if self._tools is None else self._tools.calls

    def push(self, text: str) -> list[Delta]:
        if self._reasoning is None:
            return self._answer(text)
        thought, text = self._reasoning.push(text)
        return ([Delta(reasoning_content=thought)] if thought else []) + self._answer(text)

    def flush(self) -> list[Delta]:
        thought, text = ("", "") if self._reasoning is None else self._reasoning.flush()
        deltas = ([Delta(reasoning_content=thought)] if thought else []) + self._answer(text)
        return deltas if self._tools is None else deltas + self._deltas(self._tools.flush())

    def _answer(self, text: str) -> list[Delta]:
        if not text:
            return []
        return [Delta(content=text)] if self._tools is None else self._deltas(self._tools.push(text))

    def _deltas(self, said: list[Said]) -> list[Delta]:
        deltas: list[Delta] = []
        for part in said:
            if isinstance(part, str):
                deltas.append(Delta(content=part))
            elif isinstance(part, Abandoned):
                self.abandoned.add(part.index)
                deltas.append(Delta(content=part.raw if self._folded else part.rest))
            else:
                deltas.append(Delta(tool_calls=[part]))
        return deltas


@dataclass(slots=True)
class Output:
    """The answer of one sequence. `finish_reason` is set once it ended.

    `shape` None: all text is content. `single_call`: the first whole tool call ends it. `prompt_counts`: this
    is the first choice of its prompt. `echo` is the text to begin with.
    """

    index: int
    model: str
    stream: Stream
    decoder: Detokenizer
    times: Times
    prompt_tokens: int
    prompt_counts: bool = True
    echo: str = ""
    shape: Shape | None = None
    single_call: bool = False
    tokens: int = 0
    finish_reason: FinishReason | None = None
    began: Began | None = None

    def take(self, events: list[TokenEvent]) -> list[Spoken]:
        """What these events say. Raises EngineError when they say that the sequence failed, CannotBeOnTime
        when it was refused."""
        now = monotonic()
        self.times.mark(now)
        if any(event.token is not None for event in events):
            self.times.judge(now, self.tokens)
        if self.began is None and events:
            self.began = events[0].began
        spoken: list[Spoken] = []
        push = self.decoder.push
        for event in events:
            if event.token is not None:
                self.tokens += 1
                text = push(event.token)
                if self.shape is None:
                    spoken.append((Delta(content=text), event))
                else:
                    self._shaped(text, event, spoken)
                if self.decoder.stopped is not None:
                    self._end("stop", spoken)
                elif self.single_call and self.shape is not None and self.shape.calls:
                    self._end("stop", spoken)
            if self.finish_reason is not None:
                return spoken
            if event.finish is not None:
                self._finished(event.finish, spoken)
        return spoken

    def report(self) -> AnswerReport:
        times, began = self.times, self.began
        return AnswerReport(
            rung=self.model,
            on_time=self.times.on_time,
            queue_ms=None if began is None else round(began.queue_ms, 3),
            ttft_ms=_ms(times.ttft),
            itl_p99_ms=_ms(times.itl_p99()),
            cached_tokens=None if began is None else began.cached_tokens,
        )

    def _shaped(self, text: str, event: TokenEvent, spoken: list[Spoken]) -> None:
        assert self.shape is not None
        deltas = self.shape.push(text)
        spoken.extend((delta, None) for delta in deltas[:-1])
        # A token that says nothing yet is told of all the same: clients count tokens by events.
        spoken.append((deltas[-1] if deltas else Delta(), event))

    def _finished(self, finish: Finish, spoken: list[Spoken]) -> None:
        if self.began is None:
            self.began = Began(finish.queue_ms, finish.cached_tokens)
        self.times.end(monotonic(), cut=finish.reason is Reason.DEADLINE)
        if finish.reason is Reason.REFUSED:
            raise _refusal(finish)
        reason = FINISH.get(finish.reason)
        if reason is None:
            raise EngineError(finish.error or f"the engine ended the sequence: {finish.reason.value}")
        self._end(reason, spoken)

    def _end(self, reason: FinishReason, spoken: list[Spoken]) -> None:
        rest = "" if self.decoder.stopped is not None else self.decoder.flush()
        if self.shape is not None:
            deltas = self.shape.push(rest) + self.shape.flush()
            spoken.extend((delta, None) for delta in deltas)
            if reason == "stop" and self.shape.calls:
                reason = "tool_calls"
        elif rest:
            spoken.append((Delta(content=rest), None))
        self.finish_reason = reason
        self.stream.close()


def _refusal(finish: Finish) -> CannotBeOnTime:
    after = finish.retry_after
    if after is None or not isfinite(after):
        return CannotBeOnTime("this server cannot meet $.objective at all: ask for more time")
    return CannotBeOnTime("$.objective cannot be met now; try again later", retry_after=after)


def _seconds(milliseconds: float | None) -> float:
    return inf if milliseconds is None else milliseconds / 1e3


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
