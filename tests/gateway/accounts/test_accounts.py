"""Accounts: whose a key is, what it may do, and what its requests take."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec import json, structs
from starlette.datastructures import Headers

from stretto.errors import (
    BudgetExceeded,
    KeyExpired,
    KeyRevoked,
    NotAllowed,
    RateLimited,
    StartError,
    Unauthorised,
)
from stretto.gateway.accounts.accounts import Account, Accounts, Demand
from stretto.gateway.accounts.keys import KeyBook, KeyRecord, TenantRecord, hash_of
from stretto.gateway.accounts.ledger import KeySettings, Ledger
from stretto.gateway.accounts.limits import Now
from stretto.gateway.accounts.prices import Price
from stretto.gateway.accounts.took import PlainStream, took_of
from stretto.gateway.accounts.usage import MOST_PER_DAY, OTHER, Tally, UsageTable, csv_of
from stretto.protocol.relay import Took

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)


def at(seconds: float = 0.0) -> Now:
    return Now(1000.0 + seconds, NOON.timestamp() + seconds)


def record(name: str, **fields: Any) -> KeyRecord:
    return KeyRecord(**{"id": name, "tenant": "acme", "hash": hash_of(name), "created": NOON} | fields)


def accounts(*records: KeyRecord, **rest: Any) -> Accounts:
    made = Accounts(rest.pop("prices", {}))
    load(made, KeyBook(keys=records, **rest))
    return made


def load(made: Accounts, book: KeyBook) -> set[str]:
    return made.take(made.prepare(book, {}, ""), locked=True)


def with_key(key: str) -> Headers:
    return Headers({"authorization": f"Bearer {key}"})


def work(model: str = "m", tier: str = "default", **rest: Any) -> Demand:
    return Demand(model, tier, **{"prompt_tokens": 10, "limit": 20} | rest)


def find(made: Accounts, key: str, seconds: float = 0.0) -> Account:
    return made.find(with_key(key), at(seconds))


def test_a_key_leads_to_its_account_and_nothing_else_does():
    made = accounts(record("k1"), record("k2", tenant="bob"))
    assert find(made, "k1").tenant == "acme"
    assert made.find(Headers({"x-api-key": "k2"}), at()).tenant == "bob"
    both = Headers({"authorization": "Bearer wrong", "x-api-key": "k2"})
    assert made.find(both, at()).tenant == "bob"
    for wrong in ("", "k", "k11", hash_of("k1"), "K1"):
        with pytest.raises(Unauthorised):
            find(made, wrong)


def test_revoked_and_expired_keys_say_so():
    made = accounts(
        record("gone", revoked=NOON), record("old", expires=NOON + timedelta(seconds=5)), record("good")
    )
    with pytest.raises(KeyRevoked, match="gone was revoked"):
        find(made, "gone")
    assert find(made, "old", 4.9).tenant == "acme"
    with pytest.raises(KeyExpired, match="old has expired"):
        find(made, "old", 5.0)
    both = Headers({"authorization": "Bearer gone", "x-api-key": "good"})
    assert made.find(both, at()).record.id == "good"


def test_a_rotated_key_is_valid_for_its_grace_period():
    rotated = record("k", previous=hash_of("before"), previous_until=NOON + timedelta(seconds=10))
    made = accounts(rotated)
    assert find(made, "before", 9.0) is find(made, "k", 99.0)
    with pytest.raises(KeyExpired, match="was rotated"):
        find(made, "before", 10.0)
    revoked = accounts(structs.replace(rotated, revoked=NOON))
    for key in ("k", "before"):
        with pytest.raises(KeyRevoked):
            find(revoked, key)


def test_models_tiers_and_scopes_are_enforced():
    made = accounts(record("k", models=("m",), tiers=("flex",)))
    account = find(made, "k")
    made.admit(account, work(tier="flex"), at())
    with pytest.raises(NotAllowed, match="may not use the model 'x'; it may use m"):
        account.ensure_model("x")
    with pytest.raises(NotAllowed, match="may not use the tier priority"):
        made.admit(account, work(tier="priority"), at())
    with pytest.raises(NotAllowed, match="the scope admin; this key has infer, usage"):
        account.ensure("admin")


def test_a_rate_refuses_with_the_time_after_which_a_request_passes():
    made = accounts(record("k", limits=("requests=2/minute",)))
    account = find(made, "k")
    for _ in range(2):
        made.settle(made.admit(account, work(), at()), Tally(), at())
    with pytest.raises(RateLimited, match=r"rate requests=2/minute of key k is used up") as caught:
        made.admit(account, work(), at(10.0))
    wait = caught.value.retry_after
    assert wait == pytest.approx(20.0)
    made.admit(account, work(), at(10.0 + (wait or 0)))


def test_tokens_are_reserved_first_and_settled_with_what_was_taken():
    made = accounts(record("k", limits=("tokens=100/minute", "tokens=1000/day")))
    account = find(made, "k")
    bill = made.admit(account, work(), at())
    assert [round(each.used) for each in made.limits(account, at())] == [30, 30]
    made.settle(bill, Tally(prompt_tokens=12, completion_tokens=70), at())
    assert [round(each.used) for each in made.limits(account, at())] == [82, 82]
    with pytest.raises(RateLimited, match="tokens=100/minute"):
        made.admit(account, work(), at())


def test_a_refused_request_takes_nothing_from_any_limit():
    made = accounts(record("k", limits=("requests=100/day", "requests=1/minute")))
    account = find(made, "k")
    made.admit(account, work(), at())
    for _ in range(5):
        with pytest.raises(RateLimited):
            made.admit(account, work(), at())
    assert [each.used for each in made.limits(account, at())] == [1, 1]


def test_a_budget_of_money_says_what_how_much_and_when_it_is_whole_again():
    prices = {"m": Price(input=1.0, cached=0.1, output=10.0)}
    made = accounts(record("k", limits=("cost=0.001/day",)), prices=prices)
    account = find(made, "k")
    bill = made.admit(account, work(), at())
    taken = made.settle(bill, Tally(prompt_tokens=1000, cached_tokens=900, completion_tokens=200), at())
    assert taken.cost == pytest.approx((100 * 1.0 + 900 * 0.1 + 200 * 10.0) / 1e6)
    with pytest.raises(BudgetExceeded) as caught:
        made.admit(account, work(), at())
    assert caught.value.status == 429 and caught.value.retry_after == 12 * 3600
    for part in ("cost=0.001/day", "key k", "0.00219 of 0.001 used", "2026-11-30T00:00:00Z"):
        assert part in caught.value.message
    made.admit(account, work(), at(12 * 3600))
    with pytest.raises(NotAllowed, match="needs a price of the model 'other'"):
        made.admit(account, work("other"), at(12 * 3600))


def test_energy_comes_from_the_price_list():
    made = accounts(record("k", limits=("joules=10/ever",)), prices={"*": Price(joules=0.5)})
    account = find(made, "k")
    taken = made.settle(made.admit(account, work(), at()), Tally(completion_tokens=40), at())
    assert taken.joules == 20
    with pytest.raises(BudgetExceeded, match="never renewed") as caught:
        made.admit(account, work(), at())
    assert caught.value.retry_after is None


def test_energy_that_workers_report_comes_before_the_price_list():
    made = accounts(record("k", limits=("joules=30/ever",)), prices={"m": Price(joules=0.5)})
    account = find(made, "k")
    bill = made.admit(account, work(joules=0.1), at())
    assert bill.reserved["joules"] == pytest.approx(2.0), "twenty tokens"
    assert made.settle(bill, Tally(completion_tokens=20, joules=7.0), at()).joules == 7.0
    bill = made.admit(account, work(joules=0.1), at())
    broken_off = made.settle(bill, Tally(completion_tokens=10), at())
    assert broken_off.joules == pytest.approx(1.0), "by what a token takes"
    assert made.settle(made.admit(account, work(), at()), Tally(completion_tokens=4), at()).joules == 2.0
    assert made.limits(account, at())[0].used == pytest.approx(10.0)
    made.admit(account, work("unpriced", joules=0.1), at())
    with pytest.raises(NotAllowed, match="needs a price"):
        made.admit(account, work("unpriced"), at())


def test_the_keys_of_a_tenant_share_its_limits():
    tenants = {"acme": TenantRecord(limits=("requests=2/minute",))}
    made = accounts(record("a"), record("b"), record("c", tenant="bob"), tenants=tenants)
    for key in ("a", "b"):
        made.admit(find(made, key), work(), at())
    with pytest.raises(RateLimited, match="of tenant acme"):
        made.admit(find(made, "a"), work(), at())
    made.admit(find(made, "c"), work(), at())


def test_reading_the_keys_again_keeps_use_and_names_what_is_gone():
    one, two, three = (record(name, limits=("requests=3/day",)) for name in ("one", "two", "three"))
    made = accounts(one, two, three)
    made.admit(find(made, "one"), work(), at())
    changed = structs.replace(one, limits=("requests=1/day",))
    book = KeyBook(keys=(changed, structs.replace(two, revoked=NOON)))
    assert load(made, book) == {"two", "three"}
    with pytest.raises(BudgetExceeded, match="1 of 1 used"):
        made.admit(find(made, "one"), work(), at())
    assert load(made, book) == set()


def test_several_gateways_give_out_their_share():
    made = accounts(record("k", limits=("requests=4/day",)))
    made.share(0.25, 0.25)
    account = find(made, "k")
    made.admit(account, work(), at())
    with pytest.raises(BudgetExceeded, match="1 of 1 used"):
        made.admit(account, work(), at())
    made.share(0.5, 0.5)
    made.admit(account, work(), at())


def test_answers_without_a_limit_are_expected_to_be_as_long_as_the_last_ones():
    made = accounts(record("k", limits=("tokens=1000000/day",)))
    account = find(made, "k")
    for _ in range(60):
        bill = made.admit(account, work(limit=None, answers=2), at())
        made.settle(bill, Tally(completion_tokens=80), at())
    assert account.expected == pytest.approx(40, rel=0.05)


def test_ten_thousand_keys_are_read_and_found_quickly_enough():
    """The bound is loose, because machines differ; a search through all keys would take a second."""
    records = tuple(record(f"key-{n}", limits=("requests=60/minute", "tokens=9/day")) for n in range(10_000))
    made = accounts(*records)
    began = time.perf_counter()
    for n in range(0, 10_000, 10):
        assert find(made, f"key-{n}").record.id == f"key-{n}"
    assert time.perf_counter() - began < 1.0
    held = find(made, "key-7")
    began = time.perf_counter()
    assert load(made, KeyBook(keys=records[:-1])) == {"key-9999"}
    assert time.perf_counter() - began < 2.0
    assert find(made, "key-7") is held


def settings(**rest: Any) -> KeySettings:
    usual: dict[str, Any] = {"plain": {}, "operator": "", "keys_file": "", "usage_file": "", "prices": {}}
    return KeySettings(**usual | {"share": 1.0} | rest)


async def test_usage_and_spent_budgets_outlive_a_restart(tmp_path: Path):
    file = tmp_path / "keys.json"
    from_file = settings(keys_file=str(file), usage_file=str(tmp_path / "usage.json"))
    book = KeyBook(keys=(record("k", limits=("tokens=1000/month", "tokens=50/ever", "tokens=1/minute")),))
    file.write_bytes(json.encode(book))
    first = Ledger(from_file, lambda ids: None, at)
    charge = first.charge(first.accounts.find(with_key("k"), at()))
    charge._bill = first.accounts.admit(charge.account, work(), at())  # pyright: ignore[reportPrivateUsage]
    charge.settle(Tally(prompt_tokens=40, completion_tokens=20), "m")
    with pytest.raises(StartError, match="another gateway keeps its usage"):
        Ledger(from_file, lambda ids: None, at)
    await first.close()
    second = Ledger(from_file, lambda ids: None, lambda: at(5.0))
    account = second.accounts.find(with_key("k"), at())
    with pytest.raises(BudgetExceeded, match="tokens=50/ever"):
        second.accounts.admit(account, work(), at(120.0))
    assert [each.used for each in second.accounts.limits(account, at(5.0))][:2] == [60, 60]
    assert [row.prompt_tokens for row in second.usage.rows("acme")] == [40]
    await second.close()
    (tmp_path / "usage.json").write_text("{")
    with pytest.raises(StartError, match=r"usage\.json is no usage file"):
        Ledger(from_file, lambda ids: None, at)


def test_the_table_of_usage_is_bounded_and_sums_up_by_day_tenant_and_model():
    table = UsageTable()
    for n in range(MOST_PER_DAY + 50):
        table.add(at().wall, f"t{n}", "m", Tally(prompt_tokens=1))
    table.add(at().wall, "t0", "m", Tally(completion_tokens=3, cost=0.5))
    rows = {row.tenant: row for row in table.rows()}
    assert len(rows) == MOST_PER_DAY + 1 and rows[OTHER].requests == 50
    assert (rows["t0"].requests, rows["t0"].prompt_tokens, rows["t0"].completion_tokens) == (2, 1, 3)
    for day in range(100):
        table.add(at(day * 86400.0).wall, "t0", "m", Tally())
    assert len({row.day for row in table.rows("t0")}) <= 62
    assert [row.day for row in table.rows("t0", "2027-02-01", "2027-02-02")] == ["2027-02-01", "2027-02-02"]


def test_csv_is_safe_in_a_spreadsheet():
    table = UsageTable()
    table.add(at().wall, "acme", '=cmd|"/c calc"!A1', Tally(prompt_tokens=1))
    lines = csv_of(table.rows()).splitlines()
    assert lines[0].startswith("day,tenant,model,requests,")
    assert lines[1] == '2026-11-29,acme,"\'=cmd|""/c calc""!A1",1,1,0,0,0.0,0.0'


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_streams_of_other_servers_are_counted_however_they_are_cut(size: int):
    event = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}}\n\n'
    for stream, took in (
        (event * 3 + b"data: [DONE]\n\n", Took(0, 0, 3)),
        (event * 3 + usage + b"data: [DONE]\n\n", Took(9, 0, 4)),
    ):
        counted = PlainStream()
        seen = Took()
        for at_byte in range(0, len(stream), size):
            seen = counted.push(stream[at_byte : at_byte + size])
        assert seen == counted.end() == took
    whole = PlainStream()
    body = b'{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}}'
    for at_byte in range(0, len(body), size):
        whole.push(body[at_byte : at_byte + size])
    assert whole.end() == Took(9, 0, 4)


def test_an_answer_in_one_piece_says_what_it_took():
    assert took_of("3 1 2", b"") == Took(3, 1, 2)
    body = b'{"usage":{"prompt_tokens":5,"completion_tokens":-2,"prompt_tokens_details":{"cached_tokens":4}}}'
    assert took_of("nonsense", body) == Took(5, 4, 0)
    for nothing in (b"", b"[]", b'{"usage":null}', b'{"usage":{"prompt_tokens":"many"}}', b"[" * 10_000):
        assert took_of(None, nothing) is None
