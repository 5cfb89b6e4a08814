"""The key file: what is written, what is refused, and who may write at the same time."""

from __future__ import annotations

import stat
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stretto.errors import StartError
from stretto.gateway.accounts import issue
from stretto.gateway.accounts.keys import KeyBook, KeyFile, decode, hash_of

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def test_a_key_is_shown_once_and_stored_as_a_hash(file: KeyFile):
    made = issue.create(file, NOW, tenant="acme", limits=("requests=60/minute",))
    text = file.path.read_text()
    assert made.key.startswith("sk-stretto-") and len(made.key) > 50
    assert made.key not in text and made.key.removeprefix("sk-stretto-") not in text
    assert hash_of(made.key) in text
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert file.read().keys == (made.record,)
    assert made.record.scopes == ("infer", "usage")


def test_rotation_keeps_the_name_and_the_old_key_for_a_while(file: KeyFile):
    made = issue.create(file, NOW, tenant="acme")
    fresh = issue.rotate(file, made.record.id, NOW, timedelta(hours=1))
    (record,) = file.read().keys
    assert fresh.key != made.key and record.id == made.record.id
    assert (record.hash, record.previous) == (hash_of(fresh.key), hash_of(made.key))
    assert record.previous_until == NOW + timedelta(hours=1)


def test_a_revoked_key_stays_in_the_file_and_cannot_be_rotated(file: KeyFile):
    made = issue.create(file, NOW, tenant="acme")
    issue.revoke(file, made.record.id, NOW)
    again = issue.revoke(file, made.record.id, NOW + timedelta(days=1))
    assert again.revoked == NOW and issue.status_of(again, NOW) == "revoked"
    with pytest.raises(StartError, match="is revoked; create a new one"):
        issue.rotate(file, made.record.id, NOW, timedelta(0))
    with pytest.raises(StartError, match="there is no key 'nobody'"):
        issue.revoke(file, "nobody", NOW)


def test_limits_of_a_tenant_are_set_and_removed(file: KeyFile):
    issue.create(file, NOW, tenant="acme")
    issue.limit_tenant(file, "acme", ["cost=10/month"])
    assert file.read().tenants["acme"].limits == ("cost=10/month",)
    issue.limit_tenant(file, "acme", [])
    assert file.read().tenants == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tenant": ""}, r"\$\.tenant"),
        ({"tenant": "a b"}, r"\$\.tenant"),
        ({"tenant": "x" * 65}, r"\$\.tenant"),
        ({"tenant": "a", "tiers": ["gold"]}, "'gold'"),
        ({"tenant": "a", "scopes": ["root"]}, "'root'"),
        ({"tenant": "a", "limits": ["tokens=5"]}, "is no limit"),
        ({"tenant": "a", "limits": ["tokens=5/day", "tokens=9/day"]}, "two limits of tokens per day"),
        ({"tenant": "a", "expires": NOW}, "in the past, at 2026-11-29T12:00:00Z"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused_and_changes_nothing(
    file: KeyFile, fields: dict[str, Any], message: str
):
    issue.create(file, NOW, tenant="acme")
    before = file.path.read_bytes()
    with pytest.raises(StartError, match=message):
        issue.create(file, NOW, **fields)
    assert file.path.read_bytes() == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no key file"),
        (b"\x00\xff", "is no key file"),
        (b"[" * 100_000, "is no key file"),
        (b'{"keys": 3}', r"\$\.keys"),
        (b'{"keyz": []}', "keyz"),
        (b'{"version": 2}', r"\$\.version"),
        (b'{"keys": [{"id": "a", "tenant": "t", "hash": "12", "created": "2026-01-01T00:00:00Z"}]}', r"hash"),
        (b'{"keys": [], "tenants": {"t": {"limits": ["x"]}}}', "tenant t: 'x' is no limit"),
    ],
)
def test_garbage_in_the_file_is_named(file: KeyFile, data: bytes, message: str):
    file.path.write_bytes(data)
    with pytest.raises(StartError, match=message):
        file.read()


def test_two_keys_with_one_hash_or_one_id_are_refused(file: KeyFile):
    record = issue.create(file, NOW, tenant="acme").record
    other = msgspec.structs.replace(record, id="other")
    for twice in ((record, record), (record, other)):
        with pytest.raises(StartError, match="2 keys have the"):
            decode(msgspec.json.encode(KeyBook(keys=twice)), "x")


def test_a_missing_file_and_a_folder_that_cannot_be_written_are_named(tmp_path: Path):
    with pytest.raises(StartError, match="stretto keys create TENANT"):
        KeyFile(tmp_path / "none.json").read()
    with pytest.raises(StartError, match="cannot write beside"):
        issue.create(KeyFile(tmp_path / "none" / "keys.json"), NOW, tenant="a")


def test_a_link_stays_a_link(tmp_path: Path):
    real = tmp_path / "real.json"
    link = tmp_path / "link.json"
    issue.create(KeyFile(real), NOW, tenant="a")
    link.symlink_to(real)
    issue.create(KeyFile(link), NOW, tenant="b")
    assert link.is_symlink() and len(KeyFile(real).read().keys) == 2


def _create(path: str) -> str:
    return issue.create(KeyFile(Path(path)), NOW, tenant="acme").record.id


def test_writers_at_the_same_time_lose_nothing(file: KeyFile):
    with ProcessPoolExecutor(4) as pool:
        made = list(pool.map(_create, [str(file.path)] * 24))
    assert sorted(record.id for record in file.read().keys) == sorted(made)
    assert [each.name for each in file.path.parent.iterdir() if each.name.endswith(".new")] == []


@pytest.mark.parametrize("text", ["90", "d", "1y", "-1d", "99999999999999999999d"])
def test_what_is_no_span_of_time_is_refused(text: str):
    with pytest.raises(StartError):
        issue.span(text)


def test_moments_are_spans_from_now_or_dates():
    assert issue.moment("90d", NOW) == NOW + timedelta(days=90)
    assert issue.moment("2027-01-31", NOW) == datetime(2027, 1, 31, tzinfo=UTC)
    for wrong in ("soon", "999999999d"):
        with pytest.raises(StartError):
            issue.moment(wrong, NOW)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tenant": "bad name"}, "the name of a tenant has 1 to 64 letters"),
        ({"scopes": ("everything",)}, "a scope is one of infer, usage, metrics, admin"),
        ({"tiers": ("gold",)}, "a tier is one of priority, default, flex"),
        ({"models": ("",)}, "the name of a model has"),
        ({"limits": ("requests=60",)}, "^the key cannot be made: 'requests=60' is no limit: write one like"),
    ],
)
def test_a_key_that_cannot_be_made_says_what_to_write(tmp_path: Path, fields: dict[str, Any], message: str):
    file = KeyFile(tmp_path / "keys.json")
    with pytest.raises(StartError, match=message):
        issue.create(file, datetime.now(UTC), **{"tenant": "acme"} | fields)
    assert not file.path.exists()


def test_limits_of_a_name_that_no_tenant_has_are_refused(tmp_path: Path):
    with pytest.raises(StartError, match="'bad name' is no tenant: the name of a tenant has"):
        issue.limit_tenant(KeyFile(tmp_path / "keys.json"), "bad name", ["tokens=1/day"])
