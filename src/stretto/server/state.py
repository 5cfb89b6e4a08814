"""The state of one worker's API server, and the lifetime of a call. One event loop owns both."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from itertools import takewhile
from math import inf
from secrets import token_hex
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from msgspec import Raw, json, msgpack, structs
from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Send

from stretto.config import TIERS, ServeConfig
from stretto.engine.client import EngineClient
from stretto.errors import (
    CannotBeOnTime,
    InvalidGrammar,
    Overloaded,
    StrettoError,
    Unauthorised,
    Unavailable,
    UnknownModel,
)
from stretto.http.exchange import KEY, LEFT, Exchange, watch
from stretto.http.request import tenant_of
from stretto.ladder.energy import joules_by_model
from stretto.ladder.learning.feedback import FeedbackLimits, FeedbackStore
from stretto.ladder.learning.learner import Learner
from stretto.ladder.serving import ServedLadder
from stretto.protocol.relay import TOOK, Continuation, EmittedAnswer, Took, WorkerReport
from stretto.protocol.responses import RESPONSE
from stretto.queueing.turns import Turns
from stretto.server.admission_gate import START_S, AdmissionGate
from stretto.server.objectives import ServicePolicy
from stretto.server.quota import PriorityQuota
from stretto.server.validation import ModelHandle, RequestLimits
from stretto.server.variants.router import VariantPlacement, VariantRouter
from stretto.telemetry.live import Recent
from stretto.telemetry.log import LineWriter
from stretto.telemetry.metrics import Ended, Gauges, Metrics, Verdict
from stretto.text.output import NOWHERE, AnswerEnergy, Output
from stretto.text.tokenizer import TextModel
from stretto.types import Grammar, ModelInfo, WorkerState

T = TypeVar("T")
GrammarCheck = Callable[[str, Grammar, str], Awaitable[None]]
LONG_TEXT = 4096  # bytes of a body that holds up the event loop
VERY_LONG_TEXT = 2**18  # bytes of a body that may hold up a thread for seconds
LOCAL = "local"
GATEWAY = "gateway"
NOTHING = EmittedAnswer()
STDOUT = 1
KEPT = 0.98  # of what older bodies say of the bytes of a token


class TextSource(Protocol):
    """Whose text is encoded: the tenant, and the size of the text in bytes."""

    @property
    def tenant(self) -> str: ...
    @property
    def size(self) -> int: ...


class ReadAhead(NamedTuple):
    """The beginning of a prompt that a model has computed before it was asked for an answer."""

    model: str = ""
    ids: tuple[int, ...] = ()

    def common(self, model: str, prompt: tuple[int, ...]) -> int:
        """How many tokens of the prompt, but for its last one, this model has computed."""
        if model != self.model:
            return 0
        pairs = zip(self.ids, prompt[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Server:
    """What all calls share. `check_grammar(model, grammar, tenant)` compiles a grammar in a sandbox; None
    leaves that to the engine. `texts` are the tokenizers by the names that clients know; the first is the
    default. `ladders`: those among the names that stand for several models of the engine."""

    def __init__(
        self,
        config: ServeConfig,
        engine: EngineClient,
        texts: dict[str, TextModel],
        check_grammar: GrammarCheck | None,
        ladders: Sequence[ServedLadder] = (),
    ) -> None:
        self.config = config
        self.engine = engine
        self.texts = texts
        self.ladders = {ladder.name: ladder for ladder in ladders}
        self.learner = Learner(
            FeedbackStore(FeedbackLimits(wait_s=config.feedback_wait_s)),
            {ladder.name: [model.name for model in ladder.models.values()] for ladder in ladders},
            np.random.default_rng(),
        )
        self.energies = joules_by_model(ladders)
        self._routers = {
            name: router
            for ladder in ladders
            for router in [
                VariantRouter(ladder, TIERS, lambda: engine.outlooks, lambda: engine.models, self.learner)
            ]
            for name in (ladder.name, *(model.name for model in ladder.models.values()))
        }
        self.limits = RequestLimits(config.max_n, config.max_stop, config.max_waiting)
        self.quota = PriorityQuota(config.priority_share)
        self.gate = AdmissionGate(config.max_waiting, config.drain_s, engine.unavailable)
        self.access_log = LineWriter(STDOUT) if config.access_log else None
        self.metrics = Metrics(self._gauges)
        self.recent = Recent(lambda: {name: tier.objective for name, tier in self.policy.tiers.items()})
        self.calls: set[Call] = set()
        self.sockets: Counter[str] = Counter()  # open sessions by tenant
        self.closing = asyncio.Event()  # set when the server shuts down
        self.created = int(time.time())
        self.store_id = f"{RESPONSE}{token_hex(4)}"  # what the ids of the answers begin with that it keeps
        self._check_grammar = check_grammar
        self._sizes: dict[str, tuple[float, float]] = {}  # by model: bytes of bodies, tokens of prompts
        self._idle = asyncio.Event()
        self._long = TextThread("long prompts", 256)
        self._very_long = TextThread("very long prompts", 16)
        engine.subscribe(self.metrics.step)
        engine.subscribe(self.recent.step)

    @property
    def policy(self) -> ServicePolicy:
        """What objectives depend on. The tiers follow the machine's speed, once the engine knows it."""
        config, tiers = self.config, self.engine.tiers
        return ServicePolicy(
            tiers, config.schedule, config.prefer, config.tenants_prefer, frozenset(config.cascade)
        )

    def tenant(self, headers: Headers) -> str:
        """The tenant whose API key a request has; `local` for a server without keys, `gateway` for the key
        of its gateways. Raises Unauthorised."""
        keys = self.config.api_keys
        if self.config.gateway_key:
            keys = keys | {self.config.gateway_key: GATEWAY}
        if not keys:
            return LOCAL
        try:
            return tenant_of(headers, keys)
        except Unauthorised:
            if self.config.api_keys:
                raise
            return LOCAL  # a server that is open to all takes any key

    def ensure_gateway(self, tenant: str, act: str) -> None:
        """Raises Unauthorised unless the tenant is that of a gateway, which alone may do this."""
        if tenant != (GATEWAY if self.config.gateway_key or self.config.api_keys else LOCAL):
            raise Unauthorised(f"only a gateway may {act}: give it the gateway_key of this worker")

    def ensure_known(self, name: str) -> None:
        """Raises UnknownModel."""
        if name not in self.texts:
            raise UnknownModel(
                f"there is no model {name!r}; this server has {', '.join(self.texts)}", param="$.model"
            )

    def model(self, name: str | None) -> ModelHandle:
        """The model of that name, or the default. Raises UnknownModel, or Unavailable until it is loaded."""
        name = next(iter(self.texts)) if name is None else name
        self.ensure_known(name)
        info = self.info(name)
        if info is None:
            raise Unavailable(f"the model {name} is not loaded yet; try again soon", retry_after=START_S)
        return ModelHandle(name, self.texts[name], info)

    def router(self, name: str) -> VariantRouter | None:
        """What chooses among the variants of a ladder, by its name or that of a variant; None for a model."""
        return self._routers.get(name)

    def info(self, name: str) -> ModelInfo | None:
        """The engine's description of a model, of a ladder that of its top; None until it is loaded."""
        ladder = self.ladders.get(name)
        return self.engine.models.get(name if ladder is None else ladder.top.name)

    async def check_grammar(self, call: Call, grammar: Grammar | None, path: str) -> None:
        """Raises InvalidGrammar, with the path of the field it comes from, for one that does not compile."""
        if grammar is None or self._check_grammar is None:
            return
        try:
            await self._check_grammar(call.model, grammar, call.tenant)
        except InvalidGrammar as error:
            error.param = path
            raise

    async def run_text(self, source: TextSource, work: Callable[[], T]) -> T:
        """`work()`, in a thread if the text of the source would hold up the event loop.

        Very long texts have a thread of their own, so that no other text waits for one. Raises Overloaded
        when too many texts wait.
        """
        if source.size <= LONG_TEXT:
            return work()
        thread = self._long if source.size <= VERY_LONG_TEXT else self._very_long
        return await thread.run(source.tenant, work)

    def encoded(self, model: str, size: int, tokens: int) -> None:
        """A body of `size` bytes made a prompt of so many tokens. Older bodies count less and less."""
        bodies, prompts = self._sizes.get(model, (0.0, 0.0))
        self._sizes[model] = bodies * KEPT + size, prompts * KEPT + tokens

    def worker_state(self) -> WorkerState:
        """The engine's state, and whether this server drains."""
        return structs.replace(self.engine.worker_state(), draining=self.gate.draining)

    def report(self) -> WorkerReport:
        """What gateways need to know. To them a ladder is a model beside its variants: it is described as its
        top, has no blocks of its own, and is as busy as the variant that is fastest at the moment."""
        encode, seen = msgpack.Encoder().encode, self.engine.snapshots()
        tops = {name: info for name in self.ladders if (info := self.info(name)) is not None}
        ladders = [structs.replace(info, name=name, blocks=0) for name, info in tops.items()]
        for name, ladder in self.ladders.items():
            known = [seen[model.name] for model in ladder.models.values() if model.name in seen]
            if known:
                seen[name] = min(known, key=lambda each: each.estimate.cost.decodes(1, 0))
        joules = self.energies | {
            name: self.energies[ladder.top.name]
            for name, ladder in self.ladders.items()
            if ladder.top.name in self.energies
        }
        return WorkerReport(
            now=time.monotonic(),
            boot=self.engine.boot,
            ready=self.engine.ready,
            draining=self.gate.draining,
            models=(*self.engine.models.values(), *ladders),
            tiers=dict(self.policy.tiers),
            snapshots={name: Raw(encode(snapshot)) for name, snapshot in seen.items()},
            store=self.store_id if self.config.response_store else "",
            quality=self.config.quality,
            bytes_per_token={name: size / tokens for name, (size, tokens) in self._sizes.items()},
            joules={name: each.output for name, each in joules.items()},
        )

    @property
    def running(self) -> int:
        """How many calls are running."""
        return len(self.calls)

    def close(self) -> None:
        """Refuses new calls, and has sockets end: the server is shutting down."""
        self.gate.close()
        self.closing.set()

    def rejected(self, reason: str) -> None:
        """Counts a request or a connection that was cut short."""
        self.metrics.rejected(reason)

    def end_calls(self, error: StrettoError) -> None:
        """Ends all calls with `error`."""
        for call in list(self.calls):
            call.end(error)

    async def idle(self) -> None:
        """Returns when no call is running and no socket is open."""
        while self.calls or self.sockets:
            self._idle.clear()
            await self._idle.wait()

    def started(self, call: Call) -> None:
        """Counts a call as running."""
        self.calls.add(call)

    def stopped(self, call: Call) -> None:
        """A call has nothing left in the engine."""
        self.calls.discard(call)
        self._idle.set()

    def socket_opened(self, tenant: str) -> None:
        """Counts a socket. Raises Overloaded when its tenant has too many."""
        most = self.config.max_sessions
        if self.sockets[tenant] >= most:
            raise Overloaded(
                f"{most} sessions are open already, and no more are allowed; close one", retry_after=10.0
            )
        self.sockets[tenant] += 1

    def socket_closed(self, tenant: str) -> None:
        """A socket of this tenant has nothing left to send."""
        self.sockets[tenant] -= 1
        self.sockets += Counter()  # without tenants that have none
        self._idle.set()

    def ended(self, request: Ended) -> None:
        """Counts a request that is over."""
        self.metrics.ended(request)
        self.recent.ended(request)

    def _gauges(self) -> Gauges:
        engine = self.engine
        return Gauges(
            len(self.calls),
            engine.ready,
            self.gate.draining,
            engine.restarts,
            engine.queues(),
            engine_pid=engine.pid,
            log_dropped=0 if self.access_log is None else self.access_log.dropped,
            sessions=self.sockets.total(),
            learnt=self.learner.corrections(),
        )


