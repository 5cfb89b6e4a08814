"""Queues in which tenants take turns: order, bounds, patience, and waiters that leave."""

from __future__ import annotations

import asyncio

import pytest

from stretto.errors import Overloaded
from stretto.queueing.round_robin import RoundRobin
from stretto.queueing.turns import Turns


def test_owners_take_turns_and_keep_their_own_order() -> None:
    queue: RoundRobin[str] = RoundRobin()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.push(item[0], item)
    assert (len(queue), queue.owned("a"), queue.owned("z")) == (6, 3, 0)
    queue.discard(lambda item: item == "a2")
    assert [queue.pop() for _ in range(5)] == ["a1", "b1", "c1", "a3", "b2"]
    with pytest.raises(IndexError):
        queue.pop()


class Worker:
    """Runs work in turns; `done` lists what is over, and `gate` lets one piece of work end."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.done: list[str] = []
        self.gate = asyncio.Semaphore(0)

    async def work(self, tenant: str, name: str) -> None:
        async with self.turns.turn(tenant):
            await self.gate.acquire()
            self.done.append(name)

    def start(self, tenant: str, name: str) -> asyncio.Task[None]:
        return asyncio.create_task(self.work(tenant, name))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_tenants_queue_delays_another_by_one_piece_of_work() -> None:
    worker = Worker(Turns("texts"))
    tasks = [worker.start("greedy", f"greedy {at}") for at in range(10)]
    await settle()
    tasks.append(worker.start("other", "other"))
    await settle()
    for _ in range(11):
        worker.gate.release()
    await asyncio.gather(*tasks)
    assert worker.done.index("other") == 2  # behind the running one and the next, whose turn had come
    assert worker.turns.waiting == 0


async def test_too_many_waiters_are_refused_one_tenant_at_half_of_the_limit() -> None:
    worker = Worker(Turns("texts", limit=4))
    tasks = [worker.start("greedy", "") for _ in range(3)]
    await settle()
    with pytest.raises(Overloaded, match="2 texts are waiting") as caught:
        await worker.work("greedy", "")
    assert caught.value.retry_after == 1.0
    tasks += [worker.start(name, "") for name in ("b", "c")]
    await settle()
    with pytest.raises(Overloaded):
        await worker.work("d", "")
    for _ in tasks:
        worker.gate.release()
    await asyncio.gather(*tasks)


async def test_nobody_waits_longer_than_the_patience() -> None:
    worker = Worker(Turns("texts", patience_s=0.05))
    first = worker.start("a", "first")
    await settle()
    with pytest.raises(Overloaded, match=r"its turn among the texts did not come within 0\.05 s"):
        await worker.work("b", "late")
    assert worker.turns.waiting == 0
    worker.gate.release()
    await first
    worker.gate.release()
    await worker.work("b", "free again")


async def test_waiters_that_leave_lose_no_place() -> None:
    worker = Worker(Turns("texts"))
    first, second, third = (worker.start("a", name) for name in ("1", "2", "3"))
    await settle()
    second.cancel()
    await settle()
    worker.gate.release()
    await first
    third.cancel()  # in the instant in which its turn comes
    await settle()
    worker.gate.release()
    await asyncio.wait_for(worker.work("a", "4"), 1)
    assert worker.done == ["1", "4"]
