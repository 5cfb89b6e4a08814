"""What the gateway reads of a client's request: the fields of every API that routing needs. Pure.

Their values are checked by the worker, which also reports what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard, cast

import msgspec
from msgspec import Raw, Struct, json

from stretto.config import Tier
from stretto.protocol.parsing import read_some
from stretto.protocol.relay import OperationName
from stretto.protocol.responses import InputItem
from stretto.types import INT32_MAX, Objective

BYTES_PER_TOKEN = 3.0  # of a request, until a worker reports its own ratio
ITEMS = json.Decoder(list[InputItem])
LATEST = ":latest"  # the tag that clients of Ollama add to a name
GENERATING: frozenset[OperationName] = frozenset(
    {"chat", "completions", "responses", "messages", "ollama_chat", "ollama_generate"}
)


class RoutingFields(Struct):
    """The fields that routing needs, of all APIs."""

    model: Any = None
    stream: Any = None
    name: Any = None  # what `/api/show` calls the model
    tools: Raw = Raw(b"")
    system: Raw = Raw(b"")
    instructions: Raw = Raw(b"")
    messages: Raw = Raw(b"")
    prompt: Raw = Raw(b"")
    input: Raw = Raw(b"")
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    options: Any = None
    service_tier: Any = None
    objective: Any = None
    user: Any = None
    cache_salt: Any = None
    previous_response_id: Any = None
    n: Any = None

    @property
    def text(self) -> bytes:
        """The parts of the prompt, in the order in which templates write them."""
        parts = (self.tools, self.system, self.instructions, self.messages, self.prompt, self.input)
        return b"".join(map(bytes, parts))

    @property
    def references(self) -> tuple[str, ...]:
        """The ids of kept items that the input of `/v1/responses` refers to."""
        found = bytes(self.input)
        if not found.startswith(b"[") or b'"id"' not in found:
            return ()
        try:
            items = ITEMS.decode(found)
        except (msgspec.DecodeError, msgspec.ValidationError):
            return ()  # the worker says what is wrong
        return tuple(item.id for item in items if item.refers and item.id)

    @property
    def salt(self) -> str:
        """What else decides whether two prompts share their beginnings."""
        return f"{self.user}\0{self.cache_salt}"

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer's tokens."""
        options = _members(self.options)
        limits = (
            self.max_completion_tokens,
            self.max_output_tokens,
            self.max_tokens,
            options.get("num_predict"),
        )
        return next((limit for limit in limits if _counts(limit)), None)

    def streams(self, operation: OperationName) -> bool:
        """Whether the answer comes as a stream. Ollama's does unless it is told not to."""
        return self.stream is True or (
            self.stream is None and operation in ("ollama_chat", "ollama_generate")
        )

    @property
    def answers(self) -> int:
        """How many answers are asked for."""
        return self.n if _counts(self.n) else 1

    @property
    def tier(self) -> str:
        """The name of the tier."""
        return self.service_tier if self.service_tier in ("priority", "flex") else "default"

    def wanted(self, tiers: Mapping[str, Tier]) -> Objective:
        """The objective: the request's own over that of its tier."""
        own = _members(self.objective)
        if self.tier in tiers:
            usual = msgspec.structs.asdict(tiers[self.tier].objective)
            own = usual | {key: value for key, value in own.items() if value is not None}
        try:
            return msgspec.convert(own, Objective)
        except msgspec.ValidationError:
            return Objective()


def _counts(value: object) -> TypeGuard[int]:
    """Whether a worker would take it as a number of tokens or answers, above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= INT32_MAX


def _members(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


FIELDS = json.Decoder(RoutingFields)


def read_fields(body: bytes) -> tuple[RoutingFields, bytes]:
    """The fields of a body, and the body without halves of surrogate pairs.

    Raises what a worker raises for a body that is no JSON object: see `protocol.parsing.parse`.
    """
    return read_some(FIELDS, body)
