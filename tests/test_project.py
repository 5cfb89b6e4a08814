"""The project files agree with each other: CI workflow, hooks, documentation site and pinned tools."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
REQUIREMENTS = [pin.partition(";")[0].strip() for pin in PROJECT["project"]["optional-dependencies"]["dev"]]


def parsed(path: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_workflow_runs_every_python_the_package_supports() -> None:
    jobs = parsed(".github/workflows/ci.yml")["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    built = re.findall(r"cp3(\d+)", PROJECT["tool"]["cibuildwheel"]["build"])
    assert tested == [f"3.{minor}" for minor in built]
    assert PROJECT["project"]["requires-python"] == f">={tested[0]}"


def test_every_job_has_a_time_limit_and_steps_to_run() -> None:
    for name, job in parsed(".github/workflows/ci.yml")["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name


def test_paths_in_the_workflow_and_the_makefile_exist() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for path in re.findall(r"\btests/[\w/.]+", workflow + MAKEFILE):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]\w*)", workflow)) <= targets


def test_hooks_run_pinned_tools() -> None:
    pinned = {requirement.partition("==")[0] for requirement in REQUIREMENTS}
    for hook in parsed(".pre-commit-config.yaml")["repos"][0]["hooks"]:
        assert any(tool in hook["entry"] for tool in pinned), hook["id"]


def test_development_tools_have_exact_versions() -> None:
    assert [requirement for requirement in REQUIREMENTS if "==" not in requirement] == ["triton"]


def test_the_site_builds_without_warnings_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        assert not re.findall(
            r'<(?:script|img)[^>]* src="https?:|<link[^>]* href="https?:', page.read_text()
        ), page


@pytest.mark.parametrize("goal", ["run", "check"])
def test_make_says_what_it_installs_and_lets_pip_show_its_progress(goal: str, tmp_path: Path) -> None:
    command = ["make", "--dry-run", goal, f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, _, install = done.stdout.partition("-m pip install")
    assert "200 MB" in before and "3 GB" in before
    assert not re.search(r"-q|--progress-bar|>", install.partition("\n")[0])
