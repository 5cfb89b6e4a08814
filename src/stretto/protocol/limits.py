"""The limits of what a client may send: THE table of them, and the check of values that have no type.

The wire types take their limits of length from here, and docs/limits.md is made from this table. The limits
of numbers are in `types.BOUNDS`, those that an operator chooses in `config.ServeConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from msgspec import Meta

from stretto.errors import InvalidRequest
from stretto.types import LONGEST_GRAMMAR


class Limit(NamedTuple):
    """The most `unit` that `field` may have. `of` says what the field is, for the documentation."""

    most: int
    unit: str
    field: str
    of: str = ""

    def error(self, path: str, length: int) -> InvalidRequest:
        """The error for a field at `path` with `length` units."""
        return InvalidRequest(
            f"{path} has {length} {self.unit}; at most {self.most} are allowed: send fewer", param=path
        )


LIMITS: dict[str, Limit] = {
    "messages": Limit(4096, "entries", "messages", "and the items of `input` in a response"),
    "parts": Limit(1024, "entries", "messages[].content", "its parts"),
    "tool_calls": Limit(128, "entries", "messages[].tool_calls"),
    "arguments": Limit(2**18, "characters", "messages[].tool_calls[].function.arguments"),
    "identifier": Limit(
        256, "characters", "messages[].name, .tool_call_id, .tool_calls[].id", "and the names of called tools"
    ),
    "tools": Limit(128, "entries", "tools"),
    "description": Limit(2**15, "characters", "tools[].function.description", "and that of a schema"),
    "tool_name": Limit(64, "characters", "tools[].function.name"),
    "prompts": Limit(
        2048, "entries", "prompt, input, documents, text_1, text_2", "its texts or lists of token ids"
    ),
    "token_ids": Limit(2**20, "entries", "prompt, input", "its token ids, or those of one list in it"),
    "stop": Limit(256, "entries", "stop", "`max_stop` may set a lower limit"),
    "stop_string": Limit(256, "characters", "stop[]"),
    "stop_token_ids": Limit(256, "entries", "stop_token_ids"),
    "logit_bias": Limit(1024, "entries", "logit_bias"),
    "model": Limit(512, "characters", "model"),
    "user": Limit(1024, "characters", "user, safety_identifier, prompt_cache_key, cache_salt"),
    "metadata": Limit(16, "entries", "metadata"),
    "metadata_key": Limit(64, "characters", "metadata", "its keys"),
    "metadata_value": Limit(512, "characters", "metadata", "its values"),
    "modalities": Limit(8, "entries", "modalities"),
    "variables": Limit(64, "entries", "chat_template_kwargs"),
    "regex": Limit(LONGEST_GRAMMAR["regex"], "characters", "structured_outputs.regex"),
    "choices": Limit(4096, "entries", "structured_outputs.choice"),
    "request_id": Limit(128, "characters", "request_id"),
    "corrected_answer": Limit(2**15, "characters", "corrected_answer"),
    "schema": Limit(
        LONGEST_GRAMMAR["json_schema"],
        "characters",
        "response_format, structured_outputs.json, tools[].function.parameters",
        "its schema as JSON",
    ),
    "depth": Limit(
        64, "levels of nesting", "any schema, chat_template_kwargs, function.arguments", "lists and objects"
    ),
    "members": Limit(
        2**16, "members", "any schema, chat_template_kwargs, function.arguments", "at all levels"
    ),
    "containers": Limit(100_000, "lists and objects", "the whole body"),
    "field_bytes": Limit(2**20, "bytes of JSON", "any field but messages, prompt and input"),
}


def up_to(name: str, **others: Any) -> Meta:
    """The limit of a wire type, for msgspec. `others` are further constraints."""
    return Meta(max_length=LIMITS[name].most, **others)


def check_json(value: object, path: str) -> None:
    """Raises InvalidRequest when JSON without a type is nested too deeply or has too many members."""
    depth, members = 0, 0
    level = [value]
    while containers := [each for each in map(_members, level) if each is not None]:
        depth += 1
        level = [member for each in containers for member in each]
        members += len(level)
        if members > LIMITS["members"].most:
            raise LIMITS["members"].error(path, members)
    if depth > LIMITS["depth"].most:
        raise LIMITS["depth"].error(path, depth)


def _members(value: object) -> Iterable[object] | None:
    """The values in a list or an object; None for anything else."""
    if isinstance(value, dict):
        return cast("dict[str, object]", value).values()
    return cast("list[object]", value) if isinstance(value, list) else None


def reference() -> str:
    """The limits as a Markdown table."""
    rows = ["| field | at most | of |", "| --- | --- | --- |"]
    for limit in LIMITS.values():
        names = ", ".join(name if " " in name else f"`{name}`" for name in limit.field.split(", "))
        rows.append(f"| {names} | {limit.most:,} {limit.unit} | {limit.of} |")
    return "\n".join(rows) + "\n"
