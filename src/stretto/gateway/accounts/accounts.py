"""The keys in use: whose a request is, whether it may start, and what its answer used.

`find` names the account of a request. `admit` checks every limit of its key and its tenant, and reserves what
the answer is expected to use. `settle` counts what it used. One event loop owns all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf
from typing import NamedTuple

from msgspec import Struct, structs
from starlette.datastructures import Headers

from stretto.errors import BudgetExceeded, KeyExpired, KeyRevoked, NotAllowed, RateLimited, Unauthorised
from stretto.gateway.accounts.keys import KeyBook, KeyRecord, KeyScope, TenantRecord, hash_of, limits_of
from stretto.gateway.accounts.limits import (
    BudgetMeter,
    KeyLimit,
    Meter,
    Now,
    Period,
    Quantity,
    meter_of,
    window_of,
)
from stretto.gateway.accounts.prices import Price, price_of
from stretto.gateway.accounts.usage import SpentBudget, Tally, spent_of
from stretto.http.request import given_keys

LOCAL = "local"
OPEN: tuple[KeyScope, ...] = ("infer", "usage", "metrics")
OPERATOR: tuple[KeyScope, ...] = ("admin",)
EVER = datetime.fromtimestamp(0, UTC)
FIRST_GUESS = 256.0  # tokens of an answer, before the key had any
MEMORY = 0.1  # how much the last answer counts in the expected length
Owner = tuple[str, str]  # `key` or `tenant`, and its name


@dataclass(slots=True)
class Account:
    """One key in use. `expected`: tokens of its usual answer."""

    record: KeyRecord
    meters: list[Meter] = field(default_factory=list[Meter])
    expected: float = FIRST_GUESS

    @property
    def tenant(self) -> str:
        """The tenant that the key belongs to."""
        return self.record.tenant

    def ensure(self, scope: KeyScope) -> None:
        """Raises NotAllowed, or Unauthorised for a request without a key."""
        if scope in self.record.scopes:
            return
        if not self.record.hash:
            raise Unauthorised(f"this needs an API key with the scope {scope}: `Authorization: Bearer KEY`")
        raise NotAllowed(f"this needs an API key with the scope {scope}; this key has {self._scopes()}")

    def may(self, scope: KeyScope) -> bool:
        """Whether the key has the scope."""
        return scope in self.record.scopes

    def allows(self, model: str) -> bool:
        """Whether the key may use the model."""
        return not self.record.models or model in self.record.models

    def ensure_model(self, model: str) -> None:
        """Raises NotAllowed."""
        if not self.allows(model):
            raise NotAllowed(
                f"this API key may not use the model {model!r}; it may use {', '.join(self.record.models)}",
                param="$.model",
            )

    def _scopes(self) -> str:
        return ", ".join(self.record.scopes) or "none"


class Demand(NamedTuple):
    """What is known of a request before it runs. `limit`: the most tokens of an answer, None for no limit.
    `joules`: of a token of an answer, as workers say; None: they do not know."""

    model: str
    tier: str
    prompt_tokens: int
    limit: int | None = None
    answers: int = 1
    joules: float | None = None


NO_WORK = Demand("", "default", 0)


@dataclass(frozen=True, slots=True)
class Bill:
    """A request that was admitted: what is reserved for it since when."""

    account: Account
    work: Demand
    price: Price
    reserved: Mapping[Quantity, float]
    since: Now


class Prepared(NamedTuple):
    """Keys to take over: the accounts that stay as they are, by id and by hash, and the other keys."""

    kept: dict[str, Account]
    by_hash: dict[str, Account]
    changed: list[KeyRecord]
    tenants: Mapping[str, TenantRecord]


class LimitState(Struct, frozen=True):
    """One limit of a key or a tenant, as `/v1/usage` shows it. `most` is the part of this gateway."""

    owner: str
    limit: str
    used: float
    most: float
    resets_s: float | None


class Accounts:
    """All keys of a gateway. `share`: the part of each limit that this gateway may give out."""

    def __init__(self, prices: Mapping[str, Price], share: float = 1.0) -> None:
        self.prices = prices
        self.locked = False  # whether a request needs a key
        self.asked: dict[str, BudgetMeter] = {}  # by name, since somebody emptied it
        self._used: dict[str, tuple[str, BudgetMeter]] = {}  # all that were ever asked, with their owners
        self._shares = (share, share)  # of rates, and of budgets
        self._by_hash: dict[str, Account] = {}
        self._by_id: dict[str, Account] = {}
        self._tenants: dict[str, list[Meter]] = {}
        self._spent: dict[tuple[str, Quantity, Period], SpentBudget] = {}
        self._open = Account(_record("open", LOCAL, "", OPEN))

    def prepare(self, book: KeyBook, plain: Mapping[str, str], operator: str) -> Prepared:
        """Compares the present keys with others: a key file's, `plain` keys of tenants without limits, and an
        operator's. It changes nothing, so that a thread may run it while requests come."""
        records = [*book.keys, *(_plain(key, tenant) for key, tenant in plain.items())]
        if operator:
            records.append(_record("operator", "operator", hash_of(operator), OPERATOR))
        kept: dict[str, Account] = {}
        changed: list[KeyRecord] = []
        for record in records:
            account = self._by_id.get(record.id)
            if account is not None and account.record == record:
                kept[record.id] = account
            else:
                changed.append(record)
        by_hash = {each: account for account in kept.values() for each in _hashes(account.record)}
        return Prepared(kept, by_hash, changed, book.tenants)

    def take(self, prepared: Prepared, *, locked: bool) -> set[str]:
        """Takes over prepared keys. Returns the ids of keys that were revoked or are gone.

        What a key that stays has used stays used. `locked`: every request needs a key.
        """
        valid = {name for name, account in self._by_id.items() if account.record.revoked is None}
        before, self._by_id, self._by_hash = self._by_id, prepared.kept, prepared.by_hash
        for record in prepared.changed:
            account = self._by_id[record.id] = self._updated(before.get(record.id), record)
            for each in _hashes(record):
                self._by_hash[each] = account
        self._tenants = {
            name: self._meters(("tenant", name), limits_of(tenant.limits, name), self._tenants.get(name, []))
            for name, tenant in prepared.tenants.items()
        }
        self.locked = locked
        return valid - {name for name, account in self._by_id.items() if account.record.revoked is None}

    def find(self, headers: Headers, now: Now) -> Account:
        """The account of a request's key. Raises Unauthorised, KeyRevoked or KeyExpired."""
        refusal: Unauthorised | None = None
        for key in given_keys(headers):
            hashed = hash_of(key)
            account = self._by_hash.get(hashed)
            if account is not None:
                refused = _refusal(account.record, hashed, now)
                if refused is None:
                    return account
                refusal = refusal or refused
        if refusal is not None:
            raise refusal
        if not self.locked:
            return self._open  # a gateway that is open to all takes any key
        raise Unauthorised("send a valid API key: `Authorization: Bearer KEY` or `x-api-key: KEY`")

    def admit(self, account: Account, work: Demand, now: Now) -> Bill:
        """Reserves what a request is expected to use. Raises NotAllowed, RateLimited or BudgetExceeded."""
        ensure_tier(account.record, work.tier)
        price = price_of(self.prices, work.model)
        if work.joules is not None:
            price = structs.replace(price, joules=work.joules)
        reserved = _expected(account, work, price)
        owned = self._owned(account)
        for owner, meters in owned:
            for meter in meters:
                self._ask(owner, meter, work, price, reserved, now)
        for _, meters in owned:
            for meter in meters:
                meter.reserve(reserved[meter.limit.quantity], now)
        return Bill(account, work, price, reserved, now)

    def admit_call(self, account: Account, now: Now) -> None:
        """Takes one of the limits of requests, for a call that no model answers.

        Raises RateLimited or BudgetExceeded.
        """
        counted = [
            (owner, meter)
            for owner, meters in self._owned(account)
            for meter in meters
            if meter.limit.quantity == "requests"
        ]
        for owner, meter in counted:
            self._ask(owner, meter, NO_WORK, Price(), {"requests": 1.0}, now)
        for _, meter in counted:
            meter.reserve(1.0, now)

    def settle(self, bill: Bill, tally: Tally, now: Now) -> Tally:
        """Replaces the reservation by what the answer used. Returns that with its cost."""
        price, account = bill.price, bill.account
        cost = price.cost(tally.prompt_tokens, tally.cached_tokens, tally.completion_tokens)
        joules = tally.joules or (price.joules or 0.0) * tally.completion_tokens
        actual: dict[Quantity, float] = {
            "requests": 1.0,
            "tokens": float(tally.prompt_tokens + tally.completion_tokens),
            "cost": cost,
            "joules": joules,
        }
        for owner, meters in self._owned(account):
            for meter in meters:
                self._note(owner, meter)
                quantity = meter.limit.quantity
                meter.settle(bill.reserved[quantity], actual[quantity], bill.since, now)
        if tally.completion_tokens:
            each = tally.completion_tokens / bill.work.answers
            account.expected += MEMORY * (each - account.expected)
        return Tally(
            prompt_tokens=tally.prompt_tokens,
            cached_tokens=tally.cached_tokens,
            completion_tokens=tally.completion_tokens,
            cost=cost,
            joules=joules,
        )

    def limits(self, account: Account, now: Now) -> list[LimitState]:
        """The limits of an account and of its tenant."""
        return [
            LimitState(
                owner=" ".join(owner),
                limit=str(meter.limit),
                used=max(0.0, meter.used(now)),
                most=meter.size,
                resets_s=None if (resets := meter.resets(now)) == inf else resets,
            )
            for owner, meters in self._owned(account)
            for meter in meters
        ]

    def share(self, rates: float, budgets: float) -> None:
        """This gateway may give out other parts of the limits from now on."""
        self._shares = (rates, budgets)
        for meter in self._all():
            share = self._share_of(meter.limit)
            if meter.share != share:
                meter.change(meter.limit, share)

    def spent(self) -> tuple[SpentBudget, ...]:
        """What is spent of each budget, to be saved."""
        return tuple(
            SpentBudget(
                owner=owner,
                quantity=meter.limit.quantity,
                period=meter.limit.period,
                start=None if meter.window.start == -inf else meter.window.start,
                spent=meter.spent,
            )
            for owner, meter in self._used.values()
            if meter.window is not None and meter.spent
        )

    def restore(self, budgets: Sequence[SpentBudget]) -> None:
        """Takes over what was saved. Call it before `load`."""
        self._spent = dict(spent_of(budgets))

    def _share_of(self, limit: KeyLimit) -> float:
        return self._shares[0] if limit.rate else self._shares[1]

    def _note(self, owner: Owner, meter: Meter) -> None:
        if isinstance(meter, BudgetMeter):
            name = f"{owner[0]} {owner[1]}:{meter.limit.quantity}:{meter.limit.period}"
            self.asked[name] = meter
            self._used[name] = " ".join(owner), meter

    def _owned(self, account: Account) -> list[tuple[Owner, list[Meter]]]:
        tenant = self._tenants.get(account.tenant, [])
        return [(("key", account.record.id), account.meters), (("tenant", account.tenant), tenant)]

    def _all(self) -> Iterable[Meter]:
        for account in self._by_id.values():
            yield from account.meters
        for meters in self._tenants.values():
            yield from meters

    def _updated(self, account: Account | None, record: KeyRecord) -> Account:
        account = account or Account(record)
        account.record = record
        limits = limits_of(record.limits, record.id)
        account.meters = self._meters(("key", record.id), limits, account.meters)
        return account

    def _meters(self, owner: Owner, limits: Sequence[KeyLimit], old: Sequence[Meter]) -> list[Meter]:
        kept = {(meter.limit.quantity, meter.limit.period): meter for meter in old}
        meters: list[Meter] = []
        for limit in limits:
            share = self._share_of(limit)
            meter = kept.get((limit.quantity, limit.period)) or meter_of(limit, share)
            meter.change(limit, share)
            saved = self._spent.pop((" ".join(owner), limit.quantity, limit.period), None)
            if saved is not None and isinstance(meter, BudgetMeter):
                wall = 0.0 if saved.start is None else saved.start
                meter.window, meter.spent = window_of(limit.period, wall), saved.spent
                self._note(owner, meter)
            meters.append(meter)
        return meters

    def _ask(
        self,
        owner: Owner,
        meter: Meter,
        work: Demand,
        price: Price,
        reserved: Mapping[Quantity, float],
        now: Now,
    ) -> None:
        """Raises RateLimited or BudgetExceeded when a limit has no room, NotAllowed when nobody knows."""
        limit = meter.limit
        self._note(owner, meter)
        if not price.tells(limit.quantity):
            raise NotAllowed(
                f"the limit {limit} of {' '.join(owner)} needs a price of the model {work.model!r}; "
                "the operator sets it in [prices]",
                param="$.model",
            )
        need = reserved[limit.quantity]
        wait = meter.wait(need, now)
        if not wait:
            return
        held = meter.held if isinstance(meter, BudgetMeter) else 0.0
        used = f"{meter.used(now) - held:,.6g} of {meter.size:,.6g} used"
        again = "it is never renewed" if wait == inf else f"try again in {wait:,.0f} s"
        whose = f"{limit} of {' '.join(owner)}"
        after = None if wait == inf else wait
        if limit.rate:
            raise RateLimited(
                f"the rate {whose} is used up: {used}, {need:,.6g} needed; {again}", retry_after=after
            )
        if meter.used(now) - held < meter.size:
            raise RateLimited(
                f"running requests hold the rest of the budget {whose}: {used}, {held:,.6g} held; {again}",
                retry_after=after,
            )
        whole = "" if wait == inf else f", renewed at {_iso(now.wall + wait)}"
        raise BudgetExceeded(f"the budget {whose} is used up: {used}{whole}; {again}", retry_after=after)


