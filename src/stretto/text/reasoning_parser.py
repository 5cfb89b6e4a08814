"""Splits what a thinking model says into its reasoning, between `<think>` and `</think>`, and its answer."""

from __future__ import annotations

from typing import Literal

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """The split of one answer. Line breaks next to the tags belong to neither side."""

    __slots__ = ("_held", "_state")

    def __init__(self, opened: bool) -> None:
        """`opened`: the prompt ended inside `<think>`, so the answer begins with reasoning."""
        self._state: Literal["start", "trim", "thinking", "trim answer", "answer"] = (
            "trim" if opened else "start"
        )
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) that are certain now."""
        if self._state == "answer":
            return "", text
        text = self._held + text
        self._held = ""
        if self._state == "start":
            text = self._start(text)
        if self._state in ("trim", "trim answer") and (text := text.lstrip("\n")):
            self._state = "thinking" if self._state == "trim" else "answer"
        if self._state == "thinking":
            return self._think(text)
        return ("", text) if self._state == "answer" else ("", "")

    def flush(self) -> tuple[str, str]:
        """The rest, when the answer ended."""
        held, self._held = self._held, ""
        return (held.rstrip("\n"), "") if self._state == "thinking" else ("", held)

    def _start(self, text: str) -> str:
        begun = text.lstrip()
        if begun.startswith(OPEN):
            self._state = "trim"
            return begun[len(OPEN) :]
        if OPEN.startswith(begun):
            self._held = text
        else:
            self._state = "answer"
        return text

    def _think(self, text: str) -> tuple[str, str]:
        thought, closed, rest = text.partition(CLOSE)
        if closed:
            self._state = "trim answer"
            _, answer = self.push(rest) if rest else ("", "")
            return thought.rstrip("\n"), answer
        cut = _certain(text)
        self._held = text[cut:]
        return text[:cut], ""


def _certain(text: str) -> int:
    """Length of the part that is neither the beginning of the closing tag nor line breaks before it."""
    for length in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if text.endswith(CLOSE[:length]):
            return len(text[:-length].rstrip("\n"))
    return len(text.rstrip("\n"))


def split_whole(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a finished answer that a client sends back."""
    reasoning = ReasoningParser(opened=CLOSE in text and not text.lstrip().startswith(OPEN))
    thought, answer = reasoning.push(text)
    more_thought, more_answer = reasoning.flush()
    return thought + more_thought, answer + more_answer
