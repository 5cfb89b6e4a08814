"""The HTTP edge: reads and checks bodies and keys, writes JSON and errors in OpenAI's shape. Plain ASGI."""

from __future__ import annotations

import logging
import math
import re
from hmac import compare_digest
from typing import TypeVar

from msgspec import DecodeError, ValidationError, json
from starlette.types import Message, Receive, Scope, Send

from stretto.errors import InvalidRequest, StrettoError, TooLarge, Unauthorised, UnsupportedField

log = logging.getLogger(__name__)
T = TypeVar("T")
JSON = b"application/json"
LOCAL = "local"
# Making each takes a tenth of a microsecond, in which no other request moves.
CONTAINERS = 100_000
_PLACE = re.compile(r"(.*?)(?: - at (?:`(?:key|value)` in )?`(\$.*)`)?", re.DOTALL)
_FIELD = re.compile(r"`(.*)`$", re.DOTALL)


class ClientGone(Exception):
    """The client went away while it was sending."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises TooLarge beyond `limit` bytes, before reading them; ClientGone."""
    declared = _header(scope, b"content-length")
    too_large = TooLarge(f"the body may be {limit} bytes at most")
    if declared is not None and (not declared.isdigit() or int(declared) > limit):
        raise too_large
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def parse(decoder: json.Decoder[T], scope: Scope, body: bytes) -> T:
    """The request in `body`. Raises InvalidRequest or UnsupportedField that names the field by its path."""
    kind = _header(scope, b"content-type")
    # A page of another site cannot send this type without asking first: what guards a server on loopback.
    if kind is not None and kind.split(b";")[0].strip().lower() != JSON:
        raise InvalidRequest(f"the body must be application/json, not {kind.decode('latin-1')}")
    if len(body) > CONTAINERS and body.count(b"[") + body.count(b"{") > CONTAINERS:
        raise TooLarge(f"the body holds more than {CONTAINERS} lists and objects")
    try:
        return decoder.decode(body)
    except ValidationError as error:
        raise _refusal(str(error)) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


def _refusal(message: str) -> InvalidRequest:
    match = _PLACE.fullmatch(message)
    what, path = (match[1], match[2] or "$") if match else (message, "$")
    field = _FIELD.search(what)
    if what.startswith("Object contains unknown field") and field:
        name = f"{path}.{field[1]}"
        return UnsupportedField(f"{name} is not a field that this server supports; leave it out", param=name)
    if what.startswith("Object missing required field") and field:
        name = f"{path}.{field[1]}"
        return InvalidRequest(f"{name} is missing", param=name)
    if what.startswith(("Invalid value", "Invalid enum value")):
        return UnsupportedField(
            f"{path}: {what[0].lower()}{what[1:]}, or not supported by this server", param=path
        )
    if what.startswith("Expected `null`"):
        return UnsupportedField(f"{path} is not supported by this server; leave it out", param=path)
    return InvalidRequest(f"{path}: {what[0].lower()}{what[1:]}", param=path)


def tenant(scope: Scope, keys: dict[str, str]) -> str:
    """Who asks. Raises Unauthorised; takes as long for a wrong key as for a right one."""
    if not keys:
        return LOCAL
    scheme, _, given = (_header(scope, b"authorization") or b"").partition(b" ")
    found = None
    for key, name in keys.items():
        if compare_digest(key.encode(), given.strip()):
            found = name
    if found is None or scheme.lower() != b"bearer":
        raise Unauthorised("send a valid API key: `Authorization: Bearer KEY`")
    return found


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


async def answer(send: Send, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """One whole JSON response."""
    fields = [(b"content-type", JSON), (b"content-length", str(len(body)).encode())]
    fields += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


def start_events() -> Message:
    """The start of a stream of server-sent events."""
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def whole_seconds(seconds: float) -> int:
    """What `Retry-After` can say."""
    return max(1, math.ceil(seconds))


async def refuse(send: Send, error: StrettoError) -> None:
    """`error` as a response."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(whole_seconds(error.retry_after))
    if isinstance(error, Unauthorised):
        headers["www-authenticate"] = "Bearer"
    await answer(send, json.encode(error.body()), error.status, headers)


def error_event(error: StrettoError) -> bytes:
    """`error` as the last event of a stream."""
    return b"data: " + json.encode(error.body()) + b"\n\n"


def internal(error: BaseException) -> StrettoError:
    """What the client may know of a bug. The log has its place, not its words: they may quote a prompt."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = (
        f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "an unknown place"
    )
    log.error("a request failed with %s at %s", type(error).__name__, where)
    return StrettoError("an error inside the server; its log names the place")
