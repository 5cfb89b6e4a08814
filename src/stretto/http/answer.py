"""An error as an HTTP answer: its status, its headers and its body. THE place that knows how."""

from __future__ import annotations

import math
from http import HTTPStatus

from msgspec import json

from stretto.errors import StrettoError, Unauthorised
from stretto.http.dialects import OPENAI, Dialect
from stretto.protocol.parsing import JSON
from stretto.protocol.relay import ERROR_CODE


def parts_of(
    error: StrettoError, request_id: str, dialect: Dialect = OPENAI
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers without the body's length, and body."""
    headers = {"content-type": JSON, ERROR_CODE: error.code}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorised):
        headers["www-authenticate"] = "Bearer"
    return error.status, headers, json.encode(dialect.body(error, request_id))


def bytes_of(error: StrettoError, request_id: str) -> bytes:
    """The whole answer on the wire. It says that the connection will be closed."""
    status, headers, body = parts_of(error, request_id)
    headers |= {"content-length": str(len(body)), "connection": "close", "x-request-id": request_id}
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        *(f"{name}: {headers[name]}" for name in headers),
    ]
    return "\r\n".join((*lines, "", "")).encode() + body
