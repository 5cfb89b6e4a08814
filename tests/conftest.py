"""Settings for all tests.

Torch runs on one thread, because its spinning threads would slow down the servers that tests start. Servers
keep their caches in a temporary folder. Without a GPU, Triton runs in its interpreter. Triton reads that
setting at its first import, so it is set here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

DESK = Path(__file__).parent.parent / "src" / "stretto" / "desk"

# Each run draws the same values; `--hypothesis-profile explore` draws others. A slow machine fails no test.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeatable")

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def desk_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server process that runs the bundled model."""
    if not (DESK / "config.json").exists():
        pytest.skip("the bundled model is not in this tree: recipes/desk makes it")
    log = tmp_path_factory.mktemp("serve") / "out"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "stretto", "serve", "--port", "0"], stdout=out)
    deadline = time.monotonic() + 100
    try:
        while not (found := re.search(r"^ready .* (http://\S+)$", log.read_text(), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield found[1]
    finally:
        process.terminate()
        process.wait()
