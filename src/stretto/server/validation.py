"""Validates a parsed request and encodes its prompts. It knows the model and the limits, and no server state.

A returned value is valid, and no other module checks it again. The order of the checks: fields that need no
model, tools, sampling options, and the length of the prompt once it is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from stretto.errors import InvalidRequest, UnsupportedField
from stretto.ladder.estimate import MAX_CHARS, prompt_text
from stretto.protocol.limits import LIMITS, check_json
from stretto.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    Generation,
    JsonObjectFormat,
    JsonSchemaFormat,
    StreamOptions,
)
from stretto.server.variants.question import question
from stretto.text import messages, reasoning_parser
from stretto.text.output import AnswerParser
from stretto.text.prompts import (
    RawPrompt,
    check_encoded,
    check_length,
    check_sampling_ids,
    check_size,
    encode_prompts,
)
from stretto.text.stop_strings import StopStrings
from stretto.text.tokenizer import TextModel
from stretto.text.tools.parser import CallParser
from stretto.types import Grammar, ModelInfo, Sampling, cache_salt

MOST_SCORES = 2**18  # log-probabilities of a prompt
COMPLETION_TOKENS = 16
# Sampling options whose value in a request is the engine's.
EQUAL_OPTIONS = (
    *("min_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "logit_bias", "ignore_eos", "seed", "n"),
)


class RequestLimits(NamedTuple):
    """The limits of one request: answers to each prompt, stop strings, and answers to all prompts."""

    n: int
    stop: int
    answers: int


class ModelHandle(NamedTuple):
    """A loaded model: its name, its tokenizer and template, and the engine's description of it."""

    name: str
    text: TextModel
    info: ModelInfo


class EncodedPrompt(NamedTuple):
    """A prompt's token ids.

    `echo`: the text with which the answer begins. `thinking`: whether the prompt ends inside a block of
    reasoning; None for a model or a request without reasoning.
    """

    ids: tuple[int, ...]
    echo: str = ""
    thinking: bool | None = None


@dataclass(frozen=True, slots=True)
class AnswerSpec:
    """A valid request: what to generate and what to send. `answers` counts the answers to all prompts.

    `encode` returns the prompts, which takes long for a long text. `question` returns the text that
    the quality of the answer is estimated from. `grammar_path` is the path of the field
    that gave the grammar. `parser` makes a parser of tool calls for one answer. With `single_call`, the first
    tool call ends the answer. `relaxed`: paths of a schema's parts that the grammar does not enforce.
    `whole_calls`: a stream has no part of a tool call before all of it. `stop_shown`: the stop string that
    ends an answer is part of it. `prompt_logprobs`, `token_ids`: whether the answer lists them.
    """

    model: ModelHandle
    encode: Callable[[], list[EncodedPrompt]]
    question: Callable[[], str]
    sampling: Sampling
    answers: int
    salt: str
    metadata: dict[str, str] | None
    stream: bool
    options: StreamOptions
    grammar_path: str
    parser: Callable[[], CallParser] | None = None
    single_call: bool = False
    relaxed: tuple[str, ...] = ()
    whole_calls: bool = False
    stop_shown: bool = False
    prompt_logprobs: bool = False
    token_ids: bool = False

    def answer_parser(self, thinking: bool | None) -> AnswerParser | None:
        """The parser of an answer with reasoning or tool calls. None if the answer is only content."""
        if thinking is None and self.parser is None:
            return None
        reasoning = stop = None
        if thinking is not None:
            reasoning = reasoning_parser.ReasoningParser(thinking)
            # The reasoning may hold a stop string, so only what follows it is searched.
            sampling = self.sampling
            if sampling.stop:
                stop = StopStrings(sampling.stop, sampling.min_tokens, shown=self.stop_shown)
        tools = self.parser() if self.parser else None
        return AnswerParser(
            reasoning,
            tools,
            streamed=self.stream and not self.whole_calls,
            single_call=self.single_call,
            stop=stop,
        )


