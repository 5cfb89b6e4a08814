"""A kept answer of Messages, Responses or Ollama's API: what a worker sent, with what is new in each answer.

Such an answer is replayed in the form in which it came, as a stream or in one piece, so a hit has the shape
of a worker's answer. New are its id, its times, the metadata that it repeats, and its report. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, NamedTuple, cast

from msgspec import DecodeError, Struct, ValidationError, json, msgpack

from stretto.gateway.cache.answer import Recipient, report_for
from stretto.gateway.cache.policy import JsonObject
from stretto.gateway.cache.stats import CacheKind
from stretto.protocol.relay import OperationName

EVENTS, LINES, WHOLE = "text/event-stream", "application/x-ndjson", "application/json"
DATA = b"data:"
STOPPED = frozenset({"end_turn", "stop_sequence", "tool_use"})  # whole answers of Messages
IDS = ("id", "item_id")
_encode = json.Encoder().encode


class SentAnswer(Struct, frozen=True, array_like=True):
    """One answer. `parts`: its JSON objects in order, one alone for an answer in one piece. `names`: of the
    events, where the API names them."""

    operation: OperationName
    media_type: str
    names: list[str]
    parts: list[JsonObject]

    @property
    def streams(self) -> bool:
        """Whether it came as a stream."""
        return not self.media_type.startswith(WHOLE)

    @property
    def text(self) -> str | None:
        """The text of an answer that is one text, ended by itself, and nothing else; None for any other."""
        return _TEXTS[self.operation](self.parts)

    def serves(self, recipient: Recipient) -> bool:
        """Its key says how it is sent."""
        return True

    def bytes_for(self, recipient: Recipient, kind: CacheKind) -> bytes:
        """The body of the response."""
        fresh = _Fresh(recipient, kind, _id_of(self.parts[0]))
        parts = [_encode(fresh.part(self.operation, part)) for part in self.parts]
        if not self.streams:
            return parts[0]
        if self.media_type.startswith(LINES):
            return b"".join(part + b"\n" for part in parts)
        named = zip(self.names, parts, strict=True)
        return b"".join(b"event: %b\ndata: %b\n\n" % (name.encode(), part) for name, part in named)


class _Fresh:
    """What is new in each answer."""

    def __init__(self, recipient: Recipient, kind: CacheKind, old: str) -> None:
        self._recipient = recipient
        self._kind: CacheKind = kind
        self._old = old.partition("_")[2]
        self._new = token_hex(max(8, len(self._old) // 2))

    def part(self, operation: OperationName, part: JsonObject) -> JsonObject:
        """One event, or the whole answer."""
        if operation == "messages":
            return self._message(part)
        if operation == "responses":
            return self._response(part)
        changed = dict(part)
        changed["created_at"] = (
            f"{datetime.fromtimestamp(self._recipient.created, UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        )
        if "total_duration" in changed:
            changed["total_duration"] = int(self._recipient.took_ms * 1e6)
        return self._reported(changed)

    def _message(self, part: JsonObject) -> JsonObject:
        changed = self._reported(part)
        if changed.get("type") == "message":
            changed["id"] = f"msg_{self._recipient.request_id}"
        elif changed.get("type") == "message_start":
            changed["message"] = changed["message"] | {"id": f"msg_{self._recipient.request_id}"}
        return changed

    def _response(self, part: JsonObject) -> JsonObject:
        changed: JsonObject = self._renamed(part)
        if "response" in changed:
            changed["response"] = self._dated(changed["response"])
        return self._dated(changed) if changed.get("object") == "response" else changed

    def _dated(self, response: JsonObject) -> JsonObject:
        changed = self._reported(response)
        changed["created_at"] = self._recipient.created
        if "metadata" in changed:
            changed["metadata"] = self._recipient.body.get("metadata") or {}
        return changed

    def _reported(self, part: JsonObject) -> JsonObject:
        report = part.get("stretto")
        if not isinstance(report, dict):
            return dict(part)
        known = cast(JsonObject, report)
        return part | {"stretto": report_for(known, part.get("model"), self._recipient.took_ms, self._kind)}

    def _renamed(self, value: Any) -> Any:
        """The value with the new id in place of the old one, wherever an id has it."""
        if isinstance(value, list):
            return [self._renamed(each) for each in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        changed: JsonObject = {}
        for name, each in cast(JsonObject, value).items():
            if name in IDS and isinstance(each, str) and self._old:
                changed[name] = each.replace(self._old, self._new)
            else:
                changed[name] = self._renamed(each)
        return changed


def dump(answer: SentAnswer) -> bytes:
    """The answer as bytes."""
    return msgpack.encode(answer)


_load = msgpack.Decoder(SentAnswer)


def load(raw: bytes) -> SentAnswer | None:
    """The answer of these bytes; None for bytes that are no answer."""
    try:
        answer = _load.decode(raw)
    except (DecodeError, ValidationError):
        return None
    return answer if answer.parts else None


class SentBody(NamedTuple):
    """What a worker sent. `limit`: the most tokens of an answer, by its request; None: no limit."""

    headers: Mapping[str, str]
    body: bytes
    limit: int | None


def read(operation: OperationName, status: int, got: SentBody) -> SentAnswer | None:
    """The answer that a worker sent; None unless it is whole and well."""
    headers, body, limit = got
    media_type = headers.get("content-type", "")
    if status != 200:
        return None
    try:
        names, parts = _split(media_type, body)
        answer = SentAnswer(operation, media_type, names, parts)
        return answer if parts and _ended(answer, limit) else None
    except (DecodeError, ValidationError, TypeError, AttributeError, KeyError, ValueError):
        return None


def _split(media_type: str, body: bytes) -> tuple[list[str], list[JsonObject]]:
    """The names of the events, and the JSON objects. Raises ValueError for a stream of another form."""
    if media_type.startswith(WHOLE):
        return [], [_object(body)]
    if media_type.startswith(LINES):
        return [], [_object(line) for line in body.splitlines() if line]
    if not media_type.startswith(EVENTS):
        raise ValueError(media_type)
    names: list[str] = []
    parts: list[JsonObject] = []
    for event in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
        if not lines:
            continue
        name, data = lines  # each event of these APIs has both
        if not name.startswith(b"event:") or not data.startswith(DATA):
            raise ValueError("no event")
        names.append(name[6:].strip().decode())
        parts.append(_object(data[len(DATA) :]))
    return names, parts


def _object(raw: bytes) -> JsonObject:
    return json.decode(raw, type=dict[str, Any])


def limit_of(body: JsonObject) -> int | None:
    """The most tokens of the answer to a request."""
    options = body.get("options")
    given = cast(JsonObject, options).get("num_predict") if isinstance(options, dict) else None
    limit = body.get("max_tokens", given)
    return limit if isinstance(limit, int) and limit > 0 else None


def _ended(answer: SentAnswer, limit: int | None) -> bool:
    """Whether the answer has ended for a reason that does not cut it, and no worker has to keep it.

    Messages and Ollama have one reason for an answer that is full and one that a deadline cut: the number of
    its tokens tells which it was.
    """
    last, streams = answer.parts[-1], answer.streams
    if answer.operation == "messages":
        if streams and (last.get("type") != "message_stop" or len(answer.parts) < 2):
            return False
        end = answer.parts[-2] if streams else last
        reason = (end["delta"] if streams else end)["stop_reason"]
        return reason in STOPPED or (reason == "max_tokens" and end["usage"]["output_tokens"] == limit)
    if answer.operation == "responses":
        whole: JsonObject = last["response"] if streams else last
        details: JsonObject = whole.get("incomplete_details") or {}
        full = whole["status"] == "incomplete" and details.get("reason") == "max_output_tokens"
        return bool((full or whole["status"] == "completed") and not whole.get("store"))
    reason = last.get("done_reason") if last.get("done") and "error" not in last else None
    return reason == "stop" or (reason == "length" and last["eval_count"] == limit)


def _id_of(part: JsonObject) -> str:
    for holder in (part, part.get("response")):
        if isinstance(holder, dict) and isinstance(id := cast(JsonObject, holder).get("id"), str):
            return id
    return ""


def _text_of_message(parts: list[JsonObject]) -> str | None:
    if parts[0].get("type") == "message":
        return _only_text(parts[0]["content"], "text") if parts[0]["stop_reason"] == "end_turn" else None
    blocks = [part["content_block"] for part in parts if part.get("type") == "content_block_start"]
    stops = [part["delta"]["stop_reason"] for part in parts if part.get("type") == "message_delta"]
    if stops != ["end_turn"] or _only_text(blocks, "text") is None:
        return None
    deltas = [part["delta"] for part in parts if part.get("type") == "content_block_delta"]
    return "".join(delta["text"] for delta in deltas if delta.get("type") == "text_delta")


def _text_of_response(parts: list[JsonObject]) -> str | None:
    whole: JsonObject = parts[-1].get("response", parts[-1])
    output: list[JsonObject] = whole["output"]
    if whole["status"] != "completed" or [item.get("type") for item in output] != ["message"]:
        return None
    return _only_text(output[0]["content"], "output_text")


def _text_of_ollama(parts: list[JsonObject]) -> str | None:
    said = [part.get("message", {"content": part.get("response")}) for part in parts]
    if parts[-1].get("done_reason") != "stop":
        return None
    if any(each.get("tool_calls") or each.get("thinking") for each in said):
        return None
    return "".join(each.get("content") or "" for each in said)


def _only_text(blocks: Iterable[JsonObject], kind: str) -> str | None:
    """The text of one block that is text; None for several, or another one."""
    found = list(blocks)
    return found[0].get("text") if len(found) == 1 and found[0].get("type") == kind else None


_TEXTS = {
    "messages": _text_of_message,
    "responses": _text_of_response,
    "ollama_chat": _text_of_ollama,
    "ollama_generate": _text_of_ollama,
}
