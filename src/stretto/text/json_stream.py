"""Reads JSON one character at a time. It knows where it is in the value and when the value is complete."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, cast

_BLANK = frozenset(" \t\r\n")
_SCALAR = frozenset("+-.0123456789Eaeflnrstu")
_SCALARS = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_ESCAPES = frozenset('"\\/bfnrtu')
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSER = {"{": "}", "[": "]"}

Want = Literal["value", "value or ]", "key", "key or }", "colon", "comma", "end"]


class JsonReader:
    """Reads one JSON object or array.

    `done`: the value is complete. For members of the outermost object, `key` is the last key as JSON (in
    quotes) and `in_value` says whether the last character belongs to that key's value.
    """

    __slots__ = ("_escape", "_open", "_scalar", "_stack", "_want", "done", "in_value", "key")

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._want: Want = "value"
        self._open: Literal["", "key", "text"] = ""
        self._escape = 0
        self._scalar = ""
        self.done = False
        self.in_value = False
        self.key = ""

    def feed(self, character: str) -> None:
        """Read the next character. Raises ValueError when the text is no longer JSON."""
        if self.done:
            raise ValueError("text after the end of the value")
        deep = len(self._stack)
        if inside := self._open:
            self._string(character)
            self.in_value = deep > 1 or inside == "text"
            return
        if self._scalar:
            if character in _SCALAR:
                self._scalar += character
                return
            self._end_scalar()
        if character in _BLANK:
            self.in_value = deep > 1
            return
        self._structure(character)
        if not self.done and len(self._stack) <= 1 and deep <= 1:
            in_text = self._open == "text"  # pyright: ignore[reportUnnecessaryComparison] - _value sets it
            self.in_value = in_text or bool(self._scalar)
        else:
            self.in_value = deep > 1 or (deep == 1 and len(self._stack) == 2)

    @property
    def open(self) -> tuple[str, ...]:
        """The brackets that are open, outermost first."""
        return tuple(self._stack)

    @property
    def in_text(self) -> bool:
        """Whether the last character is inside a key or a string."""
        return bool(self._open)

    @property
    def between(self) -> bool:
        """Whether the text may end here once its brackets are closed: after a value or an opening bracket."""
        return not (self._open or self._scalar) and self._want in ("comma", "key or }", "value or ]")

    def _string(self, character: str) -> None:
        if self._open == "key" and len(self._stack) == 1:
            self.key += character
        if self._escape:
            self._escaped(character)
        elif character == "\\":
            self._escape = 1
        elif character == '"':
            self._want = "colon" if self._open == "key" else "comma"
            self._open = ""
        elif character < " ":
            raise ValueError("a control character in a string")

    def _escaped(self, character: str) -> None:
        if self._escape == 1:
            if character not in _ESCAPES:
                raise ValueError("an unknown escape sequence")
            self._escape = 5 if character == "u" else 0
        else:
            if character not in _HEX:
                raise ValueError("an escape sequence that is not hexadecimal")
            self._escape = 0 if self._escape == 2 else self._escape - 1

    def _end_scalar(self) -> None:
        if not _SCALARS.fullmatch(self._scalar):
            raise ValueError(f"{self._scalar} is not a JSON value")
        self._scalar = ""
        self._want = "comma"

    def _structure(self, character: str) -> None:
        want = self._want
        inside = self._stack[-1] if self._stack else ""
        if character == _CLOSER.get(inside) and want in (
            "comma",
            f"value or {character}",
            f"key or {character}",
        ):
            self._stack.pop()
            self._want = "comma"
            self.done = not self._stack
        elif want in ("value", "value or ]"):
            self._value(character)
        elif want in ("key", "key or }") and character == '"':
            self._open = "key"
            if len(self._stack) == 1:
                self.key = character
        elif want == "colon" and character == ":":
            self._want = "value"
        elif want == "comma" and character == ",":
            self._want = "key" if inside == "{" else "value"
        else:
            raise ValueError(f"{character!r} where {want} was expected")

    def _value(self, character: str) -> None:
        if character in _CLOSER:
            self._stack.append(character)
            self._want = "key or }" if character == "{" else "value or ]"
        elif not self._stack:
            raise ValueError("neither an object nor an array")
        elif character == '"':
            self._open = "text"
        elif character in _SCALAR:
            self._scalar = character
        else:
            raise ValueError(f"{character!r} does not begin a value")


def closed(text: str) -> str:
    """The longest beginning of a cut JSON object that ends after a whole value, with its brackets closed.

    Raises ValueError for a text that is not the beginning of a JSON object.
    """
    reader, end, brackets = JsonReader(), 0, ("{",)
    for at, character in enumerate(text):
        reader.feed(character)
        if reader.open[:1] == ("[",):
            raise ValueError("no object")
        if reader.between:
            end, brackets = at + 1, reader.open
        elif character == "," and not reader.in_text:
            end, brackets = at, reader.open
    if not end:
        raise ValueError("no object")
    return text[:end] + "".join(_CLOSER[each] for each in reversed(brackets))


def whole_members(text: str) -> dict[str, Any] | None:
    """The members of a JSON object, without those that were cut; None for a text that is no JSON object."""
    try:
        value = json.loads(text.strip() or "{}")
    except ValueError:
        try:
            value = json.loads(closed(text))
        except ValueError:
            return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
