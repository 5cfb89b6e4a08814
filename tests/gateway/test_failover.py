"""What clients see of a worker's or a gateway's death: several answers, log probabilities, two gateways."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from stretto.errors import Draining, EngineDied
from stretto.gateway.app import Gateway
from stretto.gateway.settings import GatewayConfig
from stretto.http import serving
from stretto.types import Reason
from tests.gateway.cluster import ASK, CHAT, cluster, fake, running, text_of

TOKENS = list(range(60, 72))
SEVERAL = ASK | {"n": 3, "logprobs": True, "top_logprobs": 1}


def by_index(answer: httpx.Response) -> dict[int, list[Any]]:
    """The deltas, log probabilities and finish reasons of each answer, in order."""
    assert answer.status_code == 200 and answer.text.count("data: [DONE]") == 1, answer.text
    found: dict[int, list[Any]] = {}
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                part = (choice["delta"], choice["logprobs"], choice["finish_reason"])
                found.setdefault(choice["index"], []).append(part)
    return found


async def test_several_answers_with_log_probabilities_survive_their_worker(checkpoint: Path):
    async with cluster(checkpoint, fake(*TOKENS)) as (client, _):
        undisturbed = by_index(await client.post(CHAT, json=SEVERAL))
    assert len(undisturbed) == 3 and undisturbed[0][1][1]["content"]
    dying = fake(*TOKENS[:5], 0.05, EngineDied("the engine ended"))
    async with cluster(checkpoint, dying, fake(*TOKENS), route="round-robin") as (client, gateway):
        answers = [by_index(await client.post(CHAT, json=SEVERAL)) for _ in range(2)]
        assert answers == [undisturbed, undisturbed] and gateway.relay.failovers == 1


async def test_a_gateways_death_costs_only_its_own_streams_and_says_so(checkpoint: Path):
    engine = fake(*TOKENS[:3], 1.0, *TOKENS[3:])
    async with AsyncExitStack() as stack:
        client, surviving = await stack.enter_async_context(cluster(checkpoint, engine))
        (worker,) = surviving.registry.workers.values()
        dying = Gateway(GatewayConfig(workers=(f"http://{worker.name}",), port=0), seed=0)
        url = await stack.enter_async_context(running(serving.run, dying.config, dying, dying))
        other = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20))
        async with asyncio.timeout(30):
            while (await other.get("/ready")).status_code != 200:
                await asyncio.sleep(0.02)
        streams = [asyncio.create_task(each.post(CHAT, json=ASK)) for each in (client, client, other, other)]
        async with asyncio.timeout(30):
            while dying.server.running < 2 or len(engine.requests) < 4:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        dying.server.close()
        dying.server.end_calls(Draining("the gateway shut down before the answer was complete"))
        first, second, lost, other_lost = await asyncio.gather(*streams)
        whole = text_of(first)
        assert text_of(second) == whole
        for answer in (lost, other_lost):  # the ending has a type, and names what to do
            body = answer.text if answer.status_code == 200 else "data: " + answer.text
            events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
            assert events[-1]["error"]["code"] == "draining" and "[DONE]" not in body
        again = await client.post(CHAT, json=ASK)  # at the gateway that lives
        assert text_of(again) == whole
        async with asyncio.timeout(30):
            while engine.open:  # the worker has cancelled what nobody reads
                await asyncio.sleep(0.02)


async def test_what_one_worker_refuses_another_one_may_take(checkpoint: Path):
    refusing, willing = fake(Reason.REFUSED), fake(*TOKENS)
    async with cluster(checkpoint, refusing, willing, route="round-robin") as (client, gateway):
        answers = [await client.post(CHAT, json=ASK) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert len(refusing.requests) == 2 and len(willing.requests) == 4
        assert all(worker.view.usable for worker in gateway.registry.workers.values())
    async with cluster(checkpoint, refusing, fake(Reason.REFUSED), route="round-robin") as (client, _):
        answer = await client.post(CHAT, json=ASK)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cannot_be_on_time")
