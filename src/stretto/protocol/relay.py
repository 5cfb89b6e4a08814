"""What gateway and worker say to each other: reports, relayed requests, and the marks in a relayed stream.

A gateway asks for a `WorkerReport` many times a second. It posts a `RelayedRequest` to the worker's RELAY
path. In the stream that comes back, a mark follows the events of each send and lists the tokens they are
made of, so that another worker can go on after them. A mark is a comment of server-sent events: the gateway
removes it, and other clients ignore it.
"""

from __future__ import annotations

from math import inf
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Raw, Struct

from stretto.config import Tier
from stretto.types import ModelInfo

RELAY = "/v1/relay"
MARK = b":~"  # how a mark's line begins
TOOK_MARK = MARK + b"$ "  # how the line begins that says what a stream took
VARIANT_MARK = MARK + b"@ "  # how the line begins that names the variant of a ladder that answers
TOOK = "x-stretto-took"  # the header that says it of an answer in one piece
ERROR_CODE = "x-stretto-error"  # the header of a refusal: the error's code, in the words of every API
MARKED = "x-stretto-marks"  # the header of a stream that has marks
OperationName = Literal[
    "chat",
    "completions",
    "embeddings",
    "responses",
    "retrieve_response",
    "delete_response",
    "messages",
    "count_tokens",
    "ollama_chat",
    "ollama_generate",
    "ollama_embed",
    "ollama_embeddings",
    "ollama_show",
    "score",
    "rerank",
    "tokenize",
    "detokenize",
    "feedback",
    "show_feedback",
    "feedback_policies",
    "export_feedback",
    "erase_feedback",
]
# The paths of each operation whose request is the body of a POST, at a worker and at a gateway alike.
PATHS: dict[OperationName, tuple[str, ...]] = {
    "chat": ("/v1/chat/completions",),
    "completions": ("/v1/completions",),
    "embeddings": ("/v1/embeddings",),
    "responses": ("/v1/responses",),
    "messages": ("/v1/messages",),
    "count_tokens": ("/v1/messages/count_tokens",),
    "ollama_chat": ("/api/chat",),
    "ollama_generate": ("/api/generate",),
    "ollama_embed": ("/api/embed",),
    "ollama_embeddings": ("/api/embeddings",),
    "ollama_show": ("/api/show",),
    "score": ("/v1/score", "/score"),
    "rerank": ("/v1/rerank", "/v2/rerank", "/rerank"),
    "tokenize": ("/tokenize",),
    "detokenize": ("/detokenize",),
}
RESPONSES = "/v1/responses"
# Operations of OpenAI's API that are not here. Their paths look like that of a kept answer.
NO_RESPONSES = (f"{RESPONSES}/input_tokens", f"{RESPONSES}/compact")
FEEDBACK = "/v1/feedback"


# Why a lesser variant answers: the better one's workers are away, or would have been late.
Degraded = Literal["unreachable", "deadline"]


class WorkerReport(Struct, frozen=True):
    """What a worker tells gateways about itself, as msgpack in answer to a GET of the RELAY path.

    `now`: the worker's monotonic clock. `boot`: changes with each start of its engine, which empties the KV
    cache. `snapshots`: by model, the scheduler's `admission.Snapshot`; none under the schedule fcfs. `store`:
    what the ids of the answers begin with that this server keeps. `bytes_per_token`: by model, the bytes of
    requests for each token of their prompts. `quality`: what its answers are worth, from 0 to 1. `joules`: by
    model, what a token of an answer takes, where that is known; of a ladder, on its top.
    """

    now: float
    boot: str
    ready: bool
    draining: bool
    models: tuple[ModelInfo, ...]
    tiers: dict[str, Tier]
    snapshots: dict[str, Raw]
    version: int = 1
    store: str = ""
    bytes_per_token: dict[str, float] = {}
    quality: float = 1.0
    joules: dict[str, float] = {}


class EmittedAnswer(Struct, frozen=True, array_like=True):
    """The part of one answer that the client already has.

    `complete`: it has the finish reason. `late`: a token missed its deadline. `first_ms` and `last_ms`: when
    its first and its latest token came, from the request's arrival; negative when they are not known.
    `variant`: the variant of a ladder that made it; empty when there was no choice.
    """

    tokens: list[int] = []
    complete: bool = False
    late: bool = False
    first_ms: float = -1.0
    last_ms: float = -1.0
    variant: str = ""


class Continuation(Struct, frozen=True):
    """A stream that began on another worker. `answers` are in the order of the response's indexes; `id` and
    `created` are those of the chunks that the client has."""

    id: str
    created: int
    answers: list[EmittedAnswer]


