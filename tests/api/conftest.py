from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from stretto.api.app import App, build
from stretto.api.text import TextModel
from stretto.config import ServeConfig
from stretto.types import Request
from tests.api.checkpoint import CHATML, byte_level, write
from tests.api.fake_engine import FakeEngine, Item, info


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tiny"), byte_level(), CHATML, eos="<|stop|>")


@pytest.fixture(scope="session")
def text(checkpoint: Path) -> TextModel:
    return TextModel(checkpoint)


@pytest.fixture
def engine(text: TextModel) -> FakeEngine:
    """Says `Hello, world!` unless a test changes `script`."""
    said: list[Item] = list(text.tokenizer.encode("Hello, world!", add_special_tokens=False).ids)

    def script(request: Request) -> list[Item]:
        return list(said)

    return FakeEngine(script, {"tiny": info(vocab=text.vocab)})


@pytest.fixture
def says(text: TextModel, engine: FakeEngine) -> Callable[[str], list[int]]:
    """Makes the engine say a text, one token at a time, and returns its tokens."""

    def set_text(answer: str) -> list[int]:
        ids = text.tokenizer.encode(answer, add_special_tokens=False).ids
        engine.script = lambda request: list(ids)
        return ids

    return set_text


@pytest.fixture
def app(checkpoint: Path, engine: FakeEngine) -> App:
    return build(ServeConfig(max_waiting=32), engine, {"tiny": checkpoint})


@pytest.fixture
async def client(app: App) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