def check_chat(request: ChatRequest, model: ModelHandle, limits: RequestLimits) -> AnswerSpec:
    """Checks a chat request. Raises InvalidRequest and its subclasses."""
    _check_options(request, 1, limits)
    _check_untyped(request)
    tools = messages.calls(request, model.text)
    form = _grammar(request)
    grammar, relaxed = form.grammar, form.relaxed + tools.relaxed
    if tools.grammar is not None:
        if grammar is not None:
            raise InvalidRequest(
                "$.tool_choice forces a tool call, so no response format can apply; leave one of them out",
                param="$.tool_choice",
            )
        grammar = tools.grammar
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("$.top_logprobs needs logprobs: true", param="$.top_logprobs")
    limit = _chat_limit(request)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    sampling = _sampling(request, model.text, limit, logprobs, grammar)
    check_sampling_ids(sampling, model.info)
    variables = messages.variables(request, model.text)
    if grammar is not None and (tools.forced or tools.grammar is None):
        # The grammar describes the answer from its first token, so no reasoning can come before it.
        variables.setdefault("enable_thinking", False)
    encode = partial(_encode_chat, request, model, sampling, tools.shown, variables)
    return _spec(
        request,
        model,
        sampling,
        encode,
        question=partial(question, request),
        parser=tools.parser,
        single_call=tools.single,
        relaxed=relaxed,
    )


def check_completion(request: CompletionRequest, model: ModelHandle, limits: RequestLimits) -> AnswerSpec:
    """Checks a request to continue raw prompts. Raises InvalidRequest and its subclasses."""
    inputs = split_inputs(request.prompt, "$.prompt")
    _check_options(request, len(inputs), limits)
    _check_schemas(request)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise UnsupportedField(
            "$.best_of must equal n: this server does not rank candidates", param="$.best_of"
        )
    limit = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    form = _grammar(request)
    sampling = _sampling(request, model.text, limit, request.logprobs, form.grammar)
    check_sampling_ids(sampling, model.info)
    encode = partial(_encode_completion, request, inputs, model, sampling)
    question = partial(_first_text, inputs, model.text)
    return _spec(
        request, model, sampling, encode, prompts=len(inputs), question=question, relaxed=form.relaxed
    )


def _spec(
    request: Generation,
    model: ModelHandle,
    sampling: Sampling,
    encode: Callable[[], list[EncodedPrompt]],
    prompts: int = 1,
    **chat: Any,
) -> AnswerSpec:
    path = "$.tools" if request.response_format is None else "$.response_format"
    return AnswerSpec(
        model=model,
        encode=encode,
        sampling=sampling,
        answers=prompts * sampling.n,
        salt=cache_salt(
            request.user, request.safety_identifier, request.prompt_cache_key, request.cache_salt
        ),
        metadata=request.metadata,
        stream=bool(request.stream),
        stop_shown=bool(request.include_stop_str_in_output),
        prompt_logprobs=request.prompt_logprobs is not None,
        token_ids=bool(request.return_token_ids),
        options=request.stream_options or StreamOptions(),
        grammar_path=path if request.structured_outputs is None else "$.structured_outputs",
        **chat,
    )


def _first_text(inputs: Sequence[RawPrompt], text: TextModel) -> str:
    first = inputs[0]
    return prompt_text(first if isinstance(first, str) else text.decode(list(first[:MAX_CHARS])), ())


def _encode_chat(
    request: ChatRequest,
    model: ModelHandle,
    sampling: Sampling,
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
) -> list[EncodedPrompt]:
    text, kept = model.text, request.truncate_prompt_tokens
    history = messages.messages(request, text)
    rendered = text.render(history, tools, variables, unfinished=bool(request.continue_final_message))
    if kept is None:
        check_size(rendered, text, model.info, "$.messages")
    ids = tuple(text.encode_rendered(rendered))[-kept if kept else 0 :]
    check_encoded(ids, text, model.info, "$.messages")
    check_length(len(ids), sampling.least_tokens, model.info, "$.messages")
    _check_scores(len(ids), sampling)
    thinking: bool | None = None
    # Calls that are constrained once they begin leave the reasoning before them free.
    free = sampling.grammar is None or sampling.grammar.kind == "tool_calls"
    if free and text.template is not None:
        if text.template.mentions(reasoning_parser.CLOSE):
            thinking = rendered.rstrip().endswith(reasoning_parser.OPEN)
    return [EncodedPrompt(ids, thinking=thinking)]


