"""Writes a grammar in the Lark dialect of llguidance, piece by piece.

Text between two rules is lexed greedily: a text of any length and the literal after it must be one terminal.
`Rules.sequence` sees to that. A special token is no text, so it is a rule of its own, a `mark`.
The dialect is described in https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Blanks only after a comma or a colon. Then JSON may stand beside other text: both have no blanks to ignore.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True, slots=True)
class TerminalText:
    """A part of a terminal."""

    expression: str


@dataclass(frozen=True, slots=True)
class RuleName:
    """A reference to a rule."""

    name: str


GrammarPiece = TerminalText | RuleName


class Rules:
    """The rules of one grammar, and the special tokens that they refer to.

    `marks`: for each rule `mark_N`, the ids of the special tokens that match it. `calls`: the rules that
    hold what a user wrote.
    """

    def __init__(self, ids: dict[str, int]) -> None:
        """`ids`: the special tokens that a literal may contain, by their text."""
        self._ids = ids
        split = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        self._split = re.compile(f"({split})") if split else None
        self._lines: list[str] = []
        self._names: dict[str, str] = {}
        self.marks: list[list[int]] = []
        self.calls: list[str] = []

    def special(self, text: str) -> bool:
        """Whether this text has a special token in it."""
        return self._split is not None and self._split.search(text) is not None

    def literal(self, text: str) -> list[GrammarPiece]:
        """A text as it is, with its special tokens."""
        parts = [text] if self._split is None else self._split.split(text)
        return [
            self.mark([self._ids[part]]) if part in self._ids else TerminalText(quoted(part))
            for part in parts
            if part
        ]

    def mark(self, ids: list[int]) -> RuleName:
        """Any of these special tokens."""
        if ids not in self.marks:
            self.marks.append(ids)
        return RuleName(f"mark_{self.marks.index(ids)}")

    def free(self, *stops: str, least: str = "", whole: bool = False) -> TerminalText:
        """Any text without `stops` in it. `least`: a regex that it matches. `whole`: nor does it end like the
        beginning of a stop, so that what follows cannot complete one."""
        return self.terminal(f"/{without(stops, whole=whole)}/" + (f" & /{least}/" if least else ""))

    def terminal(self, expression: str) -> TerminalText:
        """A terminal of its own."""
        return TerminalText(self._named(expression, "T"))

    def json(self, schema: dict[str, Any]) -> RuleName:
        """JSON that satisfies a schema."""
        return RuleName(self._named(f"%json {json.dumps(schema | {'x-guidance': COMPACT})}", "json_"))

    def rule(self, *alternatives: Sequence[GrammarPiece]) -> RuleName:
        """Any of these sequences."""
        return RuleName(self._named(" | ".join(map(self.sequence, alternatives)), "rule_"))

    def reserve(self) -> RuleName:
        """The name of a rule that `define` defines later, so that rules may refer to themselves."""
        self._names[f"reserved {len(self._names)}"] = name = f"rule_{len(self._names)}"
        return RuleName(name)

    def define(self, rule: RuleName, *alternatives: Sequence[GrammarPiece]) -> None:
        """Define a rule that was reserved."""
        self._lines.append(f"{rule.name}: {' | '.join(map(self.sequence, alternatives))}")

    def repeated(self, pieces: Sequence[GrammarPiece], how: str) -> RuleName:
        """A sequence with `how` after it: `*`, `+` or `?`."""
        return RuleName(self._named(f"({self.sequence(pieces)}){how}", "rule_"))

    def sequence(self, pieces: Iterable[GrammarPiece]) -> str:
        """The pieces one after the other. Neighbouring texts become one terminal."""
        found: list[str] = []
        texts: list[str] = []
        for piece in (*pieces, None):
            if isinstance(piece, TerminalText):
                texts.append(piece.expression)
                continue
            if texts:
                found.append(texts[0] if len(texts) == 1 else self._named(" ".join(texts), "T"))
                texts = []
            if piece is not None:
                found.append(piece.name)
        return " ".join(found) or '""'

    def source(self, *start: Sequence[GrammarPiece]) -> str:
        """The grammar, which begins with any of `start`. The marks are not defined in it."""
        return "\n".join((f"start: {' | '.join(map(self.sequence, start))}", *self._lines))

    def _named(self, expression: str, prefix: str) -> str:
        name = self._names.get(prefix + expression)
        if name is None:
            self._names[prefix + expression] = name = f"{prefix}{len(self._names)}"
            self._lines.append(f"{name}: {expression}")
        return name


def quoted(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def without(stops: Sequence[str], *, whole: bool = False) -> str:
    """A regex for texts without `stops`, between slashes. All stops begin with the same character, which is
    nowhere else in them. `whole`: the text does not end like the beginning of a stop either.

    A complement would say the same, but the lexer does not see at once that nothing may follow it.
    """
    if not stops:
        return "(?s:.*)"
    first = stops[0][0]
    assert all(stop[0] == first and first not in stop[1:] for stop in stops), stops
    stops = [stop for stop in stops if not any(stop.startswith(each) and each != stop for each in stops)]
    beginnings = sorted({stop[:end] for stop in stops for end in range(1, len(stop))})
    begun = any_of(beginnings)
    broken: list[str] = []
    for text in beginnings:
        following = {stop[len(text)] for stop in stops if stop.startswith(text)}
        broken.append(f"{slashed(re.escape(text))}[^{_class({first, *following})}]")
    alone = f"([^{_class({first})}]|{begun}*({'|'.join(broken)}))*"
    return alone if whole else f"{alone}{begun}*"


def _class(characters: set[str]) -> str:
    return slashed("".join(map(re.escape, sorted(characters))))


def any_of(texts: Iterable[str]) -> str:
    """A regex for any of these texts."""
    return f"({'|'.join(slashed(re.escape(text)) for text in texts)})"


def slashed(regex: str) -> str:
    """A regex between slashes, without the slashes: what would end it there is escaped."""
    return re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", regex, flags=re.DOTALL).replace("\n", r"\n")
