"""What a client has of a stream: enough for another worker to go on exactly there."""

from __future__ import annotations

from msgspec import DecodeError, Struct, ValidationError, json

from stretto.protocol.relay import MARK, TOOK_MARK, Continuation, EmittedAnswer, Took, read_mark

MARK_LINE = b"\n\n" + MARK
END = b"\n\n"
RETRIABLE = {"engine_died", "draining", "unavailable", "worker_lost"}


class _Head(Struct):
    id: str = ""
    created: int = 0


class _Detail(Struct):
    code: str | None = None


class _Error(Struct):
    error: _Detail


class Progress:
    """Splits a relayed stream into bytes for the client and marks, and keeps the tokens of the marks.

    Bytes after the last mark are held back: if the worker is lost, the next one makes them again.
    """

    __slots__ = ("_complete", "_head", "_held", "_tokens", "ended", "took")

    def __init__(self) -> None:
        self.ended = False  # whether the client has the whole stream
        self.took: Took | None = None  # as the worker said at the end
        self._held: bytes = b""
        self._head: _Head | None = None
        self._tokens: dict[int, list[int]] = {}
        self._complete: set[int] = set()

    @property
    def begun(self) -> bool:
        """Whether the client has any part of the stream."""
        return self._head is not None

    @property
    def emitted(self) -> int:
        """How many tokens the client has."""
        return sum(map(len, self._tokens.values()))

    def push(self, data: bytes) -> bytes:
        """The bytes for the client that `data` completes. Raises ValueError for a malformed mark."""
        data = self._held + data if self._held else data
        passed = b""
        while (at := data.find(MARK_LINE)) >= 0:
            end = data.find(END, at + len(MARK_LINE))
            if end < 0:
                break
            events = data[: at + len(END)]
            line = data[at + len(END) : end]
            if line.startswith(TOOK_MARK):
                self.took = Took.of(line.removeprefix(TOOK_MARK).decode())
                data = events + data[end + len(END) :]
                continue
            mark = read_mark(line)
            if self._head is None:
                self._head = _head_of(events)
            self._tokens.setdefault(mark.answer, []).extend(mark.tokens)
            if mark.complete:
                self._complete.add(mark.answer)
            self.ended = self.ended or mark.last
            passed += events
            data = data[end + len(END) :]
        self._held = data
        return passed

    def lost(self) -> None:
        """The worker is gone: forget what was held back."""
        self._held = b""

    def error(self) -> tuple[bytes, bool]:
        """The error event with which the worker ended the stream, and whether another worker may go on."""
        text = self._held.strip().removeprefix(b"data: ")
        try:
            code = json.decode(text, type=_Error).error.code
        except (DecodeError, ValidationError):
            return b"", True
        return self._held, code in RETRIABLE

    def continuation(self) -> Continuation | None:
        """Where another worker must go on; None when the client has nothing yet."""
        if self._head is None:
            return None
        count = max(self._tokens, default=-1) + 1
        answers = [
            EmittedAnswer(self._tokens.get(index, []), index in self._complete) for index in range(count)
        ]
        return Continuation(self._head.id, self._head.created, answers)


def _head_of(events: bytes) -> _Head:
    try:
        return json.decode(events.split(END, 1)[0].removeprefix(b"data: "), type=_Head)
    except (DecodeError, ValidationError):
        return _Head()
