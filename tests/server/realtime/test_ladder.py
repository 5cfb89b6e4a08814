"""A session on the name of a ladder: the variant that has read the text answers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stretto.config import ServeConfig
from stretto.engine.step_time import StepCost
from stretto.ladder.registry import QualityInterval
from stretto.server.app import App
from stretto.text.tokenizer import TextModel
from stretto.types import Began, Finish, Reason, Request, TokenEvent
from tests.ladder.tiny_ladder import variant
from tests.server.fake_engine import FakeEngine, info
from tests.server.realtime.conftest import Talk, answers, reads
from tests.server.realtime.test_typing import WORDS
from tests.server.variants.snapshots import outlook
from tests.server.variants.test_placement import build

NAMES = ("full", "int8")
CHEAP = StepCost(0.01, 0.001, 0.001)
SLOW = StepCost(60_000.0, 0.001, 0.001)
BETTER = QualityInterval(0.97, 0.92, 1.0, 500)  # than the top, perhaps: its interval is 0.9 to 1
SURE = QualityInterval(0.99, 0.97, 1.0, 500)


@pytest.fixture
def engine(text: TextModel) -> FakeEngine:
    """An engine whose models keep what they have read, each its own."""
    vocab = text.tokenizer.get_vocab_size()
    engine = FakeEngine(lambda request: [], {f"m:{name}": info(f"m:{name}", vocab=vocab) for name in NAMES})
    engine.outlooks = {name: outlook(CHEAP) for name in engine.models}

    def script(request: Request) -> list[Any]:
        kept = [read.prompt for read in reads(engine) if read.model == request.model and read is not request]
        cached = max((len(ids) for ids in kept if request.prompt[: len(ids)] == ids), default=0)
        if request.spare_time:
            end = Finish(Reason.LENGTH, len(request.prompt), 0, cached, 0.1)
            return [TokenEvent(request.id, finish=end)]
        return [TokenEvent(request.id, 65, began=Began(0.1, cached)), 66]

    engine.script = script
    return engine


@pytest.fixture
def quality() -> QualityInterval:
    """That of the variant below the top."""
    return BETTER


@pytest.fixture
def app(engine: FakeEngine, checkpoint: Path, config: ServeConfig, quality: QualityInterval) -> App:
    return build(engine, checkpoint, config, variant("full"), variant("int8", quality=quality))


async def answered(talk: Talk, engine: FakeEngine) -> tuple[dict[str, Any], Request]:
    """Types a message, waits until it is read, and sends it; returns the response and its request."""
    await talk.type(WORDS)
    await talk.until("input_text.read")
    await talk.send("input_text.commit")
    response = await talk.answer()
    assert response["status"] == "completed", response
    return response, answers(engine)[-1]


async def test_the_best_variant_answers_when_nothing_is_read(engine: FakeEngine, talk: Talk) -> None:
    await talk.say("Hello")
    await talk.send("response.create")
    assert (await talk.answer())["stretto"]["variant"] == "m:int8" and not reads(engine)


async def typed(talk: Talk, engine: FakeEngine, *, late: str) -> None:
    """Types a message and waits until it is read, while one variant would be late."""
    engine.outlooks[late] = outlook(SLOW)
    await talk.type(WORDS)
    await talk.until("input_text.read")
    engine.outlooks[late] = outlook(CHEAP)


async def sent(talk: Talk, engine: FakeEngine) -> tuple[dict[str, Any], Request]:
    """Sends the message; returns the response and its request."""
    await talk.send("input_text.commit")
    response = await talk.answer()
    assert response["status"] == "completed", response
    return response, answers(engine)[-1]


async def test_the_variant_that_would_be_chosen_reads_and_answers(engine: FakeEngine, talk: Talk) -> None:
    for _ in range(2):
        response, request = await answered(talk, engine)
        assert {read.model for read in reads(engine)} == {"m:int8"}
        assert request.model == response["stretto"]["variant"] == "m:int8"
        assert response["stretto"]["variant_reason"] == "best"
        read = len(reads(engine)[-1].prompt)
        assert request.cached == read > 0
        assert response["usage"]["input_token_details"]["cached_tokens"] == read


async def test_what_one_has_read_is_cached_although_another_would_be_chosen(
    engine: FakeEngine, talk: Talk
) -> None:
    await typed(talk, engine, late="m:int8")
    response, request = await sent(talk, engine)
    assert reads(engine)[-1].model == request.model == response["stretto"]["variant"] == "m:full"
    assert response["stretto"]["variant_reason"] == "read_ahead"
    assert request.cached == len(reads(engine)[-1].prompt) > 0


@pytest.mark.parametrize("quality", [SURE])
async def test_a_variant_that_is_sure_to_be_better_answers_and_reads_from_then_on(
    engine: FakeEngine, talk: Talk
) -> None:
    await typed(talk, engine, late="m:int8")
    response, request = await sent(talk, engine)
    assert (reads(engine)[-1].model, request.model, request.cached) == ("m:full", "m:int8", 0)
    assert response["stretto"]["variant_reason"] == "best"
    response, request = await answered(talk, engine)
    assert reads(engine)[-1].model == request.model == "m:int8" and request.cached > 0


async def test_a_floor_goes_before_what_is_read(engine: FakeEngine, talk: Talk) -> None:
    await typed(talk, engine, late="m:int8")
    options = {"type": "realtime", "objective": {"min_quality": 0.91}}
    await talk.send("session.update", session=options)
    response, request = await sent(talk, engine)
    assert (reads(engine)[-1].model, request.model, request.cached) == ("m:full", "m:int8", 0)
    assert response["stretto"]["variant_reason"] == "best"


async def test_a_late_reader_does_not_answer(engine: FakeEngine, talk: Talk) -> None:
    await typed(talk, engine, late="m:int8")
    engine.outlooks["m:full"] = outlook(SLOW)
    response, request = await sent(talk, engine)
    assert (reads(engine)[-1].model, request.model) == ("m:full", "m:int8")
    assert response["stretto"]["variant_reason"] == "best"


async def test_the_choice_is_made_again_while_one_types_on(engine: FakeEngine, talk: Talk) -> None:
    await typed(talk, engine, late="m:int8")
    engine.outlooks["m:full"] = outlook(SLOW)
    _, request = await answered(talk, engine)
    assert [reads(engine)[0].model, reads(engine)[-1].model] == ["m:full", "m:int8"]
    assert request.model == "m:int8" and request.cached == len(reads(engine)[-1].prompt)


async def test_without_a_forecast_the_best_one_reads_and_answers(engine: FakeEngine, talk: Talk) -> None:
    engine.outlooks = {}
    response, request = await answered(talk, engine)
    assert request.model == reads(engine)[-1].model == "m:int8" and request.cached > 0
    assert response["stretto"]["variant_reason"] == "no_forecast"


async def test_each_response_of_a_session_takes_its_own_reward(talk: Talk, client: Any) -> None:
    ids: list[str] = []
    for text in ("Hello", "Again"):
        await talk.say(text)
        await talk.send("response.create")
        ids.append((await talk.answer())["id"])
    for id, reward in zip(ids, (0.0, 1.0), strict=True):
        receipt = await client.post("/v1/feedback", json={"request_id": id, "reward": reward})
        assert receipt.status_code == 200, receipt.text
    summary = (await client.get("/v1/feedback")).json()
    assert summary["waiting"] == 0
    assert summary["models"]["m"]["m:int8"]["rewards"] == 2
