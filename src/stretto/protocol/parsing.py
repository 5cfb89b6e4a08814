"""Request bodies -> wire types. An error names the wrong field by its path, as `$.messages[0].content`."""

from __future__ import annotations

import re
from typing import TypeVar

from msgspec import DecodeError, ValidationError, json

from stretto.errors import InvalidRequest, TooLarge, UnsupportedField

T = TypeVar("T")
JSON = "application/json"
# Decoding takes 0.1 us for each list or object and blocks the event loop.
MAX_CONTAINERS = 100_000
_PLACE = re.compile(r"(.*?)(?: - at (?:`(?:key|value)` in )?`(\$.*)`)?", re.DOTALL)
_FIELD = re.compile(r"`(.*)`$", re.DOTALL)


def parse(decoder: json.Decoder[T], body: bytes, content_type: str | None = None) -> T:
    """Decodes a request body. `content_type` is the value of that header, None if it was not sent.

    Raises InvalidRequest for a malformed body or a wrong value, UnsupportedField for a field or a value that
    this server does not implement, and TooLarge for more than MAX_CONTAINERS lists and objects.
    """
    # A browser sends JSON to another origin only if a CORS preflight allows it. Requiring this content type
    # therefore stops web pages from using a server on loopback.
    if content_type is not None and content_type.partition(";")[0].strip().lower() != JSON:
        raise InvalidRequest(f"the content type must be {JSON}, not {content_type}")
    if len(body) > MAX_CONTAINERS and body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise TooLarge(f"the body contains more than {MAX_CONTAINERS} lists and objects; send fewer")
    try:
        return decoder.decode(body)
    except ValidationError as error:
        raise _error_with_path(str(error)) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the JSON of the body is nested too deeply; flatten it") from error


def _error_with_path(message: str) -> InvalidRequest:
    """The error for a message of msgspec, which ends in the path of the wrong field unless that is `$`."""
    match = _PLACE.fullmatch(message)
    problem, path = (match[1], match[2] or "$") if match else (message, "$")
    field = _FIELD.search(problem)
    if problem.startswith("Object contains unknown field") and field:
        name = f"{path}.{field[1]}"
        return UnsupportedField(f"{name} is not a field that this server supports; leave it out", param=name)
    if problem.startswith("Object missing required field") and field:
        name = f"{path}.{field[1]}"
        return InvalidRequest(f"{name} is missing", param=name)
    lower = problem[0].lower() + problem[1:]
    if problem.startswith(("Invalid value", "Invalid enum value")):
        return UnsupportedField(f"{path}: {lower}, or a value this server does not support", param=path)
    if problem.startswith("Expected `null`"):
        return UnsupportedField(f"{path} is not supported by this server; leave it out", param=path)
    return InvalidRequest(f"{path}: {lower}", param=path)
