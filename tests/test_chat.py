"""The chat loop with a fake model and without a terminal."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from stretto import chat
from stretto.errors import Unavailable


def run(monkeypatch: pytest.MonkeyPatch, lines: list[str], answer: chat.Answer) -> None:
    typed: Iterator[str] = iter(lines)

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat.converse(answer, "model")


def test_each_answer_sees_the_history_until_a_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def answer(history: list[dict[str, Any]]) -> Generator[str]:
        seen.append([message["content"] for message in history])
        yield from ("o", "k")

    run(monkeypatch, ["a", "", "b", "/reset", "/nonsense", "c", "/quit", "d"], answer)
    assert seen == [["a"], ["a", "ok", "b"], ["c"]]
    out, err = capsys.readouterr()
    assert out == "ok\n" * 3
    assert "forgotten" in err and "no such command" in err


def test_a_stopped_answer_stays_in_the_history_and_a_failed_one_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def answer(history: list[dict[str, Any]]) -> Generator[str]:
        seen.append([message["content"] for message in history])
        if history[-1]["content"] == "fail":
            raise Unavailable("the engine is starting")
        yield "half"
        raise KeyboardInterrupt

    run(monkeypatch, ["fail", "stop", "more"], answer)
    assert seen == [["fail"], ["stop"], ["stop", "half", "more"]]
    assert capsys.readouterr().err.startswith("error: the engine is starting\n (stopped)")
