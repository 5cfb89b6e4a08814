"""Keeps special tokens that a user types from being encoded as special tokens.

Before a chat is rendered, each added token in the user's text is broken in two by a secret mark. The rendered
text is split at the marks, and each piece is encoded alone. Text without added tokens is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from secrets import token_hex
from typing import Any, cast


class SpecialTokenGuard:
    """Finds and breaks the added tokens of one tokenizer."""

    def __init__(self, contents: Iterable[str]) -> None:
        """`contents` are the texts of the added tokens."""
        # Some code models have added tokens for runs of blanks. They are harmless, and every indent has them.
        dangerous = [content for content in contents if len(content) > 1 and not content.isspace()]
        # Hexadecimal survives every filter of a template, and nobody guesses 128 random bits.
        self._mark = token_hex(16)
        self._token = re.compile(_trie(dangerous)) if dangerous else None

    def guard(self, value: Any) -> Any:
        """The same JSON value, each added token in its strings and keys broken after the first character."""
        if isinstance(value, str):
            return self._guard_text(value)
        if isinstance(value, list):
            return [self.guard(item) for item in cast("list[Any]", value)]
        if isinstance(value, dict):
            items = cast("dict[Any, Any]", value).items()
            return {self._guard_text(str(key)): self.guard(item) for key, item in items}
        return value

    def split(self, rendered: str) -> list[str]:
        """The pieces to encode alone; a single one when nothing was broken."""
        return rendered.split(self._mark)

    def _guard_text(self, text: str) -> str:
        if self._token is None or (found := self._token.search(text)) is None:
            return text
        pieces: list[str] = []
        done = 0
        while found is not None:
            # Search on after one character, not after the match: the rest of the token may hold another one.
            cut = found.start() + 1
            pieces.append(text[done:cut])
            done = cut
            found = self._token.search(text, cut)
        pieces.append(text[done:])
        return self._mark.join(pieces)


def _trie(words: list[str]) -> str:
    """A regex that matches any of `words`. Shared prefixes are merged, so thousands of words cost little.

    It need not find the longest word, so a word that is a prefix of others replaces them.
    """
    root: dict[str, Any] = {}
    for word in sorted(words):
        node: dict[str, Any] | None = root
        for character in word[:-1]:
            node = cast("dict[str, Any] | None", node.setdefault(character, {}))
            if node is None:
                break
        if node is not None:
            node[word[-1]] = None
    return _alternatives(root)


def _alternatives(node: dict[str, Any]) -> str:
    branches = [
        re.escape(character) + (_alternatives(below) if below is not None else "")
        for character, below in node.items()
    ]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
