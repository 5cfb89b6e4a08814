"""Recorded loads as arrivals: readers for public traces of LLM traffic, by what their files look like.

Files may be gzipped. A file that is not such a trace, or has a hole in it, is refused with its line: a load
test on half a trace would say something else. Of servers, clocks and tiers it knows nothing.
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

import msgspec
from msgspec import Struct

from stretto.errors import InvalidRequest
from stretto.types import Arrival

Line = tuple[int, str]
AZURE = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
WINDOWS = ["client", "start_s", "rate_rps", "cv", "pattern", "param1", "param2"]
MICROSECONDS = 1e6
CHARACTERS_PER_TOKEN = 4
MOST_TOKENS = 10**7


def read(path: Path, *, requests: int | None = None, seed: int = 0) -> list[Arrival]:
    """The arrivals of a trace in order, the first at 0 seconds; at most `requests` of them.

    `seed` draws what a trace gives only as distributions (ServeGen). Raises InvalidRequest, naming file and
    line, for what cannot be read.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            first = next(lines, None)
            if first is None:
                raise InvalidRequest(f"{path.name} is empty: a trace has a line for each request")
            arrivals = list(islice(_reader(path, first[1])(path, first, lines, seed), requests))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    if not arrivals:
        raise InvalidRequest(f"{path.name} holds no request")
    arrivals.sort(key=lambda arrival: arrival.at)
    start = arrivals[0].at
    return [msgspec.structs.replace(arrival, at=arrival.at - start) for arrival in arrivals]


Reader = Callable[[Path, Line, Iterator[Line], int], Iterable[Arrival]]


def _reader(path: Path, first: str) -> Reader:
    """Which reader a trace's first line asks for."""
    if first.strip().split(",") == AZURE:
        return _azure
    if first.strip().split(",") == WINDOWS:
        return _servegen
    if first.lstrip().startswith("{"):
        keys = _object(path, (1, first)).keys()
        for wanted, reader in JSON_LINES:
            if wanted <= keys:
                return reader
    raise InvalidRequest(
        f"{path.name} is no trace that can be read: known are Azure's CSV, Mooncake's and LMCache's "
        "JSON lines, ServeGen's windows and kv-cache-tester's sessions"
    )


