"""The workers: who they are, what they last reported, and whether they are well.

One task for each worker asks for its report over a connection of its own. That is also its heartbeat: a
worker that does not report for SILENT_S is lost, and its streams are told so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from msgspec import DecodeError, ValidationError, json, structs

from stretto.config import Tier
from stretto.engine.scheduler.admission import Outlook
from stretto.errors import StartError
from stretto.gateway.routing.fields import BYTES_PER_TOKEN, LATEST
from stretto.gateway.routing.prefixes import PIECE
from stretto.gateway.routing.router import Router, WorkerView
from stretto.gateway.upstream.connection import (
    STALLED_S,
    Address,
    Head,
    Pool,
    UpstreamConnection,
    WorkerLost,
    WorkerSilent,
)
from stretto.gateway.upstream.health import Breaker
from stretto.gateway.upstream.reports import NotAReport, read_report
from stretto.protocol.openai import ModelList
from stretto.protocol.relay import RELAY, Degraded, OperationName
from stretto.telemetry.log import describe
from stretto.types import ModelInfo

log = logging.getLogger(__name__)
POLL_S = 0.05  # between two reports of a worker
PLAIN_POLL_S = 1.0  # the same for a worker that is no Stretto
SILENT_S = 0.5  # without a report, a worker is lost
PLAIN_SILENT_S = 5.0  # the same for a worker that is no Stretto
CONNECT_S = 1.0
WARM = 2  # connections to each worker that wait open, so that a far one costs no round trip more
MOST_REPORT_BYTES = 4 << 20
SENT_UNSEEN_S = 0.03  # a report may miss what arrived at the worker so shortly before
UNKNOWN = "unknown"
MODELS = "/v1/models"
NOT_FOUND = 404
BROKEN = (500,)  # statuses of a worker that fails; others are refusals, or the client's mistakes
PLAIN_BROKEN = (500, 502, 503, 504)  # the same for a worker that is no Stretto
EJECTED = 3  # at most one of so many workers is left out because of such statuses
REST = 20.0  # how much longer a worker is left alone than its report took to read
NO_TIERS: Mapping[str, Tier] = {}


class ModelOfAll(NamedTuple):
    """A model that workers have. `ratio`: bytes of a request for each token of its prompt."""

    name: str
    info: ModelInfo | None
    ratio: float


@dataclass(slots=True)
class Worker:
    """One worker."""

    name: str
    address: Address
    pool: Pool
    view: WorkerView
    breaker: Breaker = field(default_factory=Breaker)
    plain: bool = False  # an OpenAI server of another kind: no reports, no failover in mid-answer
    boot: str = ""
    draining: bool = False  # by its own report
    drained: asyncio.Event = field(default_factory=asyncio.Event)  # an operator gives it no new requests
    tiers: Mapping[str, Tier] = field(default_factory=dict[str, Tier])
    models: dict[str, ModelInfo | None] = field(default_factory=dict[str, ModelInfo | None])
    error: str = "no report yet"
    lacks: set[OperationName] = field(default_factory=set[OperationName])  # of a plain worker, as learned
    store: str = ""  # what the ids of the answers begin with that it keeps
    ratios: Mapping[str, float] = field(default_factory=dict[str, float])  # bytes of a token, by model
    joules: Mapping[str, float] = field(default_factory=dict[str, float])  # of an answer's token, by model
    rest: float = 0.0  # seconds without a report after one that took long to read
    lease: float | None = None  # when a worker that joined by itself must have renewed; None: configured
    task: asyncio.Task[None] | None = None
    watched: UpstreamConnection | None = None  # over which it reports
    _sent: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    @property
    def held(self) -> bool:
        """Whether an operator lets it have no new requests."""
        return self.drained.is_set()

    def hold(self, *, on: bool) -> None:
        """Lets it have no new requests, or lets it have them again."""
        if on:
            self.drained.set()
            self.view.usable = False  # before the next report
        else:
            self.drained.clear()

    def hang_up(self) -> None:
        """Closes the connection over which it reports."""
        if self.watched is not None:
            self.pool.drop(self.watched)
            self.watched = None

    def keeps(self, response: str) -> bool:
        """Whether it may keep the answer with this id."""
        return bool(self.store) and response.startswith(self.store)

    @property
    def patience_s(self) -> float:
        """How long it may be silent, in seconds."""
        if self.plain or not self.pool.round_trip:
            return PLAIN_SILENT_S  # its network may be slow
        return SILENT_S + min(4 * self.pool.round_trip, PLAIN_SILENT_S)

    def sent(self, ident: int) -> None:
        """A request with that id is on its way to the worker."""
        self._sent.append((time.monotonic(), ident))

    def sent_before(self, when: float) -> int:
        """The newest id that the worker had at `when`; forgets the older ones."""
        newest = 0
        while self._sent and self._sent[0][0] < when:
            newest = self._sent.pop(0)[1]
        return newest


class Registry:
    """All workers, and the router that they are views of."""

    def __init__(self, router: Router, headers: Mapping[str, str]) -> None:
        self.router = router
        self.workers: dict[str, Worker] = {}
        self._headers = headers

    def join(self, url: str, site: str = "", *, name: str = "", lease: float | None = None) -> Worker:
        """Adds a worker, or renews its lease. Raises StartError for a wrong URL."""
        address = _address(url)
        name = name or _name_of(address)
        known = self.workers.get(name)
        if known is not None and (known.address == address or (known.lease is None and lease is not None)):
            if known.lease is not None:
                known.lease, known.view.site = lease, site
            return known
        self.leave(name)  # it speaks TLS now, or no longer
        view = WorkerView(name, site, usable=False)
        worker = Worker(name, address, Pool(address, headers=self._headers), view, lease=lease)
        self.workers[name] = worker
        self.router.workers[name] = view
        worker.task = asyncio.create_task(self._watch(worker))
        return worker

    def configure(self, written: Sequence[str]) -> None:
        """Has the workers `URL` or `SITE=URL`, and those that joined by themselves. Raises StartError for a
        wrong URL; then nothing has changed."""
        sites: dict[str, tuple[str, str]] = {}
        for each in written:
            site, equals, url = each.partition("=")
            site, url = (site, url) if equals else ("", each)
            sites[_name_of(_address(url))] = (site, url)
        for name in [name for name, worker in self.workers.items() if worker.lease is None]:
            if name not in sites:
                self.leave(name)
        for site, url in sites.values():
            worker = self.join(url, site)
            worker.lease, worker.view.site = None, site

    def leave(self, name: str) -> None:
        """Removes a worker. Its streams go on elsewhere."""
        worker = self.workers.pop(name, None)
        if worker is None:
            return
        del self.router.workers[name]
        self.router.prefixes.forget(name)
        if worker.task is not None:
            worker.task.cancel()
        worker.pool.close()
        worker.pool.lose()

    def known(self, model: str) -> str:
        """The model's name if a worker has it, else `unknown`: clients must not make up names in reports."""
        return model if any(model in worker.models for worker in self.workers.values()) else UNKNOWN

    def model(self, name: object) -> ModelOfAll:
        """What is known of the model of that name; of the first one if the name is None."""
        names = {name, name.removesuffix(LATEST)} if isinstance(name, str) else set[str]()
        for worker in self.workers.values():
            for known, info in worker.models.items():
                if name is None or known in names:
                    return ModelOfAll(known, info, worker.ratios.get(known, BYTES_PER_TOKEN))
        return ModelOfAll(str(name), None, BYTES_PER_TOKEN)

    def joules(self, model: str) -> float | None:
        """The most that a token of an answer takes on any worker that knows it; None: none does."""
        return max((w.joules[model] for w in self.workers.values() if model in w.joules), default=None)

    def degraded(self, chosen: Worker, model: str) -> Degraded | None:
        """Why a worker answers although the model has a better variant elsewhere; None if it has not."""
        better = [
            worker
            for worker in self.workers.values()
            if model in worker.models and worker.view.quality > chosen.view.quality
        ]
        if not better:
            return None
        return "deadline" if any(worker.view.usable for worker in better) else "unreachable"

    def tiers(self) -> Mapping[str, Tier]:
        """The tiers of the first worker that has any."""
        return next((worker.tiers for worker in self.workers.values() if worker.tiers), NO_TIERS)

    def close(self) -> None:
        """Forgets all workers."""
        for name in list(self.workers):
            self.leave(name)

    def failed(self, worker: Worker, reason: str, *, lost: bool) -> None:
        """A request failed on a worker."""
        worker.breaker.fail(time.monotonic(), lost=lost)
        if worker.breaker.broken:
            worker.error = reason
        self._judge(worker)

    def gave_up(self, worker: Worker, error: WorkerLost) -> None:
        """A request was lost on a worker. One that only sends nothing may be slow at this request: that
        counts as if it had answered 504."""
        if isinstance(error, WorkerSilent):
            self.answered(worker, error.status)
        else:
            self.failed(worker, error.message, lost=True)

    def answered(self, worker: Worker, status: int) -> None:
        """A worker has answered a request. One that fails is fast and so attracts requests: it is left out,
        unless too many are, because a client may send what fails everywhere."""
        if status not in (PLAIN_BROKEN if worker.plain else BROKEN):
            worker.breaker.succeed()
            return
        out = sum(each.breaker.broken for each in self.workers.values())
        others = any(each.view.usable for each in self.workers.values() if each is not worker)
        if others and out < max(1, len(self.workers) // EJECTED):
            self.failed(worker, f"it has answered several requests in a row with {status}", lost=False)

    async def _watch(self, worker: Worker) -> None:
        """Asks for reports until the worker leaves."""
        last = time.monotonic()
        excused = False  # whether a timeout was this process's own fault
        try:
            while True:
                due = time.monotonic() + worker.patience_s
                try:
                    async with asyncio.timeout(worker.patience_s):
                        await self._ask(worker)
                    last, excused = time.monotonic(), False
                    worker.pool.warm(WARM)
                except Exception as error:  # whatever a worker sends, it is watched on
                    worker.hang_up()
                    stalled = isinstance(error, TimeoutError) and time.monotonic() > due + STALLED_S
                    if stalled and not excused:
                        excused = True  # all workers would seem lost at once
                        continue
                    self._silent(worker, _reason(error, worker), last)
                self._judge(worker)
                if worker.lease is not None and time.monotonic() > worker.lease:
                    log.warning("worker %s: its lease is over", worker.name)
                    self.leave(worker.name)
                await asyncio.sleep(max(PLAIN_POLL_S if worker.plain else POLL_S, worker.rest))
        finally:
            worker.hang_up()

    def _silent(self, worker: Worker, reason: str, last: float) -> None:
        """No report came. A plain worker is known to be lost only by its connections."""
        now = time.monotonic()
        if worker.view.usable:
            log.warning("worker %s is lost: %s", worker.name, reason)
        worker.error = reason
        worker.breaker.fail(now, lost=True)
        if now - last >= worker.patience_s or not worker.plain:
            worker.pool.lose()
        worker.lacks.clear()

    async def _ask(self, worker: Worker) -> None:
        """One report. Raises WorkerLost. A server of another kind is asked for one over each new connection,
        because another server may have come in its place."""
        fresh = worker.watched is None or not worker.watched.lasting
        reports = fresh or not worker.plain
        asked, head, body = await self._get(worker, RELAY if reports else MODELS)
        if reports and head.status == NOT_FOUND:
            worker.plain, reports = True, False
            asked, head, body = await self._get(worker, MODELS)
        now = time.monotonic()
        if head.status != 200:
            what = "its report" if reports else f"{worker.name} is no Stretto, and its list of models"
            raise WorkerLost(f"{what} has the status {head.status}")
        if reports:
            self._see(worker, body, asked, now)
            worker.plain = False
        else:
            self._see_models(worker, body)
        worker.breaker.heard(now)
        if not worker.breaker.broken:
            worker.error = ""

    async def _get(self, worker: Worker, path: str) -> tuple[float, Head, bytes]:
        """When the worker was asked for that path, and what it answered. Raises WorkerLost."""
        if worker.watched is None or not worker.watched.lasting:
            worker.hang_up()
            worker.watched = await worker.pool.acquire(CONNECT_S)
        asked = time.monotonic()
        request = partial(worker.pool.request, "GET", path, {})
        worker.watched, head = await worker.pool.send(worker.watched, request, CONNECT_S)
        body = await worker.watched.read_all(MOST_REPORT_BYTES)
        worker.pool.note_round_trip(time.monotonic() - asked)
        return asked, head, body

    def _see_models(self, worker: Worker, body: bytes) -> None:
        try:
            names = [card.id for card in json.decode(body, type=ModelList).data]
        except (DecodeError, ValidationError) as error:
            raise NotAReport("its list of models is no list of models") from error
        worker.models = dict.fromkeys(names)
        worker.view.outlooks = {name: worker.view.outlooks.get(name) or Outlook({}) for name in names}
        worker.view.seen = float("-inf")

    def _see(self, worker: Worker, body: bytes, asked: float, now: float) -> None:
        """Takes over a report."""
        began = time.thread_time()
        try:
            report, seen = read_report(body)
        finally:
            worker.rest = min(REST * (time.thread_time() - began), PLAIN_POLL_S)
        for each in self.workers.values():
            if each is not worker and each.boot == report.boot != "" and not each.breaker.broken:
                raise NotAReport(f"it is the worker {each.name} at another address; list it once")
        view = worker.view
        if worker.boot and report.boot != worker.boot:
            self.router.prefixes.forget(worker.name)
            view.outlooks = {}
        worker.boot = report.boot
        worker.draining = report.draining or not report.ready
        worker.tiers, worker.store = report.tiers, report.store
        ratios = report.bytes_per_token.items()
        worker.ratios = {name: min(max(ratio, 0.5), 20.0) for name, ratio in ratios}
        worker.joules = report.joules
        worker.models = {info.name: info for info in report.models}
        view.round_trip, view.quality = worker.pool.round_trip, min(max(report.quality, 0.0), 1.0)
        view.offset = report.now - (asked + now) / 2
        view.seen = now
        view.pieces = _pieces(report.models, worker.ratios)
        newest = worker.sent_before(asked - SENT_UNSEEN_S)
        outlooks = {name: view.outlooks.get(name) or Outlook(report.tiers) for name in worker.models}
        for name, snapshot in seen.items():
            if name in outlooks:
                outlooks[name].see(structs.replace(snapshot, newest=newest))
        view.outlooks = outlooks

    def _judge(self, worker: Worker) -> None:
        """Whether the router may use the worker now, and how much."""
        now = time.monotonic()
        worker.view.usable = not (
            worker.breaker.broken or worker.draining or worker.held or not worker.models
        )
        worker.view.weight = worker.breaker.weight(now)


def _reason(error: Exception, worker: Worker) -> str:
    """Why no report came."""
    if isinstance(error, WorkerLost | TimeoutError | OSError):
        return str(error) or f"no report for {worker.patience_s} s"
    return f"its report cannot be used: {describe(error)}"


def _address(url: str) -> Address:
    """Raises StartError."""
    try:
        return Address.of(url)
    except ValueError as error:
        raise StartError(str(error)) from error


def _name_of(address: Address) -> str:
    return f"{address.authority}{address.path}"


def _pieces(models: tuple[ModelInfo, ...], ratios: Mapping[str, float]) -> int:
    """How many pieces of prompts the KV caches of these models hold."""
    size = sum(info.blocks * info.block_size * ratios.get(info.name, BYTES_PER_TOKEN) for info in models)
    return max(1, int(size / PIECE))
