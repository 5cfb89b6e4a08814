"""Where a model is loaded from: a directory or the hub, and the errors when there is none."""

# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from stretto.errors import CheckpointError
from stretto.models.source import resolve


def model(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"{}")
    return path


def test_a_local_directory_is_found(tmp_path: Path) -> None:
    path = model(tmp_path / "it", "config.json", "model.safetensors", "pytorch_model.bin")
    assert resolve(str(path)) == path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "pytorch_model.bin"], "pickled weights.*never loaded.*convert it to safetensors"),
        (["config.json", "consolidated.00.pth"], "pickled weights"),
        (["config.json"], r"no \*.safetensors"),
        (["model.safetensors"], "not a model directory: it has no config.json"),
        ([], "not a model directory"),
        (["model-q4.gguf", "config.json"], "GGUF, which is not read"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge it into its base model"),
    ],
)
def test_directories_without_a_model_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    path = model(tmp_path / "it", *names)
    with pytest.raises(CheckpointError, match=message) as error:
        resolve(str(path))
    assert str(path) in error.value.message


def test_a_file_instead_of_a_directory_is_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "it", "model.safetensors", "model.gguf")
    with pytest.raises(CheckpointError, match="give the directory"):
        resolve(str(path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="GGUF"):
        resolve(str(path / "model.gguf"))


@pytest.mark.parametrize("name", ["nowhere", "/no/such/place", "./a/b", "../x", "a/b/c", ""])
def test_unknown_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        resolve(name)


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model(tmp_path / "it", "config.json", "model.safetensors")
    calls: list[tuple[str, int, int]] = []

    def fetch(
        name: str, *, allow_patterns: list[str], ignore_patterns: list[str], tqdm_class: Callable[..., Any]
    ) -> str:
        assert name == "org/some-model.v2"
        assert "*.safetensors" in allow_patterns and not any("bin" in each for each in allow_patterns)
        bar = tqdm_class(disable=True, name="huggingface_hub.snapshot_download", total=0, unit="B")
        bar.total = 100
        bar.update(40)
        bar.refresh()
        bar.close()
        other = tqdm_class(disable=True, name="files", total=7)
        other.refresh()
        other.close()
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("org/some-model.v2", lambda *progress: calls.append(progress)) == path
    assert calls[-1] == ("download", 40, 100)
    assert {total for _, _, total in calls} <= {0, 100}


def test_an_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=r"org/model is not in the hub's cache.*cannot be reached"):
        resolve("org/model")


def test_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full, raising=False)
    with pytest.raises(CheckpointError, match=r"the disk is full.*org/model.*HF_HOME"):
        resolve("org/model")


def test_importing_the_module_loads_no_torch() -> None:
    code = "import sys, stretto.models.source; print('torch' in sys.modules, 'httpx2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
