"""`/v1/feedback` at a gateway: a reward goes to the worker that gave the answer, all else to all workers.

A worker keeps feedback in its memory. The gateway remembers who answered; a request that went through another
gateway, or before a restart, is found by asking one worker after the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from msgspec import DecodeError, Raw, Struct, ValidationError, json, structs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stretto.errors import NotImplementedHere, Unavailable
from stretto.gateway.accounts.accounts import Account
from stretto.gateway.accounts.keys import KeyScope
from stretto.gateway.registry import CONNECT_S, Registry, Worker
from stretto.gateway.routing.answered import AnsweredRequests
from stretto.gateway.upstream.connection import UpstreamConnection, WorkerLost
from stretto.http.exchange import KEY
from stretto.http.request import read_body
from stretto.protocol.extensions.feedback import (
    ErasedFeedback,
    FeedbackPolicies,
    FeedbackSummary,
    PolicyFeedback,
    VariantFeedback,
    ids_of,
)
from stretto.protocol.parsing import JSON, read_some, require_json
from stretto.protocol.relay import FEEDBACK, RELAY, FeedbackErasure, OperationName, RelayedRequest

log = logging.getLogger(__name__)
WAIT_S = 5.0  # for a worker's answer
MOST_BYTES = 64 << 20  # of it
UNKNOWN_STATUS = 404
T = TypeVar("T")
GetAccount = Callable[[Request, KeyScope], Account]


class RewardedRequest(Struct):
    """What a gateway reads of a reward. The worker checks all of it."""

    request_id: Any = None


REWARDED = json.Decoder(RewardedRequest)


class WorkerReply(NamedTuple):
    """What one worker has answered."""

    worker: str
    status: int
    media_type: str
    body: bytes


class FeedbackRelay:
    """The handlers. `account(request, scope)`: whose key it is. `most_bytes`: the present limit of a body."""

    def __init__(
        self,
        registry: Registry,
        answered: AnsweredRequests,
        account: GetAccount,
        most_bytes: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._answered = answered
        self._account = account
        self._most_bytes = most_bytes

    def routes(self) -> list[Route]:
        """The routes, the same as a worker's."""
        return [
            Route(FEEDBACK, self.give, methods=["POST"]),
            Route(FEEDBACK, self.show, methods=["GET"]),
            Route(FEEDBACK, self.erase, methods=["DELETE"]),
            Route(f"{FEEDBACK}/export", self.export, methods=["GET"]),
            Route(f"{FEEDBACK}/policies", self.policies, methods=["GET"]),
            Route(f"{FEEDBACK}/users/{{user}}", self.erase, methods=["DELETE"]),
            Route(f"{FEEDBACK}/{{id}}", self.erase, methods=["DELETE"]),
        ]

    async def give(self, request: Request) -> Response:
        """Passes a reward on to the worker that gave the answer, and to no other that had begun it. If no
        worker knows the request, the client gets a worker's 404. Raises Unavailable if one that may know it
        does not answer."""
        tenant = self._account(request, "infer").tenant
        require_json(request.headers.get("content-type"))
        fields, body = read_some(REWARDED, await read_body(request, self._most_bytes()))
        id = fields.request_id
        first = self._answered.worker(tenant, ids_of(id)) if isinstance(id, str) else None
        workers = self._workers()
        workers = [worker for worker in workers if worker.name == first] or workers
        unknown: WorkerReply | None = None
        silent: list[str] = []
        for worker in workers:
            reply = await _ask(worker, _relayed(request, "feedback", tenant, body))
            if reply is None:
                silent.append(worker.name)
            elif reply.status != UNKNOWN_STATUS:
                return _response(reply)
            else:
                unknown = reply
        if silent or unknown is None:
            raise _unconfirmed(silent)
        return _response(unknown)

    async def show(self, request: Request) -> Response:
        """The tenant's rewards at all workers. Raises Unavailable if one does not answer."""
        replies = await self._all(request, "show_feedback", b"{}")
        return _json(joined([_read(reply, FeedbackSummary) for reply in replies]))

    async def policies(self, request: Request) -> Response:
        """What other ways to choose would have been worth at each worker, by the tenant's rewards there.
        Raises Unavailable if one does not answer."""
        replies = await self._all(request, "feedback_policies", b"{}")
        return _json(listed({each.worker: _read(each, FeedbackPolicies) for each in replies}))

    async def export(self, request: Request) -> Response:
        """The tenant's corrected answers at all workers. Raises Unavailable if one does not answer."""
        replies = await self._all(request, "export_feedback", b"{}")
        lines = b"".join(reply.body for reply in replies)
        return Response(lines, media_type=replies[0].media_type, headers={"Cache-Control": "no-store"})

    async def erase(self, request: Request) -> Response:
        """Erases at all workers what the path names: one request also where a lost race for it has left it.
        Raises Unavailable if a worker does not confirm it; then ask again."""
        given = request.path_params
        body = json.encode(FeedbackErasure(given.get("id"), given.get("user")))
        replies = await self._all(request, "erase_feedback", body)
        counts = [_read(each, ErasedFeedback).erased for each in replies if each.status == 200]
        return _json(ErasedFeedback(erased=sum(counts))) if counts else _response(replies[0])

    async def _all(self, request: Request, operation: OperationName, body: bytes) -> list[WorkerReply]:
        """The replies of all workers: each is done, or says that it knows no such request."""
        tenant = self._account(request, "infer").tenant
        workers, asked = self._workers(), _relayed(request, operation, tenant, body)
        replies = await asyncio.gather(*(_ask(worker, asked) for worker in workers))
        known = [reply for reply in replies if reply is not None and reply.status in (200, UNKNOWN_STATUS)]
        if len(known) < len(workers):
            raise _unconfirmed(
                [each.name for each, got in zip(workers, replies, strict=True) if got not in known]
            )
        return known

    def _workers(self) -> list[Worker]:
        """Those that may keep feedback. Raises NotImplementedHere without any."""
        workers = [worker for worker in self._registry.workers.values() if not worker.plain]
        if not workers:
            raise NotImplementedHere(f"no worker knows {FEEDBACK}: all of them are servers of another kind")
        return workers


