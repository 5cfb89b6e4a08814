"""The command `stretto`, also as `python -m stretto`. Interrupted while it is imported, it ends cleanly."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from types import FrameType

STDERR = 2
INTERRUPTED = 130  # the exit code of a command that SIGINT ends, as shells count


def _end(number: int, frame: FrameType | None) -> None:
    """End a process that only imports: there is nothing to undo, and a traceback would tell nothing."""
    os.write(STDERR, b"interrupted\n")
    os._exit(INTERRUPTED)


def main() -> None:
    """Import the command and run it."""
    handler = signal.getsignal(signal.SIGINT)
    own = handler is signal.default_int_handler  # else it is ignored, as in the background of a script
    if own:
        signal.signal(signal.SIGINT, _end)
    command = import_module("stretto.cli").main
    if own:
        signal.signal(signal.SIGINT, handler)
    command()


if __name__ == "__main__":
    main()
