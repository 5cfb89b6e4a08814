"""The routes that report state, and the web page at `/` with its files and plotly.js."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from msgspec import json, msgpack
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from stretto.errors import NotFound, Overloaded
from stretto.http.page_files import TYPES, PageFiles
from stretto.http.request import read_body
from stretto.protocol.health import Health, Status
from stretto.protocol.openai import ModelCard, ModelList
from stretto.protocol.parsing import JSON, parse
from stretto.protocol.relay import RELAY, ErasureReport, ErasureRequest
from stretto.protocol.vllm import Version
from stretto.server import openapi
from stretto.server.state import Server
from stretto.server.variants.cards import cards_of

LIVE_S = 0.5
VIEWERS = 32  # each costs a snapshot every LIVE_S
MSGPACK = "application/msgpack"
FILES = files("stretto.server") / "static"
PLOTLY = "plotly.min.js"
FOLDERS = ("vendor", "realtime", "ladder", "docs")
PLACES = {"/realtime": "realtime/index.html", "/docs": "docs/index.html"}  # pages beside the one at `/`
LASTING = frozenset({PLOTLY})  # changes only with a release of its package


def plotly() -> Path:
    """The file of plotly.js. The package is not imported. Raises NotFound."""
    spec = find_spec("plotly")
    if spec is None or spec.origin is None:
        raise NotFound(f"{PLOTLY} is not installed")
    return Path(spec.origin).parent / "package_data" / PLOTLY


PAGE = PageFiles(
    {PLOTLY: plotly}
    | {file.name: file for file in FILES.iterdir() if file.is_file()}
    | {
        f"{folder}/{file.name}": file
        for folder in FOLDERS
        for file in (FILES / folder).iterdir()
        if file.name.rpartition(".")[2] in TYPES
    },
    LASTING,
)


class Pages:
    """The handlers of these routes, for one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._viewers = 0

    def routes(self) -> list[Route]:
        """All routes that need no engine."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/", self.page),
            Route("/page/{name:path}", self.page),
            *(Route(place, self.beside) for place in PLACES),
            Route("/redoc", self.reference),
            Route("/openapi.json", self.openapi),
            Route("/version", self.version),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/state", self.state),
            Route("/live", self.live),
            Route("/metrics", self.metrics),
            Route(RELAY, self.report, methods=["GET"]),
            Route(RELAY, self.erase, methods=["DELETE"]),
        ]

    async def health(self, request: Request) -> Response:
        """Whether the process is alive, and the state of its engine with the reason."""
        engine = self._server.engine.health()
        status = "ok" if engine.state in ("loading", "ready") else "degraded"
        return _json(Health(status=status, engine=engine))

    async def ready(self, request: Request) -> Response:
        """Whether the server accepts requests."""
        self._server.gate.ensure_open()
        return _json(Status())

    async def metrics(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        metrics = self._server.metrics
        return Response(metrics.text(), media_type=metrics.content_type)

    async def report(self, request: Request) -> Response:
        """The worker's state for gateways, as msgpack: with a gateway_key, for those that have it."""
        tenant = self._server.tenant(request.headers)
        if self._server.config.gateway_key:
            self._server.ensure_gateway(tenant, "read reports")
        return Response(msgpack.encode(self._server.report()), media_type=MSGPACK)

    async def erase(self, request: Request) -> Response:
        """Drops the cached prompts of a tenant, for a gateway. Raises Unauthorised for anybody else."""
        server = self._server
        server.ensure_gateway(server.tenant(request.headers), "erase")
        body = await read_body(request, server.config.max_body_bytes)
        erasure = parse(json.Decoder(ErasureRequest), body)
        return _json(ErasureReport(*await server.engine.erase(erasure.tenant, erasure.subject)))

    async def state(self, request: Request) -> Response:
        """The worker's state."""
        self._server.tenant(request.headers)
        return _json(self._server.worker_state())

    async def live(self, request: Request) -> Response:
        """Server-sent events: a snapshot of the last seconds, twice a second until the server drains."""
        self._server.tenant(request.headers)
        if self._viewers >= VIEWERS:
            raise Overloaded(f"{VIEWERS} clients watch already; close one, or try again", retry_after=10.0)
        headers = {"Cache-Control": "no-store"}
        if request.method == "HEAD":
            return Response(media_type="text/event-stream", headers=headers)
        return StreamingResponse(self._snapshots(), media_type="text/event-stream", headers=headers)

    async def _snapshots(self) -> AsyncIterator[bytes]:
        server = self._server
        self._viewers += 1
        first = True
        try:
            while not server.gate.draining:
                engine = server.engine
                now = server.recent.snapshot(
                    running=len(server.calls), restarts=engine.restarts, ready=engine.ready
                )
                now = server.recent.with_history(now) if first else now
                first = False
                yield b"data: " + json.encode(now) + b"\n\n"
                await asyncio.sleep(LIVE_S)
        finally:
            self._viewers -= 1

    async def version(self, request: Request) -> Response:
        """The version of Stretto, in vLLM's shape."""
        return _json(Version(version("stretto")))

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        return _json(openapi.document())

    async def models(self, request: Request) -> Response:
        """All models."""
        self._server.tenant(request.headers)
        return _json(ModelList(data=[self._card(name) for name in self._server.texts]))

    async def model(self, request: Request) -> Response:
        """One model."""
        self._server.tenant(request.headers)
        name = request.path_params["name"]
        self._server.ensure_known(name)
        return _json(self._card(name))

    def page(self, request: Request) -> Response:
        """A file of the page. Starlette runs this in a thread: the first call of each file compresses it."""
        return PAGE.answer(request, request.path_params.get("name", "index.html"))

    def beside(self, request: Request) -> Response:
        """A page beside the first one: what is read while it is typed, and the reference of the API."""
        place = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if request.scope.get("raw_path", b"").endswith(b"/"):  # its links are relative to the folder above
            return RedirectResponse(f"..{place}")
        return PAGE.answer(request, PLACES[place])

    def reference(self, request: Request) -> Response:
        """Where the reference of the API is."""
        return RedirectResponse("docs")

    def _card(self, name: str) -> ModelCard:
        info = self._server.info(name)
        context = None if info is None else info.context
        ladder = self._server.ladders.get(name)
        variants = None if ladder is None else cards_of(ladder, self._server.engine.snapshots())
        return ModelCard(id=name, created=self._server.created, max_model_len=context, variants=variants)


def _json(value: object) -> Response:
    return Response(json.encode(value), media_type=JSON)
