"""For every test: torch's operators run on one thread, since two of them would spin against the servers that
tests start on the same cores; and what those servers keep on disk goes with the tests. Where there is no GPU,
Triton interprets: it reads that when it is first imported, by whichever test is.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
