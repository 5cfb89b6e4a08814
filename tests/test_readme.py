"""What the README tells people to run is run: every fenced block marked `run`, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python) run\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
DESK = ROOT / "src" / "stretto" / "desk"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not (DESK / "config.json").exists():
        pytest.skip("the bundled model is not in this tree: recipes/desk makes it")
    log = tmp_path_factory.mktemp("serve") / "out"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "stretto", "serve", "--port", "0"], stdout=out)
    deadline = time.monotonic() + 60
    while not (found := re.search(r"^ready .* (http://\S+)$", log.read_text(), re.MULTILINE)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    try:
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_the_block_works(language: str, block: str, address: str, tmp_path: Path) -> None:
    program = {"bash": ["bash", "-euc"], "python": [sys.executable, "-c"]}[language]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*program, block.replace(ADDRESS, address)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_every_command_it_names_exists() -> None:
    named = set(re.findall(r"^\| `stretto (\w+(?: (?:serve|trace|engine))?)", README, re.MULTILINE))
    assert named == {"serve", "chat", "run", "bench serve", "bench trace", "bench engine", "doctor"}
