"""Terminal output of the commands when standard output is not a terminal."""

from __future__ import annotations

import json
import sys
from io import BytesIO, TextIOWrapper

import pytest

from stretto import terminal
from stretto.errors import StartError


def test_json_is_one_document_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": [1, None]})
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"a": [1, None]}, "")


def test_an_error_is_one_line_on_standard_error_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_error(StartError("use [bold] or [/]"))
    assert capsys.readouterr() == ("", "error: use [bold] or [/]\n")


def test_facts_are_tables_with_a_column_for_reasons_where_there_are_any(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal.show_facts([("Machine", [("cores", "2", "")]), ("Choices", [("device", "cpu", "no GPU")])])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.split()] == [
        ["Machine"],
        ["cores", "2"],
        ["Choices", "why"],
        ["device", "cpu", "no", "GPU"],
    ]


def test_progress_bars_show_nothing_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.LoadingBars() as bars:
        bars("weights", 1, 2)
        bars("weights", 2, 2)
    assert capsys.readouterr() == ("", "")


def test_a_character_that_the_locale_lacks_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, "latin-1"))
    terminal.write_any_text()
    terminal.print_json({"answer": "Adiós 😀"})
    assert "Adiós ?".encode("latin-1") in written.getvalue()
