"""Finds tool calls in text while a model generates it: Hermes and Qwen, Llama 3, Mistral, and forced calls.

Arguments are streamed as they are generated. Text that begins like a call and is none becomes content, so no
text is lost. This module knows no HTTP and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from typing import Literal, Protocol

from stretto.protocol.openai import FunctionDelta, ToolCallDelta
from stretto.text.json_stream import JsonReader
from stretto.text.stop_strings import partial_match
from stretto.text.tools.strict.formats import StrictFormat, hermes, llama, mistral

ARGUMENTS = ("arguments", "parameters")
LONGEST_NAME = 256


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls: `opener`, one or more calls, `closer`.

    `bare`: the answer may begin with a call without an opener, if it names a tool of the request. `named`:
    the opener may be followed by a name, perhaps `[CALL_ID]` with an id, `[ARGS]` and the arguments.
    `forced`: the whole answer is calls.
    `strict` writes the grammar of strict calls, with the special tokens `marks`.
    """

    opener: str
    closer: str = ""
    bare: bool = False
    named: bool = False
    forced: bool = False
    strict: StrictFormat | None = None
    marks: tuple[str, ...] = ()


HERMES = ToolFormat("<tool_call>", "</tool_call>", strict=hermes, marks=("<tool_call>", "</tool_call>"))
LLAMA = ToolFormat("<|python_tag|>", bare=True, strict=llama, marks=("<|python_tag|>",))
ARGS, CALL_ID = "[ARGS]", "[CALL_ID]"
MISTRAL = ToolFormat("[TOOL_CALLS]", named=True, strict=mistral, marks=("[TOOL_CALLS]", ARGS, CALL_ID))
FORCED = ToolFormat("", forced=True)
MARKERS = frozenset({LLAMA.opener, HERMES.opener, HERMES.closer, *MISTRAL.marks})


def choose(mentions: Callable[[str], bool]) -> ToolFormat | None:
    """The format whose opener is mentioned in the chat template, or is in the vocabulary."""
    return next((form for form in (HERMES, MISTRAL, LLAMA) if mentions(form.opener)), None)


