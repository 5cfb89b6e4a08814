"""The command `stretto bench engine`, on a small model and on the null model."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from stretto.bench.metrics import GoodputLimits
from stretto.errors import StartError
from tests.models.checkpoints import make


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stretto", "bench", "engine", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("qwen3")
    make("qwen3", directory)
    options = ["--batch", "1,3", "--context", "24,40", "--output-tokens", "6", "--threads", "1"]
    done = bench(str(directory), *options, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_every_batch_size_and_context_is_measured(report: dict[str, Any]) -> None:
    figures = report["figures"]
    assert [(each["batch"], each["context"]) for each in figures] == [(1, 24), (3, 24), (1, 40), (3, 40)]
    assert report["threads"] == 1 and report["first_token_s"] > report["start_s"] > 0
    for each in figures:
        assert each["rounds"] == 5 and each["ttft_ms"] > 0
        assert each["prefill_tokens_per_s"] == pytest.approx(
            each["batch"] * each["context"] / each["ttft_ms"] * 1e3
        )
        assert each["decode_tokens_per_s"] == pytest.approx(each["batch"] / each["step_ms"] * 1e3)
        assert 0 < each["mbu"] < 1


def test_a_step_is_timed_layer_by_layer(report: dict[str, Any]) -> None:
    parts = {part["layer"]: part for part in report["parts"]}
    assert {"qkv", "out", "gate_up", "down", "head", "attention", "norm", "between"} <= set(parts)
    linears = sum(parts[name]["bytes"] for name in ("qkv", "out", "gate_up", "down", "head"))
    assert 0 < linears <= report["model"]["weight_bytes"]
    assert all(part["ms"] > 0 for part in parts.values())
    read = [part for part in parts.values() if part["bytes"]]
    assert {part["layer"] for part in read} == {"qkv", "out", "gate_up", "down", "head", "attention"}
    assert all(
        part["floor"] == pytest.approx(part["bytes"] / report["bandwidth_gb_s"] / part["ms"] / 1e6)
        for part in read
    )


def test_the_null_model_prints_a_table_without_layers() -> None:
    done = bench("null=null:1", "--batch", "2", "--context", "8")
    assert done.returncode == 0, done.stderr
    assert "decode tok/s" in done.stdout and "of bandwidth" in done.stdout and "qkv" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "9000"], "do not fit the context of 8192"),
        (["--batch", "300"], "raise kv_memory or max_running"),
    ],
)
def test_a_case_that_does_not_fit_is_refused(options: list[str], message: str) -> None:
    done = bench("null", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_goodput_limits_are_parsed_or_refused() -> None:
    assert GoodputLimits.of("ttft:200,e2e:3000") == GoodputLimits(ttft_ms=200, e2e_ms=3000)
    assert GoodputLimits.of("tpot:50.5 ttft:1") == GoodputLimits(tpot_ms=50.5, ttft_ms=1)
    assert GoodputLimits.of("") == GoodputLimits()
    for wrong in ("ttft", "itl:5", "ttft:-1", "ttft:nan"):
        with pytest.raises(StartError, match="--goodput"):
            GoodputLimits.of(wrong)
