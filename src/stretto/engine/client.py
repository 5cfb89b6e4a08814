"""The front's side of the engine: starts its process, sends requests, hands each reader its tokens.

When the process dies, every open stream ends in `EngineDied` and a new process is started. Asynchronous, in
one event loop; never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import msgspec
import zmq

from stretto.config import EngineConfig, tiers_of
from stretto.engine import ipc
from stretto.engine.scheduler.admission import Forecast, Outlook
from stretto.engine.scheduler.quota import Shares
from stretto.errors import EngineDied, StartError
from stretto.types import Finish, ModelInfo, Reason, Request, StepStats, TokenEvent, WorkerState

log = logging.getLogger(__name__)
PRIORITY = "priority"
RESTART_S = (0.0, 0.5, 2.0, 5.0)


class Stream:
    """The events of one request, in lists of all that have arrived since the last. Closing it is
    cancelling.
    """

    __slots__ = ("_client", "_error", "_events", "_finished", "_id", "_waiter", "forecast_ms")

    def __init__(self, client: EngineClient, ident: int) -> None:
        self._client = client
        self._id = ident
        self._events: list[TokenEvent] = []
        self._finished = False
        self._error: EngineDied | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.forecast_ms: float | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        """Raises EngineDied once the engine is gone and everything it said has been read."""
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
        """Stop the work for this request, unless it is done. Calling it again does nothing."""
        if not self._finished and self._error is None:
            self._client.cancel(self._id)
        self._finished = True

    def push(self, event: TokenEvent) -> None:
        """The client's side: one more event."""
        if event.finish is not None:
            self._finished = True
        if event.began is not None:
            began = msgspec.structs.replace(event.began, forecast_ms=self.forecast_ms)
            event = msgspec.structs.replace(event, began=began)
        self._events.append(event)
        self._wake()

    def fail(self, error: EngineDied) -> None:
        """The client's side: no event will come any more."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One engine process. `on_progress(stage, done, total)` hears of long work while it loads."""

    def __init__(
        self, config: EngineConfig, *, on_progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._folder = _folder()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._streams: dict[int, Stream] = {}
        self._outbox: list[bytes] = []
        self._ids = count(1)
        self._started = time.monotonic()
        self._settled = asyncio.Event()
        self._failure: str | None = None
        self._closing = False
        self._keeper: asyncio.Task[None] | None = None
        self._outlooks: dict[str, Outlook] = {}
        self._shares = Shares(config.priority_share)
        self._steps = 0
        self._last: dict[str, StepStats] = {}
        self.ready = False
        self.restarts = 0
        self.models: dict[str, ModelInfo] = {}
        self.steps: list[Callable[[StepStats], None]] = []

    @property
    def pid(self) -> int | None:
        """The engine's process id while it runs."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Start the engine process and return; it loads its models meanwhile."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    async def wait_ready(self) -> None:
        """Wait for the models. Raises StartError with the engine's own message when it cannot load them."""
        await self._settled.wait()
        if self._failure is not None:
            raise StartError(self._failure)

    def next_id(self) -> int:
        """An id no other request of this client has."""
        return next(self._ids)

    def submit(self, request: Request) -> Stream:
        """Send a request, or refuse it at once when it may be refused and would not be on time. Raises
        EngineDied while no engine is ready."""
        if not self.ready:
            raise EngineDied("the engine is starting; try again in a moment", retry_after=1.0)
        stream = Stream(self, request.id)
        forecast = self._outlooks[request.model].forecast(request, time.monotonic())
        if forecast is not None:
            if request.objective.on_miss == "reject" and not forecast.feasible:
                stream.push(_refusal(request, forecast))
                return stream
            stream.forecast_ms = forecast.queue_ms
            self._outlooks[request.model].sent(request)
            if request.tier == PRIORITY:
                work = self._outlooks[request.model].work_ms(request)
                self._shares.charge(request.tenant, work, time.monotonic())
        self._streams[request.id] = stream
        self._send(ipc.Submit(request))
        return stream

    def within_share(self, tenant: str, tier: str) -> bool:
        """Whether the tenant may have this tier now: beyond its share of the time, `priority` it may not."""
        return tier != PRIORITY or self._shares.allows(tenant, time.monotonic())

    def cancel(self, ident: int) -> None:
        """Drop a request in the engine; its stream hears no more."""
        if self._streams.pop(ident, None) is not None and self.ready:
            self._send(ipc.Cancel([ident]))

    def worker_state(self) -> WorkerState:
        """A snapshot for `/state`. `draining` is the front's to say."""
        last = max(self._last.values(), key=lambda step: step.started, default=None)
        return WorkerState(
            ready=self.ready,
            draining=False,
            uptime_s=time.monotonic() - self._started,
            engine_pid=self.pid,
            engine_restarts=self.restarts,
            models=tuple(self.models.values()),
            active=len(self._streams),
            running=sum(step.running for step in self._last.values()),
            waiting=sum(step.waiting for step in self._last.values()),
            blocks_free=sum(step.blocks_free for step in self._last.values()),
            blocks_total=sum(info.blocks for info in self.models.values()),
            steps=self._steps,
            schedule=self._config.schedule,
            last_step=last,
        )

    async def shutdown(self, grace_s: float) -> None:
        """End the engine: ask, wait `grace_s` seconds, then kill. Open streams end in EngineDied."""
        self._closing = True
        if self.ready:
            self._send(ipc.Stop())
            self._flush()
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), grace_s if self.ready else 0.0)
            except TimeoutError:
                with suppress(ProcessLookupError):  # it may end just now
                    self._process.kill()
                await self._process.wait()
        if self._keeper is not None:
            await self._keeper
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _spawn(self) -> None:
        """A fresh socket and a fresh process, so that nothing of a dead engine can be read by mistake."""
        self._outbox.clear()
        self._outlooks = {model.name: Outlook(tiers_of(self._config.tiers)) for model in self._config.models}
        address = f"ipc://{self._folder}/engine-{self.restarts}"
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._drain)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "stretto.engine",
            "stretto.engine.worker",
            address,
            stdin=asyncio.subprocess.PIPE,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._config))
        self._process.stdin.write_eof()

    async def _keep(self) -> None:
        """Wait for the process to end; unless that was asked for, fail its readers and start another, after
        ever longer pauses while it ends before it is ready."""
        failures = 0
        while True:
            assert self._process is not None
            code = await self._process.wait()
            self._drain()
            failures = 0 if self.ready else failures + 1
            self.ready = False
            self._unplug()
            self._fail_streams(code)
            if not self._settled.is_set():
                self._failure = self._failure or f"the engine process ended while loading (exit code {code})"
                self._settled.set()
                return
            if self._closing:
                return
            pause = RESTART_S[min(failures, len(RESTART_S) - 1)]
            log.error("the engine ended (exit code %s); starting it again in %.1f s", code, pause)
            await asyncio.sleep(pause)
            if self._closing:
                return
            self.restarts += 1
            await self._spawn()

    def _unplug(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _fail_streams(self, code: int) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(
                EngineDied(f"the engine ended (exit code {code}) before the answer did", retry_after=2.0)
            )

    def _send(self, message: ipc.ToEngine) -> None:
        """Requests that arrive together leave together, so that one step reads them all: not the first alone
        while the others wait for it."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(ipc.encode(message))

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if self._socket is None:
            return
        try:
            for message in outbox:
                self._socket.send(message, zmq.NOBLOCK)
        except zmq.Again:
            return  # The engine has just died: `_keep` is about to fail every stream.
        # The socket's descriptor is edge-triggered: sending may swallow the edge of something that has
        # arrived.
        self._drain()

    def _drain(self) -> None:
        """Hand out everything that has arrived."""
        while self._socket is not None and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._handle(ipc.decode_from_engine(self._socket.recv(zmq.NOBLOCK)))

    def _handle(self, message: ipc.FromEngine) -> None:
        match message:
            case ipc.Step(events, stats, seen):
                self._deliver(events)
                for model, snapshot in seen.items():
                    self._outlooks[model].see(snapshot)
                if stats is not None:
                    self._steps += 1
                    self._last[stats.model] = stats
                    for observe in self.steps:
                        observe(stats)
            case ipc.Progress(stage, done, total):
                if self._on_progress is not None:
                    self._on_progress(stage, done, total)
            case ipc.Ready(models):
                self.models = {info.name: info for info in models}
                self.ready = True
                self._settled.set()
            case ipc.Failed(text):
                self._failure = text
                if self._settled.is_set():  # the first time, `wait_ready` says it
                    log.error("the engine cannot start: %s", text)

    def _deliver(self, events: list[TokenEvent]) -> None:
        streams = self._streams
        for event in events:
            stream = streams.get(event.id)
            if stream is not None:
                stream.push(event)
                if event.finish is not None:
                    del streams[event.id]


def _refusal(request: Request, forecast: Forecast) -> TokenEvent:
    """The end of a request that was never sent."""
    waited = (time.monotonic() - request.arrival) * 1e3
    finish = Finish(
        Reason.REFUSED, len(request.prompt), 0, 0, waited, late=True, retry_after=forecast.retry_after
    )
    return TokenEvent(request.id, finish=finish)


def _folder() -> Path:
    """A folder for the sockets. Raises StartError when none can be made, as on a full disk."""
    try:
        return Path(tempfile.mkdtemp(prefix="stretto-"))
    except OSError as error:
        reason = error.strerror or error
        raise StartError(
            f"no folder for the engine's socket: {reason}; free some space, or set TMPDIR"
        ) from error
