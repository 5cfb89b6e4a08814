"""Reading tensors in parts, by several threads, into a dtype that the file does not have."""

# pyright: reportUnknownVariableType=false
from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stretto.errors import CheckpointError
from stretto.models import checkpoint
from stretto.models.checkpoint import Checkpoint


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A tensor in `tmp_path` that is read in many small parts."""
    monkeypatch.setattr(checkpoint, "STAGE", 96)
    monkeypatch.setattr(checkpoint, "LEAST_READ", 8)
    held = torch.arange(50 * 37).view(50, 37).bfloat16()
    save_file({"a": held}, tmp_path / "model.safetensors")
    return held


def test_parts_that_threads_read_make_up_the_tensor(tmp_path: Path, stored: torch.Tensor) -> None:
    into = torch.full(stored.shape, torch.nan)
    with Checkpoint(tmp_path) as opened:
        opened.read(opened.find("a", (50, 37)), into)
    assert torch.equal(into, stored.float())


def test_a_file_that_ends_while_it_is_read_is_an_error(tmp_path: Path, stored: torch.Tensor) -> None:
    with Checkpoint(tmp_path) as opened:
        os.truncate(tmp_path / "model.safetensors", 3000)
        with pytest.raises(CheckpointError, match="ends early"):
            opened.read(opened.find("a", (50, 37)), torch.empty(stored.shape))
