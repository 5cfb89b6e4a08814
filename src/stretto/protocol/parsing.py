"""Request bodies -> wire types. An error names the wrong field by its path, as `$.messages[0].content`.

Half a surrogate pair in a string becomes U+FFFD: JavaScript sends one when it cuts an emoji in two. A mark of
the byte order in front, as .NET writes it, is left out.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Callable
from typing import Any, TypeVar, cast

from msgspec import DecodeError, Raw, ValidationError, convert, json

from stretto.errors import InvalidRequest, TooLarge, UnsupportedField, UnsupportedMedia, cut
from stretto.protocol.compatibility import accepted, as_typed
from stretto.protocol.limits import LIMITS, Limit

T = TypeVar("T")
JSON = "application/json"
# Decoding takes 0.1 us for each list or object and blocks the event loop.
MAX_CONTAINERS = LIMITS["containers"].most
# The context limits their size; a relayed request has them inside.
TEXT_FIELDS = ("messages", "prompt", "input", "request", "continuation")
LONGEST_PROBLEM = 200
_PLACE = re.compile(r"(?:`(?:key|value)` in )?`(\$.*)`", re.DOTALL)
_FIELD = re.compile(r"`(.*)`$", re.DOTALL)
_TOO_LONG = re.compile(r"Expected `(str|array|object)` of length <= (\d+)")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]|(\[\.\.\.\])")
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_TOKEN = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[\[\]{}]', re.DOTALL)
_FIELDS = json.Decoder(dict[str, Raw])


def require_json(content_type: str | None) -> None:
    """Raises UnsupportedMedia for a body that is not declared as JSON.

    A browser lets a page send JSON to another origin only if that origin allows it. Every other type, and a
    missing one, could come from a page of a stranger.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != JSON and not (kind.startswith("application/") and kind.endswith("+json")):
        sent = "missing" if content_type is None else f"{cut(content_type, LONGEST_PROBLEM)!r}"
        raise UnsupportedMedia(f"the header Content-Type is {sent}; send {JSON}")


def as_it_is(fields: dict[str, Any]) -> dict[str, Any]:
    """For `parse`: an API whose types list all that its clients send."""
    return fields


def parse(
    decoder: json.Decoder[T],
    body: bytes,
    lenient: Callable[[dict[str, Any]], dict[str, Any]] = accepted,
    history: frozenset[type] = frozenset(),
) -> T:
    """Decodes a request body. `lenient`: the usual form of one that some clients send in another. `history`:
    the types whose unknown members are left out.

    Raises InvalidRequest for a malformed body and for a value that is wrong or beyond its limit,
    UnsupportedField for a field or a value that this server does not implement, and TooLarge for more than
    MAX_CONTAINERS lists and objects.
    """
    if len(body) > MAX_CONTAINERS:
        _check_size(body)
    try:
        return decoder.decode(body)
    except ValidationError as error:
        problem = str(error)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except DecodeError as error:
        whole = without_half_pairs(body.removeprefix(BOM_UTF8))
        if whole == body:
            raise InvalidRequest(f"the body is not valid JSON: {error}") from None
        return parse(decoder, whole, lenient, history)
    except RecursionError:
        raise _too_deep(body) from None
    return _parse_otherwise(
        decoder, body, problem, lambda fields: as_typed(lenient(fields), decoder.type, history)
    )


def read_some(decoder: json.Decoder[T], body: bytes) -> tuple[T, bytes]:
    """Some fields of a body that is passed on, and the body without BOM and halves of surrogate pairs.

    Raises what `parse` raises.
    """
    try:
        return decoder.decode(body), body
    except (DecodeError, UnicodeDecodeError, RecursionError):
        whole = without_half_pairs(body.removeprefix(BOM_UTF8))
        return parse(decoder, whole, as_it_is), whole


def _parse_otherwise(
    decoder: json.Decoder[T], body: bytes, problem: str, usual_form: Callable[[dict[str, Any]], Any]
) -> T:
    """Decodes a body that clients of other servers may send. `problem`: why it is none of ours."""
    try:
        fields = json.decode(body)
        usual = usual_form(cast("dict[str, Any]", fields)) if isinstance(fields, dict) else fields
    except (DecodeError, UnicodeDecodeError, RecursionError):
        fields = usual = None
    if json.encode(usual) == json.encode(fields):  # 40.0 equals 40, and only the latter is accepted
        raise _error_with_path(problem, body)
    try:
        return convert(usual, decoder.type, str_keys=True)
    except ValidationError as error:
        raise _error_with_path(str(error), body) from None
    except RecursionError:
        raise _too_deep(body) from None


