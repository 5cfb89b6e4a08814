"""Parsed requests -> jobs: what to submit to the engine and how to write the answer. All checks end here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from stretto.errors import InvalidGrammar, InvalidRequest, Unavailable, UnsupportedField
from stretto.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    Generation,
    JsonObjectFormat,
    JsonSchemaFormat,
    StreamOptions,
)
from stretto.server import responses
from stretto.server.objectives import DEFAULT, Aim, aim
from stretto.server.state import Front
from stretto.text import messages, reasoning_parser
from stretto.text.output import AnswerParser
from stretto.text.prompts import check_length, check_sampling_ids, check_token_ids, encode_prompts
from stretto.text.tokenizer import TextModel
from stretto.text.tool_parser import NamedCallParser, ToolParser
from stretto.types import Grammar, ModelInfo, Sampling

COMPLETION_TOKENS = 16
Prompts = str | Sequence[str | int | list[int]]


@dataclass(frozen=True, slots=True)
class Job:
    """One request, checked; `modest` is its aim when the tenant has had its share of priority. There are
    `sampling.n` choices of each prompt; `echo` has one text per prompt."""

    style: responses.Style
    model: str
    text: TextModel
    prompts: list[tuple[int, ...]]
    sampling: Sampling
    salt: str
    aim: Aim
    modest: Aim
    metadata: dict[str, str] | None
    stream: bool
    options: StreamOptions
    echo: list[str]
    thinking: bool | None = None
    parser: Callable[[], ToolParser | NamedCallParser] | None = None
    single_call: bool = False

    def answer_parser(self) -> AnswerParser | None:
        """A new one for each output; None when all text is content."""
        if self.thinking is None and self.parser is None:
            return None
        thoughts = None if self.thinking is None else reasoning_parser.ReasoningParser(self.thinking)
        tools = self.parser() if self.parser else None
        return AnswerParser(thoughts, tools, streamed=self.stream, single_call=self.single_call)


async def chat(front: Front, request: ChatRequest, size: int) -> Job:
    """`size` is the body's in bytes: long ones are rendered and encoded off the event loop."""
    name, text = front.model(request.model)
    info = _open(front, name, request, 1)
    called = messages.calls(request, text)
    grammar = _grammar(request) if called.grammar is None else called.grammar
    if called.grammar is not None and _grammar(request) is not None:
        raise InvalidRequest(
            "a forced tool call and a response format exclude each other", param="$.tool_choice"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("$.top_logprobs needs logprobs: true", param="$.top_logprobs")
    limit = _chat_limit(request)
    sampling = _sampling(request, limit, (request.top_logprobs or 0) if request.logprobs else None, grammar)
    check_sampling_ids(sampling, info)
    await _check_grammar(front, name, grammar, request)
    thinks = text.template is not None and text.template.mentions(reasoning_parser.CLOSE) and grammar is None
    variables = messages.variables(request, text)
    if grammar is not None:
        # What the grammar allows is the answer: there is no room to think aloud before it.
        variables.setdefault("enable_thinking", False)

    def prepare() -> tuple[tuple[int, ...], bool]:
        rendered = text.render(messages.messages(request, text), called.shown, variables)
        opened = rendered.rstrip().endswith(reasoning_parser.OPEN)
        return tuple(text.encode_rendered(rendered)), opened

    prompt, opened = await front.off_loop(size, prepare)
    check_token_ids(prompt, info, "$.messages")
    check_length(len(prompt), limit or 1, info, "$.messages")
    return Job(
        style=responses.CHAT,
        model=name,
        text=text,
        prompts=[prompt],
        sampling=sampling,
        salt=_salt(request),
        aim=aim(request, front.tiers, front.config.schedule),
        modest=aim(request, front.tiers, front.config.schedule, DEFAULT),
        metadata=request.metadata,
        stream=bool(request.stream),
        options=_options(request),
        echo=[""],
        thinking=opened if thinks else None,
        parser=called.parser,
        single_call=called.single,
    )


async def completion(front: Front, request: CompletionRequest, size: int) -> Job:
    """As `chat`, for raw prompts."""
    name, text = front.model(request.model)
    inputs = split(request.prompt, "$.prompt")
    info = _open(front, name, request, len(inputs))
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise UnsupportedField("$.best_of must equal n: there is no ranking of candidates", param="$.best_of")
    if request.echo and request.logprobs is not None:
        raise UnsupportedField("$.echo does not go with logprobs", param="$.echo")
    limit = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    grammar = _grammar(request)
    sampling = _sampling(request, limit, request.logprobs, grammar)
    check_sampling_ids(sampling, info)
    await _check_grammar(front, name, grammar, request)

    def prepare() -> tuple[list[tuple[int, ...]], list[str]]:
        prompts = encode_prompts(text, inputs, info, "$.prompt")
        if not request.echo:
            return prompts, [""] * len(prompts)
        return prompts, [item if isinstance(item, str) else text.decode(item) for item in inputs]

    prompts, echo = await front.off_loop(size, prepare)
    for prompt in prompts:
        check_length(len(prompt), limit, info, "$.prompt")
    return Job(
        style=responses.TEXT,
        model=name,
        text=text,
        prompts=prompts,
        sampling=sampling,
        salt=_salt(request),
        aim=aim(request, front.tiers, front.config.schedule),
        modest=aim(request, front.tiers, front.config.schedule, DEFAULT),
        metadata=request.metadata,
        stream=bool(request.stream),
        options=_options(request),
        echo=echo,
    )


def split(prompt: Prompts, path: str) -> list[str | list[int]]:
    """One prompt per item. Raises InvalidRequest for a list that mixes kinds."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if len(kinds) > 1:
        raise InvalidRequest(f"{path} mixes text, ids and lists of ids; send one kind", param=path)
    return cast("list[str | list[int]]", prompt)


def _open(front: Front, name: str, request: Generation, prompts: int) -> ModelInfo:
    """Limits that need no text. Raises also whatever keeps new requests out."""
    n = request.n or 1
    most = front.config.max_n
    if n > most:
        raise InvalidRequest(f"$.n may be {most} at most, not {n}", param="$.n")
    stops = request.stop if isinstance(request.stop, list) else []
    if len(stops) > front.config.max_stop:
        most = front.config.max_stop
        raise InvalidRequest(f"$.stop may hold {most} strings at most, not {len(stops)}", param="$.stop")
    if prompts * n > front.config.max_waiting:
        most = front.config.max_waiting
        raise InvalidRequest(
            f"$.prompt asks for {prompts * n} answers; {most} at most in one request", param="$.prompt"
        )
    if request.store:
        raise UnsupportedField("$.store: this server stores no answers", param="$.store")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("$.stream_options needs stream: true", param="$.stream_options")
    front.ensure_open(prompts * n)
    info = front.engine.models.get(name)
    if info is None:
        raise Unavailable(f"model {name} is not loaded yet", retry_after=2.0)
    return info


def _chat_limit(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        where = "$.max_completion_tokens"
        raise InvalidRequest(f"{where} and $.max_tokens differ; send one of them", param=where)
    return old if new is None else new


def _sampling(
    request: Generation, max_tokens: int | None, logprobs: int | None, grammar: Grammar | None
) -> Sampling:
    stop = request.stop or ()
    given = {
        "min_tokens": request.min_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(0, request.top_k),
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "logit_bias": request.logit_bias,
        "ignore_eos": request.ignore_eos,
        "n": request.n,
    }
    try:
        return Sampling(
            max_tokens=max_tokens,
            seed=request.seed,
            logprobs=logprobs,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            grammar=grammar,
            **{name: value for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        raise InvalidRequest(f"$.{error}", param=f"$.{str(error).split(maxsplit=1)[0]}") from error


def _grammar(request: Generation) -> Grammar | None:
    """What the text must look like. Raises InvalidRequest when several things say so."""
    form = request.response_format
    found: list[Grammar] = []
    if isinstance(form, JsonObjectFormat):
        found.append(Grammar("json_object"))
    elif isinstance(form, JsonSchemaFormat):
        found.append(Grammar("json_schema", json.dumps(form.json_schema.schema)))
    if (outputs := request.structured_outputs) is not None:
        if outputs.json is not None:
            source = outputs.json if isinstance(outputs.json, str) else json.dumps(outputs.json)
            found.append(Grammar("json_schema", source))
        if outputs.json_object:
            found.append(Grammar("json_object"))
        if outputs.regex is not None:
            found.append(Grammar("regex", outputs.regex))
        if outputs.choice is not None:
            found.append(Grammar("choice", json.dumps(outputs.choice)))
        if not found:
            where = "$.structured_outputs"
            raise InvalidRequest(f"{where} needs json, json_object, regex or choice", param=where)
    if len(found) > 1:
        where = "$.structured_outputs"
        raise InvalidRequest(f"{where} and response_format: only one may shape the answer", param=where)
    return found[0] if found else None


async def _check_grammar(front: Front, model: str, grammar: Grammar | None, request: Generation) -> None:
    if grammar is None or front.check is None:
        return
    try:
        await front.check(model, grammar)
    except InvalidGrammar as error:
        if request.structured_outputs is not None:
            error.param = "$.structured_outputs"
        else:
            error.param = "$.tools" if request.response_format is None else "$.response_format"
        raise


def _options(request: Generation) -> StreamOptions:
    return request.stream_options or StreamOptions()


def salt_of(*parts: str | None) -> str:
    """What keeps computed prompts apart, besides the tenant."""
    return json.dumps(parts) if any(part is not None for part in parts) else ""


def _salt(request: Generation) -> str:
    return salt_of(request.user, request.safety_identifier, request.prompt_cache_key, request.cache_salt)
