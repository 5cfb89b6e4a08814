"""How far a client has received a stream, so that another worker can go on at that token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import DecodeError, Struct, ValidationError, json

from stretto.protocol.relay import (
    MARK,
    TOOK_MARK,
    VARIANT_MARK,
    Continuation,
    EmittedAnswer,
    Took,
    read_mark,
    read_variant_mark,
)

MARK_LINE = b"\n" + MARK
END = b"\n\n"
LAST = b"!" + END  # how the last mark ends; no event does, because JSON has no line breaks
ERROR = MARK + b"?"
DATA = b"data: "
# The request can go on, or begin again, on another worker.
RETRIABLE = {
    "engine_died",
    "engine_stalled",
    "draining",
    "unavailable",
    "overloaded",
    "out_of_memory",
    "worker_lost",
}


class _Opened(Struct):
    """The first event of an answer, as far as another worker must repeat it."""

    id: str = ""
    created: int = 0
    created_at: int | str = 0
    response: _Opened | None = None


@dataclass(slots=True)
class _Part:
    """What the client has of one answer. Times are seconds of the gateway's clock."""

    first: float
    last: float
    tokens: list[int] = field(default_factory=list[int])
    complete: bool = False
    late: bool = False


class Progress:
    """Splits a relayed stream into bytes for the client and marks, and keeps the tokens of the marks.

    Bytes after the last mark are held back: if the worker is lost, the next one makes them again. `error` is
    the code of the error in which the worker ended the stream; the client gets it unless it is RETRIABLE.
    """

    __slots__ = ("_clock", "_head", "_held", "_parts", "_variants", "ended", "error", "took")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.ended = False  # whether the client has the whole stream
        self.took: Took | None = None  # as the worker said at the end
        self.error = ""
        self._clock = clock
        self._held: bytes = b""
        self._head: _Opened | None = None
        self._parts: dict[int, _Part] = {}
        self._variants: dict[int, str] = {}  # that make the answers, where a ladder has several

    @property
    def begun(self) -> bool:
        """Whether the client has any part of the stream."""
        return self._head is not None

    @property
    def emitted(self) -> int:
        """How many tokens the client has."""
        return sum(len(part.tokens) for part in self._parts.values())

    def may_end(self, data: bytes) -> bool:
        """Whether `data` may complete a mark that ends the stream."""
        data = self._held + data if self._held else data
        return LAST in data or ERROR in data

    def push(self, data: bytes) -> bytes:
        """The bytes for the client that `data` completes. Raises ValueError for a malformed mark."""
        data = self._held + data if self._held else data
        passed, events, start = b"", b"", 0  # `events`: those in front of the last line that is no mark
        while True:
            at = start
            if not data.startswith(MARK, start):
                at = data.find(MARK_LINE, start) + 1
                if not at:
                    break
            end = data.find(END, at)
            if end < 0:
                break
            line, events = data[at:end], events + data[start:at]
            start = end + len(END)
            if line.startswith(TOOK_MARK):
                self.took = Took.of(line.removeprefix(TOOK_MARK).decode())
            elif line.startswith(VARIANT_MARK):
                index, variant = read_variant_mark(line)
                self._variants[index] = variant
            else:
                self._take(events, line)
                if self.error in RETRIABLE:
                    return passed
                passed, events = passed + events, b""
        self._held = events + data[start:]
        return passed

    def lost(self) -> None:
        """The worker is gone: forget what was held back."""
        self._held, self.error = b"", ""
        if self._head is None:
            self._parts.clear()
            self._variants.clear()

    def continuation(self, arrival: float) -> Continuation | None:
        """Where another worker must go on with a request that came at `arrival`; None when the client has
        nothing yet."""
        head = self._head
        if head is None:
            return None
        head = head.response or head
        answers = [self._emitted(index, arrival) for index in range(max(self._parts, default=-1) + 1)]
        created = head.created or (head.created_at if isinstance(head.created_at, int) else 0)
        return Continuation(head.id, created, answers)

    def _emitted(self, index: int, arrival: float) -> EmittedAnswer:
        part = self._parts.get(index)
        if part is None:
            return EmittedAnswer()
        first_ms, last_ms = ((when - arrival) * 1e3 for when in (part.first, part.last))
        variant = self._variants.get(index, "")
        return EmittedAnswer(part.tokens, part.complete, part.late, first_ms, last_ms, variant)

    def _take(self, events: bytes, line: bytes) -> None:
        """Counts what a mark says of the events before it."""
        mark = read_mark(line)
        if mark.error:
            self.error = mark.error
            self.ended = mark.error not in RETRIABLE
            return
        if self._head is None and events:
            self._head = _opened(events)
        now = self._clock()
        part = self._parts.get(mark.answer)
        if part is None:
            part = self._parts[mark.answer] = _Part(now, now)
        part.tokens += mark.tokens
        part.last = now
        part.complete = part.complete or mark.complete
        part.late = part.late or mark.late
        self.ended = self.ended or mark.last


def _opened(events: bytes) -> _Opened:
    at = events.find(DATA)
    first = events[at + len(DATA) :].split(END, 1)[0] if at >= 0 else events.split(b"\n", 1)[0]
    try:
        return json.decode(first, type=_Opened)
    except (DecodeError, ValidationError):
        return _Opened()
