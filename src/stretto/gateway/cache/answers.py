"""A gateway's caches, as one request meets them: kept answers, answers in flight, and then a worker.

A tenant without a policy passes straight on to the relay. Tenants share nothing: every key covers the
tenant, and each tenant has a budget of its own, so no timing tells one what another has asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from random import Random
from secrets import token_bytes
from typing import NamedTuple

from msgspec import DecodeError, Struct, ValidationError, json

from stretto.errors import Unavailable
from stretto.gateway.cache import answer, sent
from stretto.gateway.cache.answer import KeptAnswer, Recipient
from stretto.gateway.cache.embedding import best_embedder, embed
from stretto.gateway.cache.flight import AnswerFlight, FlightFailed, Piece
from stretto.gateway.cache.key import KeyMaker, Source, revision_of, revisions
from stretto.gateway.cache.memory import AnswerStore, Keeping, MemoryStore, StoredAnswer
from stretto.gateway.cache.policy import (
    AS_SENT,
    CachePolicy,
    Wish,
    policy_of,
    question_of,
    wish_of,
    without_field,
)
from stretto.gateway.cache.redis_store import RedisStore, connect
from stretto.gateway.cache.semantic import Question, SemanticIndex, SimilarEntry, SimilarMatch
from stretto.gateway.cache.sent import SentAnswer
from stretto.gateway.cache.stats import CacheKind, CacheStats
from stretto.gateway.exchange import RelayedExchange
from stretto.gateway.registry import CONNECT_S, Worker
from stretto.gateway.relay import Relay
from stretto.gateway.settings import GatewayConfig
from stretto.gateway.upstream.connection import UpstreamConnection, WorkerLost
from stretto.protocol.relay import RELAY, ErasureReport, ErasureRequest, OperationName

log = logging.getLogger(__name__)
MOST_ANSWER = 1 << 20  # bytes of an answer that is kept or shared
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
ERASE_S = 15.0  # a worker's step may take this long
HEADER = "x-stretto-cached"
REWRITTEN: frozenset[OperationName] = frozenset({"chat", "completions", "embeddings"})
Replay = KeptAnswer | SentAnswer


class Asked(NamedTuple):
    """A request that may meet the cache, with the keys of tenant, answer and subjects. `fence`: tells the
    store of erasures since; None: nothing can be kept."""

    wish: Wish
    source: Source
    tenant: bytes
    key: bytes
    subjects: tuple[bytes, ...]
    fence: bytes | None = None


class Probe(NamedTuple):
    """A question for the semantic cache, and the kept answer that is to be verified with its own, if any."""

    question: Question
    conversation: bytes
    match: SimilarMatch | None


class Erasure(Struct, frozen=True):
    """What an erasure has deleted: kept answers, and by worker the blocks of its KV cache. `held`: blocks
    that are free when the sequences that use them end."""

    answers: int
    blocks: dict[str, int]
    held: int


def prepare(policies: Mapping[str, CachePolicy]) -> None:
    """Reads what the policies need from files, before requests come that need it."""
    if any(policy.semantic for policy in policies.values()):
        best_embedder()


class Answers:
    """The caches of one gateway, in front of its relay."""

    def __init__(self, config: GatewayConfig, relay: Relay) -> None:
        key = config.gateway_key
        self.stats = CacheStats()
        self.policies = config.caches
        prepare(self.policies)
        self.relay = relay
        secret = sha256(b"answers " + key.encode()).digest() if key else token_bytes(32)
        self._keys = KeyMaker(secret)
        self._store: AnswerStore = (
            RedisStore(connect(config.redis), secret, self.stats)
            if config.redis
            else MemoryStore(time.monotonic, self.stats)
        )
        self._flights: dict[bytes, AnswerFlight] = {}
        self._similar = SemanticIndex(embed, Random().random, time.monotonic)
        self._erasures = 0  # an answer that was in flight during one is not kept

    async def run(self, exchange: RelayedExchange) -> None:
        """Answers a request. Raises StrettoError, as the relay does."""
        if exchange.operation not in AS_SENT | REWRITTEN:
            await self.relay.run(exchange)
            return
        fields, exchange.body = without_field(exchange.body)
        policy = policy_of(self.policies, exchange.tenant)
        wish = None if policy is None else wish_of(policy, fields, exchange.operation, exchange.body)
        if wish is None:
            await self.relay.run(exchange)
            return
        self.relay.admit(exchange)
        asked = self._asked(wish, exchange)
        found = await self._store.look(asked.tenant, asked.key, asked.subjects)
        asked = asked._replace(fence=found.fence)
        kept = self._kept(found, asked, exchange) if wish.takes else None
        if kept is not None:
            await self._reply(kept, exchange, asked, "exact")
            return
        probe = self._probe(asked) if wish.policy.semantic else None
        if probe is not None and wish.takes and probe.match is not None and probe.match.serve:
            similar = await self._answer_of(asked, probe.match)
            if similar is not None and similar.serves(_recipient(asked, exchange)):
                await self._reply(similar, exchange, asked, "semantic")
                return
        await self._fly(asked, exchange, probe)

    async def erase(self, tenant: str, subject: str | None) -> Erasure:
        """Deletes a tenant's answers about a subject, or all of them, here and in the workers' KV caches.

        Raises Unavailable when the shared store or a worker cannot confirm it; then ask again.
        """
        self._erasures += 1
        about = None if subject is None else self._keys.subject(tenant, subject)
        self._similar.erase(self._keys.tenant(tenant), about)
        erased = await self._store.erase(self._keys.tenant(tenant), about)
        self.stats.erased += erased
        workers = [worker for worker in self.relay.registry.workers.values() if not worker.plain]
        asked = json.encode(ErasureRequest(tenant, subject))
        reports = await asyncio.gather(*(erase_prefixes(worker, asked) for worker in workers))
        names = [worker.name for worker in workers]
        failed = [name for name, report in zip(names, reports, strict=True) if report is None]
        if failed:
            raise Unavailable(
                f"{erased} answers are erased, but {', '.join(failed)} did not confirm; send this again",
                retry_after=1.0,
            )
        blocks = {name: report.blocks for name, report in zip(names, reports, strict=True) if report}
        return Erasure(erased, blocks, sum(report.held for report in reports if report))

    async def close(self) -> None:
        """Lets go of the store."""
        await self._store.close()

    def _asked(self, wish: Wish, exchange: RelayedExchange) -> Asked:
        source, keys = self._source(wish, exchange), self._keys
        subjects = tuple(keys.subject(exchange.tenant, name) for name in wish.subjects)
        return Asked(wish, source, keys.tenant(exchange.tenant), keys.answer(source, wish.body), subjects)

    def _source(self, wish: Wish, exchange: RelayedExchange) -> Source:
        """Who would answer. All workers of the model count, so the key holds while some are away."""
        model = self.relay.registry.model(wish.body.get("model")).name
        known = [
            f"plain {worker.name}" if info is None else revision_of(info)
            for worker in self.relay.registry.workers.values()
            for name, info in worker.models.items()
            if name == model
        ]
        return Source(exchange.operation, exchange.tenant, model, revisions(known))

    def _kept(self, found: StoredAnswer, asked: Asked, exchange: RelayedExchange) -> Replay | None:
        kept = _loaded(asked, found)
        return kept if kept is not None and kept.serves(_recipient(asked, exchange)) else None

    async def _reply(self, kept: Replay, exchange: RelayedExchange, asked: Asked, kind: CacheKind) -> None:
        self.stats.hits[kind] += 1
        recipient = _recipient(asked, exchange)
        if isinstance(kept, SentAnswer):
            headers = STREAM_HEADERS if kept.streams else {}
            headers = headers | {"content-type": kept.media_type}
            if exchange.operation == "messages":
                headers["request-id"] = exchange.request_id
        else:
            streams = recipient.streams and exchange.operation != "embeddings"
            headers = STREAM_HEADERS if streams else {"content-type": "application/json"}
        await exchange.send(200, headers | {HEADER: kind}, kept.bytes_for(recipient, kind), False)

    def _probe(self, asked: Asked) -> Probe | None:
        """The request as a question for the semantic cache; None for one that has no similar ones."""
        found = question_of(asked.source.operation, asked.wish.body)
        question = None if found is None else self._similar.read(found.text)
        if found is None or question is None:
            return None
        conversation = self._keys.conversation(asked.source, found.rest)
        match = self._similar.find(asked.tenant, conversation, question, asked.wish.policy.max_error)
        return Probe(question, conversation, match)

    async def _answer_of(self, asked: Asked, match: SimilarMatch) -> Replay | None:
        """The kept answer to a similar question, which has the same subjects."""
        found = await self._store.look(asked.tenant, match.entry.key, asked.subjects)
        kept = _loaded(asked, found)
        if kept is None or kept.text is None:
            self._similar.remove(asked.tenant, match.entry)
            return None
        return kept

    async def _fly(self, asked: Asked, exchange: RelayedExchange, probe: Probe | None) -> None:
        """Joins the answer to an equal request in flight, or has a worker make one.

        When the joined one fails before it has begun, the request is tried once more, in a new flight.
        """
        key = self._keys.flight(asked.source, asked.wish.body)
        client = exchange.send
        for again in (True, False):
            flight = self._flights.get(key)
            joins = asked.wish.takes and flight is not None and flight.joinable
            if flight is None or not joins:
                flight = self._take_off(key, asked, exchange, probe)
                self.stats.misses += asked.wish.takes
            else:
                self.stats.joined += 1
            try:
                await flight.follow(client, partial(self._pay, flight, exchange))
                return
            except FlightFailed as failure:
                if not (joins and again) or failure.begun:
                    raise failure.error from None

    def _pay(self, flight: AnswerFlight, exchange: RelayedExchange) -> None:
        exchange.due = flight.bill()

    def _take_off(
        self, key: bytes, asked: Asked, exchange: RelayedExchange, probe: Probe | None
    ) -> AnswerFlight:
        flight = self._flights[key] = AnswerFlight(MOST_ANSWER, exchange.taken)
        erasures = self._erasures
        exchange.send, exchange.write = flight.send, None

        async def work() -> None:
            began = time.monotonic()
            try:
                await self.relay.run(exchange)
                if erasures == self._erasures and asked.source == self._source(asked.wish, exchange):
                    made = await self._keep(asked, flight, time.monotonic() - began)
                    if made is not None and made.text is not None and probe is not None:
                        await self._learn(asked, probe, made.text)
            finally:
                if self._flights.get(key) is flight:
                    del self._flights[key]

        flight.start(work)
        return flight

    async def _learn(self, asked: Asked, probe: Probe, text: str) -> None:
        """Compares a worker's answer with the kept one that a similar question has, and adds the question
        unless that one stands for it."""
        match = probe.match
        if match is not None and match.entry.key != asked.key:
            known = await self._answer_of(asked, match)
            if known is not None and known.text is not None:
                right = self._similar.same_answer(known.text, text)
                self.stats.verified += 1
                self.stats.verified_wrong += not right
                self._similar.observe(asked.tenant, match, right=right)
                if right:
                    return
        expires = time.monotonic() + asked.wish.policy.ttl
        entry = SimilarEntry(asked.key, probe.conversation, probe.question, asked.subjects, expires)
        self._similar.add(asked.tenant, entry)

    async def _keep(self, asked: Asked, flight: AnswerFlight, took_s: float) -> Replay | None:
        """Keeps the answer of a flight if it is whole and well, and returns it then."""
        made = _made(asked, flight.pieces) if flight.whole and flight.pieces else None
        if made is None or asked.fence is None:
            self.stats.not_kept += 1
            return None
        policy = asked.wish.policy
        keeping = Keeping(policy.ttl, policy.bytes, max(took_s, 1e-3), asked.subjects, asked.fence)
        kept = await self._store.put(asked.tenant, asked.key, _dumped(made), keeping)
        self.stats.kept += kept
        self.stats.not_kept += not kept
        return made if kept else None


async def erase_prefixes(worker: Worker, asked: bytes) -> ErasureReport | None:
    """Has a worker drop cached prompts; None if it does not confirm. `asked`: an ErasureRequest as JSON."""
    connection: UpstreamConnection | None = None
    try:
        async with asyncio.timeout(ERASE_S):
            connection = await worker.pool.acquire(CONNECT_S)
            headers = {"Content-Type": "application/json"}
            request = partial(worker.pool.request, "DELETE", RELAY, headers, asked)
            connection, head = await worker.pool.send(connection, request, CONNECT_S)
            body = await connection.read_all(MOST_ANSWER)
        return json.decode(body, type=ErasureReport) if head.status == 200 else None
    except (WorkerLost, TimeoutError, DecodeError, ValidationError) as error:
        log.warning("%s did not confirm an erasure: %s", worker.name, error)
        return None
    finally:
        if connection is not None:
            worker.pool.release(connection)


def _made(asked: Asked, pieces: list[Piece]) -> Replay | None:
    first, last = pieces[0], pieces[-1]
    if last.more:
        return None
    body, operation = b"".join([piece.body for piece in pieces]), asked.source.operation
    if operation in AS_SENT:
        got = sent.SentBody(first.headers, body, sent.limit_of(asked.wish.body))
        return sent.read(operation, first.status, got)
    return answer.read(operation, first.status, first.headers, body)


def _loaded(asked: Asked, found: StoredAnswer) -> Replay | None:
    load = sent.load if asked.source.operation in AS_SENT else answer.load
    return None if found.value is None else load(found.value)


def _dumped(made: Replay) -> bytes:
    return sent.dump(made) if isinstance(made, SentAnswer) else answer.dump(made)


def _recipient(asked: Asked, exchange: RelayedExchange) -> Recipient:
    took_ms = (time.monotonic() - exchange.arrival) * 1e3
    return Recipient(asked.wish.body, exchange.request_id, int(time.time()), took_ms)
