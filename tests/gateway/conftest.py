"""What the tests of the gateway share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.checkpoint import CHATML, byte_level, write


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tiny"), byte_level(), CHATML, eos="<|stop|>")
