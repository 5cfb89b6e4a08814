"""The tokens that an answer used: workers send them in a header, other servers in the body."""

from __future__ import annotations

from contextlib import suppress

from msgspec import DecodeError, Struct, ValidationError, json

from stretto.protocol.relay import Took

EVENT = b"data: "
DONE = b"[DONE]"
USAGE = b'"usage"'
LONGEST_LINE = 1 << 20  # bytes; of a longer one, only the end is read


class _Cached(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Body(Struct):
    usage: _Usage | None = None


def took_of(header: str | None, body: bytes) -> Took | None:
    """The tokens of an answer in one piece, by a worker's header or by OpenAI's `usage`; None: unknown."""
    if header is not None:
        with suppress(ValueError):
            return Took.of(header)
    return _used(body)


class PlainStream:
    """Counts a stream of a server that sends no marks: its last `usage`, or else one token for each event."""

    def __init__(self) -> None:
        self._took = Took()
        self._exact = False
        self._rest = b""

    def push(self, data: bytes) -> Took:
        """The tokens that the stream has used up to the end of `data`."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest if len(rest) <= LONGEST_LINE else b""
        for line in lines:
            if not line.startswith(EVENT):
                continue
            text = line.removeprefix(EVENT).strip()
            found = _used(text) if USAGE in text else None
            if found is not None:
                self._took, self._exact = found, True
            elif not self._exact and text != DONE:
                self._took = self._took._replace(output=self._took.output + 1)
        return self._took

    def end(self) -> Took:
        """The tokens that it used in all. A body in one piece may have come in chunks; it has no events."""
        found = _used(self._rest) if USAGE in self._rest else None
        self._took = found or self._took
        return self._took


def _used(body: bytes) -> Took | None:
    try:
        usage = json.decode(body, type=_Body).usage
    except (DecodeError, ValidationError, RecursionError):
        return None
    if usage is None or usage.prompt_tokens is None:
        return None
    details = usage.prompt_tokens_details
    cached = 0 if details is None else details.cached_tokens or 0
    counts = (usage.prompt_tokens, cached, usage.completion_tokens or 0)
    prompt, cached, output = (max(0, count) for count in counts)
    return Took(prompt, cached, output)
