"""The chat loop with a fake model and without a terminal."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from stretto import chat
from stretto.errors import Unavailable


def run(monkeypatch: pytest.MonkeyPatch, lines: list[str], answer: chat.Answer, system: str = "") -> None:
    typed: Iterator[str] = iter(lines)

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat.converse(answer, "model", system)


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


def test_commands_set_the_system_prompt_and_clear_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[tuple[str, str]]] = []

    def answer(history: list[dict[str, Any]]) -> Generator[str]:
        seen.append([(message["role"], message["content"]) for message in history])
        yield "ok"

    lines = ["/help", "a", "/clear", "b", "/system [bold] Answer in French.", "c", "/system", "/exit", "d"]
    run(monkeypatch, lines, answer, system="Be brief.")
    assert seen == [
        [("system", "Be brief."), ("user", "a")],
        [("system", "Be brief."), ("user", "b")],
        [("system", "[bold] Answer in French."), ("user", "c")],
    ]
    told = capsys.readouterr().err
    assert all(command in told for command in ("/help", "/clear", "/system TEXT", "/quit"))
    assert told.endswith("[bold] Answer in French.\n"), "/system shows the prompt as it was written"
