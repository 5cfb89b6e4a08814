"""What server and gateway read alike: the API key of a request, its path, and its body."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hmac import compare_digest

from starlette.requests import ClientDisconnect, Request

from stretto.errors import TooLarge, Unauthorised, UnsupportedField

HEADERS = ("authorization", "x-api-key")
_SLASHES = re.compile("/{2,}")


def given_keys(headers: Mapping[str, str]) -> list[str]:
    """The API keys that a request has: `Authorization: Bearer KEY`, then `x-api-key: KEY`."""
    scheme, _, bearer = headers.get(HEADERS[0], "").partition(" ")
    given = [bearer.strip()] if scheme.lower() == "bearer" else []
    given.append(headers.get(HEADERS[1], "").strip())
    return [key for key in given if key]


def tenant_of(headers: Mapping[str, str], keys: Mapping[str, str]) -> str:
    """The tenant whose key a request has, of `keys`: key -> tenant. Raises Unauthorised.

    One valid key is enough. A wrong key takes as long as a right one, so that the time tells nothing about
    the keys.
    """
    given = given_keys(headers)
    found = [
        tenant
        for key, tenant in keys.items()
        for each in given
        if compare_digest(key.encode(), each.encode())
    ]
    if not found:
        raise Unauthorised("send a valid API key: `Authorization: Bearer KEY` or `x-api-key: KEY`")
    return found[0]


def plain_path(path: str) -> str:
    """The path without a slash at its end or twice in a row, which clients make of a base URL that ends in
    one. No route has either."""
    if "//" in path:
        path = _SLASHES.sub("/", path)
    return path[:-1] if len(path) > 1 and path[-1] == "/" else path


def refuse_stream(query: Mapping[str, str]) -> None:
    """Raises UnsupportedField if the query asks for the events of an answer that was kept whole."""
    if query.get("stream", "").lower() in ("true", "1"):
        raise UnsupportedField(
            "stream: a kept answer has no events any more; leave stream out of the query", param="stream"
        )


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises TooLarge as soon as the header announces more than `limit` bytes or more have arrived, and
    ClientDisconnect when the client closes the connection.
    """
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size, more = 0, True
    while more:  # as `request.stream` does, at a third of its cost
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body may have {limit} bytes at most; send less")
