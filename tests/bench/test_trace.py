"""The command `stretto bench trace` in virtual time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace file in Azure's format: a hundred requests, one per second."""
    rows = [
        f"2023-11-16 18:{at // 60:02}:{at % 60:02}.0000000,{200 + 29 * (at % 40)},40" for at in range(100)
    ]
    file = tmp_path_factory.mktemp("trace") / "azure.csv"
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]))
    return file


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stretto", "bench", "trace", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def report(*arguments: str) -> dict[str, Any]:
    done = bench(*arguments, "--virtual", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_replay_reports_each_tier_and_all(trace: Path) -> None:
    result = report(str(trace), "--load", "0.5", "--schedule", "fcfs", "--tiers", "priority=0.5,flex=0.5")
    tiers = result["tiers"]
    assert {"priority", "default", "flex", "all"} <= set(tiers)
    assert (tiers["all"]["sent"], tiers["default"]["sent"]) == (100, 0)
    assert tiers["priority"]["sent"] + tiers["flex"]["sent"] == 100
    for tier in tiers.values():
        assert 0 <= tier["attainment"] <= 1 and tier["goodput"] >= 0
    assert result["rate"] == pytest.approx(0.5 * result["capacity"], rel=0.05)
    assert (result["schedule"], result["load"]) == ("fcfs", 0.5)


def test_the_figures_depend_on_load_and_seed(trace: Path) -> None:
    options = [str(trace), "--requests", "40", "--load", "3"]
    first = report(*options)
    assert first["tiers"]["all"]["sent"] == 40
    assert first == report(*options), "the same seed gives the same figures"
    assert first["duration_s"] < report(*options[:-1], "1")["duration_s"] / 2


def test_tables_are_shown_without_json(trace: Path) -> None:
    done = bench(str(trace), "--virtual", "--requests", "10")
    assert done.returncode == 0, done.stderr
    assert "deadline at load 1" in done.stdout
    assert all(name in done.stdout for name in ("priority", "default", "all", "good/s", "TTFT p50", "max"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "either --virtual (simulate) or --url"),
        (["--virtual", "--url", "http://x"], "either --virtual (simulate) or --url"),
        (["--virtual", "--load", "1;2"], "several like 0.7,1,2"),
        (["--virtual", "--config", "/nowhere.toml"], "cannot read the configuration"),
        (["--virtual", "--tiers", "gold=1"], "tiers are priority, default, flex"),
        (["--virtual", "--tiers", "flex=0.5"], "sum to 0.5"),
        (["--virtual", "--tiers", "flex=x"], "no share"),
        (["--virtual", "--schedule", "edf"], "one of fcfs, deadline"),
        (["--virtual", "--load", "0"], "--load"),
    ],
)
def test_a_wrong_option_is_named(trace: Path, wrong: list[str], message: str) -> None:
    done = bench(str(trace), *wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_an_incomplete_trace_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "hole.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0000000,,5\n")
    done = bench(str(file), "--virtual")
    assert done.returncode == 1
    assert "hole.csv, line 2" in " ".join(done.stderr.split())
