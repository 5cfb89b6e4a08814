"""Changes of a key file: create, revoke and rotate keys, and limit tenants. Each holds the file's lock."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

import msgspec
from msgspec import Struct, json, structs

from stretto.config import TierName
from stretto.errors import StartError
from stretto.gateway.accounts.keys import (
    SCOPES,
    KeyBook,
    KeyFile,
    KeyRecord,
    KeyScope,
    Name,
    TenantRecord,
    decode,
    hash_of,
    limits_of,
    new_id,
    new_key,
)

SPAN = re.compile(r"(\d+)([smhdw])")
SPANS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
NAMES = "1 to 64 letters, digits and the characters . _ @ -"
HINTS = {
    "$.tenant": f"the name of a tenant has {NAMES}",
    "$.scopes": f"a scope is one of {', '.join(get_args(KeyScope))}",
    "$.tiers": f"a tier is one of {', '.join(get_args(TierName))}",
    "$.models": "the name of a model has 1 to 256 characters",
}
KeyStatus = Literal["active", "expired", "revoked"]


class NewKey(Struct, frozen=True):
    """What is shown once, when a key is made. `key` is the secret."""

    key: str
    record: KeyRecord


def span(text: str) -> timedelta:
    """Reads `90d`, `12h` or `30m`. Raises StartError."""
    match = SPAN.fullmatch(text)
    if match is None:
        raise StartError(f"{text!r} is no span of time: write one like 90d, 12h or 30m")
    try:
        return timedelta(**{SPANS[match[2]]: int(match[1])})
    except OverflowError:
        raise StartError(f"{text!r} is too long") from None


def moment(text: str, now: datetime) -> datetime:
    """Reads a span from now, or a date like 2027-01-31 or 2027-01-31T12:00:00Z. Raises StartError."""
    if SPAN.fullmatch(text):
        try:
            return now + span(text)
        except OverflowError:
            raise StartError(f"{text!r} is too long") from None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise StartError(f"{text!r} is no time: write one like 90d or 2027-01-31") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def create(file: KeyFile, now: datetime, **fields: object) -> NewKey:
    """Adds a key with these fields of KeyRecord. Makes the file if there is none. Raises StartError."""
    key = new_key()
    given = {name: value for name, value in fields.items() if value not in (None, (), [])}
    values = {"id": new_id(), "hash": hash_of(key), "created": now, "scopes": SCOPES} | given
    try:
        record = msgspec.convert(values, KeyRecord)
    except msgspec.ValidationError as error:
        hints = [
            f"{path}: {hint}, unlike {values.get(path[2:])!r}"
            for path, hint in HINTS.items()
            if path in str(error)
        ]
        raise StartError(f"the key cannot be made: {hints[0] if hints else error}") from error
    limits_of(record.limits, "the key cannot be made")
    if record.expires is not None and record.expires <= now:
        raise StartError(f"a key cannot expire in the past, at {record.expires:%Y-%m-%dT%H:%M:%SZ}")
    _change(file, lambda book: structs.replace(book, keys=(*book.keys, record)), missing_ok=True)
    return NewKey(key, record)


def revoke(file: KeyFile, name: str, now: datetime) -> KeyRecord:
    """Revokes a key, and the one before its last rotation. Raises StartError."""
    return _replace(file, name, lambda record: structs.replace(record, revoked=record.revoked or now))


def rotate(file: KeyFile, name: str, now: datetime, grace: timedelta) -> NewKey:
    """Gives a key a new secret. The old one is valid for the grace period. Raises StartError."""
    key = new_key()

    def renewed(record: KeyRecord) -> KeyRecord:
        if record.revoked is not None:
            raise StartError(f"the key {name} is revoked; create a new one")
        return structs.replace(record, hash=hash_of(key), previous=record.hash, previous_until=now + grace)

    return NewKey(key, _replace(file, name, renewed))


def limit_tenant(file: KeyFile, tenant: str, limits: Sequence[str]) -> TenantRecord:
    """Sets the limits that all keys of a tenant share; none: it has no limits. Raises StartError."""
    try:
        msgspec.convert(tenant, Name)
    except msgspec.ValidationError:
        raise StartError(f"{tenant!r} is no tenant: {HINTS['$.tenant']}") from None
    record = TenantRecord(limits=tuple(limits))
    limits_of(record.limits, f"tenant {tenant}")

    def changed(book: KeyBook) -> KeyBook:
        others = {name: each for name, each in book.tenants.items() if name != tenant}
        return structs.replace(book, tenants=others | ({tenant: record} if limits else {}))

    _change(file, changed)
    return record


def find(book: KeyBook, name: str) -> KeyRecord:
    """The key with that id. Raises StartError."""
    for record in book.keys:
        if record.id == name:
            return record
    raise StartError(f"there is no key {name!r}; `stretto keys list` names them")


def status_of(record: KeyRecord, now: datetime) -> KeyStatus:
    """Whether the key is valid at `now`."""
    if record.revoked is not None:
        return "revoked"
    return "expired" if record.expires is not None and record.expires <= now else "active"


def _replace(file: KeyFile, name: str, change: Callable[[KeyRecord], KeyRecord]) -> KeyRecord:
    made: list[KeyRecord] = []

    def changed(book: KeyBook) -> KeyBook:
        old = find(book, name)
        made.append(change(old))
        return structs.replace(book, keys=tuple(made[0] if each is old else each for each in book.keys))

    _change(file, changed)
    return made[0]


def _change(file: KeyFile, change: Callable[[KeyBook], KeyBook], *, missing_ok: bool = False) -> None:
    with file.locked():
        fresh = change(file.read(missing_ok=missing_ok))
        decode(
            json.encode(fresh), "the changed key file"
        )  # a change that readers would refuse is refused here
        file.write(fresh)
