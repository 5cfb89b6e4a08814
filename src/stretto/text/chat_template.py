"""Chat templates: messages -> the prompt's text, exactly as the checkpoint's Jinja template says.

The template comes with a checkpoint, so it runs in Jinja's immutable sandbox: it sees values and may format
them, nothing else. It knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stretto.errors import CheckpointError, InvalidRequest

type_error = (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError)


class _Generation(Extension):
    """`{% generation %}` marks the answer for training; when serving, it is its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

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
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    globals_: dict[str, Callable[..., Any]] = {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    environment.globals.update(globals_)
    return environment


class ChatTemplate:
    """One checkpoint's template, and its variant for requests with tools where it has one."""

    def __init__(self, sources: dict[str, str], variables: dict[str, str]) -> None:
        """`sources` has `default` and may have `tool_use`; `variables` are the special tokens by name."""
        environment = _environment()
        try:
            self._templates: dict[str, Template] = {
                name: environment.from_string(source) for name, source in sources.items()
            }
        except TemplateError as error:
            raise CheckpointError(f"the chat template does not parse: {error}") from error
        self._sources = sources
        self._variables = variables

    def mentions(self, word: str) -> bool:
        return any(word in source for source in self._sources.values())

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> str:
        """Raises InvalidRequest with the template's own sentence when it refuses the messages."""
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates["default"]
        values = {"add_generation_prompt": True, "documents": None, **self._variables, **variables}
        try:
            return template.render({**values, "messages": messages, "tools": tools})
        except (TemplateError, *type_error) as error:
            reason = str(error) or type(error).__name__
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {reason}", param="$.messages"
            ) from error


def load(path: Path, config: dict[str, Any]) -> ChatTemplate | None:
    """The template of the checkpoint in `path`, whose tokenizer_config.json is `config`; None without one."""
    sources = _sources(path, config)
    if "default" not in sources:
        return None
    variables: dict[str, str] = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            variables[name] = token
    return ChatTemplate(sources, variables)


def _sources(path: Path, config: dict[str, Any]) -> dict[str, str]:
    # Later wins: a file of its own replaces what tokenizer_config.json holds.
    found: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        found["default"] = inline
    elif isinstance(inline, list):
        found.update({entry["name"]: entry["template"] for entry in inline})
    legacy = path / "chat_template.json"
    if legacy.is_file():
        found["default"] = json.loads(legacy.read_bytes())["chat_template"]
    alone = path / "chat_template.jinja"
    if alone.is_file():
        found["default"] = alone.read_text("utf-8")
    for extra in sorted((path / "additional_chat_templates").glob("*.jinja")):
        found[extra.stem] = extra.read_text("utf-8")
    return {name: found[name] for name in ("default", "tool_use") if name in found}
