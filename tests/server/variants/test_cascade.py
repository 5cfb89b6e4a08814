"""A cascade on a ladder: when a small variant begins an answer, what the answer says, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs

from stretto.config import TIERS, ModelConfig, ServeConfig
from stretto.engine.scheduler.admission import Outlook
from stretto.ladder.registry import MeasuredCascade, QualityInterval
from stretto.ladder.serving import ServedLadder
from stretto.server.app import App
from stretto.server.variants.router import VariantRouter
from stretto.text.tokenizer import TextModel
from stretto.types import Began, Cascade, Moved, Objective, TokenEvent
from tests.ladder.tiny_ladder import ladder_of, variant
from tests.server.conftest import CHAT, HELLO, ids_of
from tests.server.fake_engine import FakeEngine, info
from tests.server.feedback.test_routes import URL
from tests.server.variants.snapshots import FULL, SMALL, outlook
from tests.server.variants.test_placement import build
from tests.server.variants.test_router import NOW, asked, learner

ALONE = QualityInterval(0.95, 0.9, 1.0, 500)
MEASURED = MeasuredCascade(
    begins="small", below=-0.2, quality=ALONE, loss=0.01, escalated=0.4, begun=0.5, bins=()
)
LADDER = variant("full", cascade=MEASURED), variant("small")


def router(outlooks: dict[str, Outlook] | None = None) -> VariantRouter:
    models = {each.name: ModelConfig(name=f"m:{each.name}", path=each.name) for each in LADDER}
    served = ServedLadder("m", Path(), ladder_of(*LADDER), models)
    infos = {model.name: info(model.name, vocab=99) for model in models.values()}
    idle = {"m:full": outlook(FULL), "m:small": outlook(SMALL)}
    return VariantRouter(served, TIERS, lambda: outlooks or idle, lambda: infos, learner())


def test_a_small_variant_begins_and_the_better_one_may_go_on() -> None:
    placed = router().place(asked(cascade=True), NOW)
    assert (placed.model, placed.reason) == ("m:small", "cascade")
    assert placed.cascade == Cascade("m:full", -0.2)
    assert placed.made is not None and placed.made.variants == (), "its answers are not like others"
    alone = router().place(asked(), NOW)
    assert (alone.model, alone.cascade) == ("m:full", None)
    assert router().place(asked(cascade=True, prefer="latency"), NOW).cascade is None


@pytest.mark.parametrize(
    ("total_ms", "model", "reason"),
    [
        (290, "m:small", "cascade"),  # one after the other
        (280, "m:full", "best"),  # one that takes over at the first token would be late
        (200, "m:small", "deadline"),
    ],
)
def test_the_better_one_must_have_time_whenever_it_takes_over(
    total_ms: float, model: str, reason: str
) -> None:
    placed = router().place(asked(cascade=True, objective=Objective(total_ms=total_ms)), NOW)
    assert (placed.model, placed.reason) == (model, reason)


def test_what_a_cascade_loses_counts_against_a_floor() -> None:
    for floor, reason in ((0.88, "cascade"), (0.895, "best")):
        objective = Objective(ttft_ms=5000, min_quality=floor)
        assert router().place(asked(cascade=True, objective=objective), NOW).reason == reason


@pytest.fixture
def engine(text: TextModel) -> FakeEngine:
    ids = ids_of(text, "Hello, world!")
    vocab = text.tokenizer.get_vocab_size()
    engine = FakeEngine(
        lambda request: list(ids), {f"m:{n}": info(f"m:{n}", vocab=vocab) for n in ("full", "small")}
    )
    engine.outlooks = {"m:full": outlook(FULL), "m:small": outlook(SMALL)}
    return engine


@pytest.fixture
def application(engine: FakeEngine, checkpoint: Path, config: ServeConfig) -> App:
    keys = {"key-1": "ann", "key-2": "bob"}
    config = structs.replace(config, api_keys=keys, cascade=("bob",))
    return build(engine, checkpoint, config, *LADDER)


@pytest.fixture
async def client(application: App) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"content-type": "application/json", "x-api-key": "key-1"}
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as made:
        yield made


async def ask(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return (await client.post(CHAT, json=HELLO | body, headers=headers)).json()


async def test_requests_and_tenants_ask_for_it(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    usual, wanted = await ask(client), await ask(client, objective={"cascade": True})
    assert usual["stretto"]["variant_reason"] == "best"
    assert (wanted["stretto"]["variant"], wanted["stretto"]["variant_reason"]) == ("m:small", "cascade")
    assert engine.requests[-1].cascade == Cascade("m:full", -0.2)
    bob = {"x-api-key": "key-2"}
    assert (await ask(client, bob))["stretto"]["variant_reason"] == "cascade"
    assert (await ask(client, bob, objective={"cascade": False}))["stretto"]["variant_reason"] == "best"


async def test_the_answer_says_who_wrote_what_and_why(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    moved = Moved("m:full", 1, "unsure")
    engine.script = lambda request: [
        TokenEvent(0, 65, began=Began(1.0, 0)),
        TokenEvent(0, 66, began=Began(1.0, 0, moved=moved)),
        67,
    ]
    answer = await ask(client, objective={"cascade": True})
    report = answer["stretto"]
    assert (report["variant"], report["variant_reason"]) == ("m:full", "unsure")
    assert report["parts"] == [
        {"variant": "m:small", "tokens": 1, "reason": "cascade"},
        {"variant": "m:full", "tokens": 2, "reason": "unsure"},
    ]
    receipt = (await client.post(URL, json={"request_id": answer["id"], "thumbs": "up"})).json()
    assert (receipt["variant"], receipt["learnt"]) == ("m:full", False)


@pytest.mark.parametrize(
    "body",
    [{"model": "m:full"}, {"objective": {"cascade": True, "prefer": "latency"}}],
)
async def test_where_there_is_no_cascade_it_is_refused_by_name(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    refused = await ask(client, None, **{"objective": {"cascade": True}, **body})
    assert refused["error"]["code"] == "unsupported_field"
    assert refused["error"]["param"] == "$.objective.cascade"


async def test_a_ladder_without_a_measured_cascade_refuses_it(
    engine: FakeEngine, checkpoint: Path, config: ServeConfig
) -> None:
    made = build(engine, checkpoint, config, variant("full"), variant("small"))
    transport = httpx.ASGITransport(made)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        refused = await ask(client, objective={"cascade": True})
    assert refused["error"]["param"] == "$.objective.cascade"
