"""The energy that an answer reports: by the variants that wrote it, and unknown where one of them is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import msgpack

from stretto.config import ServeConfig
from stretto.engine.step_time import StepCost
from stretto.ladder.registry import TokenEnergy, Variant
from stretto.protocol.relay import RELAY, TOOK, Took, WorkerReport
from stretto.server.app import App
from stretto.text.tokenizer import TextModel
from stretto.types import Began, Moved, TokenEvent
from tests.ladder.tiny_ladder import variant
from tests.server.conftest import CHAT, HELLO
from tests.server.fake_engine import FakeEngine, info
from tests.server.variants.snapshots import outlook
from tests.server.variants.test_placement import build

COST = StepCost(base=3.0, per_decode=1.0, per_prefill=0.5)  # a prompt's token takes an eighth of a step
ESTIMATE, MEASURED = "estimate: for tests", "measured: for tests"


def of(name: str, joules: float, source: str = ESTIMATE) -> Variant:
    return variant(name, energy=TokenEnergy(joules, source), times={"here": COST})


@pytest.fixture
def engine(text: TextModel) -> FakeEngine:
    infos = {f"m:{name}": info(f"m:{name}", vocab=600) for name in ("full", "int8", "small")}
    made = FakeEngine(lambda request: [TokenEvent(0, 65, began=Began(1.0, 4)), 66, 67], infos)
    made.outlooks = {name: outlook(StepCost(0.01, 0.001, 0.001)) for name in infos}
    return made


@pytest.fixture
def application(engine: FakeEngine, checkpoint: Path, config: ServeConfig) -> App:
    variants = of("full", 0.8), of("int8", 0.4), variant("small", energy=None)
    return build(engine, checkpoint, config, *variants)


@pytest.fixture
async def client(application: App) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application)
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as made:
        yield made


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post(CHAT, json=HELLO | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_answer_takes_its_tokens_and_those_of_the_prompt_that_were_not_cached(
    client: httpx.AsyncClient,
) -> None:
    answer = await ask(client)
    read = answer["usage"]["prompt_tokens"] - 4
    assert read > 0 and answer["usage"]["completion_tokens"] == 3
    assert answer["stretto"]["energy_j"] == pytest.approx(0.1 * read + 0.8 * 3)
    assert answer["stretto"]["energy_source"] == ESTIMATE
    streamed = await client.post(CHAT, json=HELLO | {"stream": True})
    last = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")][-1]
    assert last["stretto"]["energy_j"] == answer["stretto"]["energy_j"]
    lighter = await ask(client, model="m:int8")
    assert lighter["stretto"]["energy_j"] == pytest.approx(answer["stretto"]["energy_j"] / 2)
    several = await ask(client, n=2)
    assert several["stretto"]["energy_j"] == pytest.approx(2 * answer["stretto"]["energy_j"])


async def test_a_variant_that_goes_on_reads_all_that_is_there(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    moved = Began(1.0, 0, moved=Moved("m:int8", 1, "moved"))
    engine.script = lambda request: [
        TokenEvent(0, 65, began=Began(1.0, 0)),
        TokenEvent(0, 66, began=moved),
        67,
    ]
    answer = await ask(client)
    prompt = answer["usage"]["prompt_tokens"]
    assert [part["tokens"] for part in answer["stretto"]["parts"]] == [1, 2]
    whole = 0.1 * prompt + 0.8 + 0.05 * (prompt + 1) + 0.4 * 2
    assert answer["stretto"]["energy_j"] == pytest.approx(whole)


async def test_one_that_moved_before_its_first_token_took_nothing_there(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    moved = Began(1.0, 0, moved=Moved("m:int8", 0, "moved"))
    engine.script = lambda request: [TokenEvent(0, 65, began=moved), 66]
    answer = await ask(client)
    expected = 0.05 * answer["usage"]["prompt_tokens"] + 0.4 * 2
    assert answer["stretto"]["energy_j"] == pytest.approx(expected)


async def test_an_unknown_energy_is_null(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    report = (await ask(client, model="m:small"))["stretto"]
    assert report["energy_j"] is report["energy_source"] is None
    moved = Began(1.0, 0, moved=Moved("m:small", 1, "moved"))
    engine.script = lambda request: [TokenEvent(0, 65, began=Began(1.0, 0)), TokenEvent(0, 66, began=moved)]
    report = (await ask(client))["stretto"]
    assert report["variant"] == "m:small" and report["energy_j"] is report["energy_source"] is None


async def test_an_estimate_of_one_part_makes_the_whole_one(
    engine: FakeEngine, checkpoint: Path, config: ServeConfig
) -> None:
    made = build(engine, checkpoint, config, of("full", 0.8, MEASURED), of("int8", 0.4))
    moved = Began(1.0, 0, moved=Moved("m:int8", 1, "moved"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="http://localhost") as client:
        assert (await ask(client))["stretto"]["energy_source"] == MEASURED
        engine.script = lambda request: [TokenEvent(0, 65), TokenEvent(0, 66, began=moved)]
        assert (await ask(client))["stretto"]["energy_source"] == ESTIMATE


async def test_a_gateway_is_told_what_an_answer_took(client: httpx.AsyncClient) -> None:
    body = HELLO | {"model": "m"}
    relayed = {"operation": "chat", "tenant": "ann", "request": body}
    answer = await client.post(RELAY, json=relayed)
    took = Took.of(answer.headers[TOOK])
    assert took.joules == pytest.approx(answer.json()["stretto"]["energy_j"]) and took.output == 3
    streamed = await client.post(RELAY, json=relayed | {"request": body | {"stream": True}})
    assert f":~$ {took}\n" in streamed.text
    silent = relayed | {"request": body | {"model": "m:small"}}
    assert Took.of((await client.post(RELAY, json=silent)).headers[TOOK]).joules is None
    report = msgpack.decode((await client.get(RELAY)).content, type=WorkerReport)
    assert report.joules == {"m": 0.8, "m:full": 0.8, "m:int8": 0.4}


@pytest.mark.parametrize("text", ["1 2", "1 2 3 4 5", "1 2 3 nan", "1 2 3 -1", "1 2 3 inf", "1 2 3 x"])
def test_a_wrong_account_of_an_answer_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Took.of(text)
