"""What a tenant's cache keeps, and what one request asks of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import msgspec
from msgspec import Struct, json

from stretto.errors import InvalidRequest
from stretto.protocol.openai import CacheFields
from stretto.protocol.relay import OperationName
from stretto.settings.table import size

EVERYBODY = "*"  # the policy of tenants that have none of their own
SUBJECTS = ("user", "safety_identifier", "prompt_cache_key", "cache_salt")
OLLAMA: frozenset[OperationName] = frozenset({"ollama_chat", "ollama_generate"})
# Replayed in the form in which they came.
AS_SENT: frozenset[OperationName] = frozenset({"messages", "responses", "ollama_chat", "ollama_generate"})
STREAMED = "stretto.streamed"  # stands in a request's key for whether such an answer is a stream
JsonObject = dict[str, Any]


class CachePolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table `[caches.TENANT]` of the configuration: this tenant has a cache.

    `off`: it has none, although the tenant `*` has. `semantic`: a request that asks the same in other words
    gets the kept answer, once at most a share of `max_error` of such answers is wrong. `ttl`: seconds that
    an answer is kept. `size`: memory for the tenant's answers, like 64MiB. `sampled`: also answers that
    were drawn at random. Raises ValueError for a wrong value.
    """

    off: bool = False
    semantic: bool = False
    max_error: float = 0.01
    ttl: float = 3600.0
    size: int | str = "64MiB"
    sampled: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_error <= 0.5:
            raise ValueError(f"max_error must be above 0 and at most 0.5, not {self.max_error}")
        if not 0 < self.ttl <= 30 * 86_400:
            raise ValueError(f"ttl must be above 0 seconds and at most 30 days, not {self.ttl}")
        if self.bytes < 1 << 16:
            raise ValueError(f"size must be at least 64KiB, not {self.size}")

    @property
    def bytes(self) -> int:
        """The size in bytes; a bare number is GiB, as in every size."""
        return size(self.size)


class Wish(NamedTuple):
    """What one request asks of the cache.

    `takes`: a kept answer will do. `body`: the request without the field `cache`. `subjects`: whom it is
    about, for erasure.
    """

    policy: CachePolicy
    body: JsonObject
    takes: bool
    subjects: tuple[str, ...]


def policy_of(policies: Mapping[str, CachePolicy], tenant: str) -> CachePolicy | None:
    """The policy of a tenant; None for one that has no cache."""
    policy = policies.get(tenant, policies.get(EVERYBODY))
    return policy if policy is not None and not policy.off else None


def without_field(raw: bytes) -> tuple[CacheFields, bytes]:
    """The request's field `cache`, and the body without it, for the worker. Raises InvalidRequest."""
    if b'"cache"' not in raw:
        return CacheFields(), raw
    body = _object(raw)
    if body is None or "cache" not in body:
        return CacheFields(), raw
    given = body.pop("cache")
    try:
        fields = CacheFields() if given is None else msgspec.convert(given, CacheFields)
    except msgspec.ValidationError as error:
        path = "$.cache" + str(error).partition("`$")[2].partition("`")[0]
        raise InvalidRequest(f"{path}: {str(error).partition(' - at')[0]}", param=path) from None
    return fields, json.encode(body)


def wish_of(policy: CachePolicy, fields: CacheFields, operation: OperationName, raw: bytes) -> Wish | None:
    """What a request asks of the cache; None when it must not touch it.

    An answer that would come out the same each time may be kept: an embedding, or text drawn with
    temperature 0 or a seed. Others are kept where the tenant or the request asks for it.
    """
    if fields.personal or fields.mode == "bypass":
        return None
    body = _object(raw)
    if body is None:
        return None
    if fields.mode != "use" and not policy.sampled and not _repeats(operation, body):
        return None
    if operation != "embeddings" and not _replayable(body):
        return None
    if operation in AS_SENT:
        # What a worker keeps is found nowhere else. The key tells whether the answer is a stream.
        if body.get("store") or body.get("previous_response_id") is not None or body.get("background"):
            return None
        streams = body.get("stream")
        body[STREAMED] = bool(operation in OLLAMA if streams is None else streams)
        user = _members(body.get("metadata")).get("user_id") if operation == "messages" else None
        if user is not None:
            body["user"] = user
    subjects = tuple(str(body[name]) for name in SUBJECTS if body.get(name) is not None)
    return Wish(policy, body, takes=fields.mode != "refresh", subjects=subjects)


class AskedText(NamedTuple):
    """A question that a similar one may have asked, and the request without it."""

    text: str
    rest: JsonObject


def question_of(operation: OperationName, body: JsonObject) -> AskedText | None:
    """The text of a user's last message or of a prompt, for one answer that is text alone. None for any
    other request."""
    if body.get("n") not in (None, 1) or body.get("logprobs"):
        return None
    name = {"responses": "input", "ollama_generate": "prompt"}.get(operation, "messages")
    asked: Any = body.get(name)
    if operation in ("completions", "embeddings"):
        return None
    if isinstance(asked, str) and name != "messages":
        return AskedText(asked, body | {name: ""})
    if not isinstance(asked, list) or not asked or name == "prompt":
        return None
    *earlier, last = cast("list[Any]", asked)
    if not isinstance(last, dict) or cast(JsonObject, last).get("role") != "user":
        return None
    content: Any = cast(JsonObject, last).get("content")
    if not isinstance(content, str) or cast(JsonObject, last).get("images"):
        return None
    return AskedText(content, body | {name: [*earlier, cast(JsonObject, last) | {"content": ""}]})


def _object(raw: bytes) -> JsonObject | None:
    """The whole request; None for one with a number or a depth that nobody takes, which the worker says."""
    try:
        return json.decode(raw, type=JsonObject)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError):
        return None


def _repeats(operation: OperationName, body: JsonObject) -> bool:
    given = _members(body.get("options")) if operation in OLLAMA else body
    return operation == "embeddings" or given.get("temperature") == 0 or given.get("seed") is not None


def _members(value: object) -> JsonObject:
    return cast(JsonObject, value) if isinstance(value, dict) else {}


def _replayable(body: JsonObject) -> bool:
    """A stream that counts its tokens in every chunk is passed on alone: its chunks cannot be made again."""
    options = body.get("stream_options")
    if not isinstance(options, dict):
        return True
    return not cast(JsonObject, options).get("continuous_usage_stats")
