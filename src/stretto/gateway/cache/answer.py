"""A kept answer: read from what a worker sent, as a stream or in one piece, and written as either. Pure.

An answer is kept as the chunks of its stream, with members that nobody knows, so that answers of servers of
another kind come back whole. What is cut or failed is no answer: reading it gives None. `sent` is a second
form, for the other APIs. This one serves both ways to ask from one answer, as chunks add up to the whole; in
`sent` each way is kept for itself. In this form, the other APIs would need writers like those of a worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

from msgspec import DecodeError, Struct, ValidationError, json, msgpack

from stretto.gateway.cache.policy import JsonObject
from stretto.gateway.cache.stats import CacheKind
from stretto.protocol.relay import OperationName

COMPLETE = frozenset({"stop", "length", "tool_calls", "function_call"})  # finish reasons of whole answers
OF_EACH = frozenset({"id", "created", "object", "choices", "usage", "stretto", "metadata", "service_tier"})
DONE = b"data: [DONE]"
PREFIX: dict[OperationName, str] = {"chat": "chatcmpl-", "completions": "cmpl-", "embeddings": ""}
_encode = json.Encoder().encode


class Recipient(NamedTuple):
    """Who gets a kept answer: the request's `body`, its id, the time in seconds since 1970, and how long it
    took to find the answer."""

    body: JsonObject
    request_id: str
    created: int
    took_ms: float

    @property
    def streams(self) -> bool:
        """Whether it wants a stream."""
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        """Whether it wants to know the number of tokens."""
        options: Any = self.body.get("stream_options")
        return not self.streams or (
            isinstance(options, dict) and bool(cast(JsonObject, options).get("include_usage"))
        )


class KeptAnswer(Struct, frozen=True, array_like=True):
    """One answer. `head`: the members that all chunks share. `parts`: the choices of each chunk, in order.
    `usage` is None where the worker did not tell it. An embedding is all in `head`."""

    operation: OperationName
    head: JsonObject
    parts: list[JsonObject]
    usage: JsonObject | None
    report: JsonObject

    @property
    def text(self) -> str | None:
        """The text of an answer that is one text and nothing else; None for any other."""
        choices = _choices(self)
        if self.operation != "chat" or len(choices) != 1 or choices[0].get("finish_reason") != "stop":
            return None
        message: JsonObject = choices[0]["message"]
        bare = message.keys() <= {"role", "content", "refusal"} and not message.get("refusal")
        return message.get("content") if bare and not choices[0].get("logprobs") else None

    def serves(self, recipient: Recipient) -> bool:
        """Whether it has what the recipient wants to know."""
        return self.usage is not None or not recipient.wants_usage or self.operation == "embeddings"

    def bytes_for(self, recipient: Recipient, kind: CacheKind) -> bytes:
        """The body of the response."""
        report = report_for(self.report, self.head.get("model"), recipient.took_ms, kind)
        if self.operation == "embeddings":
            return _encode(self.head)
        shared = {"id": PREFIX[self.operation] + recipient.request_id, "created": recipient.created}
        shared |= {"object": _object(self.operation, streams=recipient.streams)} | self.head
        for name in ("service_tier", "metadata"):
            if recipient.body.get(name) is not None:
                shared[name] = recipient.body[name]
        return (self._stream if recipient.streams else self._whole)(recipient, shared, report)

    def _whole(self, recipient: Recipient, shared: JsonObject, report: JsonObject) -> bytes:
        return _encode(shared | {"choices": _choices(self), "usage": self.usage, "stretto": report})

    def _stream(self, recipient: Recipient, shared: JsonObject, report: JsonObject) -> bytes:
        metadata = {name: shared.pop(name) for name in ("metadata",) if name in shared}
        usage = {"usage": None} if recipient.wants_usage else {}
        events: list[JsonObject] = []
        for part in self.parts:
            ends = {"stretto": report} | metadata if part.get("finish_reason") is not None else {}
            events.append(shared | {"choices": [part]} | usage | ends)
        if recipient.wants_usage:
            events.append(shared | {"choices": [], "usage": self.usage})
        return b"".join([b"data: " + _encode(event) + b"\n\n" for event in events]) + DONE + b"\n\n"


def report_for(kept: JsonObject, model: object, took_ms: float, kind: CacheKind) -> JsonObject:
    """The report of a hit, from that of the kept answer. What a worker would measure is null."""
    report = {
        "variant": kept.get("variant", model),
        "on_time": None,
        "queue_ms": None,
        "ttft_ms": round(took_ms, 3),
        "itl_p99_ms": None,
        "cached_tokens": None,
        "energy_j": None,
        "energy_source": None,
        "cached": kind,
    }
    if "schema_relaxed" in kept:
        report["schema_relaxed"] = kept["schema_relaxed"]
    return report


def dump(answer: KeptAnswer) -> bytes:
    """The answer as bytes."""
    return msgpack.encode(answer)


_load = msgpack.Decoder(KeptAnswer)


def load(raw: bytes) -> KeptAnswer | None:
    """The answer of these bytes; None for bytes that are no answer."""
    try:
        return _load.decode(raw)
    except (DecodeError, ValidationError):
        return None


def read(operation: OperationName, status: int, headers: Mapping[str, str], body: bytes) -> KeptAnswer | None:
    """The answer that a worker sent; None unless it is whole and well."""
    if status != 200:
        return None
    kind = headers.get("content-type", "")
    try:
        if "text/event-stream" in kind:
            return _read_stream(operation, body)
        if "application/json" in kind:
            return _read_whole(operation, json.decode(body))
    except (DecodeError, ValidationError, TypeError, AttributeError, KeyError, ValueError):
        return None
    return None


def _read_stream(operation: OperationName, body: bytes) -> KeptAnswer | None:
    events = [event for event in body.replace(b"\r\n", b"\n").split(b"\n\n") if event]
    if not events or events.pop() != DONE:
        return None
    parts: list[JsonObject] = []
    head: JsonObject = {}
    usage: JsonObject | None = None
    report: JsonObject = {}
    for event in events:
        if event.startswith(b":"):
            continue
        chunk: JsonObject = json.decode(event.removeprefix(b"data:"))
        if "error" in chunk:
            return None
        head = head or _head(chunk)
        usage = chunk.get("usage") or usage
        report = chunk.get("stretto") or report
        parts += chunk["choices"]
    return _checked(KeptAnswer(operation, head, parts, usage, report))


def _read_whole(operation: OperationName, whole: JsonObject) -> KeptAnswer | None:
    if "error" in whole:
        return None
    if operation == "embeddings":
        return KeptAnswer(operation, whole, [], None, {}) if whole.get("data") else None
    parts: list[JsonObject] = []
    for choice in cast("list[JsonObject]", whole["choices"]):
        rest = {name: value for name, value in choice.items() if name not in ("message", "finish_reason")}
        begun: JsonObject = rest | {"finish_reason": None}
        empty: JsonObject = {"text": ""}
        if operation == "chat":
            begun["delta"], empty = _delta(choice["message"]), {"delta": dict[str, Any]()}
        parts.append(begun)
        parts.append(
            {"index": choice["index"], **empty, "logprobs": None, "finish_reason": choice["finish_reason"]}
        )
    answer = KeptAnswer(operation, _head(whole), parts, whole.get("usage"), whole.get("stretto") or {})
    return _checked(answer)


def _checked(answer: KeptAnswer) -> KeptAnswer | None:
    """None unless each choice has ended once, for a reason that does not cut it."""
    seen: set[int] = set()
    ended: dict[int, Any] = {}
    for part in answer.parts:
        index: int = part["index"]
        if index in ended:
            return None
        seen.add(index)
        if part.get("finish_reason") is not None:
            ended[index] = part["finish_reason"]
    whole = bool(seen) and seen == set(range(len(seen))) == ended.keys() and set(ended.values()) <= COMPLETE
    return answer if whole else None


def _head(chunk: JsonObject) -> JsonObject:
    return {name: value for name, value in chunk.items() if name not in OF_EACH}


def _object(operation: OperationName, *, streams: bool) -> str:
    if operation == "completions":
        return "text_completion"
    return "chat.completion.chunk" if streams else "chat.completion"


def _delta(message: JsonObject) -> JsonObject:
    delta = {name: value for name, value in message.items() if value is not None}
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": index} | call for index, call in enumerate(calls)]
    return delta


def _choices(answer: KeptAnswer) -> list[JsonObject]:
    """The choices of an answer in one piece: the deltas, joined."""
    joined: dict[int, JsonObject] = {}
    for part in answer.parts:
        choice = joined.setdefault(part["index"], {})
        for name, value in part.items():
            if name in ("delta", "message"):
                _join(choice.setdefault("message", {}), value)
            elif name == "logprobs" and value is not None:
                _join(choice.setdefault(name, {}), value)
            elif name == "text":
                choice[name] = choice.get(name, "") + value
            elif value is not None or name not in choice:
                choice[name] = value
    choices = [joined[index] for index in sorted(joined)]
    if answer.operation == "chat":
        for choice in choices:
            choice["message"] = _message(choice["message"])
    return choices


def _join(into: JsonObject, more: JsonObject) -> None:
    """Adds a delta: texts and lists grow, tool calls grow by their index, and the rest is replaced."""
    for name, value in more.items():
        known = into.get(name)
        if value is None or known is None:
            if name == "tool_calls" and value is not None:
                known = into[name] = []
                _add_calls(cast("list[JsonObject]", known), value)
            elif value is not None or name not in into:
                into[name] = list(cast("list[Any]", value)) if isinstance(value, list) else value
        elif name == "tool_calls":
            _add_calls(known, value)
        elif isinstance(value, str) and isinstance(known, str) and name not in ("role", "id", "type"):
            into[name] = known + value
        elif isinstance(value, list) and isinstance(known, list):
            cast("list[Any]", known).extend(cast("list[Any]", value))
        elif isinstance(value, dict) and isinstance(known, dict):
            _join(cast(JsonObject, known), cast(JsonObject, value))
        else:
            into[name] = value


def _add_calls(calls: list[JsonObject], parts: Iterable[JsonObject]) -> None:
    for part in parts:
        call = next((each for each in calls if each["index"] == part["index"]), None)
        if call is None:
            calls.append(_copy(part))
        else:
            _join(call, {name: value for name, value in part.items() if name != "index"})


def _copy(value: JsonObject) -> JsonObject:
    return {
        name: _copy(cast(JsonObject, each)) if isinstance(each, dict) else each
        for name, each in value.items()
    }


def _message(joined: JsonObject) -> JsonObject:
    """A message as chat completions have it."""
    message: JsonObject = {"content": joined.pop("content", None)}
    if message["content"] is None and not joined.get("tool_calls") and not joined.get("reasoning_content"):
        message["content"] = ""
    if message["content"] == "" and (joined.get("tool_calls") or joined.get("reasoning_content")):
        message["content"] = None
    message |= {"role": joined.pop("role", "assistant"), "refusal": joined.pop("refusal", None)} | joined
    if calls := message.get("tool_calls"):
        ordered = sorted(cast("list[JsonObject]", calls), key=lambda call: call["index"])
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in ordered
        ]
    return message