def ensure_tier(record: KeyRecord, tier: str) -> None:
    """Raises NotAllowed for a tier that the key may not use."""
    if record.tiers and tier not in record.tiers:
        raise NotAllowed(
            f"this API key may not use the tier {tier}; it may use {', '.join(record.tiers)}",
            param="$.service_tier",
        )


def _expected(account: Account, work: Demand, price: Price) -> dict[Quantity, float]:
    """What an answer will take, by the length of the key's usual answers."""
    each = account.expected if work.limit is None else min(work.limit, account.expected)
    completion = each * work.answers
    return {
        "requests": 1.0,
        "tokens": work.prompt_tokens + completion,
        "cost": price.cost(work.prompt_tokens, 0, completion),
        "joules": (price.joules or 0.0) * completion,
    }


def _hashes(record: KeyRecord) -> tuple[str, ...]:
    return (record.hash,) if record.previous is None else (record.hash, record.previous)


def _record(name: str, tenant: str, hashed: str, scopes: tuple[KeyScope, ...]) -> KeyRecord:
    return KeyRecord(id=name, tenant=tenant, hash=hashed, created=EVER, scopes=scopes)


def _plain(key: str, tenant: str) -> KeyRecord:
    """A key of the setting `api_keys`: a tenant without limits."""
    hashed = hash_of(key)
    return KeyRecord(id=f"plain-{hashed[:10]}", tenant=tenant, hash=hashed, created=EVER)


def _refusal(record: KeyRecord, hashed: str, now: Now) -> Unauthorised | None:
    """Why the key with that hash is not valid now; None if it is."""
    if record.revoked is not None:
        return KeyRevoked(f"the API key {record.id} was revoked; ask for a new one")
    if record.expires is not None and now.wall >= record.expires.timestamp():
        return KeyExpired(f"the API key {record.id} has expired; ask for a new one")
    until = record.previous_until
    if hashed == record.previous and (until is None or now.wall >= until.timestamp()):
        return KeyExpired(f"the API key {record.id} was rotated; use its new secret")
    return None


def _iso(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
