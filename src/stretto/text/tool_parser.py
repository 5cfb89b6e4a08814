"""Finds tool calls in what a model says, while it says it: Hermes and Qwen, Llama 3, Mistral, forced ones.

Arguments leave as they are written. What begins like a call and is none is content again: nothing is lost.
It knows no HTTP and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from typing import Literal

from stretto.protocol.openai import FunctionDelta, ToolCallDelta
from stretto.text.json_stream import JsonReader

ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls. `opener` announces them, `closer` ends each.

    `bare`: the answer may begin with a call unannounced, which counts only with the name of a tool that was
    offered. `named`: after the opener may stand a name, `[ARGS]` and the arguments. `forced`: calls are all
    there is.
    """

    opener: str
    closer: str = ""
    bare: bool = False
    named: bool = False
    forced: bool = False


HERMES = ToolFormat("<tool_call>", "</tool_call>")
LLAMA = ToolFormat("<|python_tag|>", bare=True)
MISTRAL = ToolFormat("[TOOL_CALLS]", named=True)
FORCED = ToolFormat("", forced=True)
ARGS = "[ARGS]"
MARKERS = frozenset({LLAMA.opener, MISTRAL.opener, ARGS, HERMES.opener, HERMES.closer})


def choose(mentions: Callable[[str], bool]) -> ToolFormat | None:
    """The format whose opener the chat template (or the vocabulary) mentions."""
    return next((form for form in (HERMES, MISTRAL, LLAMA) if mentions(form.opener)), None)


@dataclass(frozen=True, slots=True)
class AbandonedCall:
    """What was taken for call `index` is none. `raw` is all its text, `rest` what no delta has carried."""

    index: int
    text: str
    unsent: str


ToolEvent = str | ToolCallDelta | AbandonedCall
State = Literal["text", "open", "name", "call", "close"]


class ToolParser:
    """The calls of one answer. `calls` counts those that are whole."""

    def __init__(self, form: ToolFormat, names: frozenset[str]) -> None:
        """`names` are the tools that were offered."""
        self._form = form
        self._names = names if form.bare else None
        self._state: State = "open" if form.forced else "text"
        self._array = False
        self._held = ""
        self._raw = ""
        self._call = _Call(self._names)
        self._index = 0
        self._begun = False
        self.calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        said: list[ToolEvent] = []
        while text:
            text = self._text(text, said) if self._state == "text" else self._characters(text, said)
        if self._state == "call":
            self._tell(said)
        return said

    def flush(self) -> list[ToolEvent]:
        """The rest, when the answer ended."""
        said: list[ToolEvent] = []
        if self._state == "text":
            if self._held and not (self.calls and self._held.isspace()):
                said.append(self._held)
        elif self._state == "call" and self._form.forced:
            self._tell(said)
        elif self._state in ("call", "name") or (self._state == "open" and not self._array):
            self._fail(said)
        return said

    def _text(self, text: str, said: list[ToolEvent]) -> str:
        """Content up to an opener; returns what follows it."""
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
            cut = len(text) - _overlap(text, opener)
            if self.calls and text[:cut].isspace():
                cut = 0
            self._content(text[:cut], said)
            self._held = text[cut:]
            return ""
        if not (self.calls and text[:at].isspace()):
            self._content(text[:at], said)
        self._open(opener)
        return text[at + len(opener) :]

    def _content(self, text: str, said: list[ToolEvent]) -> None:
        if text:
            self._begun = True
            said.append(text)

    def _open(self, raw: str) -> None:
        self._state, self._raw, self._array = "open", raw, False
        self._call = _Call(self._names)

    def _characters(self, text: str, said: list[ToolEvent]) -> str:
        """Reads on while inside calls; returns what is content again."""
        for at, character in enumerate(text):
            if self._state == "close":
                if not self._close(character):
                    rest = self._raw + text[at:]
                    self._state, self._raw = "text", ""
                    return rest
                if self._state == "text":
                    return text[at + 1 :]
                continue
            self._raw += character
            try:
                self._read(character)
            except ValueError:
                self._fail(said)
                return text[at + 1 :]
            if self._call.done:
                self._tell(said)
                self._index += 1
                self.calls += 1
                self._state, self._raw = "close", ""
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
        """Whether `character` belongs between or behind calls."""
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
        elif self._raw or not character.isspace():
            return False
        return True

    def _tell(self, said: list[ToolEvent]) -> None:
        """The part of the current call that can be told."""
        call = self._call
        if call.name is None or not call.begun:
            return
        arguments = call.take()
        if not call.told:
            call.told = True
            function = FunctionDelta(name=call.name, arguments=arguments)
            # Nine letters or digits: what Mistral's templates insist on.
            delta = ToolCallDelta(index=self._index, id=token_hex(5)[:9], type="function", function=function)
            said.append(delta)
        elif arguments:
            said.append(ToolCallDelta(index=self._index, function=FunctionDelta(arguments=arguments)))

    def _fail(self, said: list[ToolEvent]) -> None:
        raw, call = self._raw, self._call
        self._state, self._raw, self._begun = "text", "", True
        if call.told:
            told = call.sent
            said.append(AbandonedCall(self._index, raw, raw[raw.find(told) + len(told) :] if told else raw))
            self._index += 1
        elif raw:
            said.append(raw)