def joined(summaries: Sequence[FeedbackSummary]) -> FeedbackSummary:
    """One summary of what several workers keep: sums, and means over all rewards."""
    models: dict[str, dict[str, VariantFeedback]] = {}
    for each in summaries:
        for model, variants in each.models.items():
            found = models.setdefault(model, {})
            for name, more in variants.items():
                found[name] = _both(found[name], more) if name in found else more
    return FeedbackSummary(waiting=sum(each.waiting for each in summaries), models=models)


def listed(found: Mapping[str, FeedbackPolicies]) -> FeedbackPolicies:
    """The estimates of several workers side by side, each with its worker's name."""
    models: dict[str, list[PolicyFeedback]] = {}
    for worker, each in found.items():
        for model, policies in each.models.items():
            models.setdefault(model, []).extend(structs.replace(row, worker=worker) for row in policies)
    return FeedbackPolicies(models=models)


def _both(one: VariantFeedback, other: VariantFeedback) -> VariantFeedback:
    count = one.rewards + other.rewards

    def mean(first: float, second: float) -> float:
        return (one.rewards * first + other.rewards * second) / count

    def known(first: float | None, second: float | None) -> float | None:
        if first is None or second is None:
            return second if first is None else first
        return mean(first, second)

    return VariantFeedback(
        rewards=count,
        mean_reward=mean(one.mean_reward, other.mean_reward),
        mean_expected=known(one.mean_expected, other.mean_expected),
        correction=known(one.correction, other.correction),
        correction_low=known(one.correction_low, other.correction_low),
    )


def _relayed(request: Request, operation: OperationName, tenant: str, body: bytes) -> tuple[str, bytes]:
    """The request's id, and what a worker gets."""
    return request.scope[KEY].id, json.encode(RelayedRequest(operation, tenant, Raw(body)))


async def _ask(worker: Worker, asked: tuple[str, bytes]) -> WorkerReply | None:
    """A worker's reply; None if none comes."""
    id, body = asked
    connection: UpstreamConnection | None = None
    try:
        async with asyncio.timeout(WAIT_S):
            connection = await worker.pool.acquire(CONNECT_S)
            headers = {"Content-Type": JSON, "x-request-id": id}
            sent = partial(worker.pool.request, "POST", RELAY, headers, body)
            connection, head = await worker.pool.send(connection, sent, CONNECT_S)
            answer = await connection.read_all(MOST_BYTES)
        return WorkerReply(worker.name, head.status, head.headers.get("content-type", JSON), answer)
    except (WorkerLost, TimeoutError) as error:
        log.warning("%s did not answer about feedback: %s", worker.name, error)
        return None
    finally:
        if connection is not None:
            worker.pool.release(connection)


def _read(reply: WorkerReply, kind: type[T]) -> T:
    """What a worker has answered. Raises Unavailable if it is something else."""
    try:
        return json.decode(reply.body, type=kind)
    except (DecodeError, ValidationError):
        raise _unconfirmed([reply.worker]) from None


def _unconfirmed(silent: Sequence[str]) -> Unavailable:
    return Unavailable(f"{', '.join(silent)} did not answer; send this again", retry_after=1.0)


def _response(reply: WorkerReply) -> Response:
    return Response(reply.body, reply.status, media_type=reply.media_type)


def _json(value: object) -> Response:
    return Response(json.encode(value), media_type=JSON)
