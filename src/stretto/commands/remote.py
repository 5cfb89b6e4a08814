"""A model on a server, for a chat in the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import Any

import msgspec

from stretto.bench.client import Client, RequestFailed
from stretto.errors import StartError, Unavailable
from stretto.types import Sampling


class RemoteModel:
    """Answers chats through a server. Its event loop runs only while an answer comes."""

    def __init__(
        self, runner: asyncio.Runner, url: str, key: str | None, sampling: Sampling, model: str | None
    ) -> None:
        """`model`: its name on the server, None for the server's first. Raises Unavailable, StartError."""
        self._runner = runner
        self._client = Client(url, api_key=key)
        self._sampling = sampling
        try:
            served = self._runner.run(self._client.models())
            self.model = served[0] if model is None else model
        except (RequestFailed, IndexError) as failure:
            raise Unavailable(f"{url} does not answer like a model server: {failure}") from failure
        if self.model not in served:
            raise StartError(f"{url} has no model {model!r}; choose from {', '.join(served)}")

    def __call__(self, messages: list[dict[str, Any]]) -> Generator[str]:
        body = {"model": self.model, "messages": messages, "stream": True}
        for name in ("max_tokens", "temperature", "seed"):
            if (value := getattr(self._sampling, name)) is not None:
                body[name] = value
        pieces = self._client.pieces("chat/completions", msgspec.json.encode(body))
        try:
            while (piece := self._runner.run(_next(pieces))) is not None:
                yield piece
        except RequestFailed as failure:
            raise Unavailable(str(failure)) from failure
        finally:
            self._runner.run(_close(pieces))


async def _next(pieces: AsyncGenerator[str]) -> str | None:
    return await anext(pieces, None)


async def _close(pieces: AsyncGenerator[str]) -> None:
    await pieces.aclose()
