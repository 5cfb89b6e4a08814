"""The private folder for the sockets between a server and its engine processes.

Its owner locks it. So cleaners of temporary files (systemd-tmpfiles) leave it alone, and a later start can
tell whether some process owns it.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from stretto.errors import StartError

PREFIX = "stretto-"
NAME = re.compile(PREFIX + r"[a-z0-9_]{8}")  # as mkdtemp makes it
LONGEST_PATH = 107  # bytes of a local socket's path on Linux
LONGEST_NAME = len("/engine-999999")


class RuntimeFolder:
    """A folder of this process, below $XDG_RUNTIME_DIR or the directory for temporary files.

    Folders that a killed process left there are removed first. Raises StartError when no folder can be made,
    for example on a full disk.
    """

    def __init__(self) -> None:
        for base in _bases():
            remove_abandoned(base)
        self._lock = -1
        try:
            self._make()
        except OSError as error:
            reason = error.strerror or error
            raise StartError(
                f"no folder for the engine's socket: {reason}; free some space, or set TMPDIR"
            ) from error

    def ensure(self) -> Path:
        """The folder, made anew when somebody has removed it. Raises OSError when that fails."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._lock)):
                return self.path
        self._unlock()
        self._make()
        return self.path

    def close(self) -> None:
        """Remove the folder and the sockets in it."""
        if self._lock >= 0:
            with suppress(OSError):
                _remove(self.path)
            self._unlock()

    def _make(self) -> None:
        failure: OSError | None = None
        for base in _bases():
            try:
                self.path, self._lock = _locked_folder(base)
                return
            except OSError as error:
                failure = error
        assert failure is not None
        raise failure

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_abandoned(base: Path) -> None:
    """Remove this user's folders below `base` that hold only sockets and that no process owns."""
    with suppress(OSError):
        for folder in base.iterdir():
            if NAME.fullmatch(folder.name):
                with suppress(OSError):  # of another user, in use, or removed by another start just now
                    lock = _lock(folder)
                    try:
                        _remove(folder)
                    finally:
                        os.close(lock)


def _bases() -> list[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    bases = [Path(runtime)] if os.path.isabs(runtime) and os.access(runtime, os.W_OK | os.X_OK) else []
    return [*bases, Path(tempfile.gettempdir())]


def _locked_folder(base: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that locks it. Raises OSError."""
    if len(os.fsencode(base)) + len(f"/{PREFIX}12345678") + LONGEST_NAME > LONGEST_PATH:
        raise OSError(f"the path {base} is too long for a socket")
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    try:
        return folder, _lock(folder)
    except OSError:
        folder.rmdir()
        raise


def _lock(folder: Path) -> int:
    """A descriptor that locks the folder until it is closed. Raises OSError when another process owns it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove(folder: Path) -> None:
    """Remove a folder of sockets. Raises OSError, and removes nothing, when it holds anything else."""
    entries = list(folder.iterdir())
    if all(stat.S_ISSOCK(entry.lstat().st_mode) for entry in entries):
        for entry in entries:
            entry.unlink(missing_ok=True)
        folder.rmdir()
