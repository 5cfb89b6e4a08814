"""Pages, help lines and errors name only commands and options that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from stretto import cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "stretto"
FOLDERS = (("", "*.md"), ("docs", "**/*.md"), ("recipes", "**/*.md"), ("examples", "**/*.*"))
PAGES = sorted(page for folder, pattern in FOLDERS for page in (ROOT / folder).glob(pattern))
FENCE = re.compile(r"^ *```.*?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(?:^|[\s/;|(`])stretto (?!import )(?P<rest>[^\n;|#&`]*)", re.MULTILINE)
SCRIPT = re.compile(
    r"(?:benchmarks/(?P<file>[\w/]+)\.py|-m (?P<module>(?:benchmarks|recipes)[\w.]*))(?P<rest>[^\n;|#&`]*)"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*\w")
WORD = re.compile(r"[a-z]+\Z")
MADE_BY_TYPER = {"--help", "--version", "--install-completion", "--show-completion"}
OF_THE_ENGINE = {"--cpu"}  # of `python -m stretto.engine`, which the server alone starts
OF_OTHERS = {
    "--inplace",
    "--quantize",
    "--now",
    "--arg",
    "--web",
}  # setup.py, a spelling, systemctl, jq, Prometheus
ROOT_COMMAND: Any = typer.main.get_command(cli.app)


def options_of(command: Any) -> set[str]:
    return {
        option for each in command.params for option in (*each.opts, *each.secondary_opts)
    } | MADE_BY_TYPER


def wrong_in(rest: str) -> list[str]:
    """What of the words after `stretto` is no command, and no option of the command that they name."""
    command = ROOT_COMMAND
    words = rest.split("--")[0].split()
    while words and hasattr(command, "commands"):
        found = command.commands.get(words[0])
        if found is None:
            return [words[0]] if WORD.match(words[0]) else []
        command = found
        words.pop(0)
    if hasattr(command, "commands") and command is not ROOT_COMMAND:
        return []  # the group as a whole
    known = options_of(command) | OF_OTHERS
    return [option for option in OPTION.findall(rest) if option not in known]


def code_of(page: Path) -> Iterator[str]:
    """The code in a page, one line of it after the other; a line that goes on is one."""
    text = page.read_text()
    if page.suffix != ".md":
        yield from text.replace("\\\n", " ").splitlines()
        return
    for block in FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from (" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text)))


def texts_of(source: Path) -> Iterator[str]:
    """The strings of a module: docstrings, help lines and messages. A message with values is in parts."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def sources_of(match: re.Match[str]) -> str:
    """The source of a script or a package of scripts; empty when there is none."""
    name = match["file"] or match["module"].replace(".", "/").removeprefix("benchmarks/")
    for top in (ROOT / "benchmarks", ROOT):
        if (top / f"{name}.py").is_file():
            return (top / f"{name}.py").read_text()
        if (top / name).is_dir():
            return "".join(each.read_text() for each in (top / name).glob("*.py"))
    return ""


def literals(*folders: str) -> set[str]:
    return {
        option
        for folder in folders
        for source in (ROOT / folder).rglob("*.py")
        for option in re.findall(r"[\"'](--[a-z][\w-]*)[\"']", source.read_text())
    }


def everywhere(command: Any = ROOT_COMMAND) -> set[str]:
    """The options of all commands."""
    found = options_of(command)
    for each in getattr(command, "commands", {}).values():
        found |= everywhere(each)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_commands_and_options_that_exist(page: Path) -> None:
    known = everywhere() | literals("benchmarks", "recipes") | OF_OTHERS
    wrong: list[tuple[str, list[str]]] = []
    for code in code_of(page):
        for match in COMMAND.finditer(code):
            wrong.append((code, wrong_in(match["rest"])))
        for match in SCRIPT.finditer(code):
            source = sources_of(match)
            options = [
                each
                for each in OPTION.findall(match["rest"].split("--serve ")[0])
                if f'"{each}"' not in source
            ]
            wrong.append((code, options if source else [match[0]]))
        wrong.append((code, [option for option in OPTION.findall(code) if option not in known]))
    assert not [(code, found) for code, found in wrong if found]


def test_help_lines_and_messages_name_commands_and_options_that_exist() -> None:
    known = everywhere() | OF_OTHERS | OF_THE_ENGINE
    wrong: list[tuple[str, str]] = []
    modules = sorted(PACKAGE.rglob("*.py"))
    for source in modules:
        for text in texts_of(source):
            named = [
                each
                for match in re.finditer(r"`?stretto ((?:[a-z]+ ?)+)`", text)
                for each in wrong_in(match[1])
            ]
            named += [option for option in OPTION.findall(text) if option not in known]
            wrong += [(source.name, each) for each in named]
    assert len(modules) > 200 and not wrong


@pytest.mark.parametrize(
    ("rest", "wrong"),
    [
        ("serve null:1 --port 8000", []),
        ("cluster up CONFIG.yaml", ["cluster"]),
        ("bench nothing", ["nothing"]),
        ("bench serve URL --rate 3 --colour", ["--colour"]),
        ("run --port 1", ["--port"]),
        ("--install-completion", []),
    ],
)
def test_a_command_that_does_not_exist_is_found(rest: str, wrong: list[str]) -> None:
    assert wrong_in(rest) == wrong
