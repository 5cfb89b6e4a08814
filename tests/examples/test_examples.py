"""The examples run with the commands in their first lines, against a server of the bundled model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
PROMETHEUS = EXAMPLES / "prometheus"
CATALOGUED = set(re.findall(r"stretto_\w+", (ROOT / "docs" / "metrics.md").read_text()))


def run(name: str, desk_url: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        capture_output=True,
        text=True,
        env=os.environ | {"STRETTO_URL": desk_url},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_readme_lists_exactly_the_examples() -> None:
    listed = set(re.findall(r"\]\(([\w./]+)\)", (EXAMPLES / "README.md").read_text()))
    there = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*.py")}
    assert there <= listed
    assert all((EXAMPLES / path).exists() for path in listed)


def test_the_objectives_example_meets_one_and_has_one_refused(desk_url: str) -> None:
    out = run("objectives.py", desk_url)
    assert "on time: True" in out
    assert "refused with 503: cannot_be_on_time" in out


def test_the_structured_output_example_follows_its_schema(desk_url: str) -> None:
    assert run("structured_output.py", desk_url).strip() in {"German", "Spanish", "other"}


def test_the_realtime_example_reads_ahead_and_interrupts(desk_url: str) -> None:
    out = run("realtime.py", desk_url)
    found = re.search(r"(\d+) of (\d+) tokens were read before", out)
    assert found is not None and int(found[2]) - 64 <= int(found[1]) < int(found[2])
    assert "tokens of the prompt are read]" in out
    assert re.findall(r"^(?:first|second) answer: (\w+)$", out, re.MULTILINE) == ["cancelled", "completed"]


def test_the_langchain_example_answers_and_streams(desk_url: str) -> None:
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    assert len(run("langchain_chat.py", desk_url).splitlines()) >= 2


def test_the_offline_batch_example_answers_every_prompt(desk_url: str) -> None:
    answers = [json.loads(line) for line in run("offline_batch.py", desk_url).splitlines()]
    assert len(answers) == 3
    assert all(answer["tokens"] >= 4 for answer in answers)


def test_the_compose_file_mounts_files_that_exist() -> None:
    for name, service in parsed(PROMETHEUS / "compose.yaml")["services"].items():
        assert re.fullmatch(r"[\w/-]+:v?\d[\w.]*", service["image"]), name
        for volume in service["volumes"]:
            assert (PROMETHEUS / volume.split(":")[0]).is_file(), volume


def test_prometheus_reads_the_rules_that_the_compose_file_mounts() -> None:
    prometheus = parsed(PROMETHEUS / "compose.yaml")["services"]["prometheus"]
    mounted = {volume.split(":")[1] for volume in prometheus["volumes"]}
    config = parsed(PROMETHEUS / "prometheus.yml")
    assert set(config["rule_files"]) <= mounted
    rules = [rule for group in parsed(ROOT / "docs" / "rules.yaml")["groups"] for rule in group["rules"]]
    used = {name for rule in rules for name in re.findall(r"\bstretto_\w+", rule["expr"])}
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert stems <= CATALOGUED


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (package prometheus)")
    text = (PROMETHEUS / "prometheus.yml").read_text()
    config = tmp_path / "prometheus.yml"
    config.write_text(text.replace("/etc/prometheus/rules.yaml", str(ROOT / "docs" / "rules.yaml")))
    done = subprocess.run([promtool, "check", "config", config], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    text = (EXAMPLES / "systemd" / "stretto.service").read_text()
    unit = tmp_path / "stretto.service"
    unit.write_text(text.replace("/opt/stretto/bin/stretto", sys.executable))
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
