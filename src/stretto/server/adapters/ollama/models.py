"""What Ollama's API tells of the models: `/api/tags`, `/api/ps`, `/api/show` and `/api/version`."""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256

from msgspec import json, structs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stretto.protocol.ollama import (
    API_VERSION,
    ModelDetails,
    OllamaModel,
    OllamaModels,
    OllamaShow,
    OllamaShown,
    OllamaVersion,
)
from stretto.protocol.parsing import JSON, as_it_is, parse
from stretto.server.adapters.ollama.answers import known_as
from stretto.server.objectives import DEFAULT
from stretto.server.state import Call, Server
from stretto.text import reasoning_parser
from stretto.text.tokenizer import TextModel
from stretto.types import ModelInfo

SHOW = json.Decoder(OllamaShow)
NEVER = "2318-12-31T00:00:00Z"  # no model is unloaded


async def show(call: Call) -> None:
    """Describes one model. Raises StrettoError."""
    request = parse(SHOW, call.body, as_it_is)
    name = request.model or request.name
    call.label(known_as(name), DEFAULT)
    model = call.server.model(known_as(name))
    family, template = model.info.family, model.text.template
    shown = OllamaShown(
        template="" if template is None else template.source,
        details=_details(model.info),
        capabilities=_capabilities(model.text),
        modified_at=_time(call.server),
        model_info={
            "general.architecture": family,
            "general.basename": model.name,
            "general.parameter_count": model.info.parameters,
            f"{family}.context_length": model.info.context,
            f"{family}.vocab_size": model.info.vocab,
        },
    )
    await call.respond(Response(json.encode(shown), media_type=JSON))


class ModelPages:
    """The handlers of the routes that only read, for one server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/api/tags", self.tags),
            Route("/api/ps", self.running),
            Route("/api/version", self.version),
        ]

    async def tags(self, request: Request) -> Response:
        """All models that are loaded."""
        self._server.tenant(request.headers)
        return _json(OllamaModels([model for model, _ in self._models()]))

    async def running(self, request: Request) -> Response:
        """The same models, with the memory that they take."""
        self._server.tenant(request.headers)
        return _json(OllamaModels([_running(model, info) for model, info in self._models()]))

    async def version(self, request: Request) -> Response:
        """The version of the API."""
        return _json(OllamaVersion(API_VERSION))

    def _models(self) -> list[tuple[OllamaModel, ModelInfo]]:
        server = self._server
        infos = {name: server.info(name) for name in server.texts}
        return [(_model(name, info, server), info) for name, info in infos.items() if info is not None]


def _model(name: str, info: ModelInfo, server: Server) -> OllamaModel:
    return OllamaModel(
        name=name,
        model=name,
        modified_at=_time(server),
        size=info.weight_bytes,
        digest=sha256(f"{name} {info.weight_bytes}".encode()).hexdigest(),
        details=_details(info),
    )


def _running(model: OllamaModel, info: ModelInfo) -> OllamaModel:
    memory = 0 if info.device == "cpu" else info.weight_bytes + info.kv_bytes
    return structs.replace(model, expires_at=NEVER, size_vram=memory, context_length=info.context)


def _details(info: ModelInfo) -> ModelDetails:
    return ModelDetails(
        family=info.family,
        families=[info.family],
        parameter_size=_size(info.parameters),
        quantization_level=info.quantise or info.dtype,
    )


def _capabilities(text: TextModel) -> list[str]:
    found = ["completion", "embedding"]
    if text.template is not None and text.template.mentions("tools"):
        found.append("tools")
    if text.template is not None and text.template.mentions(reasoning_parser.CLOSE):
        found.append("thinking")
    return found


def _size(parameters: int) -> str:
    unit, name = (10**9, "B") if parameters >= 10**9 else (10**6, "M")
    return f"{parameters / unit:.1f}{name}"


def _time(server: Server) -> str:
    return datetime.fromtimestamp(server.created, UTC).isoformat().replace("+00:00", "Z")


def _json(value: object) -> Response:
    return Response(json.encode(value), media_type=JSON)
