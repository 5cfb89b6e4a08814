"""Feedback over HTTP on a ladder: votes move the choices of their tenant, and erasure takes that back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs

from stretto.config import ServeConfig
from stretto.engine.step_time import StepCost
from stretto.ladder.learning import learner
from stretto.server.app import App
from stretto.text.tokenizer import TextModel
from stretto.types import Began, Moved, TokenEvent
from tests.ladder.tiny_ladder import variant
from tests.server.conftest import CHAT, HELLO, ids_of
from tests.server.fake_engine import FakeEngine, info
from tests.server.feedback.test_routes import URL
from tests.server.variants.snapshots import outlook
from tests.server.variants.test_placement import build

NAMES = ("full", "int8", "small")
CHEAP = StepCost(0.01, 0.001, 0.001)  # so that machine time never counts
ANN, BOB = {"x-api-key": "key-1"}, {"x-api-key": "key-2"}


@pytest.fixture
def engine(text: TextModel) -> FakeEngine:
    ids = ids_of(text, "Hello, world!")
    infos = {f"m:{name}": info(f"m:{name}", vocab=text.tokenizer.get_vocab_size()) for name in NAMES}
    engine = FakeEngine(lambda request: list(ids), infos)
    engine.outlooks = {name: outlook(CHEAP) for name in infos}
    return engine


@pytest.fixture
def application(engine: FakeEngine, checkpoint: Path, config: ServeConfig) -> App:
    config = structs.replace(config, api_keys={"key-1": "ann", "key-2": "bob"})
    return build(engine, checkpoint, config, *map(variant, NAMES))


@pytest.fixture
async def client(application: App) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"content-type": "application/json"} | ANN
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(application), base_url="http://localhost", headers=headers
    ) as made:
        yield made


async def ask(client: httpx.AsyncClient, headers: dict[str, str] = ANN, **body: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json=HELLO | body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


async def vote(client: httpx.AsyncClient, count: int, headers: dict[str, str] = ANN) -> None:
    """Thumbs down for the top, thumbs up for the others."""
    for _ in range(count):
        answer = await ask(client, headers)
        thumbs = "down" if answer["stretto"]["variant"] == "m:full" else "up"
        receipt = await client.post(URL, json={"request_id": answer["id"], "thumbs": thumbs}, headers=headers)
        assert receipt.json()["learnt"] is True
        assert receipt.json()["variant"] == answer["stretto"]["variant"]


async def variants(client: httpx.AsyncClient, count: int = 30, headers: dict[str, str] = ANN) -> Counter[str]:
    answers = [await ask(client, headers) for _ in range(count)]
    return Counter(answer["stretto"]["variant"] for answer in answers)


async def test_votes_move_the_choices_of_their_tenant_and_no_other(client: httpx.AsyncClient) -> None:
    assert await variants(client, 5) == {"m:full": 5}
    await vote(client, 40)
    assert (await variants(client))["m:full"] <= 3
    assert await variants(client, headers=BOB) == {"m:full": 30}
    summary = (await client.get(URL)).json()["models"]["m"]
    assert summary["m:full"]["mean_reward"] == 0.0
    assert summary["m:full"]["mean_expected"] == pytest.approx(0.95)


def learnt(metrics: str) -> dict[str, float]:
    """The correction of each variant in an exposition."""
    found = re.findall(
        r'^stretto_learnt_correction\{model="m",variant="(.+)"\} (\S+)$', metrics, re.MULTILINE
    )
    return {variant: float(value) for variant, value in found}


async def test_what_votes_have_taught_is_shown_and_gone_with_them(client: httpx.AsyncClient) -> None:
    names = {f"m:{name}" for name in NAMES}
    assert learnt((await client.get("/metrics")).text) == dict.fromkeys(names, 0.0)
    await vote(client, 40)
    full = (await client.get(URL)).json()["models"]["m"]["m:full"]
    assert -1.0 <= full["correction_low"] <= full["correction"] < -0.1
    exposed = learnt((await client.get("/metrics")).text)
    assert exposed.keys() == names
    assert exposed["m:full"] == pytest.approx(full["correction"]), "one tenant alone is the mean"
    assert (await client.get(URL, headers=BOB)).json()["models"] == {}
    await client.delete(URL)
    assert learnt((await client.get("/metrics")).text) == dict.fromkeys(names, 0.0)


async def test_what_is_erased_no_longer_moves_a_choice(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner, "REBUILD_S", 0.0)
    await vote(client, 40)
    await client.delete(URL)
    assert await variants(client, 10) == {"m:full": 10}


async def test_a_floor_is_no_matter_of_votes(client: httpx.AsyncClient) -> None:
    await vote(client, 40, BOB)
    floor = {"min_quality": 0.8}
    answers = [await ask(client, BOB, objective=floor) for _ in range(30)]
    assert {answer["stretto"]["variant"] for answer in answers} == {"m:int8"}, "small is not sure of 0.8"


async def test_a_reward_is_for_the_variant_that_answered(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [
        TokenEvent(0, 65, began=Began(1.0, 0, moved=Moved("m:small", 0, "moved"))),
        66,
    ]
    answer = await ask(client)
    assert answer["stretto"]["variant"] == "m:small"
    receipt = await client.post(URL, json={"request_id": answer["id"], "thumbs": "up"})
    assert receipt.json()["variant"] == "m:small" and receipt.json()["learnt"] is True


async def test_a_named_variant_takes_feedback_and_teaches_nothing(client: httpx.AsyncClient) -> None:
    answer = await ask(client, model="m:int8")
    receipt = (await client.post(URL, json={"request_id": answer["id"], "thumbs": "down"})).json()
    assert (receipt["model"], receipt["variant"], receipt["learnt"]) == ("m:int8", "m:int8", False)


async def test_a_tenant_sees_what_other_choices_would_have_been_worth(client: httpx.AsyncClient) -> None:
    assert (await client.get(f"{URL}/policies")).json()["models"] == {}
    await vote(client, 12)
    found = (await client.get(f"{URL}/policies")).json()["models"]["m"]
    assert [each["policy"] for each in found] == [
        "always m:full",
        "always m:int8",
        "always m:small",
        "best estimate",
    ]
    assert all(each["refused"] for each in found), "twelve rewards are too few"
    assert (await client.get(f"{URL}/policies", headers=BOB)).json()["models"] == {}
