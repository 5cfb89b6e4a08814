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
FIRST_MARK = MARK_LINE + b"0 "  # of the first answer
IN_MARK, IN_END = len(FIRST_MARK), -2  # where its tokens begin and end
END = b"\n\n"
NUMBERS = b"0123456789 "
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
    """What the client has of one answer. Times are seconds of the gateway's clock. `tokens`: a space and the
    id of each one, as the marks have them: only a failover needs them as numbers."""

    first: float
    last: float
    tokens: bytearray = field(default_factory=bytearray)
    complete: bool = False
    late: bool = False


class Progress:
    """Splits a relayed stream into bytes for the client and marks, and keeps the tokens of the marks.

    Bytes after the last mark are held back: if the worker is lost, the next one makes them again. `error` is
    the code of the error in which the worker ended the stream; the client gets it unless it is RETRIABLE.
    """

    __slots__ = (
        "_clock",
        "_first",
        "_head",
        "_held",
        "_parts",
        "_variants",
        "ended",
        "error",
        "took",
        "written",
    )

    def __init__(self, clock: Callable[[], float]) -> None:
        self.ended = False  # whether the client has the whole stream
        self.took: Took | None = None  # as the worker said at the end
        self.error = ""
        self.written = 0  # bytes that `take` has passed on
        self._clock = clock
        self._held: bytes = b""
        self._head: _Opened | None = None
        self._parts: dict[int, _Part] = {}
        self._first: _Part | None = None  # of the first answer, once the client has something of the stream
        self._variants: dict[int, str] = {}  # that make the answers, where a ladder has several

    @property
    def begun(self) -> bool:
        """Whether the client has any part of the stream."""
        return self._head is not None

    @property
    def emitted(self) -> int:
        """How many tokens the client has."""
        return sum(len(part.tokens.split()) for part in self._parts.values())

    def take(self, write: Callable[[bytes], bool], data: bytes) -> bool:
        """Passes the middle of a stream on to `write`. Returns False, with nothing changed, if `write` does,
        or if `data` may end the stream. Raises ValueError for a malformed mark.

        Nearly all that comes is one event of one line with its token, or several events with theirs. That is
        not read further.
        """
        part = self._first
        if part is not None and not self._held and data.endswith(END):
            at = data.find(b"\n") + 1
            tokens = data[at + IN_MARK : IN_END]
            if data.startswith(FIRST_MARK, at) and tokens.isdigit() and not data.startswith(MARK):
                passed = data[: at + 1]
            else:
                passed, tokens = _plain(data)
            if tokens:
                if not write(passed):
                    return False
                part.tokens += b" " + tokens
                part.last = self._clock()
                self.written += len(passed)
                return True
        held = self._held + data if self._held else data
        if LAST in held or ERROR in held or not write(b""):
            return False
        passed = self.push(data)
        if passed:
            write(passed)
            self.written += len(passed)
        return True

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
        tokens = list(map(int, part.tokens.split()))
        return EmittedAnswer(tokens, part.complete, part.late, first_ms, last_ms, variant)

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
        part.tokens += b"".join([b" %d" % token for token in mark.tokens])
        part.last = now
        if mark.answer == 0 and self._head is not None:
            self._first = part
        part.complete = part.complete or mark.complete
        part.late = part.late or mark.late
        self.ended = self.ended or mark.last


def _plain(data: bytes) -> tuple[bytes, bytes]:
    """The events and the tokens of data that ends in a mark, where all marks are those of the first answer
    and have tokens only. Else the tokens are empty."""
    first, *others = data.split(FIRST_MARK)
    read = [other.partition(END) for other in others]
    tokens = b" ".join([numbers for numbers, _, _ in read])
    events = b"\n".join([first, *(event for _, _, event in read)])
    whole = bool(read) and all(numbers for numbers, _, _ in read) and not read[-1][2]
    other = tokens.translate(None, NUMBERS) or MARK_LINE in events or data.startswith(MARK)
    return (events, tokens) if whole and not other else (b"", b"")


def _opened(events: bytes) -> _Opened:
    at = events.find(DATA)
    first = events[at + len(DATA) :].split(END, 1)[0] if at >= 0 else events.split(b"\n", 1)[0]
    try:
        return json.decode(first, type=_Opened)
    except (DecodeError, ValidationError):
        return _Opened()