class _Call:
    """One call being read: `{"name": .., "arguments": ..}`, or a name and its arguments."""

    def __init__(self, names: frozenset[str] | None) -> None:
        self._names = names
        self._json = JsonReader()
        self._key = ""
        self._value = ""
        self._seen = False
        self._pending = ""
        self._plain = False
        self._ahead = ""
        self.name: str | None = None
        self.sent = ""
        self.told = False
        self.done = False

    @property
    def begun(self) -> bool:
        """Whether it has come to the arguments, so that it may be told of."""
        return self._seen or self.done

    def take(self) -> str:
        """Arguments that nobody has been told of."""
        pending, self._pending = self._pending, ""
        self.sent += pending
        return pending

    def feed_name(self, character: str) -> bool:
        """A character of a name that the arguments follow; True once those begin."""
        self._ahead += character
        if character == "{":
            self._know(self._ahead[:-1].removesuffix(ARGS).strip())
            self._plain = True
            self._seen = True
            self.feed(character)
            return True
        if character == "\n" or len(self._ahead) > 256:
            raise ValueError("no name of a tool")
        return False

    def feed(self, character: str) -> None:
        reader = self._json
        reader.feed(character)
        if self._plain:
            self._pending += character
        elif reader.in_value:
            self._member(character)
        elif self._value:
            self._end_member()
        if reader.done:
            if self.name is None:
                raise ValueError("a call without a name")
            if not self._seen:
                self._pending = "{}"
            self.done = True

    def _member(self, character: str) -> None:
        if not self._value:
            key = json.loads(self._json.key)
            self._key = "arguments" if key in ARGUMENTS else key
        self._value += character
        if self._key == "arguments" and self._value[0] == "{":
            self._seen = True
            self._pending += character

    def _end_member(self) -> None:
        value, self._value = self._value, ""
        if self._key == "name":
            self._know(json.loads(value))
        elif self._key == "arguments" and value[0] != "{":
            inner = json.loads(value)
            # Some models write the arguments as a string of JSON.
            if inner is not None and not (isinstance(inner, str) and isinstance(json.loads(inner), dict)):
                raise ValueError("arguments that are no object")
            self._pending += inner or "{}"
            self._seen = True

    def _know(self, name: object) -> None:
        if not isinstance(name, str) or not name or (self._names is not None and name not in self._names):
            raise ValueError("no name of a tool")
        self.name = name


class NamedCallParser:
    """The one call that `tool_choice` names: a grammar makes the whole answer its arguments."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name
        self.calls = 0

    def push(self, text: str) -> list[ToolEvent]:
        if self._name is None:
            return [ToolCallDelta(index=0, function=FunctionDelta(arguments=text))] if text else []
        function = FunctionDelta(name=self._name, arguments=text)
        self._name = None
        return [ToolCallDelta(index=0, id=token_hex(5)[:9], type="function", function=function)]

    def flush(self) -> list[ToolEvent]:
        self.calls = 1
        return self.push("") if self._name is not None else []


def _overlap(text: str, opener: str) -> int:
    for length in range(min(len(opener) - 1, len(text)), 0, -1):
        if text.endswith(opener[:length]):
            return length
    return 0
