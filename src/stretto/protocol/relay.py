"""What gateway and worker say to each other: reports, relayed requests, and the marks in a relayed stream.

A gateway asks for a `WorkerReport` many times a second. It posts a `RelayedRequest` to the worker's RELAY
path. In the stream that comes back, a mark follows the events of each send and lists the tokens they are
made of, so that another worker can go on after them. A mark is a comment of server-sent events: the gateway
removes it, and other clients ignore it.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Raw, Struct

from stretto.config import Tier
from stretto.types import ModelInfo

RELAY = "/v1/relay"
MARK = b":~"  # how a mark's line begins
TOOK_MARK = MARK + b"$ "  # how the line begins that says what a stream took
TOOK = "x-stretto-took"  # the header that says it of an answer in one piece
OperationName = Literal["chat", "completions", "embeddings"]


class WorkerReport(Struct, frozen=True):
    """What a worker tells gateways about itself, as msgpack in answer to a GET of the RELAY path.

    `now`: the worker's monotonic clock. `boot`: changes with each start of its engine, which empties the KV
    cache. `snapshots`: by model, the scheduler's `admission.Snapshot`; none under the schedule fcfs.
    """

    now: float
    boot: str
    ready: bool
    draining: bool
    models: tuple[ModelInfo, ...]
    tiers: dict[str, Tier]
    snapshots: dict[str, Raw]
    version: int = 1


class EmittedAnswer(Struct, frozen=True, array_like=True):
    """The part of one answer that the client already has."""

    tokens: list[int] = []
    complete: bool = False  # whether the client has its finish reason


class Continuation(Struct, frozen=True):
    """A stream that began on another worker. `answers` are in the order of the response's indexes; `id` and
    `created` are those of the chunks that the client has."""

    id: str
    created: int
    answers: list[EmittedAnswer]


class RelayedRequest(Struct, frozen=True):
    """A client's request as a gateway passes it on.

    `age_ms`: milliseconds since it reached the gateway, from which its deadlines count. `request` is the
    body as the client sent it.
    """

    operation: OperationName
    tenant: Annotated[str, Meta(max_length=256)]
    request: Raw
    age_ms: float = 0.0
    continuation: Continuation | None = None


class ErasureRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a DELETE of the RELAY path: drop the cached prompts of a tenant. `subject`: only those of
    requests with this `user`, `safety_identifier`, `prompt_cache_key` or `cache_salt`."""

    tenant: Annotated[str, Meta(max_length=256)]
    subject: Annotated[str, Meta(max_length=1024)] | None = None


class ErasureReport(Struct, frozen=True):
    """Blocks of the KV cache that were zeroed, and those that will be free when running sequences end."""

    blocks: int
    held: int


def mark(index: int, tokens: list[int], *, complete: bool, last: bool) -> bytes:
    """The mark after events of the answer `index` that are made of `tokens`.

    `complete`: the answer has its finish reason. `last`: nothing follows in the stream.
    """
    end = b"!" if last else b"." if complete else b""
    return b"%b%d %b%b\n\n" % (MARK, index, " ".join(map(str, tokens)).encode(), end)


class Took(NamedTuple):
    """The tokens that the answers to one request took. `cached` is part of `prompt`."""

    prompt: int = 0
    cached: int = 0
    output: int = 0

    @classmethod
    def of(cls, text: str) -> Took:
        """Reads what `str` wrote. Raises ValueError."""
        prompt, cached, output = map(int, text.split())
        return cls(prompt, cached, output)

    def __str__(self) -> str:
        return f"{self.prompt} {self.cached} {self.output}"

    def mark(self) -> bytes:
        """The line that stands in front of the last mark of a stream."""
        return b"%b%b\n\n" % (TOOK_MARK, str(self).encode())


class Mark(NamedTuple):
    """A mark that was read. `answer` is the index of the answer."""

    answer: int
    tokens: list[int]
    complete: bool
    last: bool


def read_mark(line: bytes) -> Mark:
    """The meaning of a mark's line. Raises ValueError for a line that is no mark."""
    text = line.strip()
    last, complete = text.endswith(b"!"), text.endswith((b"!", b"."))
    index, _, tokens = text[len(MARK) : len(text) - complete].partition(b" ")
    if not text.startswith(MARK):
        raise ValueError(f"no mark: {line[:40]!r}")
    return Mark(int(index), [int(token) for token in tokens.split()], complete, last)
