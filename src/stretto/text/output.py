"""One answer while it is generated: token events in, deltas out, and the answer's report at the end.

An Output belongs to one sequence. It detokenizes, finds stop strings, reasoning and tool calls, and records
times. It closes its stream when the text ends the answer. It knows neither HTTP nor JSON.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf, isfinite
from time import monotonic
from typing import NamedTuple, Protocol

from msgspec import UNSET, UnsetType, structs

from stretto.deadlines import Deadline
from stretto.errors import CannotBeOnTime, EngineError, InvalidGrammar, InvalidRequest
from stretto.protocol.extensions.report import AnswerPart, AnswerReport
from stretto.protocol.openai import Delta, FinishReason
from stretto.protocol.relay import Degraded, EmittedAnswer
from stretto.statistics import quantile
from stretto.text.detokenizer import Detokenizer
from stretto.text.reasoning_parser import ReasoningParser
from stretto.text.stop_strings import StopStrings
from stretto.text.tools.parser import AbandonedCall, CallParser, Reasoning, ToolEvent
from stretto.types import (
    Began,
    Finish,
    Moved,
    Objective,
    Reason,
    Request,
    TokenEvent,
    TokenJoules,
    VariantReason,
)

OutputDelta = tuple[Delta, TokenEvent | None]
FINISH: dict[Reason, FinishReason] = {
    Reason.STOP: "stop",
    Reason.LENGTH: "length",
    Reason.DEADLINE: "deadline",
}


class AnswerPlace(NamedTuple):
    """Where a gateway had a request answered, and why there if that is not the best place."""

    site: str | UnsetType = UNSET
    degraded: Degraded | UnsetType = UNSET


class AnswerEnergy(NamedTuple):
    """The joules that an answer took, and how they are known."""

    joules: float
    source: str

    @classmethod
    def of_all(cls, parts: Sequence[AnswerEnergy | None]) -> AnswerEnergy | None:
        """The sum; None when one is unknown or there are none. An estimate among them makes it one."""
        known = [each for each in parts if each is not None]
        if not known or len(known) < len(parts):
            return None
        sources = sorted(
            (each.source for each in known), key=lambda source: not source.startswith("estimate")
        )
        return cls(sum(each.joules for each in known), sources[0])


NOWHERE = AnswerPlace()


class TokenStream(Protocol):
    """The events of one sequence, as `engine.client` delivers them: each item lists all that came since."""

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]: ...
    async def __anext__(self) -> list[TokenEvent]: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Times:
    """When the tokens of one answer came, and how that compares with its deadlines.

    Times are seconds of the monotonic clock. Tokens that came together count as one arrival.
    """

    arrival: float
    deadline: Deadline
    timed: bool  # whether the request set any deadline
    cut: bool = False  # whether the answer was late elsewhere, or ended because its time had run out
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list[float])  # between arrivals of tokens

    @classmethod
    def of(cls, arrival: float, objective: Objective, emitted: int = 0) -> Times:
        """Of a request that arrived at `arrival`; only `emitted` tokens have come yet, elsewhere."""
        return cls(arrival, Deadline.of(arrival, objective, emitted), objective.timed)

    @classmethod
    def continued(cls, request: Request, emitted: EmittedAnswer) -> Times:
        """Of an answer that goes on after what the client has of it: late tokens there count here."""
        first = request.arrival + emitted.first_ms / 1e3 if emitted.first_ms >= 0 else None
        count = len(emitted.tokens)
        deadline = Deadline.of(request.arrival, request.objective, count, inf if first is None else first)
        times = cls(request.arrival, deadline, request.objective.timed, cut=emitted.late, first=first)
        times.last = request.arrival + max(emitted.last_ms, emitted.first_ms) / 1e3
        return times

    def mark(self, now: float, tokens: int) -> None:
        """Record that events with so many tokens arrived."""
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        if tokens:
            self.deadline.emit(now, tokens)

    def end(self, now: float, *, cut: bool) -> None:
        """Record the end of the answer."""
        self.deadline.end(now)
        self.cut = self.cut or cut

    @property
    def slack(self) -> float:
        """The least time to spare of any token, in seconds; negative when one was late."""
        return self.deadline.slack

    @property
    def late(self) -> bool:
        return self.cut or self.deadline.late

    @property
    def on_time(self) -> bool | None:
        """None when the request set no deadline."""
        return not self.late if self.timed else None

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.arrival

    def itl_p99(self) -> float | None:
        """The 99th percentile of the gaps, in seconds; None before the second token."""
        return quantile(sorted(self.gaps), 0.99) if self.gaps else None


class AnswerParser:
    """Splits an answer's text into deltas: reasoning, content and tool calls.

    `abandoned` holds the indexes of tool calls that turned out to be none.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tools: CallParser | None,
        *,
        streamed: bool = True,
        single_call: bool = False,
        stop: StopStrings | None = None,
    ) -> None:
        """`streamed`: the client has seen the deltas of an abandoned call, so only its unsent text is
        content; otherwise all of it is. `single_call`: the first complete tool call ends the answer. `stop`:
        stop strings for what follows the reasoning."""
        self._reasoning = reasoning
        self._tools = tools
        self._streamed = streamed
        self._single_call = single_call
        self._stop = stop
        self.abandoned: set[int] = set()
        self.nonce = ""  # of which the ids of tool calls are made, if there is one

    @property
    def calls(self) -> int:
        """The number of complete tool calls."""
        return 0 if self._tools is None else self._tools.calls

    @property
    def complete(self) -> bool:
        """Whether the answer has met a stop string, or has all the tool calls it may have."""
        return self.stopped is not None or (self._single_call and self.calls > 0)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the answer, once one did."""
        return None if self._stop is None else self._stop.found

    def push(self, text: str) -> list[Delta]:
        """The deltas of `text`; none while it may still become something else."""
        if self._reasoning is None:
            return self._parsed(text)
        thought, text = self._reasoning.push(text)
        return ([Delta(reasoning_content=thought)] if thought else []) + self._answer(text)

    def flush(self) -> list[Delta]:
        """The remaining deltas, when the answer ended."""
        thought, text = ("", "") if self._reasoning is None else self._reasoning.flush()
        deltas = ([Delta(reasoning_content=thought)] if thought else []) + self._answer(text)
        if self._stop is not None and (held := self._stop.flush()):
            deltas += self._parsed(held)
        return deltas if self._tools is None else deltas + self._deltas(self._tools.flush())

    def _answer(self, text: str) -> list[Delta]:
        if self._stop is not None:
            text = "" if self.stopped is not None else self._stop.token(text)
        return self._parsed(text)

    def _parsed(self, text: str) -> list[Delta]:
        if not text:
            return []
        return [Delta(content=text)] if self._tools is None else self._deltas(self._tools.push(text))

    def _deltas(self, events: list[ToolEvent]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            if isinstance(event, str):
                deltas.append(Delta(content=event))
            elif isinstance(event, Reasoning):
                deltas.append(Delta(reasoning_content=event.text))
            elif isinstance(event, AbandonedCall):
                self.abandoned.add(event.index)
                deltas.append(Delta(content=event.unsent if self._streamed else event.text))
            else:
                if self.nonce and isinstance(event.id, str):
                    event = structs.replace(event, id=call_id(self.nonce, event.index))
                deltas.append(Delta(tool_calls=[event]))
        return deltas


def call_id(nonce: str, index: int) -> str:
    """The id of a tool call: the same for the same nonce. Mistral's templates insist on nine characters."""
    return blake2b(f"{nonce}.{index}".encode(), digest_size=5).hexdigest()[:9]


