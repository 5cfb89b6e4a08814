"""A chat in the terminal. A function answers the conversation with pieces of text.

This module owns the conversation and the commands. It knows neither the model nor the server.
"""

from __future__ import annotations

import readline  # noqa: F401  # pyright: ignore[reportUnusedImport] - gives `input` a line editor
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from stretto import terminal
from stretto.errors import StrettoError

Conversation = list[dict[str, Any]]
Answer = Callable[[Conversation], Generator[str]]
HELP = "/help lists the commands, /quit ends the chat, Ctrl-C stops an answer"
COMMANDS = """\
/help           lists the commands
/clear          forgets the conversation (also /reset)
/system TEXT    sets the system prompt and forgets the conversation; without TEXT, shows it
/quit           ends the chat (also /exit and Ctrl-D)
Ctrl-C          stops an answer"""


def converse(answer: Answer, name: str, system: str = "") -> None:
    """Read lines and answer them, until the input ends or the user types `/quit`.

    `name` is the model's. `system` is the system prompt; if it is empty, the conversation has none.
    """
    interactive = sys.stdin.isatty() and terminal.out.is_terminal
    if interactive:
        terminal.out.print(f"[bold]{name}[/] · [dim]{HELP}[/]")
    history = _opened(system)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            terminal.err.print(f"\n[dim]{HELP}[/]")
            continue
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/help":
                _note(COMMANDS)
            case "/clear" | "/reset":
                history = _opened(system)
                _note("forgotten")
            case "/system" if rest.strip():
                system = rest.strip()
                history = _opened(system)
                _note("the system prompt is set; the conversation is forgotten")
            case "/system":
                _note(system or "no system prompt; /system TEXT sets one")
            case _ if command.startswith("/"):
                _note(f"no such command: {command}\n{COMMANDS}")
            case _:
                try:
                    _turn(answer, history, line)
                except KeyboardInterrupt:  # before or after the answer
                    terminal.err.print(" [dim](stopped)[/]")
                    if history and history[-1]["role"] == "user":
                        history.pop()


def _opened(system: str) -> Conversation:
    return [{"role": "system", "content": system}] if system else []


def _note(text: str) -> None:
    terminal.err.print(text, style="dim", markup=False)


def _turn(answer: Answer, history: Conversation, line: str) -> None:
    """Answer one line. A stopped answer stays in the history up to where it was stopped."""
    history.append({"role": "user", "content": line})
    pieces: list[str] = []
    started, first = time.perf_counter(), 0.0
    try:
        with closing(answer(history)) as stream:
            for piece in stream:
                first = first or time.perf_counter()
                pieces.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        terminal.err.print(" [dim](stopped)[/]", end="")
    except StrettoError as error:
        terminal.print_error(error)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if not pieces:
        history.pop()
        return
    history.append({"role": "assistant", "content": "".join(pieces)})
    if terminal.out.is_terminal:
        ended = time.perf_counter()
        terminal.out.print(
            f"[dim]{(first - started) * 1e3:.0f} ms to the first token, {ended - started:.1f} s[/]"
        )
