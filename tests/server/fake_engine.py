"""A fake engine without a process: it plays a scripted answer and records the requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

from msgspec import structs

from stretto.config import TIERS, ServeConfig, Tier
from stretto.engine.client import EngineClient
from stretto.engine.scheduler.admission import Outlook, Snapshot
from stretto.errors import EngineDied, StartError, Unavailable
from stretto.server import app
from stretto.server.state import GrammarCheck
from stretto.types import (
    EngineHealth,
    Finish,
    Logprobs,
    ModelInfo,
    Reason,
    Request,
    StepStats,
    TokenEvent,
    WorkerState,
)

Item = int | list[int] | float | Reason | Exception | TokenEvent
Script = Callable[[Request], Sequence[Item]]

BOOTS = count(1)


def info(name: str = "tiny", *, vocab: int, context: int = 512) -> ModelInfo:
    return ModelInfo(
        name=name,
        path=name,
        family="fake",
        dtype="none",
        device="none",
        context=context,
        vocab=vocab,
        parameters=0,
        weight_bytes=0,
        kv_bytes=0,
        block_size=16,
        blocks=64,
        load_s=0.0,
    )


class FakeStream:
    """A stream that plays a script of token ids, lists of ids, pauses in seconds, ends and exceptions."""

    def __init__(self, engine: FakeEngine, request: Request, script: Sequence[Item]) -> None:
        self.request = request
        self.closed_after: int | None = None
        self.emitted = 0
        self.work_ms = engine.work_ms
        self._engine = engine
        self._script = list(script)
        self._ended = False

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        if self._ended:
            raise StopAsyncIteration
        while True:
            if not self._script:
                return [self._end(Reason.STOP)]
            item = self._script.pop(0)
            if isinstance(item, float):
                await self._engine.pause(item)
            elif isinstance(item, Exception):
                raise item
            else:
                return self._events(item)

    def _events(self, item: int | list[int] | Reason | TokenEvent) -> list[TokenEvent]:
        if isinstance(item, TokenEvent):
            item = structs.replace(item, id=self.request.id)
            self._ended = item.finish is not None
            return [item]
        if isinstance(item, Reason):
            return [self._end(item)]
        events: list[TokenEvent] = []
        limit = self.request.sampling.max_tokens
        for token in [item] if isinstance(item, int) else item:
            self.emitted += 1
            last = self.emitted == limit
            top = self.request.sampling.logprobs
            logprobs = None
            if top is not None:
                logprobs = Logprobs(-0.5, tuple((token + i, -0.5 - i) for i in range(top)))
            finish = self._finish(Reason.LENGTH) if last else None
            self._ended = last
            events.append(TokenEvent(self.request.id, token, logprobs, finish))
            if last:
                break
        return events

    def _end(self, reason: Reason) -> TokenEvent:
        self._ended = True
        return TokenEvent(self.request.id, finish=self._finish(reason))

    def _finish(self, reason: Reason) -> Finish:
        error = "the tensor caught fire" if reason is Reason.ERROR else None
        return Finish(reason, len(self.request.prompt), self.emitted, 3, 1.5, error=error)

    def close(self) -> None:
        if self.closed_after is None:
            self.closed_after = self.emitted
            self._engine.open.discard(self)


@dataclass
class FakeEngine:
    """An engine whose `script(request)` returns the answer to each request.

    `open` holds the streams that are not closed. `work_ms` is the predicted work of each request."""

    script: Script
    models: dict[str, ModelInfo]
    ready: bool = True
    restarts: int = 0
    pid: int | None = None
    observers: list[Callable[[StepStats], None]] = field(default_factory=list[Any])
    requests: list[Request] = field(default_factory=list[Any])
    streams: list[FakeStream] = field(default_factory=list[Any])
    open: set[FakeStream] = field(default_factory=set[Any])
    pause: Callable[[float], Awaitable[object]] = asyncio.sleep
    failure: str | None = None
    ended: bool = False
    work_ms: float = 0.0
    boot: str = field(default_factory=lambda: f"boot-{next(BOOTS)}")
    erased: list[tuple[str, str | None]] = field(default_factory=list[Any])
    outlooks: dict[str, Outlook] = field(default_factory=dict[str, Outlook])
    tiers: dict[str, Tier] = field(default_factory=lambda: TIERS)
    last: dict[str, StepStats] = field(default_factory=dict[str, StepStats])
    _ids: count[int] = field(default_factory=lambda: count(1))

    def unavailable(self) -> Unavailable | None:
        return None if self.ready else Unavailable("the engine is loading; try again soon", retry_after=2.0)

    def health(self) -> EngineHealth:
        return EngineHealth(state="ready" if self.ready else "loading", restarts=self.restarts)

    def queues(self) -> dict[str, StepStats]:
        return self.last

    async def wait_ready(self) -> None:
        if self.failure is not None:
            raise StartError(self.failure)
        await asyncio.sleep(0)
        self.ready = True

    async def shutdown(self, grace_s: float) -> None:
        self.ended = True
        self.ready = False

    def subscribe(self, observer: Callable[[StepStats], None]) -> None:
        self.observers.append(observer)

    def publish(self, stats: StepStats) -> None:
        """Call every subscriber, as the client does after a step."""
        self.last[stats.model] = stats
        for observe in self.observers:
            observe(stats)

    def next_id(self) -> int:
        return next(self._ids)

    def submit(self, request: Request) -> FakeStream:
        if not self.ready:
            raise EngineDied("the engine is starting", retry_after=1.0)
        self.requests.append(request)
        stream = FakeStream(self, request, self.script(request))
        self.streams.append(stream)
        self.open.add(stream)
        return stream

    async def erase(self, tenant: str, subject: str | None) -> tuple[int, int]:
        self.erased.append((tenant, subject))
        return 5, 1

    def snapshots(self) -> dict[str, Snapshot]:
        return {}

    def worker_state(self) -> WorkerState:
        return WorkerState(
            ready=self.ready,
            draining=False,
            uptime_s=time.monotonic(),
            engine_pid=1,
            engine_restarts=self.restarts,
            models=tuple(self.models.values()),
            active=len(self.open),
            running=0,
            waiting=0,
            blocks_free=64,
            blocks_total=64,
            steps=0,
        )


def build(
    config: ServeConfig, engine: object, models: dict[str, Path], check: GrammarCheck | None = None
) -> app.App:
    """The application over a fake engine."""
    return app.build(config, cast(EngineClient, engine), models, check)
