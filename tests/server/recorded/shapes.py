"""What an answer looks like in each API, told from its request alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

Json = dict[str, Any]
OLLAMA_TEXT = ("/api/chat", "/api/generate")


@dataclass(frozen=True)
class Recorded:
    """A request as its client sent it. `status`: what the server answered when it was recorded."""

    client: str
    method: str
    path: str
    headers: dict[str, str]
    status: int
    body: Json

    @property
    def streamed(self) -> bool:
        return self.body.get("stream") is True or (
            self.path in OLLAMA_TEXT and self.body.get("stream") is not False
        )


def check(request: Recorded, kind: str, text: str) -> None:
    """Asserts that a text of this content type answers the request."""
    wanted = "application/json"
    if request.streamed:
        wanted = "application/x-ndjson" if request.path in OLLAMA_TEXT else "text/event-stream"
    assert kind.partition(";")[0] == wanted, (kind, text)
    if request.streamed:
        STREAMS[request.path](request.body, text)
    else:
        WHOLE[request.path](request.body, json.loads(text))


def _part(fields: Json, name: str) -> Json:
    """A member that is an object. It is empty if it is null or left out."""
    return cast(Json, fields.get(name) or {})


def _list(fields: Json, name: str) -> list[Json]:
    return cast("list[Json]", fields.get(name) or [])


def _count(value: Any) -> int:
    """How many inputs a prompt is: a text, a list of texts, ids, or lists of ids."""
    inputs = cast("list[Any]", value) if isinstance(value, list) else None
    return len(inputs) if inputs and not isinstance(inputs[0], int) else 1


# OpenAI's chats and completions


def _chat(body: Json, answer: Json) -> None:
    assert answer["object"] == "chat.completion" and answer["model"]
    _choices(body, answer, [choice["message"] for choice in answer["choices"]])


def _chat_stream(body: Json, text: str) -> None:
    chunks = _chunks(body, text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    _choices(body, folded := _folded(chunks), [choice["message"] for choice in folded["choices"]])


def _choices(body: Json, answer: Json, messages: Sequence[Json]) -> None:
    """The choices, how each ends, and what the request forces: a call, a schema, log probabilities."""
    _ends(body, answer)
    forced = body.get("tool_choice") not in (None, "auto", "none")
    form = _part(body, "response_format")
    for choice, message in zip(answer["choices"], messages, strict=True):
        assert message["role"] == "assistant"
        calls = [call["function"] for call in _list(message, "tool_calls")]
        _calls(body, calls, forced=forced, cut=choice["finish_reason"] == "length")
        assert bool(calls) == (choice["finish_reason"] == "tool_calls") or forced
        if form.get("type") == "json_schema" and choice["finish_reason"] == "stop":
            _fits(form["json_schema"]["schema"], json.loads(message["content"]))
        if body.get("logprobs"):
            tokens = choice["logprobs"]["content"]
            assert tokens and {len(each["top_logprobs"]) for each in tokens} == {body.get("top_logprobs", 0)}


def _calls(body: Json, calls: Sequence[Json], *, forced: bool, cut: bool) -> None:
    """Calls have arguments; forced ones are of an offered tool. `cut`: the last may lack its end."""
    tools = [tool.get("function", tool) for tool in _list(body, "tools")]
    schemas: dict[str, Json] = {
        tool["name"]: tool.get("parameters") or tool.get("input_schema") or {} for tool in tools
    }
    assert calls or not forced or cut
    for call in calls[:-1] if cut else calls:
        arguments = call["arguments"]
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        assert isinstance(parsed, dict), call
        if forced:  # a small model may call what it was not offered, unless it is forced
            assert call["name"] in schemas, call
            _fits(schemas[call["name"]], parsed)


def _fits(schema: Json, value: Json) -> None:
    """The parts of a schema that the recorded ones use at their top."""
    assert set(schema.get("required", ())) <= value.keys(), value
    for name, each in value.items():
        rule = schema.get("properties", {}).get(name, {})
        assert "enum" not in rule or each in rule["enum"], (name, each)
        assert rule.get("type") != "integer" or isinstance(each, int), (name, each)


def _ends(body: Json, answer: Json) -> None:
    choices = answer["choices"]
    count = _count(body.get("prompt"))
    assert [choice["index"] for choice in choices] == list(range((body.get("n") or 1) * count))
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "length", "tool_calls"}
    usage = answer["usage"]
    if usage is not None:
        assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"] > 0
        most = body.get("max_tokens") or body.get("max_completion_tokens")
        assert most is None or usage["completion_tokens"] <= most * len(choices)


def _completion(body: Json, answer: Json) -> None:
    assert answer["object"] == "text_completion"
    _ends(body, answer)
    for choice in answer["choices"]:
        assert isinstance(choice["text"], str)
        if body.get("logprobs") is not None:
            found = choice["logprobs"]
            if not body.get("echo") and len(answer["choices"]) == 1:
                assert len(found["tokens"]) == answer["usage"]["completion_tokens"]
            assert (
                len(found["token_logprobs"])
                == len(found["text_offset"])
                == len(found["top_logprobs"])
                == len(found["tokens"])
            )
            if body.get("echo"):
                assert found["token_logprobs"][0] is None


def _completion_stream(body: Json, text: str) -> None:
    chunks = _chunks(body, text)
    if body.get("logprobs") is not None:
        assert all(choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["text"])
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    _ends(body, _folded(chunks))


def _chunks(body: Json, text: str) -> list[Json]:
    """The chunks of a stream that ends with [DONE], and has its usage last if it was asked for."""
    parts = [part for part in text.split("\n\n") if part]
    assert all(part.startswith("data: ") for part in parts), text
    *chunks, done = [part.removeprefix("data: ") for part in parts]
    assert done == "[DONE]"
    found = [json.loads(chunk) for chunk in chunks]
    assert len({chunk["id"] for chunk in found}) == 1
    if _part(body, "stream_options").get("include_usage"):
        assert found[-1]["choices"] == [] and found[-1]["usage"]
    else:
        assert not any(chunk.get("usage") for chunk in found)
    return found


def _folded(chunks: Sequence[Json]) -> Json:
    """A stream as one answer. Each choice ends once."""
    choices: dict[int, Json] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            new: Json = {"index": choice["index"], "finish_reason": None, "message": {}, "logprobs": None}
            kept = choices.setdefault(choice["index"], new)
            assert kept["finish_reason"] is None, "a choice goes on after its end"
            kept["finish_reason"] = choice["finish_reason"]
            if _part(choice, "logprobs").get("content"):
                kept["logprobs"] = {
                    "content": [
                        *(kept["logprobs"] or {"content": []})["content"],
                        *choice["logprobs"]["content"],
                    ]
                }
            _merge(kept["message"], _part(choice, "delta"))
    usage = chunks[-1].get("usage")
    return {"choices": [choices[index] for index in sorted(choices)], "usage": usage}


def _merge(message: Json, delta: Json) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for part in value:
                if part["index"] == len(calls):
                    calls.append({"function": {"name": part["function"]["name"], "arguments": ""}})
                calls[part["index"]]["function"]["arguments"] += part["function"].get("arguments") or ""
        elif name == "content" and value:
            message[name] = (message.get(name) or "") + value
        else:
            message.setdefault(name, value)


def _embeddings(body: Json, answer: Json) -> None:
    count = _count(body["input"])
    assert answer["object"] == "list" and [each["index"] for each in answer["data"]] == list(range(count))
    kind = str if body.get("encoding_format") == "base64" else list
    assert all(isinstance(each["embedding"], kind) and each["embedding"] for each in answer["data"])


# OpenAI's responses


def _response(body: Json, answer: Json) -> None:
    assert answer["object"] == "response" and answer["status"] in ("completed", "incomplete")
    cut = answer["status"] == "incomplete"
    calls = [item for item in answer["output"] if item["type"] == "function_call"]
    _calls(body, calls, forced=body.get("tool_choice") not in (None, "auto", "none"), cut=cut)
    form = _part(_part(body, "text"), "format")
    if form.get("type") == "json_schema" and not cut:
        _fits(form["schema"], json.loads(_output_text(answer)))


def _output_text(answer: Json) -> str:
    messages = [item for item in answer["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in messages for part in item["content"])


def _response_stream(body: Json, text: str) -> None:
    events = _named_events(text)
    names = [name for name, _ in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] in ("response.completed", "response.incomplete")
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    assert names.count("response.output_item.added") == names.count("response.output_item.done")
    answer = events[-1][1]["response"]
    deltas = [event["delta"] for name, event in events if name == "response.output_text.delta"]
    assert "".join(deltas) == _output_text(answer)
    _response(body, answer)


def _named_events(text: str) -> list[tuple[str, Json]]:
    found: list[tuple[str, Json]] = []
    for part in [part for part in text.split("\n\n") if part]:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}", part
        found.append((event["type"], event))
    return found


# Anthropic's messages


def _message(body: Json, answer: Json) -> None:
    assert (answer["type"], answer["role"]) == ("message", "assistant")
    assert answer["stop_reason"] in ("end_turn", "max_tokens", "tool_use", "stop_sequence")
    assert 0 <= answer["usage"]["output_tokens"] <= body["max_tokens"]
    calls = [
        {"name": block["name"], "arguments": block["input"]}
        for block in answer["content"]
        if block["type"] == "tool_use"
    ]
    forced = _part(body, "tool_choice").get("type") in ("any", "tool")
    _calls(body, calls, forced=forced, cut=answer["stop_reason"] == "max_tokens")


def _message_stream(body: Json, text: str) -> None:
    events = _named_events(text)
    names = [name for name, _ in events if name != "ping"]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_start") == names.count("content_block_stop")
    (end,) = [event for name, event in events if name == "message_delta"]
    assert end["delta"]["stop_reason"] in ("end_turn", "max_tokens", "tool_use", "stop_sequence")


# Ollama


def _ollama_chat(body: Json, answer: Json) -> None:
    assert answer["done"] and answer["message"]["role"] == "assistant"
    assert answer["done_reason"] in (("stop", "length") if body.get("messages") else ("load", "unload"))
    calls = [call["function"] for call in _list(answer["message"], "tool_calls")]
    _calls(body, calls, forced=False, cut=False)
    if isinstance(body.get("format"), dict) and answer["done_reason"] == "stop":
        _fits(body["format"], json.loads(answer["message"]["content"]))


def _ollama_generate(body: Json, answer: Json) -> None:
    assert answer["done"] and isinstance(answer["response"], str)
    assert answer["done_reason"] in (("stop", "length") if body.get("prompt") else ("load", "unload"))


def _ollama_stream(body: Json, text: str) -> None:
    *lines, last = [json.loads(line) for line in text.splitlines()]
    assert not any(line["done"] for line in lines) and last["done"]
    assert last["done_reason"] in ("stop", "length", "load", "unload")
    if last["done_reason"] in ("stop", "length"):
        assert last["eval_count"] >= 0 and last["prompt_eval_count"] > 0


def _ollama_embed(body: Json, answer: Json) -> None:
    wanted = body["input"]
    assert len(answer["embeddings"]) == (1 if isinstance(wanted, str) else len(wanted))
    assert all(answer["embeddings"])


def _tokens(body: Json, answer: Json) -> None:
    assert answer["count"] == len(answer["tokens"]) > 0


def _has(*names: str) -> Callable[[Json, Json], None]:
    """A check that an answer has members that say something."""

    def has(body: Json, answer: Json) -> None:
        assert all(answer[name] for name in names), answer

    return has


WHOLE: dict[str, Callable[[Json, Json], None]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embeddings,
    "/v1/responses": _response,
    "/v1/messages": _message,
    "/v1/messages/count_tokens": _has("input_tokens"),
    "/v1/models": _has("data"),
    "/tokenize": _tokens,
    "/api/chat": _ollama_chat,
    "/api/generate": _ollama_generate,
    "/api/embed": _ollama_embed,
    "/api/embeddings": _has("embedding"),
    "/api/show": _has("details", "model_info", "capabilities"),
    "/api/tags": _has("models"),
    "/api/ps": _has("models"),
    "/api/version": _has("version"),
}
STREAMS: dict[str, Callable[[Json, str], None]] = {
    "/v1/chat/completions": _chat_stream,
    "/v1/completions": _completion_stream,
    "/v1/responses": _response_stream,
    "/v1/messages": _message_stream,
    "/api/chat": _ollama_stream,
    "/api/generate": _ollama_stream,
}