class TextThread:
    """A thread that turns text into tokens. Tenants take turns, and `limit` texts may wait."""

    def __init__(self, kind: str, limit: int) -> None:
        self._turns = Turns(kind, limit=limit)
        self._thread = ThreadPoolExecutor(1, kind.replace(" ", "-"))

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """`work()` in the thread. Raises Overloaded when too much waits for it."""
        async with self._turns.turn(tenant):
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def error_event(error: StrettoError) -> bytes:
    """The last event of a stream that fails, as OpenAI's chat completions have it."""
    return b"data: " + json.encode(error.body()) + b"\n\n"


class Call:
    """One request at work: who sent it, its outputs, and how it ended.

    `arrival`: monotonic seconds, stamped before the body was read; every deadline counts from it. However a
    call ends, its outputs are closed, which cancels what the engine still does for them.
    """

    def __init__(
        self, server: Server, request: HttpRequest, send: Send, body: bytes, tenant: str, arrival: float
    ) -> None:
        self.server = server
        self.request = request
        self.send = send
        self.body = body
        self.size = len(body)  # of the text that it brings
        self.read_ahead = ReadAhead()
        self.tenant = tenant
        self.arrival = arrival
        self.exchange: Exchange = request.scope[KEY]
        self.outputs: list[Output] = []
        self.relayed = False  # whether a gateway reads the answer
        self.believed_cached = 0  # tokens of its prompt in the prefix cache, as far as the gateway knows
        self.continuation: Continuation | None = None
        self.nonce = token_hex(12)  # of which ids in the answer are made
        # By which a reward may name the answer, beside the id of the exchange.
        self.feedback_ids: tuple[str, ...] = ()
        self.placement = VariantPlacement(None)
        self.placed = NOWHERE
        self.user = ""  # what stands for whom the request is for, within the tenant
        self.model = ""
        self.tier = ""
        self.streaming = False
        self.stream_type = b"text/event-stream; charset=utf-8"
        self.error_event: Callable[[StrettoError], bytes] = error_event  # ends a stream that has begun
        self.client_gone = False
        self._task = asyncio.current_task()
        self._ended = False
        self._error: StrettoError | None = None

    async def run(self, handler: Callable[[Call], Awaitable[None]]) -> None:
        """Runs the handler until it is done, the client has left, or the server ends the call. Raises what
        the handler raises, and what the server ended it with."""
        unwatch = watch(self.request.scope, self.request.receive, self.end)
        self.server.started(self)
        try:
            await handler(self)
        except asyncio.CancelledError:
            if not self._ended or self._task is None:
                raise
            self._task.uncancel()
            if self._error is not None:
                raise self._error from None
            self.client_gone = True
        finally:
            unwatch()
            self.server.stopped(self)
            for output in self.outputs:
                output.stream.close()

    def label(self, model: str | None, tier: str) -> None:
        """Names the model and the tier that metrics count the call under. An unknown model has no name, so
        that clients cannot make up labels."""
        texts = self.server.texts
        self.model = next(iter(texts)) if model is None else model if model in texts else ""
        self.tier = tier

    def emitted(self, index: int) -> EmittedAnswer:
        """What the client has of the answer with that index, from another worker."""
        answers = () if self.continuation is None else self.continuation.answers
        return answers[index] if index < len(answers) else NOTHING

    async def respond(self, response: Response) -> None:
        """Sends a response that is not a stream. A gateway gets a header that says what it took."""
        if self.relayed:
            response.headers[TOOK] = str(self.took())
        await response(self.request.scope, self.request.receive, self.send)

    def took(self) -> Took:
        """What the answers took, for the accounts of a gateway."""
        firsts = [output for output in self.outputs if output.prompt_counts]
        energy = AnswerEnergy.of_all([output.energy() for output in self.outputs])
        return Took(
            sum(output.prompt_tokens for output in firsts),
            sum(output.began.cached_tokens for output in firsts if output.began is not None),
            sum(output.tokens for output in self.outputs),
            None if energy is None else energy.joules,
        )

    def end(self, error: StrettoError | None = None) -> None:
        """Ends the call: with `error`, or silently when the client has left."""
        if not self._ended and self._task is not None:
            self._ended = True
            self._error = error
            self._task.cancel()

    def summary(self, endpoint: str, error: StrettoError | None) -> Ended:
        """What metrics count of the call, which ended in `error` or well."""
        outputs = self.outputs
        began = [output.began for output in outputs if output.began is not None]
        forecasts = [start.forecast_ms / 1e3 for start in began if start.forecast_ms is not None]
        slack = min((output.times.slack for output in outputs), default=inf)
        return Ended(
            endpoint=endpoint,
            outcome="client_gone" if self.client_gone else "ok" if error is None else error.code,
            seconds=time.monotonic() - self.arrival,
            verdict=self._verdict(error),
            tier=self.tier,
            model=self.model,
            prompt_tokens=sum(output.prompt_tokens for output in outputs if output.prompt_counts),
            output_tokens=sum(output.tokens for output in outputs),
            cached_tokens=sum(start.cached_tokens for start in began),
            queued=max((start.queue_ms / 1e3 for start in began), default=None),
            forecast=max(forecasts, default=None),
            first=min(
                (output.times.ttft for output in outputs if output.times.ttft is not None), default=None
            ),
            slack=None if slack == inf else slack,
            gaps=_gaps(outputs),
            status=status_of(error, self.exchange, client_gone=self.client_gone),
            variant=outputs[0].variant if outputs else "",
            variant_reason=(outputs[0].why or "") if outputs else "",
            finish_reason=_finish_reason(outputs),
        )

    def _verdict(self, error: StrettoError | None) -> Verdict | None:
        """None for a request that no server could have answered."""
        if isinstance(error, CannotBeOnTime) or (isinstance(error, Unavailable) and not self.outputs):
            return "refused"
        if any(output.times.late for output in self.outputs):
            return "late"
        if self.client_gone:
            return "cancelled"
        if error is None:
            return "on_time"
        return "failed" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else None


def status_of(error: StrettoError | None, exchange: Exchange, *, client_gone: bool) -> int:
    """The status of a response that has begun, or that is about to begin with `error`."""
    if exchange.status is not None:
        return exchange.status
    return LEFT if client_gone or error is None else error.status


def _finish_reason(outputs: Sequence[Output]) -> str | None:
    """The reason of the answer; of several answers, their different reasons. None when none has ended."""
    if len(outputs) == 1:
        return outputs[0].finish_reason
    return ",".join(sorted({output.finish_reason for output in outputs if output.finish_reason})) or None


def _gaps(outputs: Sequence[Output]) -> Sequence[float]:
    if len(outputs) == 1:
        return outputs[0].times.gaps
    return [gap for output in outputs for gap in output.times.gaps]
