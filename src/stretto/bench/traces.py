"""Reads public traces of LLM traffic as arrivals. The first line of a file determines its format.

Files may be gzipped. A line that cannot be read is an error, because part of a trace is a different load.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import accumulate, groupby, islice
from math import gamma, isfinite
from pathlib import Path
from random import Random
from typing import TypeVar

import msgspec
from msgspec import Struct

from stretto.errors import InvalidRequest, reason_of
from stretto.simulator.setting import Arrival

T = TypeVar("T")
Line = tuple[int, str]  # the number, from 1, and the text
AZURE = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
WINDOWS = ["client", "start_s", "rate_rps", "cv", "pattern", "param1", "param2"]
MICROSECONDS = 1e6
CHARACTERS_PER_TOKEN = 4
MOST_TOKENS = 10**7


def read(path: Path, *, requests: int | None = None, seed: int = 0) -> list[Arrival]:
    """The arrivals of a trace, in order and with the first at 0 seconds; at most `requests` of them.

    `seed` is for a trace that records only distributions (ServeGen). Raises InvalidRequest that names the
    file and the line that cannot be read.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            first = next(lines, None)
            if first is None:
                raise InvalidRequest(f"{path.name} is empty; write one line for each request")
            arrivals = list(islice(_reader(path, first[1])(path, first, lines, seed), requests))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {reason_of(error)}") from error
    if not arrivals:
        raise InvalidRequest(f"{path.name} holds no request")
    arrivals.sort(key=lambda arrival: arrival.at)
    start = arrivals[0].at
    return [msgspec.structs.replace(arrival, at=arrival.at - start) for arrival in arrivals]


Reader = Callable[[Path, Line, Iterator[Line], int], Iterable[Arrival]]


def _reader(path: Path, first: str) -> Reader:
    """The reader for a trace with this first line. Raises InvalidRequest when there is none."""
    if first.strip().split(",") == AZURE:
        return _azure
    if first.strip().split(",") == WINDOWS:
        return _servegen
    if first.lstrip().startswith("{"):
        keys = _decoded(path, (1, first), dict[str, object]).keys()
        for wanted, reader in JSON_LINES:
            if wanted <= keys:
                return reader
    raise InvalidRequest(
        f"{path.name} is no trace that can be read; give Azure's CSV, JSON lines of Mooncake or LMCache, "
        "windows of ServeGen, or sessions of kv-cache-tester"
    )


