"""Finds stop strings in text that arrives in pieces, and holds back text that may become one."""

from __future__ import annotations


class StopStrings:
    """The stop strings of one answer. `found` is the one that ended it, once one did.

    The result depends on the characters alone, not on the pieces. The stop string complete first wins.
    """

    __slots__ = ("_held", "_shown", "_stop", "_unsearched", "found")

    def __init__(self, stop: tuple[str, ...], min_tokens: int = 0, *, shown: bool = False) -> None:
        """The text of the first `min_tokens` tokens is not searched. `shown`: the stop string that is found
        is part of the text."""
        self._stop = stop
        self._shown = shown
        self._unsearched = min_tokens
        self._held = ""
        self.found: str | None = None

    def token(self, text: str) -> str:
        """`push` of the text that one token completes, perhaps none."""
        if self._unsearched:
            self._unsearched -= 1
            return text
        return self.push(text) if text else ""

    def push(self, text: str) -> str:
        """The text before a stop string, or all that cannot become part of one any more."""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            end, at, self.found = min(ends)
            self._held = ""
            return text[: end if self._shown else at]
        cut = len(text) - max(partial_match(text, stop) for stop in self._stop)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text held back, when the answer ended."""
        held, self._held = self._held, ""
        return held


def partial_match(text: str, marker: str) -> int:
    """The length of the longest proper prefix of `marker` that `text` ends with."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
