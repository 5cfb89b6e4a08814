"""Finds tool calls between tags, in any of the formats of `tag_formats`.

A call is sent when it is whole. Text that begins like a call and is none becomes content, so no text is lost.
"""

from __future__ import annotations

import json
import re
from typing import Any

from stretto.text.stop_strings import partial_match
from stretto.text.tools.parser import ToolEvent, first_delta
from stretto.text.tools.tag_formats import ENDS_TRIED, Parameters, TagFormat, UnfinishedCall


class TagParser:
    """Finds the calls of one answer. `calls` counts them."""

    def __init__(self, form: TagFormat, parameters: Parameters) -> None:
        """`parameters`: the schema of each tool's arguments, by the tool's name."""
        self._form = form
        self._parameters = parameters
        self._outside = (form.opener, *form.wrappers, *((form.bare[0], form.closer) if form.bare else ()))
        self._opener, self._closer = form.opener, form.closer  # of the call that is being read
        self._tags = re.compile("|".join(map(re.escape, self._outside)))
        self._held = ""
        self._inside = False
        self._ends: list[int] = []  # where a closer came too early in what is held
        self._seen = 0  # how much of it was searched for closers
        self._blank = False  # whether blanks are no content: between calls, or after a wrapper
        self.calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        """The content and the calls that are certain now."""
        events: list[ToolEvent] = []
        text, self._held = self._held + text, ""
        while text:
            if self._inside:
                end = self._end(text)
                if end < 0:
                    self._held = text
                    return events
                text = self._close(text, end, events)
                continue
            tag = self._tags.search(text)
            if tag is None:
                cut = len(text) - max(partial_match(text, each) for each in self._outside)
                if self._blank and not text[:cut].strip():
                    cut = 0
                self._held = text[cut:]
                self._content(text[:cut], events)
                return events
            text = self._tag(text, tag, events)
        return events

    def _tag(self, text: str, tag: re.Match[str], events: list[ToolEvent]) -> str:
        """Emit the content before a tag. Returns the text after it, or from it on if it is part of a call."""
        form = self._form
        self._content(text[: tag.start()], events)
        if tag[0] == form.closer and not self._blank:
            self._content(tag[0], events)  # it closes nothing
            return text[tag.end() :]
        self._blank = True
        self._opener, self._closer = form.opener, form.closer
        if form.bare is not None and tag[0] == form.bare[0]:
            self._inside, self._opener, self._closer = True, "", form.bare[1]
            return text[tag.start() :]
        self._inside = tag[0] == form.opener
        return text[tag.end() :]

    def flush(self) -> list[ToolEvent]:
        """The rest, when the answer ended. A call that was cut keeps the arguments that are whole."""
        events: list[ToolEvent] = []
        held, self._held = self._held, ""
        while self._inside and self._ends:  # it was no closer in a string, but a call that is broken
            rest = self._close(held, self._ends[0], events)
            events += self.push(rest)
            held, self._held = self._held, ""
        if self._inside:
            self._call(held, events, whole=False)
        else:
            self._content(held, events)
        return events

    def _end(self, text: str) -> int:
        """Where the call in `text` ends, -1 while it may go on. A closer inside a value ends nothing."""
        closer = self._closer
        start = self._ends[-1] + 1 if self._ends else max(0, self._seen - len(closer))
        self._seen = len(text)
        while (end := text.find(closer, start)) >= 0:
            try:
                self._form.read(text[:end], self._parameters, True)
            except UnfinishedCall:
                self._ends.append(end)
                start = end + 1
                if len(self._ends) == ENDS_TRIED:
                    return self._ends[0]
            else:
                return end
        return -1

    def _close(self, text: str, end: int, events: list[ToolEvent]) -> str:
        """Emit the call that ends there. Returns the text after it."""
        self._inside, self._ends, self._seen = False, [], 0
        self._call(text[:end], events, whole=True)
        return text[end + len(self._closer) :]

    def _content(self, text: str, events: list[ToolEvent]) -> None:
        if text and not (self._blank and not text.strip()):
            events.append(text)
            self._blank = False

    def _call(self, inside: str, events: list[ToolEvent], *, whole: bool) -> None:
        try:
            call = self._form.read(inside, self._parameters, whole)
        except UnfinishedCall as unfinished:
            call = unfinished.call
        if call is None:
            events.append(self._opener + inside + (self._closer if whole else ""))
            self._blank = False
            return
        name, arguments = call
        events.append(first_delta(self.calls, name, _dumped(arguments)))
        self.calls += 1


def _dumped(arguments: dict[str, Any]) -> str:
    """Arguments as JSON. Half a surrogate pair in them stays an escape sequence."""
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text
