"""A ladder over HTTP: which model the engine gets, what the answer says, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from msgspec import structs

from stretto.config import ModelConfig, ServeConfig
from stretto.engine.client import EngineClient
from stretto.engine.step_time import StepCost
from stretto.errors import StartError
from stretto.ladder.registry import Variant
from stretto.ladder.serving import ServedLadder
from stretto.protocol.relay import RELAY, VARIANT_MARK, variant_mark
from stretto.server import app
from stretto.server.app import App
from stretto.text.tokenizer import TextModel
from stretto.types import Began, Moved, Objective, TokenEvent
from tests.ladder.tiny_ladder import ladder_of, variant
from tests.server.conftest import CHAT, HELLO, ids_of
from tests.server.fake_engine import FakeEngine, info
from tests.server.sse import events
from tests.server.variants.snapshots import outlook

# The prompts here have about 20 tokens, so they take seconds: longer than a busy machine delays a test.
COSTS = {
    "full": StepCost(1.0, 0.1, 400.0),
    "int8": StepCost(1.0, 0.1, 150.0),
    "small": StepCost(0.5, 0.05, 20.0),
}


def build(engine: FakeEngine, checkpoint: Path, config: ServeConfig, *variants: Variant) -> App:
    models = {each.name: ModelConfig(name=f"m:{each.name}", path=str(checkpoint)) for each in variants}
    ladder = ServedLadder("m", checkpoint, ladder_of(*variants), models)
    paths = {model.name: checkpoint for model in models.values()}
    return app.build(config, cast(EngineClient, engine), paths, None, [ladder])


@pytest.fixture
def engine(text: TextModel) -> FakeEngine:
    ids = ids_of(text, "Hello, world!")
    vocab = text.tokenizer.get_vocab_size()
    infos = {f"m:{name}": info(f"m:{name}", vocab=vocab) for name in COSTS}
    engine = FakeEngine(lambda request: list(ids), infos)
    engine.outlooks = {f"m:{name}": outlook(cost) for name, cost in COSTS.items()}
    return engine


@pytest.fixture
def application(engine: FakeEngine, checkpoint: Path, config: ServeConfig) -> App:
    config = structs.replace(
        config,
        api_keys={"secret-of-alice": "alice", "secret-of-bob": "bob"},
        tenants_prefer={"bob": "latency"},
        gateway_key="secret-of-the-gateway",
    )
    return build(engine, checkpoint, config, *map(variant, COSTS))


@pytest.fixture
async def client(application: App) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"content-type": "application/json", "authorization": "Bearer secret-of-alice"}
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as made:
        yield made


async def ask(client: httpx.AsyncClient, **body: Any) -> Any:
    return (await client.post(CHAT, json=HELLO | body)).json()


async def test_the_ladder_is_one_model_and_each_variant_another(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["m", "m:full", "m:int8", "m:small"]
    assert (await client.get("/v1/models/m:int8")).json()["id"] == "m:int8"


async def test_a_ladder_lists_its_variants_with_quality_and_step_time(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = (await client.get("/v1/models/m")).json()["variants"]
    assert [each["step_ms"] for each in starting] == [None] * 3, "nothing is known yet"
    seen = {name: each.seen for name, each in engine.outlooks.items()}
    monkeypatch.setattr(engine, "snapshots", lambda: seen)
    first, *others = (await client.get("/v1/models/m")).json()["variants"]
    low, high = pytest.approx(0.9), pytest.approx(1.0)
    assert first == {
        "id": "m:full",
        "quality": 0.95,
        "quality_low": low,
        "quality_high": high,
        "step_ms": pytest.approx(1.1),
    }
    assert [each["id"] for each in others] == ["m:int8", "m:small"]
    assert others[1]["step_ms"] == pytest.approx(0.55)
    assert (await client.get("/v1/models/m:int8")).json()["variants"] is None


async def test_the_answer_says_which_variant_spoke_and_why(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    answer = await ask(client)
    assert engine.requests[0].model == "m:full" and engine.requests[0].lighter == ("m:int8", "m:small")
    assert answer["model"] == "m"
    assert (answer["stretto"]["variant"], answer["stretto"]["variant_reason"]) == ("m:full", "best")
    streamed = await client.post(CHAT, json=HELLO | {"stream": True, "objective": {"ttft_ms": 1500}})
    last = [chunk for chunk in events(streamed.text) if "stretto" in chunk][-1]
    assert (last["stretto"]["variant"], last["stretto"]["variant_reason"]) == (
        engine.requests[1].model,
        "deadline",
    )
    assert engine.requests[1].model != "m:full" and last["model"] == "m"


async def test_a_variant_may_be_named_and_then_nothing_is_chosen(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    answer = await ask(client, model="m:int8", objective={"ttft_ms": 1})
    assert engine.requests[0].model == "m:int8" and engine.requests[0].lighter == ()
    assert answer["model"] == "m:int8"
    assert answer["stretto"]["variant"] == "m:int8" and "variant_reason" not in answer["stretto"]


async def relayed(client: httpx.AsyncClient, request: dict[str, Any], answers: list[Any] | None) -> bytes:
    continuation = None if answers is None else {"id": "c", "created": 1, "answers": answers}
    body = {"operation": "chat", "tenant": "alice", "request": HELLO | request | {"stream": True}}
    headers = {"authorization": "Bearer secret-of-the-gateway"}
    sent = body | {"continuation": continuation, "age_ms": 5000.0}
    answer = await client.post(RELAY, json=sent, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.content


async def test_the_variant_that_began_an_answer_goes_on_with_it_elsewhere(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    whole = await relayed(client, {}, None)
    assert whole.count(variant_mark(0, "m:full")) == 1
    assert VARIANT_MARK not in await relayed(client, {"model": "m:int8"}, None)
    # The first token was due long ago, and another variant would be chosen now.
    late = {"objective": {"ttft_ms": 1, "on_miss": "reject"}, "n": 2}
    for variants, expected in (
        (("m:int8", "m:int8"), ["m:int8", "m:int8"]),
        (("m:full", "m:int8"), ["m:full", "m:int8"]),
        (("m:gone", "m:gone"), ["m:small", "m:small"]),  # not served here: another one, rather than none
    ):
        engine.requests.clear()
        answers = [[[7], False, False, 1.0, 1.0, variant] for variant in variants]
        await relayed(client, late, answers)
        assert [request.model for request in engine.requests] == expected
        assert {(request.lighter, request.emitted) for request in engine.requests} == {((), (7,))}
        assert {request.objective.on_miss for request in engine.requests} == {"late"}


async def test_all_answers_of_a_request_come_from_one_variant(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client, n=3)
    assert {request.model for request in engine.requests} == {"m:full"}


async def test_min_quality_is_a_floor_and_on_miss_says_what_gives_way(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    tight = {"ttft_ms": 1500, "min_quality": 0.8}
    assert (await ask(client, objective=tight))["stretto"]["variant_reason"] == "below_floor"
    assert (await ask(client, objective=tight | {"on_miss": "late"}))["stretto"]["variant"] == "m:int8"
    refused = await ask(client, objective=tight | {"on_miss": "reject"})
    assert refused["error"]["code"] == "cannot_be_on_time"
    high = await ask(client, objective={"min_quality": 0.99, "on_miss": "reject"})
    assert high["error"]["code"] == "quality_out_of_reach"
    assert high["error"]["param"] == "$.objective.min_quality"
    assert "0.9 is the most that a variant of this model is sure to reach" in high["error"]["message"]
    named = await ask(client, model="m:small", objective={"min_quality": 0.8, "on_miss": "reject"})
    assert named["error"]["code"] == "quality_out_of_reach"
    assert [request.model for request in engine.requests] == ["m:small", "m:int8"]
    assert engine.requests[0].objective == Objective(ttft_ms=1500, min_quality=0.8)


async def test_the_preference_comes_from_the_request_the_tenant_or_the_server(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(client, objective={"prefer": "energy"})
    client.headers["authorization"] = "Bearer secret-of-bob"
    await ask(client)
    await ask(client, objective={"prefer": "quality"})
    assert [request.model for request in engine.requests] == ["m:small", "m:small", "m:full"]


@pytest.mark.parametrize("value", [-0.1, 1.1, "high", True])
async def test_a_floor_out_of_range_is_named(client: httpx.AsyncClient, value: object) -> None:
    refused = await ask(client, objective={"min_quality": value})
    assert refused["error"]["param"] == "$.objective.min_quality"


async def test_an_unknown_preference_is_named(client: httpx.AsyncClient) -> None:
    refused = await ask(client, objective={"prefer": "speed"})
    assert refused["error"]["param"] == "$.objective.prefer"


async def test_energy_that_was_not_measured_cannot_be_preferred(
    engine: FakeEngine, checkpoint: Path, config: ServeConfig
) -> None:
    made = build(engine, checkpoint, config, variant("full"), variant("small", energy=None))
    transport = httpx.ASGITransport(made)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        refused = await ask(client, objective={"prefer": "energy"})
    assert refused["error"]["code"] == "unsupported_field"
    assert refused["error"]["param"] == "$.objective.prefer"


async def test_an_answer_that_moved_says_so(
    client: httpx.AsyncClient, application: App, engine: FakeEngine
) -> None:
    engine.script = lambda request: [
        TokenEvent(0, 65, began=Began(1.0, 0, moved=Moved("m:small", 0, "moved"))),
        66,
    ]
    answer = await ask(client)
    assert (answer["stretto"]["variant"], answer["stretto"]["variant_reason"]) == ("m:small", "moved")
    counted = application.server.metrics.text().decode()
    assert 'stretto_variant_answers_total{model="m",reason="moved",variant="m:small"} 1.0' in counted


async def test_an_answer_that_moved_between_tokens_says_who_wrote_what(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = lambda request: [
        TokenEvent(0, 65, began=Began(1.0, 0)),
        66,
        TokenEvent(0, 67, began=Began(1.0, 0, moved=Moved("m:small", 2, "moved"))),
    ]
    report = (await ask(client))["stretto"]
    assert (report["variant"], report["variant_reason"], report["queue_ms"]) == ("m:small", "moved", 1.0)
    assert report["parts"] == [
        {"variant": "m:full", "tokens": 2, "reason": "best"},
        {"variant": "m:small", "tokens": 1, "reason": "moved"},
    ]
    engine.script = lambda request: [65, 66]
    assert "parts" not in (await ask(client))["stretto"]


async def test_metrics_count_answers_by_variant_and_reason(
    client: httpx.AsyncClient, application: App
) -> None:
    await ask(client)
    await ask(client)
    await ask(client, objective={"prefer": "latency"})
    await ask(client, model="m:small")
    counted = application.server.metrics.text().decode()
    assert 'stretto_variant_answers_total{model="m",reason="best",variant="m:full"} 2.0' in counted
    assert 'stretto_variant_answers_total{model="m",reason="best",variant="m:small"} 1.0' in counted
    assert counted.count("stretto_variant_answers_total{") == 2, "a named variant was not chosen"


async def test_the_lengths_of_answers_are_learnt_by_tenant(
    client: httpx.AsyncClient, application: App, engine: FakeEngine
) -> None:
    router = application.server.router("m")
    assert router is not None and router.lengths.expect("alice").long == 8, "the ladder's own"
    engine.script = lambda request: [65] * 30
    for _ in range(10):
        await ask(client)
    assert router.lengths.expect("alice").long == 30


async def test_a_single_model_has_no_floor_and_no_reason(
    engine: FakeEngine, checkpoint: Path, config: ServeConfig
) -> None:
    made = app.build(config, cast(EngineClient, engine), {"single": checkpoint})
    engine.models["single"] = structs.replace(engine.models["m:full"], name="single")
    transport = httpx.ASGITransport(made)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        refused = await ask(client, objective={"min_quality": 0.5})
        answer = await ask(client, objective={"prefer": "latency"})
    assert refused["error"]["param"] == "$.objective.min_quality"
    assert "the quality of single was not measured" in refused["error"]["message"]
    assert "variant_reason" not in answer["stretto"] and answer["stretto"]["variant"] == "single"


def test_a_tier_with_a_floor_needs_ladders_only(
    engine: FakeEngine, checkpoint: Path, config: ServeConfig
) -> None:
    config = structs.replace(config, tiers={"priority": Objective(min_quality=0.5)})
    with pytest.raises(StartError, match=r"tiers\.priority: min_quality needs a ladder, and single"):
        app.build(config, cast(EngineClient, engine), {"single": checkpoint})
    build(engine, checkpoint, config, variant("full"))
