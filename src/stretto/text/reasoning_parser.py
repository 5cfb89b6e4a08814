"""Splits the text of a reasoning model into reasoning, between `<think>` and `</think>`, and answer."""

from __future__ import annotations

from typing import Literal

from stretto.text.stop_strings import partial_match

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """Splits one answer. Line breaks next to the tags belong to neither part."""

    __slots__ = ("_held", "_state")

    def __init__(self, opened: bool) -> None:
        """`opened`: the prompt ends with `<think>`, so the answer begins with reasoning."""
        self._state: Literal["start", "trim", "thinking", "trim answer", "answer"] = (
            "trim" if opened else "start"
        )
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """The (reasoning, answer) text that is certain now."""
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
        """The remaining (reasoning, answer) text, when the answer ended."""
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
        # The beginning of the closing tag, and line breaks before it, are not certain yet.
        cut = len(text[: len(text) - partial_match(text, CLOSE)].rstrip("\n"))
        self._held = text[cut:]
        return text[:cut], ""


def split_whole(text: str) -> tuple[str, str]:
    """The (reasoning, answer) of a complete answer that a client sends back in the history."""
    reasoning = ReasoningParser(opened=CLOSE in text and not text.lstrip().startswith(OPEN))
    thought, answer = reasoning.push(text)
    more_thought, more_answer = reasoning.flush()
    return thought + more_thought, answer + more_answer
