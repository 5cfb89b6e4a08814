"""`benchmarks/gpu_serve.py` without a GPU: what it keeps of a run that is cut off, and what it leaves out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu_serve

LOADS = ("first 1", "first 2", "warm 1", "warm 2")  # 16 s, 6 s, 16 s and 6 s
TWO_LOADS = ("m", "--at-once", "1", "2")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with a clock of its own and no processes: a start takes 20 s, and a load 1 s a request."""
    now = [0.0]

    @contextmanager
    def running(server: Any) -> Generator[float]:
        now[0] += 20.0
        yield 20.0

    def load(server: Any, shape: list[str], requests: int, seed: int) -> dict[str, Any]:
        now[0] += requests
        return dict.fromkeys(("ttft_ms", "itl_ms", "goodput")) | {"output_tokens_per_s": 1.0, "failed": 0}

    monkeypatch.setattr(gpu_serve, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu_serve, "running", running)
    monkeypatch.setattr(gpu_serve, "load", load)
    return gpu_serve


def test_a_run_that_is_cut_off_has_written_the_loads_that_were_done(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, file = serve.load, tmp_path / "rows.json"

    def cut_off(server: Any, shape: list[str], requests: int, seed: int) -> dict[str, Any]:
        if seed == 3:
            raise KeyboardInterrupt
        return load(server, shape, requests, seed)

    monkeypatch.setattr(serve, "load", cut_off)
    monkeypatch.setattr(sys, "argv", ["gpu_serve", *TWO_LOADS, "--json", str(file)])
    with pytest.raises(KeyboardInterrupt):
        serve.main()
    assert [row["load"] for row in json.loads(file.read_text())] == ["1 at once", "2 at once"]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("seconds", "ours", "theirs"), [(1000, 4, 4), (110, 4, 2), (60, 3, 0), (41, 1, 0), (9, 0, 0)]
)
def test_loads_that_do_not_fit_are_skipped_and_named(
    serve: Any,
    seconds: int,
    ours: int,
    theirs: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [*TWO_LOADS, "--vllm", "python", "--seconds-left", str(seconds)]
    monkeypatch.setattr(sys, "argv", ["gpu_serve", *arguments])
    serve.main()
    lines = re.findall(r"^ *(stretto|vllm) +(.*) at once: (.*)$", capsys.readouterr().out, re.MULTILINE)
    told = {(server, " ".join(load.split())): "skipped" not in rest for server, load, rest in lines}
    assert len(lines) == len(told) == 2 * len(LOADS)
    assert [told["stretto", each] for each in LOADS] == [at < ours for at in range(4)]
    assert [told["vllm", each] for each in LOADS] == [at < theirs for at in range(4)]


def test_a_steady_pass_has_more_requests_and_is_expected_to_take_longer(
    serve: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 s are left for it. It needs 30 s for one load and 60 for the other, so only the first fits."""
    sent: dict[str, int] = {}
    load = serve.load

    def counted(server: Any, shape: list[str], requests: int, seed: int) -> dict[str, Any]:
        sent[f"{seed}: {shape[-1]}"] = requests
        return load(server, shape, requests, seed)

    monkeypatch.setattr(serve, "load", counted)
    arguments = [*TWO_LOADS, "--passes", "warm", "--steady", "30", "--seconds-left", "82"]
    monkeypatch.setattr(sys, "argv", ["gpu_serve", *arguments])
    serve.main()
    assert sent == {"1: 1": 16, "2: 2": 6, "3: 1": 30}
    assert "steady    2 at once: skipped" in capsys.readouterr().out
