"""Starts a Stretto server in a child process, for the benchmarks beside this file that load one over HTTP."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 120.0
POLL_S = 0.05


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """Run `stretto serve ARGUMENTS` on a free port. Yields its address once it is ready, and stops it."""
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "stretto", "serve", *arguments, "--port", "0"]
        process = subprocess.Popen(command, stdout=output)
        try:
            yield _address(process, Path(f"/proc/self/fd/{output.fileno()}"))
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], output: Path) -> str:
    """The address that the server prints when it is ready."""
    deadline = time.monotonic() + START_S
    while "http://" not in (text := output.read_text()):
        if process.poll() is not None:
            sys.exit(f"the server ended with exit code {process.returncode}; its errors are above")
        if time.monotonic() > deadline:
            sys.exit(f"the server was not ready within {START_S:g} s")
        time.sleep(POLL_S)
    return next(word for word in text.split() if word.startswith("http://"))
