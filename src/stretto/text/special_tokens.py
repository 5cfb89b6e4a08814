"""Special tokens that a user types are text: they must never reach the tokenizer whole.

Before a chat is rendered, each added token found in what the user wrote is broken by a secret mark; the
rendered text is split at the mark and its pieces are encoded apart. Text without such tokens is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from secrets import token_hex
from typing import Any


class Literals:
    """Finds and breaks the added tokens of one tokenizer. `contents` are their texts."""

    def __init__(self, contents: Iterable[str]) -> None:
        # Runs of blanks are added tokens of some code models: harmless, and part of every indent.
        dangerous = [content for content in contents if len(content) > 1 and not content.isspace()]
        # Hexadecimal survives every filter a template may apply; 128 random bits are not guessed.
        self._mark = token_hex(16)
        self._token = re.compile(_trie(dangerous)) if dangerous else None

    def guard(self, value: Any) -> Any:
        """The same JSON value, each token in its strings and keys broken behind its first character."""
        if isinstance(value, str):
            return self._guard_text(value)
        if isinstance(value, list):
            return [self.guard(item) for item in value]
        if isinstance(value, dict):
            return {self._guard_text(str(key)): self.guard(item) for key, item in value.items()}
        return value

    def split(self, rendered: str) -> list[str]:
        """The pieces to encode apart; one alone when nothing was broken."""
        return rendered.split(self._mark)

    def _guard_text(self, text: str) -> str:
        if self._token is None or (found := self._token.search(text)) is None:
            return text
        pieces: list[str] = []
        done = 0
        while found is not None:
            # One further, not behind the match: what is left of a broken token may itself begin another.
            cut = found.start() + 1
            pieces.append(text[done:cut])
            done = cut
            found = self._token.search(text, cut)
        pieces.append(text[done:])
        return self._mark.join(pieces)


def _trie(words: list[str]) -> str:
    """A regex for any of `words`, by shared prefixes, so that thousands cost no more than a few.

    Only whether a word starts at a position matters, so a word that is a prefix of others hides them.
    """
    root: dict[str, Any] = {}
    for word in sorted(words):
        node = root
        for character in word[:-1]:
            node = node.setdefault(character, {})
            if not isinstance(node, dict):
                break
        if isinstance(node, dict):
            node[word[-1]] = None
    return _alternatives(root)


def _alternatives(node: dict[str, Any]) -> str:
    branches = [
        re.escape(character) + (_alternatives(below) if below is not None else "")
        for character, below in node.items()
    ]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