def _azure(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """Azure 2023 (Splitwise, ISCA 2024): wall clock in ticks of 100 ns, tokens in, tokens out."""
    for number, line in lines:
        row = next(csv.reader([line]))
        if len(row) != len(AZURE):
            raise _hole(path, number, f"{len(row)} columns where {len(AZURE)} belong")
        try:
            stamp = datetime.fromisoformat(row[0][:26]).timestamp()
        except ValueError:
            raise _hole(path, number, f"TIMESTAMP {row[0]!r} is no time") from None
        yield _arrival(path, number, stamp, row[1], row[2])


def _mooncake(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """Mooncake (FAST 2025): milliseconds, tokens in, tokens out, ids of 512-token blocks of the prompt."""
    for number, line in (first, *lines):
        entry = _object(path, (number, line))
        prefix = entry.get("hash_ids", [])
        if not isinstance(prefix, list) or not all(isinstance(block, int) for block in prefix):
            raise _hole(path, number, "hash_ids is no list of numbers")
        stamp = _number(path, number, entry.get("timestamp"), "timestamp") / 1e3
        plain = _arrival(path, number, stamp, entry.get("input_length"), entry.get("output_length"))
        yield msgspec.structs.replace(plain, prefix=tuple(prefix))


def _lmcache(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """LMCache's agents: microseconds and real text, reckoned at four characters a token."""
    for number, line in (first, *lines):
        entry = _object(path, (number, line))
        stamp = _number(path, number, entry.get("timestamp"), "timestamp") / MICROSECONDS
        asked, said = entry.get("input"), entry.get("output")
        if not isinstance(asked, str) or not isinstance(said, str):
            raise _hole(path, number, "input and output must be text")
        tokens = [max(1, len(text) // CHARACTERS_PER_TOKEN) for text in (asked, said)]
        plain = _arrival(path, number, stamp, *tokens)
        yield msgspec.structs.replace(plain, tenant=str(entry.get("session_id", "local")))


def _sessions(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """kv-cache-tester: sessions of an agent, each from its own start; a sub-agent's calls lie within."""
    calls: list[Arrival] = []
    for number, line in (first, *lines):
        session = _object(path, (number, line))
        calls += _calls(path, number, session, 0.0, str(session["id"]))
    yield from sorted(calls, key=lambda call: call.at)


def _calls(
    path: Path, number: int, session: dict[str, object], start: float, tenant: str
) -> Iterator[Arrival]:
    calls = session.get("requests", [])
    if not isinstance(calls, list):
        raise _hole(path, number, "requests is no list")
    for call in calls:
        if not isinstance(call, dict):
            raise _hole(path, number, "a request is no object")
        at = start + _number(path, number, call.get("t"), "t")
        if "requests" in call:
            yield from _calls(path, number, call, at, tenant)
        elif call.get("type") != "subagent":
            plain = _arrival(path, number, at, call.get("in"), call.get("out"))
            yield msgspec.structs.replace(plain, tenant=tenant)


class _Window(Struct):
    """One client's ten minutes: the fitted process of its arrivals."""

    client: str
    start: float
    rate: float
    pattern: str
    shape: float
    scale: float


WINDOW_S = 600.0


def _servegen(path: Path, first: Line, lines: Iterator[Line], seed: int) -> Iterator[Arrival]:
    """ServeGen (arXiv 2505.09999): arrivals drawn from each client's process, lengths from its distributions
    in the `_lengths` file beside the windows. Window by window, so a first part needs no more."""
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
        raise _hole(path, number, f"{len(row)} columns where {len(WINDOWS)} belong")
    start, rate, shape, scale = (_number(path, number, row[index], WINDOWS[index]) for index in (1, 2, 5, 6))
    if row[4] not in ("", "Gamma", "Weibull", "Exponential"):
        raise _hole(path, number, f"{row[4]!r} is no known pattern of arrivals")
    return _Window(row[0], start, rate, row[4], shape, scale)


def _arrivals_in(window: _Window, rng: Random) -> Iterator[float]:
    """A renewal process: gaps are drawn until the window is over. `scale` is in windows' own unit, so the
    gaps are stretched to the window's mean rate."""
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
    """What a ServeGen client asks and gets, by six-hour windows. Distributions are parsed when drawn from."""

    def __init__(self, windows: Path) -> None:
        self._path = windows.with_name(windows.name.replace("_windows.csv", "_lengths.jsonl"))
        if self._path == windows or not self._path.exists():
            raise InvalidRequest(f"{windows.name} needs its _lengths.jsonl file beside it")
        self._entries: dict[str, list[tuple[float, int, dict[str, object]]]] = {}
        self._parsed: dict[tuple[int, str], tuple[list[int], list[float]]] = {}
        opened = gzip.open if self._path.suffix == ".gz" else open
        with opened(self._path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                entry = _object(self._path, (number, line))
                if entry.get("output_tokens") not in (None, "{}"):
                    start = _number(self._path, number, entry.get("start_s"), "start_s")
                    known = self._entries.setdefault(str(entry.get("client")), [])
                    known.append((start, number, entry))
        if not self._entries:
            raise InvalidRequest(f"{self._path.name} holds no lengths")

    def draw(self, window: _Window, rng: Random) -> tuple[int, int]:
        """Tokens in and out. A client without lengths of its own draws from the first that has some."""
        known = self._entries.get(window.client) or next(iter(self._entries.values()))
        past = [entry for entry in known if entry[0] <= window.start]
        _, number, entry = past[-1] if past else known[0]
        asked = self._one(number, entry, "input_tokens" if "input_tokens" in entry else "text_tokens", rng)
        if "image_tokens" in entry:
            asked += self._one(number, entry, "image_tokens", rng) * self._one(
                number, entry, "image_count", rng
            )
        return max(1, asked), max(1, self._one(number, entry, "output_tokens", rng))

    def _one(self, number: int, entry: dict[str, object], name: str, rng: Random) -> int:
        if (number, name) not in self._parsed:
            try:
                table = literal_eval(str(entry[name]))
                self._parsed[number, name] = [int(key) for key in table], list(accumulate(table.values()))
            except (ValueError, SyntaxError, KeyError, AttributeError, TypeError):
                raise _hole(self._path, number, f"{name} is no table of probabilities") from None
        values, weights = self._parsed[number, name]
        return rng.choices(values, cum_weights=weights)[0] if values else 0


JSON_LINES: tuple[tuple[set[str], Reader], ...] = (
    ({"timestamp", "input_length", "output_length"}, _mooncake),
    ({"timestamp", "input", "output"}, _lmcache),
    ({"id", "requests"}, _sessions),
)


def _arrival(path: Path, number: int, at: float, asked: object, said: object) -> Arrival:
    tokens = [
        _number(path, number, value, name) for value, name in ((asked, "tokens in"), (said, "tokens out"))
    ]
    if any(value != int(value) or not 0 <= value <= MOST_TOKENS for value in tokens):
        raise _hole(path, number, f"{asked!r} and {said!r} are no numbers of tokens")
    return Arrival(at, max(1, int(tokens[0])), max(1, int(tokens[1])))


def _number(path: Path, number: int, value: object, name: str) -> float:
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise _hole(path, number, f"{name} is {value!r}, not a number") from None
    if not isfinite(found):
        raise _hole(path, number, f"{name} is {value!r}, not a finite number")
    return found


def _object(path: Path, line: Line) -> dict[str, object]:
    try:
        return msgspec.json.decode(line[1], type=dict[str, object])
    except msgspec.DecodeError as error:
        raise _hole(path, line[0], str(error)) from None


def _hole(path: Path, number: int, what: str) -> InvalidRequest:
    return InvalidRequest(f"{path.name}, line {number}: {what}")
