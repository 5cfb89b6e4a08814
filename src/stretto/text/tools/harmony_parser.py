"""Reads the messages of gpt-oss, whose format is called harmony.

An answer is several messages: `<|channel|>CHANNEL to=RECIPIENT<|message|>TEXT<|end|>`, and before each but
the first `<|start|>assistant`. The channel `analysis` is reasoning. A message to `functions.NAME` is a call
with its arguments. All other text is content, also that of an answer without channels.
The format is documented in https://github.com/openai/harmony.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from stretto.protocol.openai import FunctionDelta, ToolCallDelta
from stretto.text.stop_strings import partial_match
from stretto.text.tools.parser import Reasoning, ToolEvent, ToolFormat, first_delta
from stretto.text.tools.strict.formats import harmony

CHANNEL, MESSAGE, START, CONSTRAIN = "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START, CHANNEL)
HARMONY_TOKENS = frozenset({MESSAGE, CONSTRAIN, *ENDS})
HARMONY = ToolFormat(CHANNEL, strict=harmony, marks=tuple(sorted(HARMONY_TOKENS)))
LONGEST_HEADER = 1024  # characters
_END = re.compile("|".join(map(re.escape, ENDS)))
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


class HarmonyParser:
    """Splits one answer into reasoning, content and calls. `calls` counts the complete ones."""

    def __init__(self, names: frozenset[str]) -> None:
        """`names` are the tools of the request."""
        self._names = names
        self._state: Literal["start", "header", "content", "reasoning", "call"] = "start"
        self._held = ""
        self._index = -1  # of the current call
        self._arguments = ""
        self.calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        """The reasoning, the content and the parts of calls that are certain now."""
        events: list[ToolEvent] = []
        text, self._held = self._held + text, ""
        while text:
            if self._state == "start":
                text = self._start(text)
            elif self._state == "header":
                text = self._header(text, events)
            else:
                text = self._body(text, events)
        return events

    def flush(self) -> list[ToolEvent]:
        """The rest, when the answer ended."""
        events: list[ToolEvent] = []
        held, self._held = self._held, ""
        if self._state not in ("start", "header"):
            self._emit(held, events)
            self._end_message()
        elif held.strip() and not any(token in held for token in HARMONY_TOKENS):
            events.append(held)
        return events

    def _start(self, text: str) -> str:
        """The first text: a header, or an answer without channels."""
        begun = text.lstrip()
        if any(each.startswith(begun) for each in (CHANNEL, START, "to=functions.")):
            self._held = text
            return ""
        known = begun.startswith((CHANNEL, START, "to=functions."))
        self._state = "header" if known else "content"
        return text

    def _header(self, text: str, events: list[ToolEvent]) -> str:
        header, found, rest = text.partition(MESSAGE)
        if not found:
            if len(text) > LONGEST_HEADER:
                self._state = "content"
                return text
            self._held = text
            return ""
        recipient = _RECIPIENT.search(header)
        channel = header.rpartition(CHANNEL)[2].split()
        if recipient is not None and recipient[1] in self._names:
            self._state, self._arguments = "call", ""
            self._index += 1
            events.append(first_delta(self._index, recipient[1], ""))
        else:
            self._state = "reasoning" if channel[:1] == ["analysis"] else "content"
        return rest

    def _body(self, text: str, events: list[ToolEvent]) -> str:
        end = _END.search(text)
        if end is None:
            cut = len(text) - max(partial_match(text, each) for each in ENDS)
            self._held = text[cut:]
            self._emit(text[:cut], events)
            return ""
        self._emit(text[: end.start()], events)
        self._end_message()
        return text[end.start() if end[0] in (START, CHANNEL) else end.end() :]

    def _emit(self, text: str, events: list[ToolEvent]) -> None:
        if not text:
            return
        if self._state == "call":
            self._arguments += text
            delta = ToolCallDelta(index=self._index, function=FunctionDelta(arguments=text))
            events.append(delta)
        else:
            events.append(Reasoning(text) if self._state == "reasoning" else text)

    def _end_message(self) -> None:
        """A call counts if its arguments are whole, so not if the answer was cut in them."""
        if self._state == "call":
            try:
                self.calls += isinstance(json.loads(self._arguments or "{}"), dict)
            except (ValueError, RecursionError):
                pass
        self._state = "header"
