from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.config import ServeConfig
from stretto.http import serving as lifecycle
from stretto.server.app import App
from stretto.text.tokenizer import TextModel
from tests.server.checkpoint import CHATML, byte_level, write
from tests.server.fake_engine import FakeEngine, build, info

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tiny"), byte_level(), CHATML, eos="<|stop|>")


@pytest.fixture(scope="session")
def text(checkpoint: Path) -> TextModel:
    return TextModel(checkpoint)


@pytest.fixture
def engine(text: TextModel) -> FakeEngine:
    """A fake engine that answers `Hello, world!` unless a test changes `script`."""
    ids = ids_of(text, "Hello, world!")
    return FakeEngine(lambda request: list(ids), {"tiny": info(vocab=text.tokenizer.get_vocab_size())})


def ids_of(text: TextModel, answer: str) -> list[int]:
    return text.tokenizer.encode(answer, add_special_tokens=False).ids


@pytest.fixture
def set_answer(text: TextModel, engine: FakeEngine) -> Callable[[str], list[int]]:
    """A function that makes the engine answer a text, one token at a time, and returns its token ids."""

    def set_script(answer: str) -> list[int]:
        ids = ids_of(text, answer)
        engine.script = lambda request: list(ids)
        return ids

    return set_script


@pytest.fixture
def config() -> ServeConfig:
    return ServeConfig(port=0, max_waiting=32, drain_s=0.3, schedule="deadline")


@pytest.fixture
def app(config: ServeConfig, checkpoint: Path, engine: FakeEngine) -> App:
    return build(config, engine, {"tiny": checkpoint})


@pytest.fixture
async def client(app: App) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client that calls the app without sockets. It declares every body as JSON."""
    declared = {"content-type": "application/json"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", headers=declared
    ) as client:
        yield client


@dataclass
class Served:
    url: str
    port: int
    task: asyncio.Task[None]


@pytest.fixture
async def served(config: ServeConfig, app: App, engine: FakeEngine) -> AsyncIterator[Served]:
    """A real server on a free port, in this event loop."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(lifecycle.run(config, app, engine, ready.set_result))
    await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
    url = ready.result()
    yield Served(url, int(url.rpartition(":")[2]), task)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
