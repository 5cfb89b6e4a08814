"""Finds tool calls that a model writes with tags: Qwen3-Coder's and GLM's.

Qwen3-Coder writes `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>`. GLM
writes `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>`. A value is plain
text; the schema of its parameter says what it stands for. A call is sent when it is whole. Text that begins
like a call and is none becomes content, so no text is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from stretto.protocol.openai import ToolCallDelta
from stretto.text.stop_strings import partial_match
from stretto.text.tools.parser import ToolEvent, first_delta

OPENER, CLOSER = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class TagFormat:
    """How a family writes the inside of a call: a pattern of the name, and one of each argument."""

    name: re.Pattern[str]
    argument: re.Pattern[str]
    mentioned: str  # a text that occurs in the chat templates of the family


QWEN_CODER = TagFormat(
    re.compile(r"\s*<function=([^>\n]+)>"),
    re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL),
    "<function=",
)
GLM = TagFormat(
    re.compile(r"\s*([\w.-]+)\s*(?=<arg_key>|$)"),
    re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL),
    "<arg_key>",
)
TAG_FORMATS = (QWEN_CODER, GLM)


class TagParser:
    """Finds the calls of one answer. `calls` counts them."""

    def __init__(self, form: TagFormat, parameters: Mapping[str, dict[str, Any] | None]) -> None:
        """`parameters`: the schema of each tool's arguments, by the tool's name."""
        self._form = form
        self._parameters = parameters
        self._held = ""
        self._inside = False
        self.calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        """The content and the calls that are certain now."""
        events: list[ToolEvent] = []
        text, self._held = self._held + text, ""
        while text:
            marker = CLOSER if self._inside else OPENER
            before, found, rest = text.partition(marker)
            if not found:
                if self._inside:
                    self._held = text
                else:
                    cut = len(text) - partial_match(text, OPENER)
                    if self.calls and not text[:cut].strip():
                        cut = 0  # blanks between calls are no content
                    self._held = text[cut:]
                    self._content(text[:cut], events)
                return events
            if self._inside:
                self._call(before, events)
            elif not (self.calls and not before.strip()):
                self._content(before, events)
            self._inside, text = not self._inside, rest
        return events

    def flush(self) -> list[ToolEvent]:
        """The rest, when the answer ended. A call that was cut keeps the arguments that are whole."""
        events: list[ToolEvent] = []
        held, self._held = self._held, ""
        if self._inside:
            self._call(held, events)
        elif not (self.calls and not held.strip()):
            self._content(held, events)
        return events

    def _content(self, text: str, events: list[ToolEvent]) -> None:
        if text:
            events.append(text)

    def _call(self, inside: str, events: list[ToolEvent]) -> None:
        found = self._form.name.match(inside)
        if found is None or found[1].strip() not in self._parameters:
            events.append(OPENER + inside + CLOSER)
            return
        name = found[1].strip()
        properties = cast("dict[str, Any]", (self._parameters[name] or {}).get("properties", {}))
        arguments = {
            key.strip(): value_of(text, properties.get(key.strip()))
            for key, text in self._form.argument.findall(inside)
        }
        events.append(self._delta(name, arguments))
        self.calls += 1

    def _delta(self, name: str, arguments: dict[str, Any]) -> ToolCallDelta:
        return first_delta(self.calls, name, json.dumps(arguments, ensure_ascii=False))


def value_of(text: str, schema: Any) -> Any:
    """The JSON value that a parameter's text stands for. A text is a string if its schema allows a string, or
    if it is no JSON."""
    kinds: Any = cast("dict[str, Any]", schema).get("type") if isinstance(schema, dict) else None
    allowed = cast("list[Any]", kinds) if isinstance(kinds, list) else [kinds]
    if "string" in allowed and not (text == "null" and "null" in allowed):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        literal = {"True": True, "False": False, "None": None}
        return literal.get(text.strip(), text)
