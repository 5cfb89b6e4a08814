"""Reading files that a stranger made: regular files of bounded size, and one sentence for whatever is wrong.

A checkpoint is downloaded or written by other programs. Its files may be damaged in any way, and a name may
be a pipe, a device or a loop of links.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from stretto.errors import CheckpointError, StrettoError

DAMAGED = "its files are damaged or of a kind that is not supported, so fetch them again"
POINTER = b"version https://git-lfs"
MOST_BYTES = 512 * 2**20  # of a file that is read whole; the largest tokenizers have 40 MB


def open_file(path: Path) -> int:
    """A descriptor of a regular file, which the caller closes.

    Raises CheckpointError when it is missing, cannot be opened, or is a directory, a pipe or a device.
    """
    try:
        # A pipe without a writer would block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the download may not have finished") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file: put the checkpoint's own file there")
    return descriptor


def read_file(path: Path) -> bytes:
    """All of a regular file. Raises CheckpointError as `open_file` does, and for one that is too large."""
    with os.fdopen(open_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; a file of its kind has {MOST_BYTES} at most")
        try:
            content = file.read()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    check_content(path, content)
    return content


def check_content(path: Path, begin: bytes) -> None:
    """Raises CheckpointError for a file that begins as a pointer of Git LFS does."""
    if begin.startswith(POINTER):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull`")


@contextmanager
def loading(what: str, advice: str = DAMAGED) -> Generator[None]:
    """Turns any exception in the block into a CheckpointError that says that `what` cannot be loaded.

    Known faults have sentences of their own, which pass. This is for the rest, as no list of the ways in
    which a file can be damaged is complete.
    """
    try:
        yield
    except StrettoError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{what} cannot be loaded: there is not enough memory; free some") from error
    except BaseException as error:  # a panic inside the tokenizers package is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        line = (str(error).strip() or "no message").splitlines()[0][:300]
        if "allocate" in line:
            raise CheckpointError(f"{what} cannot be loaded: there is not enough memory ({line})") from error
        raise CheckpointError(f"{what} cannot be loaded: {type(error).__name__}: {line}; {advice}") from error
