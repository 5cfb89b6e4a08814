"""Every error of an application as a response: Stretto's own, the router's, and bugs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from stretto.errors import NotFound, OutOfMemory, StrettoError, WrongMethod
from stretto.http.answer import parts_of
from stretto.http.dialects import dialect_of
from stretto.http.exchange import KEY, Exchange
from stretto.telemetry.log import describe

log = logging.getLogger(__name__)
NO_THREAD = "can't start new thread"  # Python's RuntimeError where there is no memory for its stack


def internal(error: BaseException) -> StrettoError:
    """Logs where an error came from, and returns the error for the client: OutOfMemory, or that of a bug.

    Neither holds the error's message, because that may quote a prompt.
    """
    log.error("a request failed with %s", describe(error))
    if isinstance(error, MemoryError) or str(error) == NO_THREAD:
        return OutOfMemory("the server has no memory left for this request; send it again", retry_after=1)
    return StrettoError("an error inside the server; its log names the place")


async def nothing_there(scope: Scope, receive: Receive, send: Send) -> None:
    """The router's handler of paths without a route. Raises NotFound or HTTPException."""
    if scope["type"] == "websocket":
        raise NotFound(f"there is no WebSocket at {scope['path']}")
    raise HTTPException(404)


@dataclass(frozen=True, slots=True)
class NothingAt:
    """The endpoint of a path that has none, though a route with a parameter would take it for its own."""

    path: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await nothing_there(scope, receive, send)


def _methods(scope: Scope) -> str:
    """The methods of all routes at the path of a request."""
    routes = [route for route in scope["router"].routes if isinstance(route, Route)]
    found = [route.methods or () for route in routes if route.matches(scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for methods in found for method in methods}))


async def error_response(request: Request, error: Exception) -> Response:
    """Every error as a response, the router's own included."""
    allow: dict[str, str] = {}
    if isinstance(error, HTTPException):
        path = request.scope["path"]
        if error.status_code == WrongMethod.status:
            allow = {"allow": _methods(request.scope)}
            error = WrongMethod(f"{path} does not take {request.method}; use {allow['allow']}")
        else:
            error = NotFound(f"there is nothing at {path}")
    if not isinstance(error, StrettoError):
        error = internal(error)
    exchange: Exchange = request.scope[KEY]
    exchange.outcome = error.code
    status, headers, body = parts_of(error, exchange.id, dialect_of(request.scope["path"]))
    return Response(body, status, headers | allow)