def _encode_completion(
    request: CompletionRequest, inputs: list[RawPrompt], model: ModelHandle, sampling: Sampling
) -> list[EncodedPrompt]:
    prompts: list[EncodedPrompt] = []
    encoded = encode_prompts(
        model.text,
        inputs,
        model.info,
        "$.prompt",
        last=request.truncate_prompt_tokens,
        special=request.add_special_tokens is not False,
    )
    for ids, source in zip(encoded, inputs, strict=True):
        check_length(len(ids), sampling.least_tokens, model.info, "$.prompt")
        _check_scores(len(ids), sampling)
        text = source if isinstance(source, str) else model.text.decode(list(source))
        prompts.append(EncodedPrompt(ids, text if request.echo else ""))
    return prompts


def _check_scores(tokens: int, sampling: Sampling) -> None:
    """Raises InvalidRequest for log-probabilities of a prompt that would fill an answer of megabytes."""
    each = sampling.prompt_logprobs
    if each is not None and tokens * (each + 1) > MOST_SCORES:
        raise InvalidRequest(
            f"{tokens} tokens of the prompt with {each + 1} log-probabilities each are more than the"
            f" {MOST_SCORES} that an answer may hold: ask for fewer, or send a shorter prompt",
            param="$.prompt_logprobs",
        )


