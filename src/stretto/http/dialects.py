"""How each API writes an error: the body of a response, and the end of a stream that has begun."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple

from msgspec import json

from stretto.errors import StrettoError, Unavailable
from stretto.protocol.anthropic import AnthropicError, AnthropicErrorDetail
from stretto.protocol.ollama import OllamaError

OVERLOADED = 529  # Anthropic's status of a server that has too much to do
ANTHROPIC_TYPES: dict[int, str] = {
    HTTPStatus.BAD_REQUEST: "invalid_request_error",
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_TIMEOUT: "timeout_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class Dialect(NamedTuple):
    """`body(error, request_id)` is an error. `event` is the same in a stream, if it differs there; its JSON
    stands between `before` and `after`."""

    body: Callable[[StrettoError, str], Any]
    before: bytes
    after: bytes
    event: Callable[[StrettoError, str], Any] | None = None

    def ending(self, error: StrettoError, request_id: str) -> bytes:
        """What ends a stream that fails."""
        return self.before + json.encode((self.event or self.body)(error, request_id)) + self.after


def _openai(error: StrettoError, request_id: str) -> dict[str, Any]:
    return error.body()


def _response_event(error: StrettoError, request_id: str) -> dict[str, Any]:
    return {"type": "error", "code": error.code, "message": error.message, "param": error.param}


def _anthropic(error: StrettoError, request_id: str) -> AnthropicError:
    usual = "invalid_request_error" if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else "api_error"
    kind = "overloaded_error" if isinstance(error, Unavailable) else ANTHROPIC_TYPES.get(error.status, usual)
    return AnthropicError(error=AnthropicErrorDetail(kind, error.message), request_id=request_id)


def _ollama(error: StrettoError, request_id: str) -> OllamaError:
    return OllamaError(error.message)


OPENAI = Dialect(_openai, b"data: ", b"\n\n")
RESPONSES = Dialect(_openai, b"event: error\ndata: ", b"\n\n", _response_event)
ANTHROPIC = Dialect(_anthropic, b"event: error\ndata: ", b"\n\n")
OLLAMA = Dialect(_ollama, b"", b"\n")
PREFIXES = (("/v1/messages", ANTHROPIC), ("/api/", OLLAMA), ("/v1/responses", RESPONSES))


def dialect_of(path: str) -> Dialect:
    """The dialect of the API that a path belongs to."""
    return next((dialect for prefix, dialect in PREFIXES if path.startswith(prefix)), OPENAI)
