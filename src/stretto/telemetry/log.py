"""Log lines: their form, their level, and a thread that writes them, so that no task waits for a disk.

`configure` is called once in each process. A line has time, level, process, place and, where it concerns one
request, that request's id. No line holds the message of an exception, because that may quote a prompt.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from contextvars import ContextVar
from queue import SimpleQueue
from traceback import walk_tb
from types import TracebackType

from stretto.config import LogLevel

STDERR = 2
WAITING_LINES = 8192
LONGEST_LINE = 4096
PAUSE_S = 0.05  # lines that come within it are written together
CLOSE_S = 1.0
MOST_CAUSES, MOST_PLACES = 4, 8
# Characters that end a line, move a terminal's cursor or change the direction of writing.
CONTROLS = (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
ESCAPES = {code: f"\\u{code:04x}" for code in CONTROLS}

# The id of the HTTP request that the present task works for; empty outside of one.
request_id: ContextVar[str] = ContextVar("request_id", default="")


def timestamp(seconds: float) -> str:
    """Seconds since 1970 as UTC in ISO 8601 with milliseconds."""
    whole, milliseconds = divmod(int(seconds * 1e3), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"


def one_line(text: str) -> str:
    """The text without control characters and cut, so that it cannot forge a second line."""
    cut = text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "..."
    return cut.translate(ESCAPES)


class LineWriter:
    """Writes lines to a file descriptor, in order, from a thread of its own.

    At most `limit` lines wait. `dropped` counts the lines that came when so many waited, and those that could
    not be written, for example on a full disk.
    """

    def __init__(self, descriptor: int, limit: int = WAITING_LINES) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._limit = limit
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._closing = threading.Event()
        self._broken = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue a line, without its newline. Never waits and never raises."""
        if self._lines.qsize() < self._limit:
            self._lines.put(line)
        else:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, for `CLOSE_S` seconds at most. Lines that come later are lost."""
        self._closing.set()
        self._lines.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        running = True
        while running:
            lines = [self._lines.get()]
            while not self._lines.empty():  # nobody else takes lines
                lines.append(self._lines.get())
            running = None not in lines
            self._write([line for line in lines if line is not None])
            self._closing.wait(PAUSE_S)

    def _write(self, lines: list[bytes]) -> None:
        # After a line that was cut off, the next one begins on a new line.
        data = b"\n" * self._broken + b"".join([line + b"\n" for line in lines])
        try:
            while data:
                written = os.write(self._descriptor, data)
                self._broken = data[written - 1 : written] != b"\n"
                data = data[written:]
        except OSError:
            self.dropped += min(len(lines), data.count(b"\n"))


class LineFormat(logging.Formatter):
    """One line: `TIME LEVEL PROCESS PLACE: MESSAGE`, then the request's id and the places of an exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record. `extra={"request_id": ID}` names a request of another task."""
        place = record.name.removeprefix("stretto.")
        start = f"{timestamp(record.created)} {record.levelname.lower()} {self._process} {place}: "
        named = getattr(record, "request_id", "") or request_id.get()
        request = f" request_id={named}" if named else ""
        error = record.exc_info[1] if record.exc_info else None
        return start + one_line(f"{record.getMessage()}{request}{': ' if error else ''}{describe(error)}")


class LineHandler(logging.Handler):
    """Hands each record to a LineWriter."""

    def __init__(self, writer: LineWriter, process: str) -> None:
        super().__init__()
        self._writer = writer
        self.setFormatter(LineFormat(process))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record. One whose message cannot be formed is lost, as logging must not raise."""
        try:
            self._writer.write(self.format(record).encode("utf-8", "backslashreplace"))
        except Exception:
            self._writer.dropped += 1


def describe(error: BaseException | None) -> str:
    """The types of an exception and of its causes, each with the places in the code, the innermost first.

    It leaves their messages out, because they may quote a prompt.
    """
    parts: list[str] = []
    while error is not None and len(parts) < MOST_CAUSES:
        places = [f"{frame.f_code.co_filename}:{line}" for frame, line in walk_tb(error.__traceback__)]
        inner = " < ".join(reversed(places[-MOST_PLACES:])) or "an unknown place"
        parts.append(f"{type(error).__name__} at {inner}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ", caused by ".join(parts)


def configure(process: str, level: LogLevel) -> LineWriter:
    """Sends the log of this process to standard error: of Stretto, of its libraries, and uncaught errors.

    `process` is its name in the lines. Call it once. What waits is written when the process exits.
    """
    writer = LineWriter(STDERR)
    logging.basicConfig(handlers=[LineHandler(writer, process)], level=level.upper(), force=True)
    # uvicorn warns of every malformed request, which lets a stranger fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    atexit.register(writer.close)
    return writer


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("stretto").critical("uncaught", exc_info=error)
