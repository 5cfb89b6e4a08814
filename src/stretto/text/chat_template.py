"""Chat templates: messages -> the text of the prompt, by the checkpoint's own Jinja template.

A template comes with a checkpoint and is not trusted. It runs in the sandbox of `template_sandbox`, where it
can format the values it is given and nothing else. This module knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from stretto.disk.files import read_file
from stretto.errors import CheckpointError, InvalidRequest, cut
from stretto.text.template_sandbox import TemplateEnvironment, check_json_arguments

LONGEST_REASON = 300
# What each request looks for in the source. A search takes 1 to 2 us in a template of 4 kB.
USUAL_WORDS = (
    *("tools", "tool_calls", "developer", "enable_thinking", "reasoning_effort"),
    *("<think>", "</think>", "<|channel|>", "<|message|>"),
)


class _Generation(Extension):
    """`{% generation %}` marks the answer for training. In serving it is replaced by its content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, and no model was trained on that.
    check_json_arguments(value, indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Refusal(TemplateError):
    """What a template says of messages that it rejects."""


def _refuse(message: str) -> str:
    raise _Refusal(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> TemplateEnvironment:
    environment = TemplateEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson  # pyright: ignore[reportUnknownMemberType]
    globals_: dict[str, Callable[..., Any]] = {
        "raise_exception": _refuse,
        "strftime_now": _now,
    }
    environment.globals.update(globals_)  # pyright: ignore[reportUnknownMemberType]
    return environment


class ChatTemplate:
    """The template of one checkpoint, and its variant for requests with tools if there is one."""

    def __init__(self, sources: dict[str, str], variables: dict[str, str]) -> None:
        """`sources` has `default` and may have `tool_use`. `variables` are the special tokens by name.

        Raises CheckpointError when a source is not valid Jinja.
        """
        self._environment = environment = _environment()
        try:
            self._templates: dict[str, Template] = {
                name: environment.compiled(source) for name, source in sources.items()
            }
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template does not parse: line {error.lineno}: {error}"
            ) from error
        except (TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template does not parse: {error}") from error
        self.source = "\n".join(sources.values())
        self._usual = {word: word in self.source for word in USUAL_WORDS}
        self._variables = variables

    def mentions(self, word: str) -> bool:
        """Whether the source of the template contains `word`."""
        found = self._usual.get(word)
        return word in self.source if found is None else found

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> str:
        """The text of the prompt.

        Raises InvalidRequest with the template's message when it rejects them, and with the line when the
        template fails or takes too much time or memory.
        """
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates["default"]
        values = {"add_generation_prompt": True, "documents": None, **self._variables, **variables}
        try:
            return self._environment.render(template, {**values, "messages": messages, "tools": tools})
        except _Refusal as error:
            reason = f"rejects these messages: {error}"
        except Exception as error:  # a template may raise whatever an expression of Python can
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            reason = f"fails at line {_line(error)}: {kind}{cut(str(error), LONGEST_REASON)}"
        raise InvalidRequest(f"the model's chat template {reason}", param="$.messages")


def _line(error: Exception) -> int:
    """The line of the template that raised an error."""
    line, place = 0, error.__traceback__
    while place is not None:
        if place.tb_frame.f_code.co_filename == "<template>":
            line = place.tb_lineno
        place = place.tb_next
    return line


def load(path: Path, config: dict[str, Any]) -> ChatTemplate | None:
    """The template of the checkpoint in `path`; None without one. `config` is its tokenizer_config.json.

    Raises CheckpointError, or what a damaged file makes Python raise.
    """
    sources = _sources(path, config)
    if "default" not in sources:
        return None
    variables: dict[str, str] = {}
    for name, value in config.items():
        token = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            variables[name] = token
    return ChatTemplate(sources, variables)


def _sources(path: Path, config: dict[str, Any]) -> dict[str, str]:
    # The last one found wins: a separate file replaces the template in tokenizer_config.json.
    found: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        found["default"] = inline
    elif isinstance(inline, list):
        found.update({entry["name"]: entry["template"] for entry in cast("list[dict[str, str]]", inline)})
    elif inline is not None:
        raise CheckpointError(f"{path / 'tokenizer_config.json'}: $.chat_template must be a string or a list")
    legacy = path / "chat_template.json"
    if legacy.exists():
        found["default"] = json.loads(read_file(legacy))["chat_template"]
    alone = path / "chat_template.jinja"
    if alone.exists():
        found["default"] = read_file(alone).decode("utf-8")
    for extra in sorted((path / "additional_chat_templates").glob("*.jinja")):
        found[extra.stem] = read_file(extra).decode("utf-8")
    return {name: found[name] for name in ("default", "tool_use") if name in found}
