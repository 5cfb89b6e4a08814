"""What adapters of other APIs share: field names in errors, arguments as objects, possible reasoning."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec import structs

from stretto.errors import EngineError, StrettoError
from stretto.protocol.openai import ChatRequest, MadeCall
from stretto.server.validation import ModelHandle
from stretto.text.json_stream import whole_members


@contextmanager
def fields_named(names: Sequence[tuple[str, str]]) -> Generator[None]:
    """Gives the fields in errors the names that the client's API has for them: (ours, theirs)."""
    try:
        yield
    except StrettoError as error:
        error.message = renamed(error.message, names)
        error.param = error.param and renamed(error.param, names)
        raise


def renamed(text: str, names: Sequence[tuple[str, str]]) -> str:
    """A text or a path with the client's names: (ours, theirs)."""
    for ours, theirs in names:
        text = text.replace(ours, theirs)
    return text


def arguments_of(call: MadeCall) -> dict[str, Any]:
    """The arguments of a call as an object. Of a call that was cut: the members that are whole. Raises
    EngineError for arguments that are nested too deeply to be read."""
    try:
        return whole_members(call.function.arguments) or {}
    except RecursionError:
        raise EngineError("the model nested the arguments of a call too deeply; ask again") from None


def with_possible_reasoning(request: ChatRequest, model: ModelHandle) -> ChatRequest:
    """The request with `reasoning_effort` as this model's template knows it: an effort, on and off, or
    nothing. An answer that has a format from its first token on has no reasoning."""
    effort, template = request.reasoning_effort, model.text.template
    if effort is None:
        return request
    formed = request.response_format is not None or request.tool_choice not in (None, "auto", "none")
    switched = template is not None and template.mentions("enable_thinking")
    graded = template is not None and template.mentions("reasoning_effort") and effort != "none"
    return structs.replace(
        request,
        reasoning_effort=effort if graded else None,
        chat_template_kwargs={"enable_thinking": effort != "none" and not formed} if switched else None,
    )
