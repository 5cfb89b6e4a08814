"""How an engine process begins: the GPU's context is created while torch is imported."""

from __future__ import annotations

import ctypes
import sys
from threading import Thread
from types import SimpleNamespace

import pytest
from msgspec import structs

from stretto.engine import __main__ as entry
from stretto.hardware import snapshot


class Driver:
    """CUDA's driver. It notes its calls; the one named `failing` returns an error."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self._failing = failing

    def __getattr__(self, name: str) -> object:
        def call(*_: object) -> int:
            self.calls.append(name)
            return int(name == self._failing)

        return call


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that `main` starts on a machine with a GPU, and of the modules it runs."""
    seen: list[str] = []
    machine = structs.replace(snapshot(), gpus=("NVIDIA H200",))
    monkeypatch.setattr(entry, "snapshot", lambda: machine)
    monkeypatch.setattr(Thread, "start", lambda self: seen.append(self.name))  # pyright: ignore
    module = SimpleNamespace(main=lambda: None)
    monkeypatch.setattr(entry, "import_module", lambda name: seen.append(name) or module)  # pyright: ignore
    monkeypatch.setattr(entry.gc, "freeze", lambda: None)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    return seen


def test_the_device_is_opened_before_torch_is_imported(
    started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["engine", "stretto.engine.worker", "address"])
    entry.main()
    assert started == ["device", "stretto.engine.worker"]
    assert sys.argv == ["engine", "address"]


def test_an_engine_on_the_cpu_opens_no_device(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["engine", "--cpu", "stretto.engine.worker", "address"])
    entry.main()
    assert started == ["stretto.engine.worker"]
    assert sys.argv == ["engine", "address"]


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        ("", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]),
        ("cuDeviceGet", ["cuInit", "cuDeviceGet"]),
        ("cuInit", ["cuInit"]),
    ],
)
def test_a_driver_that_fails_is_asked_no_further(
    failing: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)  # pyright: ignore
    entry.open_device()
    assert driver.calls == calls


def test_a_machine_without_the_driver_starts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "DRIVER", "libmissing.so.1")
    entry.open_device()
