"""Finds tool calls between tags, in any of the formats of `tag_formats`.

A call is sent when it is whole. Text that begins like a call and is none becomes content, so no text is lost.
"""

from __future__ import annotations

import json
import re

from stretto.text.stop_strings import partial_match
from stretto.text.tools.parser import ToolEvent, first_delta
from stretto.text.tools.tag_formats import Parameters, TagFormat


class TagParser:
    """Finds the calls of one answer. `calls` counts them."""

    def __init__(self, form: TagFormat, parameters: Parameters) -> None:
        """`parameters`: the schema of each tool's arguments, by the tool's name."""
        self._form = form
        self._parameters = parameters
        self._outside = (form.opener, *form.wrappers)
        self._tags = re.compile("|".join(map(re.escape, self._outside)))
        self._held = ""
        self._inside = False
        self._blank = False  # whether blanks are no content: between calls, or after a wrapper
        self.calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        """The content and the calls that are certain now."""
        events: list[ToolEvent] = []
        text, self._held = self._held + text, ""
        while text:
            if self._inside:
                inside, found, text = text.partition(self._form.closer)
                if not found:
                    self._held = inside
                    return events
                self._inside = False
                self._call(inside, events, whole=True)
                continue
            tag = self._tags.search(text)
            if tag is None:
                cut = len(text) - max(partial_match(text, each) for each in self._outside)
                if self._blank and not text[:cut].strip():
                    cut = 0
                self._held = text[cut:]
                self._content(text[:cut], events)
                return events
            self._content(text[: tag.start()], events)
            self._blank = True
            self._inside, text = tag[0] == self._form.opener, text[tag.end() :]
        return events

    def flush(self) -> list[ToolEvent]:
        """The rest, when the answer ended. A call that was cut keeps the arguments that are whole."""
        events: list[ToolEvent] = []
        held, self._held = self._held, ""
        if self._inside:
            self._call(held, events, whole=False)
        else:
            self._content(held, events)
        return events

    def _content(self, text: str, events: list[ToolEvent]) -> None:
        if text and not (self._blank and not text.strip()):
            events.append(text)
            self._blank = False

    def _call(self, inside: str, events: list[ToolEvent], *, whole: bool) -> None:
        call = self._form.read(inside, self._parameters, whole)
        if call is None:
            events.append(self._form.opener + inside + (self._form.closer if whole else ""))
            return
        name, arguments = call
        events.append(first_delta(self.calls, name, json.dumps(arguments, ensure_ascii=False)))
        self.calls += 1
