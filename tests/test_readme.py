"""The commands in the README run in a bare shell, in a folder with `.venv`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python) run\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"
BARE = "/usr/local/bin:/usr/bin:/bin"
# Where this checkout is not the installed one, its path is all that the shell knows besides PATH and HOME.
CHECKOUT = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with `.venv`, like a clone after `make run`."""
    if not Path(sys.prefix, "bin", "activate").exists():
        pytest.skip("the tests run outside of a virtual environment")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def test_the_readme_has_commands_to_run() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_each_command_block_runs(language: str, block: str, desk_url: str, clone: Path) -> None:
    if "import openai" in block or "from openai" in block:
        assert "pip install openai" in README.partition(block)[0], "it is not among Stretto's dependencies"
    block = block.replace(ADDRESS, desk_url)
    script = block if language == "bash" else f". .venv/bin/activate\npython -c {shlex.quote(block)}"
    done = subprocess.run(
        ["bash", "--norc", "-euc", script],
        capture_output=True,
        text=True,
        cwd=clone,
        env={"PATH": BARE, "HOME": str(clone), **CHECKOUT},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout


def test_links_lead_to_existing_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_every_stretto_command_in_the_readme_exists() -> None:
    named = set(re.findall(r"^\| `stretto (\w+(?: (?:serve|trace|engine))?)", README, re.MULTILINE))
    assert named == {
        "serve",
        "chat",
        "run",
        "bench serve",
        "bench trace",
        "bench engine",
        "optimise",
        "gateway",
        "keys",
        "doctor",
    }


def test_ratios_in_the_readme_equal_those_of_the_docs() -> None:
    for ratio, page in re.findall(r"\[(\d\.\d\dx)\]\((docs/\w+\.md)", README):
        assert ratio in (ROOT / page).read_text(), (ratio, page)
