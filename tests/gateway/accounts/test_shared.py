"""Budgets and rates of several gateways that share a Redis: a real one, and one that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from stretto.errors import BudgetExceeded, RateLimited, StartError
from stretto.gateway.accounts import issue
from stretto.gateway.accounts.accounts import Demand
from stretto.gateway.accounts.keys import KeyFile
from stretto.gateway.accounts.ledger import KeySettings, Ledger
from tests.gateway.redis_server import RedisServer, redis

__all__ = ["redis"]

DEMAND = Demand("m", "default", 10, 20)


class Gateways:
    """Ledgers of gateways with one key file and one Redis, and the key of a tenant."""

    def __init__(self, folder: Path, url: str, *limits: str) -> None:
        file = KeyFile(folder / "keys.json")
        self.key = issue.create(file, datetime.now(UTC), tenant="ann", limits=limits).key
        self._file = str(file.path)
        self._url = url
        self.ledgers: list[Ledger] = []

    def add(self, **rest: Any) -> Ledger:
        """One more gateway."""
        usual: dict[str, Any] = {"plain": {}, "operator": "g", "usage_file": "", "prices": {}, "share": 1.0}
        settings = KeySettings(**usual | {"keys_file": self._file, "redis": self._url} | rest)
        ledger = Ledger(settings, lambda ids: None)
        ledger.start()
        self.ledgers.append(ledger)
        return ledger

    def spend(self, ledger: Ledger) -> None:
        """One request of the tenant at a gateway."""
        accounts = ledger.accounts
        account = accounts.find(Headers({"x-api-key": self.key}), ledger.now())
        accounts.admit(account, DEMAND, ledger.now())

    def used(self, ledger: Ledger) -> float:
        """What the gateway believes that the tenant has used of its first limit."""
        account = ledger.accounts.find(Headers({"x-api-key": self.key}), ledger.now())
        return ledger.accounts.limits(account, ledger.now())[0].used


@pytest.fixture
async def closing() -> AsyncGenerator[list[Gateways]]:
    made: list[Gateways] = []
    yield made
    for each in made:
        for ledger in each.ledgers:
            await ledger.close()


async def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not become true in 10 s")


async def test_a_budget_is_spent_by_all_gateways_together(redis: RedisServer, tmp_path: Path, closing: Any):
    gateways = Gateways(tmp_path, redis.url, "requests=5/day")
    closing.append(gateways)
    one, two = gateways.add(), gateways.add()
    for _ in range(3):
        gateways.spend(one)
    gateways.spend(two)
    await until(lambda: gateways.used(two) == 4)
    gateways.spend(two)
    with pytest.raises(BudgetExceeded, match="5 of 5 used"):
        gateways.spend(two)
    with pytest.raises(BudgetExceeded, match="used"):
        for _ in range(500):
            await asyncio.sleep(0.02)
            if gateways.used(one) >= 5:
                gateways.spend(one)
        raise AssertionError("the first gateway never heard of it")


async def test_what_a_gateway_gave_out_stays_spent_when_it_restarts(
    redis: RedisServer, tmp_path: Path, closing: Any
):
    gateways = Gateways(tmp_path, redis.url, "requests=5/ever")
    closing.append(gateways)
    one = gateways.add()
    for _ in range(4):
        gateways.spend(one)
    await one.close()
    gateways.ledgers.clear()
    fresh = gateways.add()
    gateways.spend(fresh)
    await until(lambda: gateways.used(fresh) == 5)
    with pytest.raises(BudgetExceeded):
        gateways.spend(fresh)


async def test_rates_are_divided_by_the_gateways_that_are_there(
    redis: RedisServer, tmp_path: Path, closing: Any
):
    gateways = Gateways(tmp_path, redis.url, "requests=4/minute")
    closing.append(gateways)
    one = gateways.add()
    two = gateways.add()

    def most(ledger: Ledger) -> float:
        account = ledger.accounts.find(Headers({"x-api-key": gateways.key}), ledger.now())
        return ledger.accounts.limits(account, ledger.now())[0].most

    await until(lambda: most(one) == most(two) == 2)
    for _ in range(2):
        gateways.spend(one)
    with pytest.raises(RateLimited, match="rate requests=4/minute"):
        gateways.spend(one)
    await two.close()
    gateways.ledgers.remove(two)
    await until(lambda: most(one) == 4)


async def test_without_redis_each_gateway_counts_alone_and_says_so(
    redis: RedisServer, tmp_path: Path, closing: Any
):
    gateways = Gateways(tmp_path, redis.url, "requests=6/day")
    closing.append(gateways)
    one, two = gateways.add(), gateways.add()
    for ledger in (one, two):
        gateways.spend(ledger)
    await until(lambda: gateways.used(one) == gateways.used(two) == 2)
    redis.kill()
    await until(lambda: "Redis is away or full" in one.shared_error)
    for _ in range(2):
        gateways.spend(one)
    assert gateways.used(one) == 4, "what it heard of the other one still counts"
    redis.start()  # it has lost everything
    await until(lambda: one.shared_error == two.shared_error == "")
    gateways.spend(two)
    await until(lambda: gateways.used(two) >= 5)
    for _ in range(6 - int(gateways.used(two))):
        gateways.spend(two)
    with pytest.raises(BudgetExceeded):
        gateways.spend(two)


async def test_gateways_with_another_secret_share_nothing(redis: RedisServer, tmp_path: Path, closing: Any):
    gateways = Gateways(tmp_path, redis.url, "requests=5/day")
    closing.append(gateways)
    one, stranger = gateways.add(), gateways.add(operator="another")
    for _ in range(3):
        gateways.spend(one)
    gateways.spend(stranger)
    await asyncio.sleep(1.5)
    assert (gateways.used(one), gateways.used(stranger)) == (3, 1)


def test_a_wrong_url_stops_the_start(tmp_path: Path):
    pytest.importorskip("redis")
    with pytest.raises(StartError, match="is no URL of a Redis"):
        Gateways(tmp_path, "nonsense", "requests=5/day").add()
