"""A conversation in a terminal. Whoever answers is a function from messages to pieces of text.

Owns the history and the commands; knows neither model nor server.
"""

from __future__ import annotations

import readline  # noqa: F401 - gives `input` a line editor and a history
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from stretto import terminal
from stretto.errors import StrettoError

Message = dict[str, Any]
Answerer = Callable[[list[Message]], Generator[str]]
HELP = "/reset forgets the conversation, /quit ends it, Ctrl-C stops an answer"


def converse(answerer: Answerer, who: str) -> None:
    """Read a line, answer it, until the end of the input or `/quit`."""
    interactive = sys.stdin.isatty() and terminal.out.is_terminal
    if interactive:
        terminal.out.print(f"[bold]{who}[/] · [dim]{HELP}[/]")
    history: list[Message] = []
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            terminal.err.print(f"\n[dim]{HELP}[/]")
            continue
        match line:
            case "":
                continue
            case "/quit":
                return
            case "/reset":
                history.clear()
                terminal.err.print("[dim]forgotten[/]")
            case _ if line.startswith("/"):
                terminal.err.print(f"[dim]no such command: {HELP}[/]")
            case _:
                try:
                    _turn(answerer, history, line)
                except KeyboardInterrupt:  # beside the answer itself
                    terminal.err.print(" [dim](stopped)[/]")
                    if history and history[-1]["role"] == "user":
                        history.pop()


def _turn(answerer: Answerer, history: list[Message], line: str) -> None:
    """One question and its answer. An answer stopped half-way stays in the history as far as it came."""
    history.append({"role": "user", "content": line})
    pieces: list[str] = []
    started, first = time.perf_counter(), 0.0
    try:
        with closing(answerer(history)) as answer:
            for piece in answer:
                first = first or time.perf_counter()
                pieces.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        terminal.err.print(" [dim](stopped)[/]", end="")
    except StrettoError as error:
        terminal.say_error(error)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if not pieces:
        history.pop()
        return
    history.append({"role": "assistant", "content": "".join(pieces)})
    if terminal.out.is_terminal:
        ended = time.perf_counter()
        terminal.out.print(
            f"[dim]{(first - started) * 1e3:.0f} ms to the first word, {ended - started:.1f} s[/]"
        )
