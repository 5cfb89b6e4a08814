"""ASGI middleware: refuses by their headers requests that strangers' web pages make, and answers CORS.

It decides before the handler runs and before a body is read, and adds nothing to the cost of a token.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stretto.config import HttpConfig
from stretto.errors import ForeignHost, ForeignOrigin, InvalidHttp, StrettoError, UnsupportedMedia
from stretto.http.exchange import KEY
from stretto.http.hosts import HostRule, OriginRule

READING = ("GET", "HEAD", "OPTIONS")
SOCKET = "WebSocket"  # stands where a request has its method
FROM_ELSEWHERE = ("cross-site", "same-site")
EXPOSED = b"x-request-id, retry-after"
METHODS = "GET, POST, DELETE"
PREFLIGHT_S = "600"
PREFLIGHT = b"access-control-request-method"
WANTED_HEADERS = b"access-control-request-headers"
PRIVATE_NETWORK = b"access-control-request-private-network"
WATCHED = frozenset(
    (
        b"host",
        b"origin",
        b"sec-fetch-site",
        b"content-type",
        b"content-encoding",
        b"transfer-encoding",
        PREFLIGHT,
        WANTED_HEADERS,
        PRIVATE_NETWORK,
    )
)
CODINGS = {b"content-encoding": "identity", b"transfer-encoding": "chunked"}
Found = dict[bytes, str]


class Guard:
    """Checks `Host`, `Origin`, `Sec-Fetch-Site` and the coding of a body. `count` gets an error's code.

    A page of another origin may open no WebSocket, whose messages it could read without being asked.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig, count: Callable[[str], None]) -> None:
        self._app = app
        self._hosts = HostRule(config)
        self._origins = OriginRule(config)
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers a preflight. Raises StrettoError for what it refuses."""
        try:
            found = self._headers(scope)
            origin = self._check(scope, found)
        except StrettoError as error:
            self._count(error.code)
            raise
        app = self._app
        if origin is not None:
            scope[KEY].extra = _shared(origin)
            if scope["type"] == "http" and scope["method"] == "OPTIONS" and PREFLIGHT in found:
                app = _preflight(found)
        await app(scope, receive, send)

    def _headers(self, scope: Scope) -> Found:
        """The headers that the checks read. Raises InvalidHttp if one comes twice, or `Host` never."""
        found: Found = {}
        for name, value in scope["headers"]:
            if name in WATCHED:
                if name in found:
                    raise InvalidHttp(f"the header {name.decode()} is there twice; send it once")
                found[name] = value.decode("latin-1")
        if b"host" not in found and scope["http_version"] == "1.1":
            raise InvalidHttp("the header Host is missing; HTTP/1.1 requires it")
        return found

    def _check(self, scope: Scope, found: Found) -> str | None:
        """The origin of `cors_origins` that sent the request, None if none did. Raises StrettoError."""
        host = found.get(b"host")
        if host is not None and not self._hosts.allows(host):
            raise ForeignHost(
                f"this server does not answer for the host {host[:100]!r}; add its name to `allowed_hosts`"
            )
        for name, plain in CODINGS.items():
            if (coding := found.get(name)) is not None and coding.lower() != plain:
                raise UnsupportedMedia(
                    f"{name.decode()} {coding[:100]!r} is not supported; send the body as it is"
                )
        origin, reading = found.get(b"origin"), scope.get("method", SOCKET) in READING
        if origin is None:
            if found.get(b"sec-fetch-site") in FROM_ELSEWHERE and not reading:
                raise ForeignOrigin("web pages of other sites may not send requests to this server")
            return None
        if self._origins.shares(origin):
            return origin
        own = self._origins.own(origin, host or "")
        elsewhere = not own or found.get(b"sec-fetch-site") in FROM_ELSEWHERE
        if elsewhere and (not reading or PREFLIGHT in found):
            raise ForeignOrigin(
                f"web pages of {origin[:100]!r} may not use this server; add that origin to `cors_origins`"
            )
        return None


def _shared(origin: str) -> list[tuple[bytes, bytes]]:
    """The headers that let a page of `origin` read an answer."""
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", EXPOSED),
        (b"vary", b"origin"),
    ]


def _preflight(found: Found) -> Response:
    """Allows what a browser asks before it sends a page's request."""
    headers = {"access-control-allow-methods": METHODS, "access-control-max-age": PREFLIGHT_S}
    if wanted := found.get(WANTED_HEADERS):
        headers["access-control-allow-headers"] = wanted
    if found.get(PRIVATE_NETWORK) == "true":
        headers["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=headers)
