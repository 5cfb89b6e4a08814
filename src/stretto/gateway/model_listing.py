"""The pages of a gateway that tell of models and versions: all models of all workers, each once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

from msgspec import DecodeError, Raw, Struct, ValidationError, json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stretto.errors import UnknownModel
from stretto.gateway.accounts.accounts import Account
from stretto.gateway.registry import CONNECT_S, Registry, Worker
from stretto.gateway.upstream.connection import WorkerLost
from stretto.protocol.ollama import API_VERSION, OllamaVersion
from stretto.protocol.openai import ModelCard, ModelList
from stretto.protocol.parsing import JSON
from stretto.protocol.vllm import Version

MOST_LIST_BYTES = 4 << 20


class _Named(Struct):
    name: str


class _Listed(Struct):
    """The answer of `/api/tags` and `/api/ps`, with the models as they came."""

    models: list[Raw] = []


class ModelListing:
    """The handlers of these pages. `account` raises Unauthorised for a request without a valid key."""

    def __init__(self, registry: Registry, account: Callable[[Request], Account]) -> None:
        self._registry = registry
        self._account = account

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/api/tags", self.listed),
            Route("/api/ps", self.listed),
            Route("/api/version", self.ollama_version),
            Route("/version", self.version),
        ]

    async def models(self, request: Request) -> Response:
        """All models."""
        return _json(ModelList(data=list(self._cards(self._account(request)).values())))

    async def model(self, request: Request) -> Response:
        """One model."""
        name, cards = request.path_params["name"], self._cards(self._account(request))
        if name not in cards:
            known = ", ".join(sorted(cards)) or "none"
            raise UnknownModel(f"there is no model {name!r}; the workers have {known}", param="$.model")
        return _json(cards[name])

    async def listed(self, request: Request) -> Response:
        """All models in Ollama's shape, as the workers describe them."""
        account = self._account(request)
        covered: set[str] = set()
        asked: list[Worker] = []
        for worker in self._registry.workers.values():
            if worker.view.usable and not worker.plain and not worker.models.keys() <= covered:
                covered |= worker.models.keys()
                asked.append(worker)
        found: dict[str, Raw] = {}
        for models in await asyncio.gather(*(_models_of(worker, request.url.path) for worker in asked)):
            for name, model in models.items():
                if account.allows(name):
                    found.setdefault(name, model)
        return _json(_Listed(list(found.values())))

    async def ollama_version(self, request: Request) -> Response:
        """The version of Ollama's API."""
        return _json(OllamaVersion(API_VERSION))

    async def version(self, request: Request) -> Response:
        """The version of Stretto, in vLLM's shape."""
        return _json(Version(version("stretto")))

    def _cards(self, account: Account) -> dict[str, ModelCard]:
        known = {
            name: None if info is None else info.context
            for worker in self._registry.workers.values()
            for name, info in worker.models.items()
            if account.allows(name)
        }
        return {name: ModelCard(id=name, created=0, max_model_len=context) for name, context in known.items()}


async def _models_of(worker: Worker, path: str) -> dict[str, Raw]:
    """The models of one worker by name; empty when it does not answer."""
    pool = worker.pool
    try:
        async with asyncio.timeout(CONNECT_S):
            connection = await pool.acquire(CONNECT_S)
            asked = partial(pool.request, "GET", path, {})
            connection, head = await pool.send(connection, asked, CONNECT_S)
            try:
                body = await connection.read_all(MOST_LIST_BYTES)
            finally:
                pool.release(connection)
        models = json.decode(body, type=_Listed).models if head.status == 200 else []
        return {json.decode(model, type=_Named).name: model for model in models}
    except (WorkerLost, TimeoutError, DecodeError, ValidationError):
        return {}


def _json(value: object) -> Response:
    return Response(json.encode(value), media_type=JSON)
