"""The engine process: when it waits for a message, what it does meanwhile, and what it leaves to the garbage
collector."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stretto.config import EngineConfig, ModelConfig
from stretto.engine import ipc
from stretto.engine.core import EngineCore
from stretto.engine.runners.null import NullRunner
from stretto.engine.worker import HANDLING_S, IDLE_MS, QUIET_MS, EngineWorker
from stretto.types import Request, Sampling

NULL = EngineConfig(models=(ModelConfig(name="null", path="null"),))
FEW = 300  # objects


class Socket:
    """A socket on which these messages arrive, and then none. It records how long it was asked to wait, and
    how many objects the garbage collector had to look at when the engine was ready."""

    def __init__(self, *arrives: ipc.ToEngine) -> None:
        self.waits: list[int] = []
        self.objects: list[int] = []
        self._arrives = deque(map(ipc.encode, arrives))

    def send(self, message: bytes) -> None:
        if isinstance(ipc.decode_from_engine(message), ipc.Ready):
            self.objects.append(len(gc.get_objects()))

    def poll(self, ms: int) -> int:
        self.waits.append(ms)
        return len(self._arrives)

    def recv(self, flags: int) -> bytes:
        return self._arrives.popleft()


@pytest.fixture
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_a_quiet_engine_uses_spare_time_until_nothing_is_left_to_prepare(
    monkeypatch: pytest.MonkeyPatch, unfrozen: None
) -> None:
    """What that made is then no work of the garbage collector."""
    left, made, socket = [2], list[object](), Socket()

    def prepare(self: NullRunner) -> bool:
        made.extend([] for _ in range(2 * FEW))
        left[0] -= 1
        return left[0] > 0

    monkeypatch.setattr(NullRunner, "prepare", prepare)
    worker = EngineWorker(NULL, cast(Any, socket))
    tracked: list[int] = []
    for _ in range(4):
        assert list(worker._inbox()) == []  # pyright: ignore[reportPrivateUsage]
        tracked.append(len(gc.get_objects()))
    assert left == [0], "it asks no more once the runner has nothing to do"
    assert [ms for ms in socket.waits if ms] == [QUIET_MS, QUIET_MS, IDLE_MS, IDLE_MS]
    assert tracked[0] > 2 * FEW and max(tracked[1:]) < FEW


def test_what_an_engine_loads_is_no_work_of_the_garbage_collector(unfrozen: None) -> None:
    gc.unfreeze()
    socket = Socket(ipc.Stop())
    worker = EngineWorker(NULL, cast(Any, socket))
    assert len(gc.get_objects()) > 100 * FEW, "with what this process has imported"
    worker.run(cast(Any, SimpleNamespace(turns=0)))
    assert socket.objects and socket.objects[0] < FEW


def test_a_burst_of_requests_does_not_hold_up_the_next_step(
    monkeypatch: pytest.MonkeyPatch, unfrozen: None
) -> None:
    """An idle engine starts after the first requests, and a busy one reads a few in each turn."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-3
        return now[0]

    requests = [
        Request(id=ident, model="null", prompt=(1, 2, 3), arrival=0.0, sampling=Sampling(seed=1))
        for ident in range(40)
    ]
    socket = Socket(*map(ipc.Submit, requests), ipc.Stop())
    worker = EngineWorker(NULL, cast(Any, socket))
    waiting: list[int] = []

    def step(self: EngineCore) -> bool:
        waiting.append(len(self._sequences))  # pyright: ignore[reportPrivateUsage]
        return True

    monkeypatch.setattr(EngineCore, "step", step)
    monkeypatch.setattr("stretto.engine.worker.time.monotonic", clock)
    worker.run(cast(Any, SimpleNamespace(turns=0)))
    grown = [later - before for before, later in zip([0, *waiting], waiting, strict=False)]
    assert waiting[-1] == 40 and max(grown) <= 1e3 * HANDLING_S + 1
