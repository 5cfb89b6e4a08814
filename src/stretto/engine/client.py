"""The server's side of the engine: starts the engine process, sends it requests and delivers their events.

When the engine process ends unasked, every open stream ends in `EngineDied` and a new process is started. It
runs in one event loop and never imports torch.
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
from stretto.errors import EngineDied, StartError
from stretto.types import Finish, ModelInfo, Reason, Request, StepStats, TokenEvent, WorkerState

log = logging.getLogger(__name__)
RESTART_S = (0.0, 0.5, 2.0, 5.0)


class Stream:
    """The events of one request. Each item is the list of the events that have arrived since the last item.

    Closing a stream cancels its request. `forecast_ms` is the queueing time that admission predicted, and
    `work_ms` the work; a request that was not sent has none.
    """

    __slots__ = ("_client", "_error", "_events", "_finished", "_id", "_waiter", "forecast_ms", "work_ms")

    def __init__(
        self, client: EngineClient, ident: int, forecast_ms: float | None = None, work_ms: float = 0.0
    ) -> None:
        self._client = client
        self._id = ident
        self._events: list[TokenEvent] = []
        self._finished = False
        self._error: EngineDied | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.forecast_ms = forecast_ms
        self.work_ms = work_ms

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        """Raises EngineDied after the last event when the engine process has ended."""
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
            self._client.cancel(self._id)
        self._finished = True

    def push(self, event: TokenEvent) -> None:
        """Add an event; called by the client."""
        if event.finish is not None:
            self._finished = True
        if event.began is not None:
            began = msgspec.structs.replace(event.began, forecast_ms=self.forecast_ms)
            event = msgspec.structs.replace(event, began=began)
        self._events.append(event)
        self._wake()

    def fail(self, error: EngineDied) -> None:
        """End the stream in an error; called by the client."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One engine process, its open streams and what it last reported.

    `on_progress(stage, done, total)` is called while the engine loads. It is called again after a restart.
    """

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
        self._loaded = asyncio.Event()  # or failed to load: then `_failure` is set
        self._failure: str | None = None
        self._closing = False
        self._supervisor: asyncio.Task[None] | None = None
        self._outlooks: dict[str, Outlook] = {}
        self._steps = 0
        self._last_steps: dict[str, StepStats] = {}
        self._subscribers: list[Callable[[StepStats], None]] = []
        self.ready = False
        self.restarts = 0
        self.models: dict[str, ModelInfo] = {}

    @property
    def pid(self) -> int | None:
        """The process id of the engine, None while it does not run."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Start the engine process. Returns before its models are loaded."""
        await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise())

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

    def submit(self, request: Request) -> Stream:
        """Send a request to the engine.

        A request with `on_miss="reject"` that is predicted to be late is not sent: its stream holds only the
        refusal. Raises EngineDied while no engine is ready.
        """
        if not self.ready:
            raise EngineDied("the engine is starting; try again in a moment", retry_after=1.0)
        outlook = self._outlooks[request.model]
        forecast = outlook.forecast(request, time.monotonic())
        if forecast is None:
            stream = Stream(self, request.id)
        elif request.objective.on_miss == "reject" and not forecast.feasible:
            stream = Stream(self, request.id)
            stream.push(_refusal(request, forecast))
            return stream
        else:
            stream = Stream(self, request.id, forecast.queue_ms, outlook.work_ms(request))
            outlook.sent(request)
        self._streams[request.id] = stream
        self._send(ipc.Submit(request))
        return stream

    def cancel(self, ident: int) -> None:
        """End a request in the engine. Its stream gets no more events."""
        if self._streams.pop(ident, None) is not None and self.ready:
            self._send(ipc.Cancel([ident]))

    def worker_state(self) -> WorkerState:
        """A snapshot for `/state`. `draining` is always False: only the server knows it."""
        last = max(self._last_steps.values(), key=lambda step: step.started, default=None)
        return WorkerState(
            ready=self.ready,
            draining=False,
            uptime_s=time.monotonic() - self._started,
            engine_pid=self.pid,
            engine_restarts=self.restarts,
            models=tuple(self.models.values()),
            active=len(self._streams),
            running=sum(step.running for step in self._last_steps.values()),
            waiting=sum(step.waiting for step in self._last_steps.values()),
            blocks_free=sum(step.blocks_free for step in self._last_steps.values()),
            blocks_total=sum(info.blocks for info in self.models.values()),
            steps=self._steps,
            schedule=self._config.schedule,
            last_step=last,
        )

    async def shutdown(self, grace_s: float) -> None:
        """Ask the engine to stop and kill it after `grace_s` seconds. Open streams end in EngineDied."""
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
        if self._supervisor is not None:
            await self._supervisor
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _spawn(self) -> None:
        """Start a process with a socket of its own, so that no message of a dead engine is read."""
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

    async def _supervise(self) -> None:
        """Start the engine again whenever it ends unasked, and end its streams in EngineDied.

        While it ends before it is ready, the pauses between two starts grow as in `RESTART_S`.
        """
        failures = 0
        while True:
            assert self._process is not None
            code = await self._process.wait()
            self._drain()
            failures = 0 if self.ready else failures + 1
            self.ready = False
            self._close_socket()
            self._fail_streams(code)
            if not self._loaded.is_set():
                self._failure = self._failure or f"the engine process ended while loading (exit code {code})"
                self._loaded.set()
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

    def _close_socket(self) -> None:
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
        """Queue a message until the event loop's next turn.

        Requests that arrive together are sent together, so that one step of the engine can run all of them.
        """
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
            return  # The engine has just died, and `_supervise` is about to end every stream.
        # The socket's descriptor is edge-triggered, and sending may consume the edge of an arrived message.
        self._drain()

    def _drain(self) -> None:
        """Handle every message that has arrived."""
        while self._socket is not None and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._handle(ipc.decode_from_engine(self._socket.recv(zmq.NOBLOCK)))

    def _handle(self, message: ipc.FromEngine) -> None:
        match message:
            case ipc.StepResult(events, stats, snapshots):
                self._deliver(events)
                for model, snapshot in snapshots.items():
                    self._outlooks[model].see(snapshot)
                if stats is not None:
                    self._steps += 1
                    self._last_steps[stats.model] = stats
                    for observe in self._subscribers:
                        observe(stats)
            case ipc.LoadProgress(stage, done, total):
                if self._on_progress is not None:
                    self._on_progress(stage, done, total)
            case ipc.Ready(models):
                self.models = {info.name: info for info in models}
                self.ready = True
                self._loaded.set()
            case ipc.Failed(text):
                self._failure = text
                if self._loaded.is_set():  # the first failure is raised by `wait_ready`
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
    """The final event of a request that is not sent to the engine."""
    waited = (time.monotonic() - request.arrival) * 1e3
    finish = Finish(
        Reason.REFUSED, len(request.prompt), 0, 0, waited, late=True, retry_after=forecast.retry_after
    )
    return TokenEvent(request.id, finish=finish)


def _folder() -> Path:
    """A folder for the sockets. Raises StartError when it cannot be made, for example on a full disk."""
    try:
        return Path(tempfile.mkdtemp(prefix="stretto-"))
    except OSError as error:
        reason = error.strerror or error
        raise StartError(
            f"no folder for the engine's socket: {reason}; free some space, or set TMPDIR"
        ) from error
