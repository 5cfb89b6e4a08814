"""The state of the HTTP front: its models, who waits, what runs, whether it drains. One loop owns it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, TypeVar

from msgspec import structs

from stretto.config import ServeConfig, tiers_of
from stretto.errors import Draining, StrettoError, Unavailable, UnknownModel
from stretto.server.admission_gate import Gate
from stretto.telemetry.live import Recent
from stretto.telemetry.metrics import Ended, Gauges, Metrics
from stretto.text.output import Output, TokenStream
from stretto.text.tokenizer import TextModel
from stretto.types import Grammar, ModelInfo, Request, StepStats, WorkerState

T = TypeVar("T")
Check = Callable[[str, Grammar], Awaitable[None]]
LONG_TEXT = 4096


class Engine(Protocol):
    """What the front needs of `engine.client.EngineClient`."""

    ready: bool
    models: dict[str, ModelInfo]
    restarts: int

    def subscribe(self, observer: Callable[[StepStats], None]) -> None: ...
    def next_id(self) -> int: ...
    def submit(self, request: Request) -> TokenStream: ...
    def within_share(self, tenant: str, tier: str) -> bool: ...
    def worker_state(self) -> WorkerState: ...


class Front:
    """Shared by every request. `check` judges a grammar where it may die; None leaves that to the engine."""

    def __init__(
        self, config: ServeConfig, engine: Engine, texts: dict[str, TextModel], check: Check | None
    ) -> None:
        self.config = config
        self.tiers = tiers_of(config.tiers)
        self.engine = engine
        self.texts = texts
        self.check = check
        self.metrics = Metrics(self._gauges)
        self.gate = Gate(config.max_waiting)
        self.runs: set[Run] = set()
        self._last_ended = asyncio.Event()
        self.draining = False
        self.created = int(time.time())
        self._threads = ThreadPoolExecutor(2, "text")
        self.recent = Recent({name: tier.objective for name, tier in self.tiers.items()})
        engine.subscribe(self.metrics.step)
        engine.subscribe(self.recent.step)

    def model(self, name: str | None) -> tuple[str, TextModel]:
        """The model of that name, or the first one. Raises UnknownModel."""
        if name is None:
            name = next(iter(self.texts))
        if name not in self.texts:
            held = ", ".join(self.texts)
            raise UnknownModel(f"no model {name!r} here; this server holds {held}", param="$.model")
        return name, self.texts[name]

    def ensure_open(self, count: int = 1) -> None:
        """Raises what keeps `count` more sequences out: Draining, Unavailable, Overloaded."""
        if self.draining:
            raise Draining("the server is shutting down", retry_after=self.config.drain_s)
        if not self.engine.ready:
            raise Unavailable("the engine is starting; try again soon", retry_after=2.0)
        self.gate.check(count)

    async def off_loop(self, size: int, work: Callable[..., T], *arguments: object) -> T:
        """`work(*arguments)`, in a thread when `size` bytes of text would hold the event loop up."""
        if size <= LONG_TEXT:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def state(self) -> WorkerState:
        """The engine's state with what only the front knows."""
        return structs.replace(self.engine.worker_state(), draining=self.draining)

    def end_all(self, error: StrettoError) -> None:
        """Ends what runs, each with `error`."""
        for run in list(self.runs):
            run.end(error)

    def _gauges(self) -> Gauges:
        return Gauges(len(self.runs), self.engine.ready, self.draining, self.engine.restarts)

    async def idle(self) -> None:
        """Returns when nothing runs."""
        while self.runs:
            self._last_ended.clear()
            await self._last_ended.wait()

    def closed(self, run: Run) -> None:
        """A run has nothing more in the engine."""
        self.runs.discard(run)
        if not self.runs:
            self._last_ended.set()

    def ended(self, request: Ended) -> None:
        """A request is over."""
        self.metrics.ended(request)
        self.recent.ended(request)


class Run:
    """One request with work in the engine. However it ends, its streams are closed.

    `end(None)`, when the client left, and `end(error)`, when the server must stop it, cancel its task; at the
    end of the `with` the first is silent and the second raises `error`.
    """

    def __init__(self, front: Front) -> None:
        self.choices: list[Output] = []
        self.tier = ""
        self.model = ""
        self._front = front
        self._task = asyncio.current_task()
        self._ended = False
        self._error: StrettoError | None = None
        self.streaming = False
        self.gone = False

    def __enter__(self) -> Run:
        self._front.runs.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._front.closed(self)
        for choice in self.choices:
            choice.stream.close()
            if choice.times.first is None:
                self._front.gate.leave(served=False)
        if kind is asyncio.CancelledError and self._ended and self._task is not None:
            self._task.uncancel()
            if self._error is not None:
                raise self._error
            self.gone = True
            return True
        return False

    def end(self, error: StrettoError | None) -> None:
        if not self._ended and self._task is not None:
            self._ended = True
            self._error = error
            self._task.cancel()

    def asks(self, model: str | None, tier: str) -> None:
        """What the request is for: counted under a model only where it is one of ours."""
        self.tier = tier
        texts = self._front.texts
        self.model = next(iter(texts)) if model is None else model if model in texts else ""

    def open(self, choices: Iterable[Output]) -> list[Output]:
        """Takes charge of each choice once its stream is submitted, so that none is left when one fails."""
        opened: list[Output] = []
        for choice in choices:
            opened.append(choice)
            self.choices.append(choice)
            self._front.gate.enter()
        return opened

    def heard(self, choice: Output) -> None:
        """Called before the first events of `choice` are taken."""
        self._front.gate.leave(served=True)
