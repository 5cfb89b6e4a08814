"""The key file: who may use the gateway, and for what. It holds hashes; a key itself is shown once.

A key is 256 random bits, so one SHA-256 protects it: nobody can try them all, and a slow hash would only
slow down requests. The file is JSON. It is replaced as a whole, under a lock, so no reader sees half of it.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from secrets import token_hex, token_urlsafe
from typing import Annotated, Literal

from msgspec import DecodeError as NotJson
from msgspec import Meta, Struct, ValidationError, json

from stretto.config import TierName
from stretto.errors import StartError
from stretto.gateway.accounts.limits import KeyLimit

KeyScope = Literal["infer", "usage", "metrics", "admin"]
SCOPES: tuple[KeyScope, ...] = ("infer", "usage")
PREFIX = "sk-stretto-"
SECRET_BYTES = 32
ID_BYTES = 5
MODE = 0o600
LARGEST = 64 << 20  # bytes of a key file
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Aware = Annotated[datetime, Meta(tz=True)]
LimitText = Annotated[str, Meta(max_length=100)]


class TenantRecord(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Limits that all keys of a tenant share."""

    limits: tuple[LimitText, ...] = ()


class KeyRecord(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One key. Empty `tiers` and `models` allow all. `hash` and `previous` are SHA-256 in hexadecimal digits.

    After a rotation the previous key is valid until `previous_until`.
    """

    id: Name
    tenant: Name
    hash: Hash
    created: Aware
    scopes: tuple[KeyScope, ...] = SCOPES
    tiers: tuple[TierName, ...] = ()
    models: tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...] = ()
    limits: tuple[LimitText, ...] = ()
    expires: Aware | None = None
    revoked: Aware | None = None
    previous: Hash | None = None
    previous_until: Aware | None = None


class KeyBook(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a key file holds."""

    keys: tuple[KeyRecord, ...] = ()
    tenants: dict[Name, TenantRecord] = {}
    version: Literal[1] = 1


def hash_of(key: str) -> str:
    """The SHA-256 of a key."""
    return sha256(key.encode()).hexdigest()


def new_id() -> str:
    """A random name for a key, which is no secret."""
    return f"key-{token_hex(ID_BYTES)}"


def new_key() -> str:
    """A random key of 256 bits."""
    return PREFIX + token_urlsafe(SECRET_BYTES)


def limits_of(texts: tuple[str, ...], where: str) -> tuple[KeyLimit, ...]:
    """Limits as numbers. Raises StartError for one that cannot be read, and for two of the same kind."""
    try:
        return _limits(texts)
    except ValueError as error:
        raise StartError(f"{where}: {error}") from error


@lru_cache(4096)  # many keys have the same limits
def _limits(texts: tuple[str, ...]) -> tuple[KeyLimit, ...]:
    limits: dict[tuple[str, str], KeyLimit] = {}
    for limit in map(KeyLimit.of, texts):
        if limits.setdefault((limit.quantity, limit.period), limit) is not limit:
            raise ValueError(f"there are two limits of {limit.quantity} per {limit.period}; keep one of them")
    return tuple(limits.values())


def decode(data: bytes, where: str) -> KeyBook:
    """Reads the content of a key file. Raises StartError that says what is wrong, and where."""
    try:
        book = json.decode(data, type=KeyBook)
    except (NotJson, ValidationError, RecursionError) as error:
        raise StartError(f"{where} is no key file: {error}") from error
    ids = Counter(record.id for record in book.keys)
    hashes = Counter(each for record in book.keys for each in (record.hash, record.previous) if each)
    for counted, what in ((ids, "id"), (hashes, "hash")):
        for value, count in counted.items():
            if count > 1:
                raise StartError(f"{where}: {count} keys have the {what} {value[:16]}; keep one of them")
    for record in book.keys:
        if record.limits:
            limits_of(record.limits, f"{where}: key {record.id}")
    for name, tenant in book.tenants.items():
        limits_of(tenant.limits, f"{where}: tenant {name}")
    return book


class KeyFile:
    """The key file at a path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, *, missing_ok: bool = False) -> KeyBook:
        """The file's content. Raises StartError; not for a missing file if `missing_ok`."""
        try:
            with self.path.open("rb") as file:
                data = file.read(LARGEST + 1)
        except FileNotFoundError:
            if missing_ok:
                return KeyBook()
            raise StartError(
                f"there is no key file {self.path}: `stretto keys create TENANT --file {self.path}` makes it"
            ) from None
        except OSError as error:
            raise StartError(f"cannot read the key file {self.path}: {error.strerror}") from error
        if len(data) > LARGEST:
            raise StartError(f"the key file {self.path} has more than {LARGEST} bytes; remove revoked keys")
        return decode(data, f"{self.path}")

    def stamp(self) -> tuple[int, int, int] | None:
        """What changes whenever the file does; None for no file."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    @contextmanager
    def locked(self) -> Generator[None]:
        """Holds the file's lock, which every writer takes. Raises StartError."""
        try:
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
        except OSError as error:
            raise StartError(f"cannot write beside the key file {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def write(self, book: KeyBook) -> None:
        """Replaces the file. Hold the lock from before the read. Raises StartError; the old file stays."""
        replace(self.path.resolve(), json.format(json.encode(book), indent=1))


def replace(path: Path, data: bytes) -> None:
    """Puts a file in the place of another one, all or nothing, readable by its owner alone.

    Raises StartError; then the old file is as it was.
    """
    fresh = path.with_name(f"{path.name}.{token_hex(4)}.new")
    try:
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StartError(f"cannot write {path}: {error.strerror}; the old file is as it was") from error
