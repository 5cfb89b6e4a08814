"""The responses of one relayed session: each is charged like a request of its own. It sends nothing.

A client's event that asks for a response gets an id of the gateway's, by which an error of the worker tells
that none comes. A worker handles events in order, so its next response is that of the oldest such event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, cast

from msgspec import DecodeError, Raw, Struct, ValidationError, json, structs

from stretto.errors import InvalidRequest, StrettoError
from stretto.gateway.accounts.accounts import Account, ensure_tier
from stretto.gateway.accounts.ledger import Charge, Ledger
from stretto.gateway.accounts.usage import Tally
from stretto.gateway.operations.metrics import GatewayMetrics, RelayedEnd
from stretto.gateway.registry import Worker
from stretto.gateway.relay import Relay
from stretto.gateway.routing.fields import RoutingFields
from stretto.gateway.routing.router import Ask
from stretto.http.errors import internal
from stretto.protocol.parsing import read_some
from stretto.types import Request, Sampling

OK = "ok"
ENDED_WELL = ("completed", "incomplete", "cancelled")
OPTIONS = ("service_tier", "objective", "max_output_tokens")  # of a session, which a response may replace
ASKING = ("response.create", "input_text.commit")
MOST_PENDING = 64  # events that asked for a response and have none yet
encode = json.Encoder().encode


class _ClientHead(Struct):
    """What is read of a client's event. The worker checks all of it."""

    type: Any = None
    event_id: Any = None
    create_response: Any = None
    response: Raw = Raw(b"")
    session: Raw = Raw(b"")


CLIENT_HEAD = json.Decoder(_ClientHead)


class _CachedCount(Struct, frozen=True):
    cached_tokens: int = 0