@dataclass(frozen=True, slots=True)
class AbandonedCall:
    """The text taken for call `index` is not a call. `unsent` is the part of it that no delta contained."""

    index: int
    text: str
    unsent: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that a model writes before its answer, in a format that marks reasoning and calls alike."""

    text: str


ToolEvent = str | ToolCallDelta | AbandonedCall | Reasoning
State = Literal["text", "open", "name", "call", "close"]


class CallParser(Protocol):
    """Finds the tool calls of one answer. `calls` counts the complete ones."""

    calls: int

    def push(self, text: str) -> list[ToolEvent]:
        """The content and parts of calls that are certain now."""
        ...

    def flush(self) -> list[ToolEvent]:
        """The remaining content and calls, when the answer ended."""
        ...


class ToolParser:
    """Finds the calls of one answer. `calls` counts the complete ones."""

    def __init__(self, form: ToolFormat, names: frozenset[str]) -> None:
        """`names` are the tools of the request."""
        self._form = form
        self._names = names if form.bare else None
        self._state: State = "open" if form.forced else "text"
        self._array = False
        self._held = ""
        self._raw = ""
        self._call = _Call(self._names)
        self._index = 0
        self._begun = False
        self._after_call = False  # whether blanks are no content
        self.calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        """The content and parts of calls that are certain now."""
        events: list[ToolEvent] = []
        while text:
            text = self._text(text, events) if self._state == "text" else self._characters(text, events)
        if self._state == "call":
            self._emit(events)
        return events

    def flush(self) -> list[ToolEvent]:
        """The remaining content and calls, when the answer ended."""
        events: list[ToolEvent] = []
        if self._state == "text":
            self._content(self._held, events)
        elif self._state == "call" and self._form.forced:
            self._emit(events)
        elif self._state in ("call", "name") or (self._state == "open" and not self._array):
            self._emit(events)
            if self._call.sent is None:  # a call that was cut stays a call, once its name is known
                self._abandon(events)
        return events

    def _text(self, text: str, events: list[ToolEvent]) -> str:
        """Emit the content before an opener. Returns the text after it."""
        text = self._held + text
        self._held = ""
        opener = self._form.opener
        if self._form.bare and not self._begun and not self.calls:
            start = text.lstrip()
            if start.startswith("{"):
                self._open(text[: len(text) - len(start)])
                return start
            if not start:
                self._held = text
                return ""
        at = text.find(opener) if opener else -1
        if at < 0:
            cut = len(text) - partial_match(text, opener)
            if self._after_call and text[:cut].isspace():
                cut = 0
            self._content(text[:cut], events)
            self._held = text[cut:]
            return ""
        self._content(text[:at], events)
        self._open(opener)
        return text[at + len(opener) :]

    def _content(self, text: str, events: list[ToolEvent]) -> None:
        if text and not (self._after_call and text.isspace()):
            self._begun, self._after_call = True, False
            events.append(text)

    def _open(self, raw: str) -> None:
        self._state, self._raw, self._array = "open", raw, False
        self._call = _Call(self._names)

    def _characters(self, text: str, events: list[ToolEvent]) -> str:
        """Read the text inside calls. Returns the text after them."""
        for at, character in enumerate(text):
            if self._state == "close":
                if not self._close(character):
                    rest = self._raw + text[at:]
                    self._state, self._raw = "text", ""
                    return rest
                if self._state == "text":  # pyright: ignore[reportUnnecessaryComparison] - _close sets it
                    return text[at + 1 :]
                continue
            self._raw += character
            try:
                self._read(character)
            except ValueError:
                self._abandon(events)
                return text[at + 1 :]
            if self._call.done:
                self._emit(events)
                self._index += 1
                self.calls += 1
                self._state, self._raw, self._after_call = "close", "", True
                self._call = _Call(self._names)
        return ""

    def _read(self, character: str) -> None:
        if self._state == "call":
            self._call.feed(character)
        elif self._state == "name":
            if self._call.feed_name(character):
                self._state = "call"
        elif character.isspace():
            return
        elif character == "[" and not self._array and not self._form.closer:
            self._array = True
        elif character == "{":
            self._state = "call"
            self._call.feed(character)
        elif self._form.named and not self._array:
            self._state = "name"
            self._call.feed_name(character)
        else:
            raise ValueError("neither an object nor a name")

    def _close(self, character: str) -> bool:
        """Read a character between or after calls. Returns False when it is content."""
        if self._array and character == ",":
            self._state = "open"
        elif self._array and character == "]":
            self._state = "text"
        elif not self._array and character == ";" and self._form.bare:
            self._open("")
        elif self._form.closer.startswith(self._raw + character):
            self._raw += character
            if self._raw == self._form.closer:
                self._state, self._raw = "text", ""
        elif character == "{" and self._form.closer and not self._raw:
            self._state, self._raw = "call", character  # some models write several calls between two tags
            self._call.feed(character)
        elif self._raw or not character.isspace():
            return False
        return True

    def _emit(self, events: list[ToolEvent]) -> None:
        """Emit the part of the current call that has not been sent, once its name is known."""
        call = self._call
        if call.name is None or not call.has_arguments:
            return
        first, arguments = call.sent is None, call.take()
        if first:
            events.append(first_delta(self._index, call.name, arguments))
        elif arguments:
            events.append(ToolCallDelta(index=self._index, function=FunctionDelta(arguments=arguments)))

    def _abandon(self, events: list[ToolEvent]) -> None:
        raw, sent = self._raw, self._call.sent
        self._state, self._raw, self._begun, self._after_call = "text", "", True, False
        if sent is not None:
            unsent = raw[raw.find(sent) + len(sent) :] if sent else raw
            events.append(AbandonedCall(self._index, raw, unsent))
            self._index += 1
        elif raw:
            events.append(raw)


def first_delta(index: int, name: str, arguments: str) -> ToolCallDelta:
    """The first delta of a call: a new id, its name, and the arguments so far."""
    # Mistral's templates insist on ids of nine letters or digits.
    function = FunctionDelta(name=name, arguments=arguments)
    return ToolCallDelta(index=index, id=token_hex(5)[:9], type="function", function=function)


class _Call:
    """One call being read: `{"name": .., "arguments": ..}`, or a name and then its arguments.

    `sent` are the arguments taken so far; None before the first `take`.
    """

    def __init__(self, names: frozenset[str] | None) -> None:
        self._names = names
        self._json = JsonReader()
        self._key = ""
        self._value = ""
        self._unsent = ""
        self._prefix = ""
        self.has_arguments = False
        self.name: str | None = None
        self.sent: str | None = None
        self.done = False

    def take(self) -> str:
        """The arguments read since the last `take`."""
        unsent, self._unsent = self._unsent, ""
        self.sent = (self.sent or "") + unsent
        return unsent

    def feed_name(self, character: str) -> bool:
        """Read a character of a name before its arguments. Returns True when the arguments begin."""
        if character == "{":
            self._set_name(self._prefix.removesuffix(ARGS).partition(CALL_ID)[0].strip())
            self.has_arguments = True
            self.feed(character)
            return True
        self._prefix += character
        if character == "\n" or len(self._prefix) > LONGEST_NAME:
            raise ValueError("not the name of a tool")
        return False

    def feed(self, character: str) -> None:
        """Read a character of the JSON. Raises ValueError when this is not a call."""
        reader = self._json
        reader.feed(character)
        if self._prefix:
            self._unsent += character
        elif reader.in_value:
            self._member(character)
        elif self._value:
            self._end_member()
        if reader.done:
            if self.name is None:
                raise ValueError("a call without a name")
            if not self.has_arguments:
                self._unsent = "{}"
            self.has_arguments = self.done = True

    def _member(self, character: str) -> None:
        if not self._value:
            key = json.loads(self._json.key)
            self._key = "arguments" if key in ARGUMENTS else key
            if (self._key == "arguments" and self.has_arguments) or (key == "name" and self.name is not None):
                raise ValueError("a member twice, and the first one may have been sent")
        self._value += character
        if self._key == "arguments" and self._value[0] == "{":
            self.has_arguments = True
            self._unsent += character

    def _end_member(self) -> None:
        value, self._value = self._value, ""
        if self._key == "name":
            self._set_name(json.loads(value))
        elif self._key == "arguments" and value[0] != "{":
            inner = json.loads(value)
            # Some models write the arguments as a string that contains JSON.
            if inner is not None and not (isinstance(inner, str) and isinstance(json.loads(inner), dict)):
                raise ValueError("arguments that are no object")
            self._unsent += inner or "{}"
            self.has_arguments = True

    def _set_name(self, name: object) -> None:
        if not isinstance(name, str) or not name or (self._names is not None and name not in self._names):
            raise ValueError("not the name of a tool")
        self.name = name


class NamedCallParser:
    """The one call that `tool_choice` names. A grammar makes the whole answer its arguments."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name
        self.calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        """The next part of the arguments."""
        if self._name is None:
            return [ToolCallDelta(index=0, function=FunctionDelta(arguments=text))] if text else []
        name, self._name = self._name, None
        return [first_delta(0, name, text)]

    def flush(self) -> list[ToolEvent]:
        """The call is complete."""
        self.calls = 1
        return self.push("") if self._name is not None else []
