"""THE table of fields that clients of other servers send and that change no answer here.

A field that changes the answer is implemented, or refused by name. A field that is null, that has the value
which means nothing, or that only annotates is accepted. A body is looked up here only after it failed to
parse, so requests in the usual form pay nothing. docs/compatibility.md is made from this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple, cast, get_args

from msgspec import inspect, json

from stretto.protocol.openai import TEMPLATE_MEMBERS, Message

Body = dict[str, Any]
ANY = object()


class Accepted(NamedTuple):
    """A field that is left out of a request. `values`: those that mean nothing; ANY: it only annotates."""

    values: tuple[Any, ...]
    sender: str


NOTHING: dict[str, Accepted] = {
    "add_generation_prompt": Accepted((True,), "vLLM"),
    "skip_special_tokens": Accepted((True,), "vLLM"),
    "spaces_between_special_tokens": Accepted((True, False), "vLLM"),
    "continue_final_message": Accepted((False,), "vLLM"),
    "return_tokens_as_token_ids": Accepted((False,), "vLLM"),
    "truncate_prompt_tokens": Accepted((-1,), "vLLM"),
    "use_beam_search": Accepted((False,), "vLLM"),
    "length_penalty": Accepted((1,), "vLLM"),
    "early_stopping": Accepted((False,), "vLLM"),
    "priority": Accepted((0,), "vLLM"),
    "include_reasoning": Accepted((True,), "vLLM"),
    "separate_reasoning": Accepted((True,), "SGLang"),
    "stream_reasoning": Accepted((True,), "SGLang"),
    "no_stop_trim": Accepted((False,), "SGLang"),
    "return_hidden_states": Accepted((False,), "vllm-router"),
    "guided_decoding_backend": Accepted((ANY,), "vLLM"),
    "cache_prompt": Accepted((ANY,), "llama.cpp"),
    "timings_per_token": Accepted((ANY,), "llama.cpp"),
    "return_progress": Accepted((False,), "llama.cpp"),
    "id_slot": Accepted((-1,), "llama.cpp"),
    "n_keep": Accepted((0,), "llama.cpp"),
    "n_probs": Accepted((0,), "llama.cpp"),
    "min_keep": Accepted((0,), "llama.cpp"),
    "samplers": Accepted(([],), "llama.cpp"),
    "grammar": Accepted(("",), "llama.cpp"),
    "mirostat": Accepted((0,), "llama.cpp"),
    "mirostat_tau": Accepted((5,), "llama.cpp"),
    "mirostat_eta": Accepted((0.1,), "llama.cpp"),
    "tfs_z": Accepted((1,), "llama.cpp"),
    "typical_p": Accepted((1,), "llama.cpp"),
    "dynatemp_range": Accepted((0,), "llama.cpp"),
    "xtc_probability": Accepted((0,), "llama.cpp"),
    "dry_multiplier": Accepted((0,), "llama.cpp"),
    # Each of these says more about an option above, which is off.
    **dict.fromkeys(
        ("dynatemp_exponent", "xtc_threshold", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
        Accepted((ANY,), "llama.cpp"),
    ),
    "typ_p": Accepted((1,), "llama.cpp"),
    "top_n_sigma": Accepted((-1,), "llama.cpp"),
    "repeat_last_n": Accepted((-1,), "llama.cpp"),
    "reasoning_format": Accepted(("auto", "deepseek"), "llama.cpp"),
    "keep_alive": Accepted((ANY,), "Ollama"),
    "extra_body": Accepted(({},), "litellm"),
    "cache_control": Accepted((ANY,), "Anthropic's clients"),
    "functions": Accepted(([],), "older OpenAI clients"),
    "function_call": Accepted(("none", "auto"), "older OpenAI clients"),
    "suffix": Accepted(("",), "older OpenAI clients"),
    "verbosity": Accepted(("medium",), "OpenAI's clients"),
    "bad_words": Accepted(([],), "vLLM"),
    "echo": Accepted((False,), "vLLM"),
    "logits_processors": Accepted(([],), "vLLM"),
    "prompt_cache_retention": Accepted((ANY,), "OpenAI's clients"),
    "rank_fields": Accepted((["text"],), "Cohere's clients"),
}
# Of a chat alone: its template writes special tokens, and an answer without a limit has none.
CHAT: dict[str, Accepted] = {
    "add_special_tokens": Accepted((False,), "vLLM"),
    "max_tokens": Accepted((-1,), "llama.cpp, LM Studio"),
    "max_completion_tokens": Accepted((-1,), "llama.cpp"),
}
STREAM_OPTIONS: dict[str, Accepted] = {"include_obfuscation": Accepted((ANY,), "OpenAI's clients")}
TOOL: dict[str, Accepted] = {
    "cache_control": Accepted((ANY,), "Anthropic's clients"),
    "id": Accepted((ANY,), "several"),
}
# The same option under another server's name.
RENAMED = {
    "repeat_penalty": "repetition_penalty",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_whitespace_pattern": "structured_outputs.whitespace_pattern",
    "enable_thinking": "chat_template_kwargs.enable_thinking",
}
# By role. A member that is not among them is data for the chat template.
MESSAGE = {
    str(each.__struct_config__.tag): frozenset(each.__struct_fields__) - {"extra"} | {"role"}
    for each in get_args(Message)
}
TEXT_PARTS = ("text", "input_text", "output_text")  # compared with any JSON, so no set
REASONING = ("reasoning_content", "reasoning")


def accepted(body: Body) -> Body:
    """The request in the form that the wire types take. What would change the answer stays, to be refused."""
    found = _without(body, NOTHING)
    for name, target in RENAMED.items():
        if name in found:
            _move(found, name, target)
    if "messages" in found:
        found = _without(found, CHAT)
    if found.get("top_logprobs") == 0 and not found.get("logprobs"):
        del found["top_logprobs"]
    _each(found, "messages", _message)
    _each(found, "tools", _tool)
    _part(found, "stream_options", lambda options: _without(options, STREAM_OPTIONS))
    _part(found, "response_format", _format)
    return found


def as_typed(value: Any, kind: Any, history: frozenset[type] = frozenset()) -> Any:
    """JSON as a type reads it: 40 for 40.0 where it has whole numbers, and no unknown member that is null.

    `history`: the types whose unknown members are left out, whatever they are.
    """
    return _as_typed(value, _options(kind), history)


@lru_cache(maxsize=64)
def _options(kind: Any) -> tuple[inspect.Type, ...]:
    return _alternatives(inspect.type_info(kind))


def _alternatives(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    """The types of which a value has one."""
    if isinstance(kind, inspect.Metadata):
        return _alternatives(kind.type)
    return kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _as_typed(value: Any, options: Iterable[inspect.Type], history: frozenset[type]) -> Any:
    if isinstance(value, float) and value.is_integer():
        kinds = {type(each) for each in options}
        return int(value) if inspect.IntType in kinds and inspect.FloatType not in kinds else value
    if isinstance(value, list):
        items = next((each.item_type for each in options if isinstance(each, inspect.ListType)), None)
        if items is not None:
            of = _alternatives(items)
            return [_as_typed(each, of, history) for each in cast("list[Any]", value)]
    if isinstance(value, dict):
        members = cast(Body, value)
        kinds = (each for each in options if isinstance(each, inspect.StructType))
        found = next((each for each in kinds if _is_tagged(members, each)), None)
        if found is not None:
            return _members_as_typed(members, found, history)
    return cast(Any, value)


def _is_tagged(members: Body, kind: inspect.StructType) -> bool:
    return kind.tag_field is None or members.get(kind.tag_field) == kind.tag


def _members_as_typed(members: Body, kind: inspect.StructType, history: frozenset[type]) -> Body:
    known = {each.encode_name: each.type for each in kind.fields}
    found: Body = {}
    for name, value in members.items():
        if name in known:
            found[name] = _as_typed(value, _alternatives(known[name]), history)
        elif name == kind.tag_field or (value is not None and kind.cls not in history):
            found[name] = value
    return found


def _without(fields: Body, table: dict[str, Accepted]) -> Body:
    return {name: value for name, value in fields.items() if not _means_nothing(value, table.get(name))}


def _means_nothing(value: Any, row: Accepted | None) -> bool:
    if row is None:
        return False
    return value is None or any(
        each is ANY or (each == value and isinstance(each, bool) == isinstance(value, bool))
        for each in row.values
    )


def _move(fields: Body, name: str, target: str) -> None:
    """Give a field its name here, unless both are set."""
    value = fields[name]
    outer, dot, inner = target.partition(".")
    place: Any = fields
    if dot:
        place = fields.get(outer) or {}
        if not isinstance(place, dict):
            return
        place = dict(cast(Body, place))
    if value is None or inner not in place if dot else target not in place:
        del fields[name]
        if value is not None:
            place[inner or target] = value
            if dot:
                fields[outer] = place


def _each(fields: Body, name: str, change: Callable[[Body], Body]) -> None:
    value = fields.get(name)
    if isinstance(value, list):
        items = cast("list[Any]", value)
        fields[name] = [change(cast(Body, item)) if isinstance(item, dict) else item for item in items]


def _part(fields: Body, name: str, change: Callable[[Body], Body]) -> None:
    value = fields.get(name)
    if isinstance(value, dict):
        fields[name] = change(cast(Body, value))


def _message(message: Body) -> Body:
    """A message of the history. What servers put into answers comes back, and is data for the template."""
    role = message.get("role")
    known = MESSAGE.get(role) if isinstance(role, str) else None
    if known is None:
        return message
    found = {name: value for name, value in message.items() if name in known and value is not None}
    extra = {name: value for name, value in message.items() if name not in known and value is not None}
    if "content" in message:
        found["content"] = "" if message["content"] is None and role == "tool" else message["content"]
    if role == "assistant":
        for name in REASONING:
            if isinstance(extra.get(name), str):
                found.setdefault("reasoning_content", extra.pop(name))
        _each(found, "tool_calls", _call)
    if isinstance(found.get("content"), list):
        _each(found, "content", _content_part)
    return found | {TEMPLATE_MEMBERS: extra} if extra else found


def _call(call: Body) -> Body:
    found = {name: call[name] for name in ("id", "type", "function") if call.get(name) is not None}
    _part(found, "function", _called_function)
    return found


def _called_function(function: Body) -> Body:
    """The name and the arguments. Some servers give those as JSON, and none as null."""
    found = {name: function[name] for name in ("name", "arguments") if function.get(name) is not None}
    arguments = found.setdefault("arguments", "")
    if isinstance(arguments, dict):
        found["arguments"] = json.encode(arguments).decode()
    return found


def _content_part(part: Body) -> Body:
    """A text, without its annotations. Any other kind of part is left as it is."""
    if part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if part.get("type") == "refusal" and "refusal" in part:
        return {"type": "refusal", "refusal": part["refusal"]}
    return part


def _tool(tool: Body) -> Body:
    found = _without(tool, TOOL)
    _part(found, "function", lambda function: _without(function, TOOL))
    return found


def _format(form: Body) -> Body:
    """llama.cpp's two short forms of a JSON schema."""
    schema = form.get("schema")
    if form.get("type") in ("json_object", "json_schema") and isinstance(schema, dict) and len(form) == 2:
        return {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
    return form


def reference() -> str:
    """The tables in Markdown, for the documentation."""
    rows = ["| field | accepted when it is | sent by |", "| --- | --- | --- |"]
    prefixes = (
        ("", NOTHING, ""),
        ("", CHAT, " in a chat"),
        ("stream_options.", STREAM_OPTIONS, ""),
        ("tools[].", TOOL, ""),
    )
    for prefix, table, where in prefixes:
        for name, row in table.items():
            values = ", ".join("anything" if each is ANY else f"`{each!r}`" for each in row.values)
            rows.append(f"| `{prefix}{name}`{where} | {values} | {row.sender} |")
    rows += ["", "| field | means here |", "| --- | --- |"]
    rows += [f"| `{name}` | `{target}` |" for name, target in RENAMED.items()]
    return "\n".join(rows) + "\n"