def split_inputs(prompt: str | Sequence[str | int | list[int]], path: str) -> list[RawPrompt]:
    """One text or list of token ids for each prompt. Raises InvalidRequest for a list that mixes kinds or has
    too many prompts."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if len(prompt) > LIMITS["prompts"].most:
        raise LIMITS["prompts"].error(path, len(prompt))
    if len(kinds) > 1:
        raise InvalidRequest(
            f"{path} mixes texts, token ids and lists of token ids; send one kind", param=path
        )
    return cast("list[RawPrompt]", prompt)


def _check_options(request: Generation, prompts: int, limits: RequestLimits) -> None:
    n = request.n or 1
    if n > limits.n:
        raise InvalidRequest(f"$.n is {n}; this server allows at most {limits.n}", param="$.n")
    stops = request.stop if isinstance(request.stop, list) else []
    if len(stops) > limits.stop:
        raise InvalidRequest(
            f"$.stop has {len(stops)} strings; this server allows at most {limits.stop}", param="$.stop"
        )
    if prompts * n > limits.answers:
        raise InvalidRequest(
            f"$.prompt needs {prompts * n} answers; this server allows at most {limits.answers} in a request",
            param="$.prompt",
        )
    if request.prompt_logprobs is not None and request.stream:
        path = "$.prompt_logprobs"
        raise UnsupportedField(f"{path} are not part of a stream; leave $.stream out", param=path)
    if request.store:
        raise UnsupportedField("$.store: this server stores no answers; leave it out", param="$.store")


def _check_untyped(request: ChatRequest) -> None:
    """Raises InvalidRequest where a field without a type is nested too deeply or has too many members."""
    _check_schemas(request)
    if request.chat_template_kwargs is not None:
        check_json(request.chat_template_kwargs, "$.chat_template_kwargs")
    for at, tool in enumerate(request.tools or ()):
        if tool.function.parameters is not None:
            check_json(tool.function.parameters, f"$.tools[{at}].function.parameters")


def _check_schemas(request: Generation) -> None:
    if isinstance(request.response_format, JsonSchemaFormat):
        check_json(request.response_format.json_schema.schema, "$.response_format.json_schema.schema")
    if request.structured_outputs is not None:
        check_json(request.structured_outputs.json, "$.structured_outputs.json")


def _chat_limit(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        path = "$.max_completion_tokens"
        raise InvalidRequest(f"{path} and $.max_tokens differ; send one of them", param=path)
    return old if new is None else new


def _sampling(
    request: Generation,
    text: TextModel,
    max_tokens: int | None,
    logprobs: int | None,
    grammar: Grammar | None,
) -> Sampling:
    stop = request.stop or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    # The text of a special token is not in the answer, so such a stop string is found by its id.
    special = [id for each in stops if (id := text.special_id(each)) is not None]
    scored = request.prompt_logprobs
    if isinstance(request, CompletionRequest) and request.echo and logprobs is not None:
        scored = max(logprobs, scored or 0)
    given: dict[str, Any] = {
        name: value for name in EQUAL_OPTIONS if (value := getattr(request, name)) is not None
    }
    if request.top_k is not None:
        given["top_k"] = max(0, request.top_k)
    try:
        return Sampling(
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=scored,
            stop=stops,
            stop_token_ids=(*(request.stop_token_ids or ()), *special),
            grammar=grammar,
            **given,
        )
    except ValueError as error:
        raise InvalidRequest(f"$.{error}", param=f"$.{str(error).split(maxsplit=1)[0]}") from error


class AnswerFormat(NamedTuple):
    """The grammar of an answer, and the paths of what it does not enforce."""

    grammar: Grammar | None = None
    relaxed: tuple[str, ...] = ()


def _grammar(request: Generation) -> AnswerFormat:
    """The format that the answer must have. Raises InvalidRequest if the request gives several, and
    UnsupportedField for a strict schema that cannot be enforced."""
    form = request.response_format
    found: list[AnswerFormat] = []
    if isinstance(form, JsonObjectFormat):
        found.append(AnswerFormat(Grammar("json_object")))
    elif isinstance(form, JsonSchemaFormat):
        named = form.json_schema
        path = "$.response_format.json_schema.schema"
        found.append(_schema_format(named.schema, path, strict=bool(named.strict)))
    path = "$.structured_outputs"
    if (outputs := request.structured_outputs) is not None:
        if outputs.json is not None:
            found.append(_schema_format(outputs.json, f"{path}.json", blanks=outputs.whitespace_pattern))
        if outputs.json_object:
            blanks, spaced = outputs.whitespace_pattern, f"{path}.json_object"
            found.append(
                AnswerFormat(Grammar("json_object"))
                if blanks is None
                else _schema_format({"type": "object"}, spaced, blanks=blanks)
            )
        if outputs.regex is not None:
            found.append(AnswerFormat(Grammar("regex", outputs.regex)))
        if outputs.choice is not None:
            found.append(AnswerFormat(Grammar("choice", json.dumps(outputs.choice))))
        if not found:
            raise InvalidRequest(f"{path} needs json, json_object, regex or choice", param=path)
        if outputs.whitespace_pattern is not None and outputs.json is None and not outputs.json_object:
            where = f"{path}.whitespace_pattern"
            raise InvalidRequest(f"{where} is for json and json_object; leave it out", param=where)
    if len(found) > 1:
        raise InvalidRequest(f"{path} and response_format describe several formats; send one", param=path)
    return found[0] if found else AnswerFormat()


def _schema_format(
    schema: dict[str, Any] | str, path: str, *, strict: bool = False, blanks: str | None = None
) -> AnswerFormat:
    """The format of a JSON schema, perhaps written as a string. `blanks`: a regex of the blanks it allows."""
    if isinstance(schema, str):
        try:
            parsed: Any = json.loads(schema)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            return AnswerFormat(Grammar("json_schema", schema))  # compiling it says what is wrong
        schema = cast("dict[str, Any]", parsed)
    found = messages.checked_schema(schema, path, strict=strict)
    if blanks is not None:
        found.schema["x-guidance"] = {"whitespace_pattern": blanks}
    return AnswerFormat(Grammar("json_schema", json.dumps(found.schema)), tuple(found.relaxed))
