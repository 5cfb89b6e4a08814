"""The folder of the engine's socket: where it is, who owns it, and what a start removes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from errno import ENOSPC
from pathlib import Path

import pytest

from stretto.engine.runtime_folder import RuntimeFolder
from stretto.errors import StartError


@pytest.fixture(autouse=True)
def short(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory with a short path, as a socket needs it."""
    path = tmp_path_factory.mktemp("r")
    monkeypatch.setattr("tempfile.tempdir", str(path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return path


def abandoned(base: Path) -> Path:
    """The folder of a process that was killed, with a socket in it."""
    code = (
        "import os, socket, sys; from stretto.engine.runtime_folder import RuntimeFolder\n"
        "path = RuntimeFolder().path; socket.socket(socket.AF_UNIX).bind(str(path / 'engine-0'))\n"
        "print(path, flush=True); os.kill(os.getpid(), 9)"
    )
    environ = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ | {"TMPDIR": str(base)}, capture_output=True, text=True
    )
    return Path(done.stdout.strip())


def test_a_start_removes_the_folder_of_a_killed_process_and_no_other(short: Path) -> None:
    mine = RuntimeFolder()
    left = abandoned(short)
    users = short / "stretto-mymodels"
    users.mkdir()
    (users / "weights").write_text("precious")
    assert left.exists()
    other = RuntimeFolder()
    assert not left.exists()
    assert mine.path.exists() and (users / "weights").exists()
    for folder in (mine, other):
        folder.close()
        folder.close()
    assert list(short.iterdir()) == [users]


def test_the_folder_is_private_and_in_the_runtime_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = RuntimeFolder()
    assert folder.path.parent == tmp_path and folder.path.stat().st_mode & 0o777 == 0o700
    folder.close()


@pytest.mark.parametrize("runtime", ["relative", "/no/such/directory", ""])
def test_a_runtime_directory_that_cannot_be_used_is_passed_over(
    short: Path, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    folder = RuntimeFolder()
    assert folder.path.parent == short
    folder.close()


def test_a_folder_that_was_removed_is_made_anew() -> None:
    folder = RuntimeFolder()
    first = folder.path
    assert folder.ensure() == first
    first.rmdir()
    second = folder.ensure()
    assert second.is_dir()
    folder.close()
    assert not second.exists()


def test_a_full_disk_is_a_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: str) -> str:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(StartError, match="No space left on device; free some space, or set TMPDIR"):
        RuntimeFolder()


def test_a_path_too_long_for_a_socket_is_a_start_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(StartError, match="too long for a socket"):
        RuntimeFolder()


def test_a_socket_is_all_that_a_folder_of_ours_holds(short: Path) -> None:
    """A folder with anything but sockets is nobody's leftover, whatever its name is."""
    strange = short / "stretto-abcdefgh"
    strange.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(strange / "engine-0"))
    (strange / "notes").write_text("")
    RuntimeFolder().close()
    assert sorted(path.name for path in strange.iterdir()) == ["engine-0", "notes"]