def _check_size(body: bytes) -> None:
    """Raises TooLarge or InvalidRequest for a large body that would take long to decode."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise TooLarge(f"the body contains more than {MAX_CONTAINERS} lists and objects; send fewer")
    try:
        fields = _FIELDS.decode(body)
    except (DecodeError, UnicodeDecodeError, RecursionError):
        return  # decoding it whole says what is wrong
    for name, raw in fields.items():
        path = cut(f"$.{name}", LONGEST_PROBLEM)
        size = len(memoryview(raw))
        if (
            name in ("stop_token_ids", "logit_bias")
            and (commas := bytes(raw).count(b",")) >= LIMITS[name].most
        ):
            raise LIMITS[name].error(path, commas + 1)
        if name not in TEXT_FIELDS and size > LIMITS["field_bytes"].most:
            raise LIMITS["field_bytes"].error(path, size)


def without_half_pairs(body: bytes) -> bytes:
    """The JSON with U+FFFD for each escaped half of a surrogate pair."""
    # `\\ud83d` is a backslash and letters, so escaped backslashes are hidden from the search. NUL is free for
    # that: JSON has none.
    return _HALF_PAIR.sub(rb"\\ufffd", body.replace(rb"\\", b"\0\0")).replace(b"\0\0", rb"\\")


def _too_deep(body: bytes) -> InvalidRequest:
    """The error for a body that is nested too deeply to be decoded; it names the field at the top."""
    path, depth, most = "$", 0, LIMITS["depth"].most
    for token in _TOKEN.finditer(body):
        if token[2] and depth == 1:
            path = cut(f"$.{token[1][1:-1].decode(errors='replace')}", LONGEST_PROBLEM)
        depth += (token[0] in (b"[", b"{")) - (token[0] in (b"]", b"}"))
        if depth > most + 1:
            break
    return InvalidRequest(
        f"{path} has more than {most} levels of nesting; at most {most} are allowed", param=path
    )


def _error_with_path(message: str, body: bytes) -> InvalidRequest:
    """The error for a message of msgspec, which ends in the path of the wrong field unless that is `$`."""
    problem, _, where = message.rpartition(" - at ")
    place = _PLACE.fullmatch(where)
    problem, path = (problem, place[1]) if place else (message, "$")
    field = _FIELD.search(problem)
    if problem.startswith("Object contains unknown field") and field:
        name = f"{path}.{cut(field[1], LONGEST_PROBLEM)}"
        return UnsupportedField(f"{name} is not a field that this server supports; leave it out", param=name)
    if problem.startswith("Object missing required field") and field:
        name = f"{path}.{field[1]}"
        return InvalidRequest(f"{name} is missing", param=name)
    if beyond := _TOO_LONG.match(problem):
        unit = "characters" if beyond[1] == "str" else "entries"
        most = int(beyond[2])
        if not most:
            return UnsupportedField(f"{path} is not supported by this server; leave it out", param=path)
        return Limit(most, unit, path).error(path, _length(body, path, most, keys="`key` in" in message))
    lower = cut(problem[0].lower() + problem[1:], LONGEST_PROBLEM)
    if problem.startswith(("Invalid value", "Invalid enum value")):
        return UnsupportedField(f"{path}: {lower}, or a value this server does not support", param=path)
    if problem.startswith("Expected `null`"):
        return UnsupportedField(f"{path} is not supported by this server; leave it out", param=path)
    return InvalidRequest(f"{path}: {lower}", param=path)


def _length(body: bytes, path: str, most: int, *, keys: bool) -> int:
    """The length of the value at a path of msgspec, which does not name the keys of a map: of the first one
    that is longer than `most`. `keys`: the path leads to a map, and one of its keys is too long."""
    try:
        values = [json.decode(body)]
    except (DecodeError, UnicodeDecodeError, RecursionError):
        values = []  # the rest of the body is malformed
    for name, index, _ in _STEP.findall(path):
        values = [each for value in values for each in _at(value, name, index)]
    if keys:
        values = [key for value in values if isinstance(value, dict) for key in cast("dict[str, Any]", value)]
    lengths = (len(cast("str | list[Any]", each)) for each in values if isinstance(each, str | list | dict))
    return next((length for length in lengths if length > most), most + 1)


def _at(value: object, name: str, index: str) -> list[Any]:
    """The members of a value at one step of a path; none where a name that came twice hides them."""
    if isinstance(value, list):
        members = cast("list[Any]", value)
        return members[int(index) :][:1] if index else []
    fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if name:
        return [fields[name]] if name in fields else []
    return list(fields.values())