@dataclass(slots=True)
class Output:
    """The answer of one sequence. `finish_reason` is set once it ended.

    `index` counts the outputs of an HTTP request. `prompt_counts`: usage counts the prompt with this output.
    `echo` is text to send before the answer. Without a `parser` all text is content. `energies`: of a token,
    by the engine's models whose energy is known.
    """

    request: Request
    stream: TokenStream
    detokenizer: Detokenizer
    index: int = 0
    prompt_counts: bool = True
    echo: str = ""
    parser: AnswerParser | None = None
    grammar_path: str | None = None  # of the field that gave the grammar
    variant_reason: VariantReason | None = None  # why this variant was chosen, if one was
    placed: AnswerPlace = NOWHERE
    energies: Mapping[str, TokenJoules] = field(default_factory=dict[str, TokenJoules])
    tokens: int = 0
    finish_reason: FinishReason | None = None
    began: Began | None = None
    moves: list[Moved] = field(default_factory=list[Moved])  # to other variants
    started: bool = False  # whether any of its events came from this worker
    stop_token: int | None = None  # that ended it
    times: Times = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.times = Times.of(request.arrival, request.objective, len(request.emitted))

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        found = self.detokenizer.stopped
        return found if found is not None or self.parser is None else self.parser.stopped

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    def push(self, events: list[TokenEvent]) -> list[OutputDelta]:
        """The deltas of these events, each with the token event that completed it.

        Raises EngineError when the sequence failed, CannotBeOnTime when the engine refused it.
        """
        now = monotonic()
        self.started = True
        # Only the last event may come without a token: it ends the sequence.
        self.times.mark(now, len(events) - (events[-1].token is None) if events else 0)
        deltas: list[OutputDelta] = []
        push, parser = self.detokenizer.push, self.parser
        for event in events:
            if event.began is not None:
                self._begin(event.began)
            if event.token is not None:
                self.tokens += 1
                text = push(event.token)
                if parser is None:
                    deltas.append((Delta(content=text), event))
                else:
                    _extend(deltas, parser.push(text), event)
                if self.detokenizer.stopped is not None or (parser is not None and parser.complete):
                    self._end("stop", deltas)
            if self.finish_reason is not None:
                return deltas
            if event.finish is not None:
                self._finished(event.finish, deltas)
        return deltas

    def replay(self, emitted: EmittedAnswer) -> list[OutputDelta]:
        """The deltas of the tokens that the client already has from another worker."""
        tokens = emitted.tokens
        deltas = self.push([TokenEvent(self.request.id, token) for token in tokens]) if tokens else []
        self.times, self.began, self.started = Times.continued(self.request, emitted), None, False
        if emitted.complete and self.finish_reason is None:
            self._end("stop", deltas)
        return deltas

    @property
    def variant(self) -> str:
        """The engine's model that answers. It may change."""
        return self.moves[-1].model if self.moves else self.request.model

    @property
    def why(self) -> VariantReason | None:
        """Why this variant answers; None when there was no choice."""
        return self.moves[-1].why if self.moves else self.variant_reason

    def report(self) -> AnswerReport:
        """What the client is told about this answer: its latency, and the variant."""
        times, began, energy = self.times, self.began, self.energy()
        return AnswerReport(
            variant=self.variant,
            variant_reason=self.why or UNSET,
            parts=self._parts() or UNSET,
            on_time=self.times.on_time,
            queue_ms=None if began is None else round(began.queue_ms, 3),
            ttft_ms=_ms(times.ttft),
            itl_p99_ms=_ms(times.itl_p99()),
            cached_tokens=None if began is None else began.cached_tokens,
            energy_j=None if energy is None else round(energy.joules, 6),
            energy_source=None if energy is None else energy.source,
            site=self.placed.site,
            degraded=self.placed.degraded,
        )

    def energy(self) -> AnswerEnergy | None:
        """What it took by now, for its tokens and those of its prompt that were not cached; None: unknown.
        A variant that goes on computes all tokens before its own."""
        if not self.energies or (self.began is None and not self.tokens):
            return None
        read = self.prompt_tokens - (0 if self.began is None else self.began.cached_tokens)
        spans = [span for span in self._spans() if span[1]] or self._spans()[-1:]
        parts: list[AnswerEnergy | None] = []
        for start, written in spans:
            each = self.energies.get(start.model)
            if each is None:
                return None
            parts.append(AnswerEnergy(each.prompt * max(read, 0) + each.output * written, each.source))
            read = self.prompt_tokens + start.after + written
        return AnswerEnergy.of_all(parts)

    def _spans(self) -> list[tuple[Moved, int]]:
        """The variants one after another, and how many tokens each one wrote."""
        starts = [Moved(self.request.model, 0, "moved"), *self.moves]
        ends = [each.after for each in self.moves] + [self.tokens]
        return [(start, end - start.after) for start, end in zip(starts, ends, strict=True)]

    def _begin(self, began: Began) -> None:
        """Record how the sequence started, or where it moved."""
        if self.began is None:
            self.began = began
        if began.moved is not None:
            self.moves.append(began.moved)

    def _parts(self) -> list[AnswerPart]:
        """What each variant wrote, if several did."""
        if not self.moves:
            return []
        parts = [
            AnswerPart(
                variant=start.model, tokens=written, reason=self.variant_reason if at == 0 else start.why
            )
            for at, (start, written) in enumerate(self._spans())
            if written > 0
        ]
        return parts if len(parts) > 1 else []

    def _finished(self, finish: Finish, deltas: list[OutputDelta]) -> None:
        if self.began is None:
            self.began = Began(finish.queue_ms, finish.cached_tokens)
        self.stop_token = finish.stop_token
        self.times.end(monotonic(), cut=finish.reason is Reason.DEADLINE)
        if finish.reason is Reason.REFUSED:
            raise _refusal(finish)
        if finish.reason is Reason.INVALID:
            kind = InvalidRequest if self.request.sampling.grammar is None else InvalidGrammar
            raise kind(finish.error or "the model cannot run this request", param=self.grammar_path)
        reason = FINISH.get(finish.reason)
        if reason is None:
            raise EngineError(finish.error or f"the engine ended the sequence: {finish.reason.value}")
        self._end(reason, deltas)

    def _end(self, reason: FinishReason, deltas: list[OutputDelta]) -> None:
        rest = "" if self.detokenizer.stopped is not None else self.detokenizer.flush()
        if self.parser is not None:
            deltas += [(delta, None) for delta in self.parser.push(rest) + self.parser.flush()]
            if reason == "stop" and self.parser.calls:
                reason = "tool_calls"
        elif rest:
            deltas.append((Delta(content=rest), None))
        self.finish_reason = reason
        self.stream.close()


def _extend(deltas: list[OutputDelta], parsed: list[Delta], event: TokenEvent) -> None:
    """Clients count tokens by events, so a token without a delta of its own gets an empty one."""
    deltas += [(delta, None) for delta in parsed[:-1]]
    deltas.append((parsed[-1] if parsed else Delta(), event))


def _refusal(finish: Finish) -> CannotBeOnTime:
    after = finish.retry_after
    if after is None or not isfinite(after):
        return CannotBeOnTime("this server cannot meet $.objective at all: ask for more time")
    return CannotBeOnTime("$.objective cannot be met now; try again later", retry_after=after)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
