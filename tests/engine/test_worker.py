"""The engine process: when it waits for a message, and what it does meanwhile."""

from __future__ import annotations

from typing import Any, cast

import pytest

from stretto.config import EngineConfig, ModelConfig
from stretto.engine.runners.null import NullRunner
from stretto.engine.worker import IDLE_MS, QUIET_MS, EngineWorker


class Silent:
    """A socket on which nothing arrives. It records how long it was asked to wait."""

    def __init__(self) -> None:
        self.waits: list[int] = []

    def send(self, message: bytes) -> None: ...

    def poll(self, ms: int) -> int:
        self.waits.append(ms)
        return 0


def test_a_quiet_engine_uses_spare_time_until_nothing_is_left_to_prepare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, socket = [2], Silent()

    def prepare(self: NullRunner) -> bool:
        left[0] -= 1
        return left[0] > 0

    monkeypatch.setattr(NullRunner, "prepare", prepare)
    config = EngineConfig(models=(ModelConfig(name="null", path="null"),))
    worker = EngineWorker(config, cast(Any, socket))
    for _ in range(4):
        assert list(worker._inbox()) == []  # pyright: ignore[reportPrivateUsage]
    assert left == [0], "it asks no more once the runner has nothing to do"
    assert [ms for ms in socket.waits if ms] == [QUIET_MS, QUIET_MS, IDLE_MS, IDLE_MS]
