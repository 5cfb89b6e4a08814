"""The server's side of the engine: keeps an engine process running, sends it requests, delivers events.

When the engine process ends unasked, every open stream ends in an error and a new process is started, however
often that happens. It runs in one event loop and never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from secrets import token_hex

import msgspec
import zmq

from stretto.config import EngineConfig, tiers_of
from stretto.engine import ipc
from stretto.engine.heartbeat import BEAT_S, Watch
from stretto.engine.process import ChildProcess
from stretto.engine.runtime_folder import RuntimeFolder
from stretto.engine.scheduler.admission import Forecast, Outlook, Snapshot
from stretto.engine.scheduler.types import tier_weight
from stretto.errors import EngineDied, EngineStalled, StartError, Unavailable
from stretto.types import (
    EngineHealth,
    EngineState,
    Finish,
    ModelInfo,
    QueueState,
    Reason,
    Request,
    StepStats,
    TokenEvent,
    WorkerState,
)

log = logging.getLogger(__name__)
RESTART_S = (0.0, 0.5, 2.0, 5.0, 15.0, 30.0)  # the pause before a start, by the failures in a row before it
FAILING = 5  # failures in a row after which `/health` says so; it is tried again all the same
ERASE_S = 10.0  # a step may run before the engine reads its messages
TURN_AWAY_S = 0.1  # between two messages on refused requests
SOON_S = 2.0  # after which a refused client may try again


class Stream:
    """The events of one request. Each item is the list of the events that have arrived since the last item.

    Closing a stream cancels its request. `forecast_ms` is the queueing time that admission predicted, and
    `work_ms` the work; a request that was not sent has none.
    """

    __slots__ = (
        *("_client", "_error", "_events", "_finished", "_waiter"),
        *("begun", "forecast_ms", "request", "work_ms"),
    )

    def __init__(
        self, client: EngineClient, request: Request, forecast_ms: float | None = None, work_ms: float = 0.0
    ) -> None:
        self._client = client
        self.request = request
        self.begun = False  # whether an event has arrived
        self._events: list[TokenEvent] = []
        self._finished = False
        self._error: Unavailable | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.forecast_ms = forecast_ms
        self.work_ms = work_ms

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        """Raises EngineDied or EngineStalled after the last event when the engine has failed."""
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Cancel the request unless it has ended. Calling it again does nothing."""
        if not self._finished and self._error is None:
            self._client.cancel(self.request.id)
        self._finished = True

    def push(self, event: TokenEvent) -> None:
        """Add an event; called by the client."""
        self.begun = True
        if event.finish is not None:
            self._finished = True
        if event.began is not None:
            began = msgspec.structs.replace(event.began, forecast_ms=self.forecast_ms)
            event = msgspec.structs.replace(event, began=began)
        self._events.append(event)
        self._wake()

    def fail(self, error: Unavailable) -> None:
        """End the stream in an error; called by the client."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """The engine process, its open streams and what it last reported.

    `on_progress(stage, done, total)` is called while the engine loads. It is called again after a restart.
    Raises StartError when there is no place for the engine's socket.
    """

    def __init__(
        self, config: EngineConfig, *, on_progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._folder = RuntimeFolder()
        self._name = token_hex(8)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._process: ChildProcess | None = None
        self._streams: dict[int, Stream] = {}
        self._erasures: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._ids = count(1)
        self._started = time.monotonic()
        self._loaded = asyncio.Event()  # or failed to load: then `_failure` is set
        self._failure: str | None = None
        self._closing = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._outlooks: dict[str, Outlook] = {}
        self._turned_away: dict[tuple[str, float], float] = defaultdict(float)  # by model and weight, ms
        self._told = 0.0
        self._steps = 0
        self._last_step: StepStats | None = None
        self._queues: dict[str, QueueState | StepStats] = {}
        self._subscribers: list[Callable[[StepStats], None]] = []
        self._state: EngineState = "loading"
        self._reason = "the engine is loading"
        self._cause: str | None = None  # why this process ends, when that is known before its end
        self._failures = 0  # starts in a row
        self.restarts = 0
        self.models: dict[str, ModelInfo] = {}
        self.start_s: dict[str, float] = {}  # seconds of the engine's last start, by part
        self.tiers = tiers_of(config.tiers)  # those that the machine can keep, once that is known

    @property
    def pid(self) -> int | None:
        """The process id of the engine, None while it does not run."""
        return None if self._process is None else self._process.pid

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._state == "ready"

    async def start(self) -> None:
        """Start the engine process. Returns before its models are loaded. Raises StartError."""
        try:
            process = await self._spawn()
        except (OSError, zmq.ZMQError) as error:
            raise StartError(f"the engine process cannot be started: {error}") from error
        self._supervisor = asyncio.create_task(self._supervise(process))

    def subscribe(self, observer: Callable[[StepStats], None]) -> None:
        """Call `observer` with the statistics of every step from now on."""
        self._subscribers.append(observer)

    async def wait_ready(self) -> None:
        """Wait until the models are loaded. Raises StartError with the engine's message if that fails."""
        await self._loaded.wait()
        if self._failure is not None:
            raise StartError(self._failure)

    def next_id(self) -> int:
        """A request id that this client has not given before."""
        return next(self._ids)

    def unavailable(self) -> Unavailable | None:
        """The error of a request that comes now; None while requests are accepted."""
        if self._state == "ready":
            return None
        first = self._state == "loading" and not self.restarts
        kind = EngineStalled if self._state == "stalled" else Unavailable if first else EngineDied
        return kind(f"{self._reason}; try again soon", retry_after=SOON_S)

    def health(self) -> EngineHealth:
        """The state of the engine process, and why it is so."""
        return EngineHealth(
            state=self._state, reason=self._reason, restarts=self.restarts, failures=self._failures
        )

    def submit(self, request: Request) -> Stream:
        """Send a request to the engine.

        A request with `on_miss="reject"` that is predicted to be late, or any that cannot be admitted, goes
        to the first of its `lighter` models that takes it; the stream then has that request. Without one it
        is not sent: its stream holds only the refusal. Raises Unavailable, EngineDied or EngineStalled while
        the engine takes no requests.
        """
        problem = self.unavailable()
        if problem is not None:
            raise problem
        request, forecast = self._admitted(request, time.monotonic())
        outlook = self._outlooks[request.model]
        if forecast is None:
            stream = Stream(self, request)
        elif (refused_for := forecast.refusal(request)) > 0:
            stream = Stream(self, request)
            stream.push(_refusal(request, refused_for))
            self._turn_away(request)
            return stream
        else:
            request = msgspec.structs.replace(request, admitted=True)
            stream = Stream(self, request, forecast.queue_ms, outlook.work_ms(request))
        self._send(ipc.Submit(request))  # first, because what cannot be encoded raises here
        if forecast is not None:
            outlook.sent(request)
        self._streams[request.id] = stream
        return stream

    def _admitted(self, request: Request, now: float) -> tuple[Request, Forecast | None]:
        """The request as a model takes it, its own or a lighter one, and what would become of it there; as it
        is when none does."""
        own = self._outlooks[request.model].forecast(request, now)
        if own is None or own.refusal(request) <= 0:
            return request, own
        for place, model in enumerate(request.lighter, 1):
            lighter = msgspec.structs.replace(request, model=model, lighter=request.lighter[place:])
            forecast = self._outlooks[model].forecast(lighter, now)
            if forecast is None or forecast.refusal(lighter) <= 0:
                return lighter, forecast
        return request, own

    def _turn_away(self, request: Request) -> None:
        """Tell the engine of refused requests, so that it knows how much more comes than can be done.

        A message holds those of `TURN_AWAY_S`, because each may come in well under a millisecond.
        """
        key = request.model, tier_weight(self.tiers, request.tier)
        ms = self._outlooks[request.model].prefill_ms(len(request.prompt), request.cached)
        self._turned_away[key] += ms
        now = time.monotonic()
        if now >= self._told + TURN_AWAY_S:
            for (model, weight), sum_ms in self._turned_away.items():
                self._send(ipc.TurnAway(model, weight, sum_ms))
            self._turned_away.clear()
            self._told = now

    def cancel(self, ident: int) -> None:
        """End a request in the engine. Its stream gets no more events."""
        if self._streams.pop(ident, None) is not None:
            self._send(ipc.Cancel([ident]))

    async def erase(self, tenant: str, subject: str | None) -> tuple[int, int]:
        """Drop the cached prompts of a tenant: those about a subject, or all.

        Returns how many blocks that were, and how many more are dropped when running sequences end. Raises
        Unavailable when the engine does not answer; one that has ended has no cache any more.
        """
        if not self.ready:
            return 0, 0
        ident = self.next_id()
        erased = self._erasures[ident] = asyncio.get_running_loop().create_future()
        self._send(ipc.Erase(ident, tenant, subject))
        try:
            return await asyncio.wait_for(erased, ERASE_S)
        except TimeoutError:
            raise Unavailable(
                "the engine did not confirm the erasure; try again", retry_after=SOON_S
            ) from None
        finally:
            del self._erasures[ident]

    def queues(self) -> dict[str, QueueState | StepStats]:
        """What each model runs and holds now, by its name; empty while no engine is loaded."""
        return self._queues

    @property
    def boot(self) -> str:
        """Changes with each start of the engine process."""
        return f"{self._name}-{self.restarts}"

    @property
    def outlooks(self) -> dict[str, Outlook]:
        """What is known of each model's scheduler, by the model's name. Not to be changed."""
        return self._outlooks

    def snapshots(self) -> dict[str, Snapshot]:
        """The last snapshot of each model's scheduler; none before the first, or under the schedule fcfs."""
        return {name: seen for name, outlook in self._outlooks.items() if (seen := outlook.seen) is not None}

    def worker_state(self) -> WorkerState:
        """A snapshot for `/state`. `draining` is always False: only the server knows it."""
        queues = self._queues.values()
        return WorkerState(
            ready=self.ready,
            draining=False,
            uptime_s=time.monotonic() - self._started,
            engine_pid=self.pid,
            engine_restarts=self.restarts,
            models=tuple(self.models.values()),
            active=len(self._streams),
            running=sum(queue.running for queue in queues),
            waiting=sum(queue.waiting for queue in queues),
            blocks_free=sum(queue.blocks_free for queue in queues),
            blocks_total=sum(info.blocks for info in self.models.values()),
            steps=self._steps,
            schedule=self._config.schedule,
            objectives={name: tier.objective for name, tier in self.tiers.items()},
            last_step=self._last_step,
        )

    async def shutdown(self, grace_s: float) -> None:
        """Ask the engine to stop and kill it after `grace_s` seconds. Open streams end in EngineDied."""
        self._closing.set()
        process = self._process
        if process is not None:
            if self.ready:
                self._send(ipc.Stop())
                process.flush()
            try:
                await asyncio.wait_for(process.wait(), grace_s if self.ready else 0.0)
            except TimeoutError:
                process.kill()
        if self._supervisor is not None:
            await self._supervisor
        self._context.term()
        self._folder.close()

    async def _spawn(self) -> ChildProcess:
        """Start a process. Raises OSError or ZMQError when that fails."""
        self._outlooks = {model.name: Outlook(tiers_of(self._config.tiers)) for model in self._config.models}
        self._cause = None
        address = self._folder.ensure() / f"engine-{self.restarts}"
        self._process = await ChildProcess.start(self._config, address, self._context, self._handle)
        return self._process

    async def _supervise(self, process: ChildProcess) -> None:
        """Attend to the engine process until the client closes, and start a new one whenever it has ended.

        An end before the models are loaded is a failure, and so is a start that does not succeed. The pauses
        grow with the failures in a row, as in `RESTART_S`. Only the first load is not tried again: then
        `wait_ready` raises.
        """
        cause = await self._attend(process)
        if not self._loaded.is_set():
            self._failure = cause
            self._loaded.set()
            return
        while not self._closing.is_set():
            pause = RESTART_S[min(self._failures, len(RESTART_S) - 1)]
            log.error(
                "%s; starting it again in %.1f s (failed starts in a row: %d)", cause, pause, self._failures
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause)
                return
            self.restarts += 1
            try:
                cause = await self._attend(await self._spawn())
            except Exception as error:  # whatever it is, the supervision goes on
                self._failures += 1
                cause = f"the engine process cannot be started: {error}"
                self._change("restarting", cause)

    async def _attend(self, process: ChildProcess) -> str:
        """Watch a process until it ends, and then fail its streams. Returns why it ended."""
        if self._failures < FAILING:
            self._change("loading", "the engine is loading")
        ending, watch = asyncio.create_task(process.wait()), Watch(self._config.engine_timeout_s)
        try:
            while not ending.done():
                if self._closing.is_set() and not self.ready:
                    process.kill()
                await asyncio.wait({ending}, timeout=BEAT_S)
                self._look(process, watch)
        finally:
            process.kill()
            process.close()
            loaded, self._queues, self._process = bool(self._queues), {}, None
            self._failures = 0 if loaded else self._failures + 1
        cause = self._cause or f"the engine ended (exit code {ending.result()})"
        self._change("restarting", cause)
        self._fail_streams(EngineDied(f"{cause} before the answer was complete", retry_after=SOON_S))
        return cause

    def _look(self, process: ChildProcess, watch: Watch) -> None:
        """Judge the process by its heartbeats, BEAT_S after the last time."""
        loaded = self._state in ("ready", "stalled")
        verdict = watch.tick(process.newest_beat(), process.cpu_s(), loaded=loaded)
        if verdict == "well":
            if self._state == "stalled":
                log.warning("the engine responds again")
                self._change("ready", "")
        elif verdict == "stalled":
            if self._state == "ready":
                log.error("%s; requests are refused until it does", watch.reason)
            self._change("stalled", watch.reason)
            self._refuse_unbegun()
        else:
            self._cause = self._cause or f"{watch.reason} and was stopped"
            self._change("restarting", self._cause)
            self._fail_streams(
                EngineStalled(f"{self._cause} before the answer was complete", retry_after=SOON_S)
            )
            process.kill()

    def _change(self, state: EngineState, reason: str) -> None:
        if state == "restarting" and self._failures >= FAILING:
            state, reason = "failing", f"{reason}; {self._failures} starts in a row have failed"
        self._state, self._reason = state, reason

    def _fail_streams(self, error: Unavailable) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
        for erased in self._erasures.values():
            if not erased.done():
                erased.set_result((0, 0))

    def _refuse_unbegun(self) -> None:
        """End the requests that rather want a refusal than to be late, as far as nothing of them has come."""
        for stream in list(self._streams.values()):
            if not stream.begun and stream.request.objective.on_miss == "reject":
                stream.fail(EngineStalled(f"{self._reason}; try again soon", retry_after=SOON_S))
                self.cancel(stream.request.id)

    def _send(self, message: ipc.ToEngine) -> None:
        if self._process is not None:
            self._process.send(ipc.encode(message))

    def _handle(self, message: ipc.FromEngine) -> None:
        match message:
            case ipc.StepResult(events, stats, snapshots, queues):
                self._deliver(events)
                for model, snapshot in snapshots.items():
                    self._outlooks[model].see(snapshot)
                self._queues |= queues
                if stats is not None:
                    self._steps += 1
                    self._last_step = self._queues[stats.model] = stats
                    for observe in self._subscribers:
                        observe(stats)
            case ipc.LoadProgress(stage, done, total):
                if self._on_progress is not None:
                    self._on_progress(stage, done, total)
            case ipc.Ready(models, tiers, start_s):
                self.tiers, self.start_s = tiers, start_s
                self.models = {info.name: info for info in models}
                self._failures = 0
                self._change("ready", "")
                self._loaded.set()
            case ipc.Erased(ident, blocks, held):
                waiting = self._erasures.get(ident)
                if waiting is not None and not waiting.done():
                    waiting.set_result((blocks, held))
            case ipc.Failed(text):
                self._cause = text

    def _deliver(self, events: list[TokenEvent]) -> None:
        streams = self._streams
        for event in events:
            stream = streams.get(event.id)
            if stream is not None:
                stream.push(event)
                if event.finish is not None:
                    del streams[event.id]


def _refusal(request: Request, retry_after: float) -> TokenEvent:
    """The final event of a request that is not sent to the engine."""
    waited = (time.monotonic() - request.arrival) * 1e3
    finish = Finish(Reason.REFUSED, len(request.prompt), 0, 0, waited, late=True, retry_after=retry_after)
    return TokenEvent(request.id, finish=finish)