class _TurnUsage(Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    input_token_details: _CachedCount = _CachedCount()


class _TurnError(Struct):
    code: str = "worker_error"


class _TurnDetails(Struct):
    error: _TurnError | None = None


class _TurnResponse(Struct):
    id: str = ""
    status: str = ""
    status_details: _TurnDetails | None = None
    usage: _TurnUsage | None = None


class _EventError(Struct):
    event_id: Any = None


class _WorkerHead(Struct):
    """What is read of a worker's event."""

    type: str = ""
    response: Raw = Raw(b"")
    error: Raw = Raw(b"")


class SessionPlace(NamedTuple):
    """Where a session is and whose it is. `account()`: of its key now; it raises Unauthorised for one that is
    no longer valid."""

    relay: Relay
    ledger: Ledger
    metrics: GatewayMetrics
    worker: Worker
    model: str
    account: Callable[[], Account]


@dataclass(slots=True)
class MeteredTurn:
    """One response that was asked for. `event_id`: of the client's event. `deltas`: that have come."""

    event_id: object
    tenant: str
    charge: Charge
    request: Request
    first: float | None = None
    deltas: int = 0


class SessionMeter:
    """What a session has asked for and got. `idle` is set while no response is running or asked for."""

    def __init__(self, place: SessionPlace) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self._place = place
        self._session = RoutingFields()
        self._pending: dict[str, MeteredTurn] = {}
        self._turn: tuple[str, MeteredTurn] | None = None
        self._ids = count(1)
        self._context = 0  # tokens of the conversation at the last response
        self._fresh = 0  # bytes of the client's events since

    def asked(self, event: str | bytes) -> str | bytes:
        """A client's event as the worker gets it. Raises StrettoError for a response that may not run, or a
        tier that the key may not use."""
        event, head = _read(event)
        if head.type == "session.update":
            fields = _fields(head.session)
            ensure_tier(self._place.account().record, fields.tier)
            self._session = _merged(self._session, fields)
        self._fresh += len(event)
        if head.type not in ASKING or (head.type == ASKING[1] and head.create_response is False):
            return event
        if len(self._pending) >= MOST_PENDING:
            raise InvalidRequest(
                f"{MOST_PENDING} responses are asked for; wait for response.done", param="$.type"
            )
        own = f"gateway_{next(self._ids)}"
        self._pending[own] = self._admit(head)
        self.idle.clear()
        return encode(json.decode(event) | {"event_id": own}).decode()

    def came(self, event: str | bytes) -> str | bytes:
        """A worker's event as the client gets it. Raises InvalidRequest if nobody asked for a response."""
        try:
            head = json.decode(event, type=_WorkerHead)
        except (DecodeError, ValidationError):
            return event  # the client knows better
        if head.type == "response.created":
            self._begin(head.response)
        elif head.type == "response.done":
            self._done(head.response)
        elif head.type == "error":
            return self._error(event, head.error)
        elif head.type.endswith(".delta") and self._turn is not None:
            turn = self._turn[1]
            turn.deltas += 1
            if turn.first is None:
                turn.first = time.monotonic()
        return event

    def close(self, error: StrettoError | None) -> None:
        """The session is over: settles what is open. `error`: why; None: the client left."""
        outcome = "client_gone" if error is None else error.code
        turns = list(self._pending.values())
        self._pending.clear()
        if self._turn is not None:
            turns.append(self._turn[1])
            self._turn = None
        for turn in turns:
            began = turn.deltas > 0
            prompt = len(turn.request.prompt) if began else 0
            self._settle(turn, Tally(prompt_tokens=prompt, completion_tokens=turn.deltas), outcome)

    def _admit(self, head: _ClientHead) -> MeteredTurn:
        relay, ledger, metrics, worker, model, find = self._place
        account = find()
        fields = _merged(self._session, _fields(head.response))
        ratio = relay.registry.model(model).ratio
        tokens = self._context + max(1, int(self._fresh / ratio))
        request = Request(
            id=relay.next_id(),
            model=model,
            prompt=cast("tuple[int, ...]", range(min(tokens, 1 << 20))),  # only its length is read
            arrival=time.monotonic(),
            sampling=Sampling(max_tokens=fields.most_tokens),
            tenant=account.tenant,
            objective=fields.wanted(relay.registry.tiers()),
            tier=fields.tier,
        )
        charge = ledger.charge(account)
        try:
            charge.admit(request, 1)
        except StrettoError as error:
            metrics.ended(
                RelayedEnd(
                    tenant=account.tenant,
                    model=relay.registry.known(model),
                    outcome=error.code,
                    status=error.status,
                    at=time.monotonic(),
                )
            )
            raise
        if model in worker.view.outlooks:
            relay.router.record(Ask(request), worker.view, min(self._context, tokens - 1))
            worker.sent(request.id)
        else:
            worker.view.active += 1
        return MeteredTurn(head.event_id, account.tenant, charge, request)

    def _begin(self, raw: Raw) -> None:
        own = next(iter(self._pending), None)
        if own is None or self._turn is not None:
            raise InvalidRequest("the event that asked for a response could not be read; send plain JSON")
        turn = self._pending.pop(own)
        self._turn = own, turn
        place = self._place
        place.relay.answered.add(turn.tenant, _response(raw).id, place.worker.name)

    def _done(self, raw: Raw) -> None:
        if self._turn is None:
            return
        turn, self._turn = self._turn[1], None
        done = _response(raw)
        usage, details = done.usage or _TurnUsage(), done.status_details
        self._context, self._fresh = usage.input_tokens + usage.output_tokens or self._context, 0
        failed = details.error.code if details is not None and details.error is not None else "worker_error"
        tally = Tally(
            prompt_tokens=usage.input_tokens,
            cached_tokens=usage.input_token_details.cached_tokens,
            completion_tokens=usage.output_tokens,
        )
        self._settle(turn, tally, OK if done.status in ENDED_WELL else failed)

    def _error(self, event: str | bytes, raw: Raw) -> str | bytes:
        """An error, with the id of the client's event in place of the gateway's."""
        try:
            own = json.decode(raw, type=_EventError).event_id
        except (DecodeError, ValidationError):
            return event
        if self._turn is not None and self._turn[0] == own:
            given = self._turn[1].event_id
        elif isinstance(own, str) and own in self._pending:
            turn = self._pending.pop(own)
            given = turn.event_id
            self._settle(turn, Tally(), "worker_error")
        else:
            return event
        whole: dict[str, Any] = json.decode(event)
        whole["error"]["event_id"] = given
        return encode(whole).decode()

    def _settle(self, turn: MeteredTurn, tally: Tally, outcome: str) -> None:
        relay, _, metrics, worker, model, _ = self._place
        known = relay.registry.known(model)
        tally = turn.charge.settle(tally, known)
        relay.router.done(worker.view)
        first = None if turn.first is None else turn.first - turn.request.arrival
        metrics.ended(
            RelayedEnd(
                tenant=turn.tenant,
                model=known,
                outcome=outcome,
                status=200,
                at=time.monotonic(),
                tally=tally,
                worker=worker.name,
                upstream=first,
                first=first,
            )
        )
        if not self._pending and self._turn is None:
            self.idle.set()


def error_event(error: Exception, event_id: object = None) -> str:
    """The event that tells a client of an error. `event_id`: of the event that caused it."""
    known = error if isinstance(error, StrettoError) else internal(error)
    body = {**known.body()["error"], "event_id": event_id}
    return encode(
        {"type": "error", "event_id": f"event_gateway_{time.monotonic_ns()}", "error": body}
    ).decode()


def event_id_of(event: str | bytes) -> object:
    """The id that the client gave an event, as far as it can be read."""
    return _read(event)[1].event_id


def _read(event: str | bytes) -> tuple[str | bytes, _ClientHead]:
    """A client's event, without halves of surrogate pairs as the worker reads it, and its head."""
    body = event.encode() if isinstance(event, str) else event
    try:
        head, whole = read_some(CLIENT_HEAD, body)
    except StrettoError:
        return event, _ClientHead()  # the worker says what is wrong with it
    return event if whole is body else whole.decode(), head


def _response(raw: Raw) -> _TurnResponse:
    try:
        return json.decode(raw, type=_TurnResponse)
    except (DecodeError, ValidationError):
        return _TurnResponse()


def _fields(raw: Raw) -> RoutingFields:
    try:
        return json.decode(raw, type=RoutingFields)
    except (DecodeError, ValidationError, RecursionError):
        return RoutingFields()


def _merged(session: RoutingFields, own: RoutingFields) -> RoutingFields:
    given = {name: value for name in OPTIONS if (value := getattr(own, name)) is not None}
    return structs.replace(session, **given)
