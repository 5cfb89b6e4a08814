"""One client request on its way through the gateway, whatever workers it meets."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from secrets import token_hex

from stretto.errors import Draining, Overloaded, Unavailable
from stretto.gateway.accounts.usage import Tally
from stretto.gateway.routing.fields import RoutingFields
from stretto.gateway.routing.router import Ask
from stretto.gateway.upstream.connection import Head
from stretto.gateway.upstream.progress import Progress
from stretto.protocol.relay import MARKED, OperationName, Took
from stretto.telemetry.tracing import TraceSpan
from stretto.types import Request

PATIENCE_S = 10.0  # how long a begun stream waits for a worker
HOLD_S = 1.0  # how long a new request does at most
CALM = (Draining.code, Unavailable.code, Overloaded.code)  # no request is why a worker says so
EVENTS = "text/event-stream"
Send = Callable[[int, Mapping[str, str], bytes, bool], Awaitable[None]]


class Refusal(Exception):
    """A worker cannot take the request, for a reason that another one need not have."""

    def __init__(self, head: Head, body: bytes) -> None:
        super().__init__(head.status)
        self.head = head
        self.body = body


@dataclass(slots=True)
class RelayedExchange:
    """One client request to a path. `send(status, headers, body, more)` writes to the client. `write(body)`
    writes more of a body that has begun, at once, or returns False when the client must be waited for.

    `kept`: the id of the answer that it asks for or goes on from. `references`: those of the kept items that
    its input refers to. `admit(request, answers)` asks the tenant's limits; it raises StrettoError for a
    request that may not run. `refusal`: what the last worker answered that could not take it.
    """

    operation: OperationName
    path: str
    tenant: str
    body: bytes
    fields: RoutingFields
    arrival: float
    send: Send
    write: Callable[[bytes], bool] | None = None
    request_id: str = ""
    kept: str = ""
    admit: Callable[[Request, int], None] = lambda request, answers: None
    nonce: str = field(default_factory=token_hex)
    took: Took | None = None  # of an answer in one piece, and of a stream from a server of another kind
    progress: Progress = field(default_factory=lambda: Progress(time.monotonic))
    tried: set[str] = field(default_factory=set[str])
    first: float | None = None  # when the first bytes came
    refusal: Refusal | None = None
    silence: str = ""  # what to tell the client of the last worker that sent nothing
    model: str = ""
    tier: str = ""
    prompt_tokens: int = 0  # roughly
    ask: Ask | None = None  # once it is admitted
    span: TraceSpan | None = None  # None: traces are off
    references: tuple[str, ...] = ()
    worker: str = ""  # that answers, or did last
    ttft: float | None = None  # of a stream, from its arrival
    forecast: float = inf  # of `ttft`
    passed: bool = False  # whether the client has a part of a body without marks
    losses: int = 0  # workers in a row that were lost without a token more
    due: Tally | None = None  # its part of an answer that several requests share
    _had: int = 0  # tokens that the client had at the last loss

    @property
    def begun(self) -> bool:
        """Whether the client has any part of the answer."""
        return self.passed or self.progress.begun

    @property
    def hold_s(self) -> float:
        """How long it waits while no worker is usable: all may be so for a moment, as when their reports come
        late on a busy machine or the last one restarts. A new one waits no longer than its objective."""
        if self.begun:
            return PATIENCE_S
        if self.tried:
            return 0.0
        ttft_ms = None if self.ask is None else self.ask.request.objective.ttft_ms
        return min(HOLD_S, inf if ttft_ms is None else ttft_ms / 1e3)

    def lost(self, code: str) -> None:
        """The worker that answers is lost. `code`: of the error that it says; empty: none."""
        emitted = self.progress.emitted
        self.losses = (0 if emitted > self._had else self.losses) + (code not in CALM)
        self._had = emitted
        self.progress.lost()

    def answered(self, worker: str, forecast: float, head: Head) -> None:
        """A worker's response has begun. `forecast`: the predicted time from arrival to the first token."""
        self.worker = worker
        streams = MARKED in head.headers or EVENTS in head.headers.get("content-type", "")
        if self.ttft is None and streams:
            self.ttft = time.monotonic() - self.arrival
            self.forecast = forecast

    def tally(self) -> Tally:
        """What the request is charged for: what its answer took, or its part of one that it shared."""
        return self.taken() if self.due is None else self.due

    def taken(self) -> Tally:
        """What the answer took. Of one that was broken off the length of the prompt is an estimate."""
        emitted, took = self.progress.emitted, self.progress.took or self.took
        if took is None:
            return Tally(prompt_tokens=self.prompt_tokens if emitted else 0, completion_tokens=emitted)
        return Tally(
            prompt_tokens=took.prompt,
            cached_tokens=took.cached,
            completion_tokens=emitted or took.output,
            joules=took.joules or 0.0,
        )
