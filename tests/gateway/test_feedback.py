"""`/v1/feedback` through the gateway: it reaches the worker that gave the answer, and nobody else's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.config import ServeConfig
from stretto.engine.step_time import StepCost
from stretto.errors import EngineDied
from stretto.gateway.app import Gateway
from stretto.gateway.feedback import joined
from stretto.gateway.routing.answered import AnsweredRequests
from stretto.protocol.extensions.feedback import FeedbackSummary, VariantFeedback
from stretto.protocol.relay import RELAY
from stretto.server.app import App
from tests.gateway.cluster import ASK, CHAT, cluster, fake
from tests.ladder.tiny_ladder import variant
from tests.server.fake_engine import FakeEngine, info
from tests.server.variants.snapshots import outlook
from tests.server.variants.test_placement import build

URL = "/v1/feedback"
Cluster = tuple[httpx.AsyncClient, Gateway]
KEYS: dict[str, Any] = {
    "gateway_key": "between-us",
    "api_keys": {"key-1": "ann", "key-2": "bob"},
}
NAMES = ("full", "int8", "small")
BOB = {"x-api-key": "key-2"}


@pytest.fixture
async def two(checkpoint: Path) -> AsyncIterator[Cluster]:
    kept = {"feedback_prompts": ("ann",)}
    async with cluster(
        checkpoint, fake(65, 66), fake(65, 66), worker=kept, route="round-robin", **KEYS
    ) as made:
        made[0].headers["x-api-key"] = "key-1"
        yield made


async def ask(client: httpx.AsyncClient, **fields: Any) -> str:
    """Asks for an answer; returns the id of its request."""
    answer = await client.post(CHAT, json=ASK | {"stream": False} | fields)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-request-id"]


async def give(client: httpx.AsyncClient, id: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return await client.post(URL, json={"request_id": id, "thumbs": "up"} | body, headers=headers)


def forget(gateway: Gateway) -> None:
    """Has a gateway that did not relay the answers."""
    gateway.relay.answered._workers.clear()  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("remembers", [True, False])
async def test_a_reward_reaches_the_worker_that_answered(two: Cluster, remembers: bool) -> None:
    client, gateway = two
    ids = [await ask(client) for _ in range(4)]
    assert len(set(gateway.relay.answered._workers.values())) == 2  # pyright: ignore[reportPrivateUsage]
    if not remembers:
        forget(gateway)
    for id in (ids[0], ids[1], f"chatcmpl-{ids[2]}"):
        receipt = await give(client, id)
        assert receipt.status_code == 200, receipt.text
        assert (receipt.json()["request_id"], receipt.json()["reward"]) == (id, 1.0)
    summary = (await client.get(URL)).json()
    assert summary["waiting"] == 1
    kept = summary["models"]["tiny"]["tiny"]
    assert (kept["rewards"], kept["mean_reward"]) == (3, 1.0)
    assert kept["mean_expected"] is kept["correction"] is None, (
        "a model without variants has nothing to learn"
    )


async def test_the_id_of_a_response_finds_its_worker(two: Cluster) -> None:
    client, _ = two
    for _ in range(2):
        answer = await client.post("/v1/responses", json={"input": "Hi"})
        receipt = await give(client, answer.json()["id"])
        assert receipt.status_code == 200, receipt.text
    assert (await client.get(URL)).json()["waiting"] == 0


@pytest.mark.parametrize("remembers", [True, False])
async def test_a_request_that_no_worker_knows_gets_the_404_of_a_worker(two: Cluster, remembers: bool) -> None:
    client, gateway = two
    id = await ask(client)
    if not remembers:
        forget(gateway)
    for answer in (await give(client, "nobody"), await give(client, id, BOB)):
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("request_not_found", "$.request_id")
    for headers, unknown in (({}, "nobody"), (BOB, id)):
        answer = await client.delete(f"{URL}/{unknown}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")
    assert (await give(client, id)).status_code == 200, "and it is still the tenant's own"


async def test_what_is_wrong_with_a_reward_is_said(two: Cluster) -> None:
    client, _ = two
    id = await ask(client)
    both = await give(client, id, reward=0.5)
    assert (both.status_code, both.json()["error"]["param"]) == (400, "$.reward")
    for body in (b"[]", b"{", b'{"request_id": 3, "thumbs": "up"}', b'{"thumbs": "up"}'):
        answer = await client.post(URL, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), body
    half = f'{{"request_id": "{id}", "thumbs": "up", "corrected_answer": "\\ud83d"}}'
    answer = await client.post(URL, content=half, headers={"content-type": "application/json"})
    assert answer.status_code == 200, "half of an emoji is read as U+FFFD"
    assert (await client.post(URL, content=b"{}")).status_code == 415
    assert (await give(client, id, {"x-api-key": "wrong"})).status_code == 401


async def test_erasure_and_export_cover_all_workers(two: Cluster) -> None:
    client, _ = two
    ids = [await ask(client, user="u" if number < 2 else "v") for number in range(6)]
    for id in ids:
        assert (await give(client, id, corrected_answer=f"no: {id}")).status_code == 200
    export = await client.get(f"{URL}/export")
    assert export.headers["content-type"].startswith("application/jsonl")
    assert sorted(json.loads(line)["answer"] for line in export.text.splitlines()) == sorted(
        f"no: {id}" for id in ids
    )
    assert (await client.delete(URL, headers=BOB)).json()["erased"] == 0
    assert (await client.delete(f"{URL}/chatcmpl-{ids[5]}")).json()["erased"] == 1
    assert (await client.delete(f"{URL}/{ids[5]}")).status_code == 404
    assert (await client.delete(f"{URL}/users/u")).json()["erased"] == 2
    assert (await client.delete(URL)).json()["erased"] == 3
    assert (await client.get(URL)).json()["models"] == {}


async def test_what_other_choices_would_have_been_worth_is_told_by_worker(checkpoint: Path) -> None:
    def engine() -> FakeEngine:
        infos = {f"m:{name}": info(f"m:{name}", vocab=600) for name in NAMES}
        made = FakeEngine(lambda request: [65, 66], infos)
        made.outlooks = {name: outlook(StepCost(0.01, 0.001, 0.001)) for name in infos}
        return made

    def app(config: ServeConfig, made: FakeEngine) -> App:
        return build(made, checkpoint, config, *map(variant, NAMES))

    async with cluster(checkpoint, engine(), engine(), make=app, route="round-robin", **KEYS) as (
        client,
        gateway,
    ):
        assert (await client.get(f"{URL}/policies")).status_code == 401
        client.headers["x-api-key"] = "key-1"
        assert (await client.get(f"{URL}/policies")).json() == {"object": "feedback.policies", "models": {}}
        for number in range(10):
            id = await ask(client, model="m")
            assert (await give(client, id, thumbs="up" if number % 2 else "down")).status_code == 200
        found = (await client.get(f"{URL}/policies")).json()["models"]["m"]
        summary = (await client.get(URL)).json()["models"]["m"]
        assert (await client.get(f"{URL}/policies", headers=BOB)).json()["models"] == {}
        own: dict[str, Any] = {}
        for worker in gateway.registry.workers.values():
            relayed: dict[str, Any] = {"operation": "feedback_policies", "tenant": "ann", "request": {}}
            url = f"http://{worker.address.host}:{worker.address.port}{RELAY}"
            headers = {"x-api-key": "between-us"}
            own[worker.name] = (await client.post(url, json=relayed, headers=headers)).json()["models"]["m"]
    assert len(own) == 2 and all(own.values()) and sum(each["rewards"] for each in summary.values()) == 10
    for worker, rows in own.items():
        assert [row for row in found if row["worker"] == worker] == [
            row | {"worker": worker} for row in rows
        ], "as that worker says it"
    assert len(found) == sum(map(len, own.values())), "and nothing of both together"


async def test_a_worker_that_does_not_answer_is_named(checkpoint: Path) -> None:
    async with cluster(checkpoint, fake(65, 66), fake(65, 66), route="round-robin") as (client, gateway):
        ids = [await ask(client) for _ in range(2)]
        lost = next(iter(gateway.registry.workers.values()))
        lost.pool.close()
        lost.pool.address = lost.pool.address._replace(port=1)
        answers = {id: await give(client, id) for id in ids}
        assert sorted(each.status_code for each in answers.values()) == [200, 503]
        silent = await client.get(f"{URL}/policies")
        assert silent.status_code == 503 and lost.name in silent.json()["error"]["message"]
        for path in (URL, f"{URL}/{ids[0]}"):
            refused = await client.delete(path)
            assert refused.status_code == 503 and lost.name in refused.json()["error"]["message"]
        assert (await give(client, "nobody")).status_code == 503, "the lost one may know it"


async def test_the_worker_that_ended_a_stream_gets_its_reward(checkpoint: Path) -> None:
    engines = [fake(65, 66, EngineDied("died", retry_after=1.0)), fake(65, 66, 67)]
    async with cluster(checkpoint, *engines, route="sticky") as (client, gateway):
        ids: list[str] = []
        while not gateway.relay.failovers and len(ids) < 8:
            ids.append((await client.post(CHAT, json=ASK)).headers["x-request-id"])
        assert gateway.relay.failovers == 1
        id = ids[-1]
        last = list(gateway.registry.workers)[1]
        assert gateway.relay.answered.worker("local", [id]) == last
        assert (await give(client, id)).status_code == 200


async def test_of_two_workers_that_began_an_answer_the_one_that_gave_it_learns(checkpoint: Path) -> None:
    async with cluster(checkpoint, fake(65, 66), fake(65, 66), route="round-robin") as (client, gateway):
        for _ in range(3):  # one id, so that both know it
            answer = await client.post(CHAT, json=ASK, headers={"x-request-id": "same"})
            assert answer.status_code == 200
        gave = gateway.relay.answered.worker("local", ["same"])
        assert (await give(client, "same")).status_code == 200
        rewarded: list[str] = []
        for worker in gateway.registry.workers.values():
            url = f"http://{worker.address.host}:{worker.address.port}{URL}"
            summary = (await client.get(url)).json()
            assert bool(summary["models"]) != bool(summary["waiting"]), "both know the request"
            rewarded += [worker.name] * bool(summary["models"])
        assert rewarded == [gave]
        assert (await client.delete(f"{URL}/same")).json()["erased"] == 2, "nothing of it is left anywhere"


def test_the_newest_requests_are_remembered_by_tenant() -> None:
    answered = AnsweredRequests(2)
    for number in range(3):
        answered.add("ann", str(number), f"worker {number}")
    assert answered.worker("ann", ["0"]) is None and answered.worker("bob", ["2"]) is None
    assert answered.worker("ann", ["chatcmpl-2", "2"]) == "worker 2"


def test_the_means_of_workers_are_weighted() -> None:
    def of(count: int, mean: float, expected: float | None, taught: float | None) -> FeedbackSummary:
        kept = VariantFeedback(
            rewards=count,
            mean_reward=mean,
            mean_expected=expected,
            correction=taught,
            correction_low=None if taught is None else taught - 0.1,
        )
        return FeedbackSummary(waiting=1, models={"m": {"v": kept}})

    whole = joined([of(1, 1.0, 0.5, 0.2), of(3, 0.0, 0.9, -0.2), of(4, 0.25, None, None)])
    assert whole.waiting == 3
    kept = whole.models["m"]["v"]
    assert (kept.rewards, kept.mean_reward) == (8, 0.25)
    assert kept.mean_expected == pytest.approx(0.8)
    assert (kept.correction, kept.correction_low) == (pytest.approx(-0.1), pytest.approx(-0.2))