def _azure(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """Azure 2023 (Splitwise, ISCA 2024): wall-clock time, tokens in, tokens out."""
    for number, line in lines:
        row = next(csv.reader([line]))
        if len(row) != len(AZURE):
            raise _wrong(path, number, f"{len(row)} columns where {len(AZURE)} belong")
        try:
            stamp = datetime.fromisoformat(row[0][:26]).timestamp()  # the rest is below a microsecond
        except ValueError:
            raise _wrong(path, number, f"TIMESTAMP {row[0]!r} is no time") from None
        yield _arrival(path, number, stamp, row[1], row[2])


class _MooncakeRequest(Struct):
    timestamp: float
    input_length: int | None = None
    output_length: int | None = None
    hash_ids: tuple[int, ...] = ()


def _mooncake(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """Mooncake (FAST 2025): milliseconds, tokens in, tokens out, ids of 512-token blocks of the prompt."""
    for number, line in (first, *lines):
        row = _decoded(path, (number, line), _MooncakeRequest)
        plain = _arrival(path, number, row.timestamp / 1e3, row.input_length, row.output_length)
        yield msgspec.structs.replace(plain, prefix=row.hash_ids)


class _LmcacheRequest(Struct):
    timestamp: float
    input: str
    output: str
    session_id: str | int = "local"


def _lmcache(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """LMCache's agents: microseconds and real text, counted as one token for every four characters."""
    for number, line in (first, *lines):
        row = _decoded(path, (number, line), _LmcacheRequest)
        tokens = [max(1, len(text) // CHARACTERS_PER_TOKEN) for text in (row.input, row.output)]
        plain = _arrival(path, number, row.timestamp / MICROSECONDS, *tokens)
        yield msgspec.structs.replace(plain, tenant=str(row.session_id))


class _SessionCall(Struct, rename={"tokens_in": "in", "tokens_out": "out"}):
    """A call at `t` seconds from its session's start. A sub-agent has `requests` of its own."""

    t: float
    type: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    requests: list[_SessionCall] | None = None


class _Session(Struct):
    id: str | int
    requests: list[_SessionCall]


def _sessions(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """kv-cache-tester: sessions of an agent, each with its own start. A sub-agent's calls are among them."""
    calls: list[Arrival] = []
    for number, line in (first, *lines):
        session = _decoded(path, (number, line), _Session)
        for at, call in _flattened(session.requests, 0.0):
            plain = _arrival(path, number, at, call.tokens_in, call.tokens_out)
            calls.append(msgspec.structs.replace(plain, tenant=str(session.id)))
    yield from sorted(calls, key=lambda call: call.at)


def _flattened(calls: Iterable[_SessionCall], start: float) -> Iterator[tuple[float, _SessionCall]]:
    """The calls that a model answers, each with its time in seconds."""
    for call in calls:
        if call.requests is not None:
            yield from _flattened(call.requests, start + call.t)
        elif call.type != "subagent":
            yield start + call.t, call


class _Window(Struct):
    """The fitted arrival process of one client over ten minutes. `rate` is requests per second."""

    client: str
    start: float
    rate: float
    pattern: str
    shape: float


WINDOW_S = 600.0


def _servegen(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """ServeGen (arXiv 2505.09999): arrivals are drawn from each client's process, window by window.

    Lengths are drawn from the client's distributions, which the `_lengths` file beside the windows holds.
    """
    lengths = _Lengths(path)
    rng = Random(seed)
    windows = [_window(path, number, line) for number, line in lines]
    windows.sort(key=lambda window: window.start)
    for _, together in groupby(windows, key=lambda window: window.start):
        stamps = [(at, window) for window in together for at in _arrivals_in(window, rng)]
        for at, window in sorted(stamps, key=lambda stamp: stamp[0]):
            yield Arrival(at, *lengths.draw(window, rng), tenant=window.client)


def _window(path: Path, number: int, line: str) -> _Window:
    row = next(csv.reader([line]))
    if len(row) != len(WINDOWS):
        raise _wrong(path, number, f"{len(row)} columns where {len(WINDOWS)} belong")
    start, rate, shape, _ = (_number(path, number, row[index], WINDOWS[index]) for index in (1, 2, 5, 6))
    if row[4] not in ("", "Gamma", "Weibull", "Exponential"):
        raise _wrong(path, number, f"{row[4]!r} is no known pattern of arrivals")
    return _Window(row[0], start, rate, row[4], shape)


def _arrivals_in(window: _Window, rng: Random) -> Iterator[float]:
    """The arrival times of a renewal process with the window's mean rate, in seconds."""
    if window.rate <= 0 or not window.pattern:
        return
    draw: dict[str, Callable[[], float]] = {
        "Gamma": lambda: rng.gammavariate(window.shape, 1.0) / window.shape,
        "Weibull": lambda: rng.weibullvariate(1.0, window.shape) / _weibull_mean(window.shape),
        "Exponential": lambda: rng.expovariate(1.0),
    }
    gap = draw[window.pattern]
    at = gap() / window.rate
    while at < WINDOW_S:
        yield window.start + at
        at += gap() / window.rate


def _weibull_mean(shape: float) -> float:
    return gamma(1.0 + 1.0 / max(shape, 0.05))


class _Lengths:
    """The token counts of ServeGen clients, by six-hour windows. Distributions are parsed when first used."""

    def __init__(self, windows: Path) -> None:
        self._path = windows.with_name(windows.name.replace("_windows.csv", "_lengths.jsonl"))
        if self._path == windows or not self._path.exists():
            raise InvalidRequest(f"{windows.name} needs its _lengths.jsonl file; put it in the same folder")
        self._entries: dict[str, list[tuple[float, int, dict[str, object]]]] = {}
        self._parsed: dict[tuple[int, str], tuple[list[int], list[float]]] = {}
        opened = gzip.open if self._path.suffix == ".gz" else open
        with opened(self._path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                entry = _decoded(self._path, (number, line), dict[str, object])
                if entry.get("output_tokens") not in (None, "{}"):
                    start = _number(self._path, number, entry.get("start_s"), "start_s")
                    known = self._entries.setdefault(str(entry.get("client")), [])
                    known.append((start, number, entry))
        if not self._entries:
            raise InvalidRequest(f"{self._path.name} holds no lengths")

    def draw(self, window: _Window, rng: Random) -> tuple[int, int]:
        """Draw tokens in and out. A client without lengths of its own takes those of the first client."""
        known = self._entries.get(window.client) or next(iter(self._entries.values()))
        past = [entry for entry in known if entry[0] <= window.start]
        _, number, entry = past[-1] if past else known[0]
        tokens_in = self._one(
            number, entry, "input_tokens" if "input_tokens" in entry else "text_tokens", rng
        )
        if "image_tokens" in entry:
            tokens_in += self._one(number, entry, "image_tokens", rng) * self._one(
                number, entry, "image_count", rng
            )
        return max(1, tokens_in), max(1, self._one(number, entry, "output_tokens", rng))

    def _one(self, number: int, entry: dict[str, object], name: str, rng: Random) -> int:
        if (number, name) not in self._parsed:
            try:
                table = literal_eval(str(entry[name]))
                self._parsed[number, name] = [int(key) for key in table], list(accumulate(table.values()))
            except (ValueError, SyntaxError, KeyError, AttributeError, TypeError):
                raise _wrong(self._path, number, f"{name} is no table of probabilities") from None
        values, weights = self._parsed[number, name]
        return rng.choices(values, cum_weights=weights)[0] if values else 0


JSON_LINES: tuple[tuple[set[str], Reader], ...] = (
    ({"timestamp", "input_length", "output_length"}, _mooncake),
    ({"timestamp", "input", "output"}, _lmcache),
    ({"id", "requests"}, _sessions),
)


def _arrival(path: Path, number: int, at: float, tokens_in: object, tokens_out: object) -> Arrival:
    named = ((tokens_in, "tokens in"), (tokens_out, "tokens out"))
    tokens = [_number(path, number, value, name) for value, name in named]
    if any(value != int(value) or not 0 <= value <= MOST_TOKENS for value in tokens):
        raise _wrong(path, number, f"{tokens_in!r} and {tokens_out!r} are no numbers of tokens")
    return Arrival(at, max(1, int(tokens[0])), max(1, int(tokens[1])))


def _number(path: Path, number: int, value: object, name: str) -> float:
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise _wrong(path, number, f"{name} is {value!r}, not a number") from None
    if not isfinite(found):
        raise _wrong(path, number, f"{name} is {value!r}, not a finite number")
    return found


def _decoded(path: Path, line: Line, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(line[1], type=kind, strict=False)
    except msgspec.DecodeError as error:
        raise _wrong(path, line[0], str(error)) from None


def _wrong(path: Path, number: int, what: str) -> InvalidRequest:
    return InvalidRequest(f"{path.name}, line {number}: {what}")