class RelayedRequest(Struct, frozen=True):
    """A client's request as a gateway passes it on.

    `age_ms`: milliseconds since it reached the gateway, from which its deadlines count, with the network's
    way to the worker and back. `request` is the body as the client sent it. `nonce`: a random text of which
    ids in the answer are made, so that they stay the same when another worker goes on. `site` and `degraded`
    belong into the answer's report. `cached`: the tokens of the prompt that the worker is believed to have in
    its prefix cache.
    """

    operation: OperationName
    tenant: Annotated[str, Meta(max_length=256)]
    request: Raw
    age_ms: float = 0.0
    continuation: Continuation | None = None
    nonce: Annotated[str, Meta(max_length=64)] = ""
    site: Annotated[str, Meta(max_length=256)] = ""
    degraded: Degraded | None = None
    cached: Annotated[int, Meta(ge=0)] = 0


class ErasureRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a DELETE of the RELAY path: drop the cached prompts of a tenant. `subject`: only those of
    requests with this `user`, `safety_identifier`, `prompt_cache_key` or `cache_salt`."""

    tenant: Annotated[str, Meta(max_length=256)]
    subject: Annotated[str, Meta(max_length=1024)] | None = None


class ErasureReport(Struct, frozen=True):
    """Blocks of the KV cache that were zeroed, and those that will be free when running sequences end."""

    blocks: int
    held: int


class KeptResponseId(Struct, frozen=True):
    """The request of `retrieve_response` and `delete_response`."""

    id: Annotated[str, Meta(max_length=256)]


class FeedbackErasure(Struct, frozen=True, forbid_unknown_fields=True):
    """The request of `erase_feedback`: that of one request, of one user, or of the whole tenant."""

    request_id: str | None = None
    user: str | None = None


def mark(index: int, tokens: list[int], *, complete: bool, last: bool, late: bool = False) -> bytes:
    """The mark after events of the answer `index` that are made of `tokens`.

    `complete`: the answer has its finish reason. `last`: nothing follows in the stream. `late`: a token of
    the answer has missed its deadline.
    """
    end = b"!" if last else b"." if complete else b""
    return b"%b%d %b%b%b\n\n" % (MARK, index, " ".join(map(str, tokens)).encode(), b"-" if late else b"", end)


def variant_mark(index: int, variant: str) -> bytes:
    """The line in front of the first mark of the answer `index`, when a variant of a ladder makes it."""
    return b"%b%d %b\n\n" % (VARIANT_MARK, index, variant.encode())


def read_variant_mark(line: bytes) -> tuple[int, str]:
    """What `variant_mark` wrote. Raises ValueError."""
    index, _, variant = line.removeprefix(VARIANT_MARK).strip().partition(b" ")
    return int(index), variant.decode()


def error_mark(code: str) -> bytes:
    """The mark after the event with which a stream ends in an error."""
    return b"%b? %b\n\n" % (MARK, code.encode())


class Took(NamedTuple):
    """The tokens that the answers to one request took, and their energy; None: the worker does not know it.
    `cached` is part of `prompt`."""

    prompt: int = 0
    cached: int = 0
    output: int = 0
    joules: float | None = None

    @classmethod
    def of(cls, text: str) -> Took:
        """Reads what `str` wrote. Raises ValueError."""
        prompt, cached, output, *more = text.split()
        joules = float(more[0]) if more else None
        if len(more) > 1 or (joules is not None and not 0 <= joules < inf):
            raise ValueError(f"not what an answer took: {text[:80]!r}")
        return cls(int(prompt), int(cached), int(output), joules)

    def __str__(self) -> str:
        tokens = f"{self.prompt} {self.cached} {self.output}"
        return tokens if self.joules is None else f"{tokens} {self.joules:.6g}"

    def mark(self) -> bytes:
        """The line that stands in front of the last mark of a stream."""
        return b"%b%b\n\n" % (TOOK_MARK, str(self).encode())


class Mark(NamedTuple):
    """A mark that was read. `answer` is the index of the answer; `error`: the stream ends in that error."""

    answer: int
    tokens: list[int]
    complete: bool = False
    last: bool = False
    late: bool = False
    error: str = ""


def read_mark(line: bytes) -> Mark:
    """The meaning of a mark's line. Raises ValueError for a line that is no mark."""
    text = line.strip()
    if not text.startswith(MARK):
        raise ValueError(f"no mark: {line[:40]!r}")
    index, _, rest = text[len(MARK) :].partition(b" ")
    if rest[-1:].isdigit():  # nearly all
        return Mark(int(index), [int(each) for each in rest.split()])
    if index == b"?":
        return Mark(0, [], last=True, error=rest.decode())
    tokens = rest.rstrip(b"-.!")
    flags = rest[len(tokens) :]
    last = b"!" in flags
    return Mark(
        int(index), [int(each) for each in tokens.split()], last or b"." in flags, last, b"-" in flags
    )
