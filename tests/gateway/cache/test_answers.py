"""The caches of a gateway on real sockets, in front of workers with fake engines."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from msgspec import structs
from tokenizers import Tokenizer

from stretto.errors import EngineDied, Unavailable
from stretto.gateway.app import Gateway
from stretto.gateway.cache.answers import Answers
from stretto.gateway.cache.policy import CachePolicy
from stretto.gateway.exchange import RelayedExchange
from stretto.gateway.relay import Relay
from stretto.gateway.routing.fields import read_fields
from stretto.gateway.settings import GatewayConfig
from stretto.types import Finish, Reason, Request, TokenEvent
from tests.gateway.cluster import ASK, CHAT, cluster, fake, text_of
from tests.server.fake_engine import FakeEngine, info

FIXED: dict[str, Any] = ASK | {"temperature": 0}
WHOLE: dict[str, Any] = FIXED | {"stream": False}
ON = {"caches": {"local": CachePolicy()}}
TWO = {"gateway_key": "secret", "api_keys": {"k-ann": "ann", "k-bob": "bob"}}
ANN, BOB = ({"Authorization": f"Bearer k-{name}"} for name in ("ann", "bob"))
OPERATOR = {"Authorization": "Bearer secret"}


def cached(answer: httpx.Response) -> str | None:
    """What the answer says of the cache, in its header and in its body."""
    assert answer.status_code == 200, answer.text
    texts = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(text) for text in texts] if texts else [answer.json()]
    said = {chunk["stretto"].get("cached") for chunk in chunks if "stretto" in chunk} or {None}
    assert said == {answer.headers.get("x-stretto-cached")}
    return said.pop()


async def settled(gateway: Gateway) -> None:
    """Returns when no answer is in flight. An answer is kept just after its last byte."""
    while gateway.answers._flights:
        await asyncio.sleep(0.005)


async def test_nothing_is_kept_until_the_tenant_has_a_policy(checkpoint: Path):
    engine = fake(10, 11)
    async with cluster(checkpoint, engine) as (client, gateway):
        for _ in range(2):
            assert cached(await client.post(CHAT, json=FIXED)) is None
        assert len(engine.requests) == 2 and gateway.answers.stats.report().kept == 0
        assert cached(await client.post(CHAT, json=FIXED | {"cache": {"mode": "use"}})) is None


def spoken(checkpoint: Path, text: str) -> FakeEngine:
    """An engine that always answers with this text."""
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return FakeEngine(lambda request: list(ids)[len(request.emitted) :], {"tiny": info(vocab=4096)})


async def asked_twice(client: httpx.AsyncClient, gateway: Gateway, body: dict[str, Any]) -> list[Any]:
    """The choices of two equal requests; the second is answered from the cache."""
    answers: list[Any] = []
    for kind in (None, "exact"):
        answer = await client.post(CHAT, json=body)
        assert cached(answer) == kind
        answers.append(answer.json()["choices"])
        await settled(gateway)
    return answers


@pytest.mark.parametrize("first", [WHOLE, FIXED | {"stream_options": {"include_usage": True}}])
async def test_an_equal_request_gets_the_kept_answer_in_any_form(checkpoint: Path, first: dict[str, Any]):
    engine = fake(10, 11, 12)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        assert cached(await client.post(CHAT, json=first)) is None
        await settled(gateway)
        whole, streamed = [await client.post(CHAT, json=body) for body in (WHOLE, FIXED)]
        assert (cached(whole), cached(streamed)) == ("exact", "exact")
        assert text_of(streamed) == whole.json()["choices"][0]["message"]["content"]
        assert whole.headers["content-type"] == "application/json"
        assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert whole.json()["id"] == f"chatcmpl-{whole.headers['x-request-id']}"
        assert whole.json()["usage"]["completion_tokens"] == 3
        assert len(engine.requests) == 1 and gateway.answers.stats.hits["exact"] == 2


async def test_a_stream_that_told_no_usage_is_asked_again_for_one(checkpoint: Path):
    engine = fake(10, 11)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        for body, kind in ((FIXED, None), (FIXED, "exact"), (WHOLE, None), (WHOLE, "exact")):
            assert cached(await client.post(CHAT, json=body)) == kind
            await settled(gateway)
        assert len(engine.requests) == 2


async def test_an_answer_with_tool_calls_comes_back_equal(checkpoint: Path):
    calls = spoken(checkpoint, 'Wait.<tool_call>\n{"name": "f", "arguments": {"c": "K"}}\n</tool_call>')
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    async with cluster(checkpoint, calls, **ON) as (client, gateway):
        first, second = await asked_twice(client, gateway, WHOLE | {"tools": tools})
        assert first == second and second[0]["message"]["tool_calls"][0]["function"]["name"] == "f"
        assert second[0]["finish_reason"] == "tool_calls"
        streamed = await client.post(CHAT, json=FIXED | {"tools": tools})
        assert cached(streamed) == "exact" and '"name":"f"' in streamed.text


async def test_choices_logprobs_schemas_and_stops_come_back_equal(checkpoint: Path):
    async with cluster(checkpoint, spoken(checkpoint, '{"a": "stop here"}'), **ON) as (client, gateway):
        for extra in (
            {"n": 3},
            {"logprobs": True, "top_logprobs": 2},
            {"response_format": {"type": "json_object"}},
            {"stop": ["here"]},
            {"max_tokens": 2},
            {"n": 2, "logprobs": True, "stop": ["stop"]},
        ):
            first, second = await asked_twice(client, gateway, WHOLE | extra)
            assert first == second, extra
        plain = {"prompt": "Hi", "temperature": 0, "logprobs": 2, "n": 2, "echo": False}
        answers = [await client.post("/v1/completions", json=plain) for _ in range(2)]
        assert answers[0].json()["choices"] == answers[1].json()["choices"]
        assert cached(answers[1]) == "exact"
        streamed = await client.post("/v1/completions", json=plain | {"stream": True})
        assert cached(streamed) == "exact" and streamed.text.endswith("data: [DONE]\n\n")


async def test_embeddings_are_kept_too(checkpoint: Path):
    def embedded(request: Request) -> list[Any]:
        end = Finish(Reason.STOP, len(request.prompt), 0, 0, 0.0)
        return [TokenEvent(request.id, finish=end, embedding=(0.6, 0.8))]

    engine = FakeEngine(embedded, {"tiny": info(vocab=4096)})
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        first = await client.post("/v1/embeddings", json={"input": "Hi"})
        await settled(gateway)
        second = await client.post("/v1/embeddings", json={"input": "Hi"})
        assert first.json() == second.json() and second.headers["x-stretto-cached"] == "exact"
        assert len(engine.requests) == 1


async def test_bypass_refresh_personal_and_random_requests_ask_a_worker(checkpoint: Path):
    engine = fake(10)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        for body, kind, kept in (
            (WHOLE | {"cache": {"personal": True}}, None, 0),
            (WHOLE | {"cache": {"mode": "bypass"}}, None, 0),
            (WHOLE | {"temperature": 0.7}, None, 0),
            (WHOLE, None, 1),
            (WHOLE, "exact", 1),
            (WHOLE | {"cache": {"mode": "bypass"}}, None, 1),
            (WHOLE | {"cache": {"mode": "refresh"}}, None, 2),
            (WHOLE | {"temperature": 0.7, "cache": {"mode": "use"}}, None, 3),
            (WHOLE | {"temperature": 0.7, "cache": {"mode": "use"}}, "exact", 3),
        ):
            assert cached(await client.post(CHAT, json=body)) == kind, body
            await settled(gateway)
            assert gateway.answers.stats.kept == kept, body
        wrong = await client.post(CHAT, json=WHOLE | {"cache": {"mode": "always"}})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "$.cache.mode")


@pytest.mark.parametrize(
    ("end", "stream"),
    [
        (EngineDied("the engine ended"), False),
        (Reason.DEADLINE, True),
        (Reason.DEADLINE, False),
        (Reason.ERROR, True),
        (Reason.ERROR, False),
    ],
)
async def test_a_cut_or_failed_answer_is_never_kept(checkpoint: Path, end: Any, stream: bool):
    engine = fake(10, 11, end)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        for _ in range(2):
            await client.post(CHAT, json=FIXED | {"stream": stream})
            await settled(gateway)
        assert gateway.answers.stats.kept == 0 and gateway.answers.stats.hits["exact"] == 0


async def test_an_invalid_request_is_refused_each_time(checkpoint: Path):
    async with cluster(checkpoint, fake(10), **ON) as (client, gateway):
        for _ in range(2):
            wrong = await client.post(CHAT, json=FIXED | {"top_p": 7})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "$.top_p")
        assert gateway.answers.stats.kept == 0


async def test_equal_requests_in_flight_have_one_upstream(checkpoint: Path):
    engine = fake(10, 0.4, 11, 12)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        answers = await asyncio.gather(*(client.post(CHAT, json=FIXED) for _ in range(8)))
        assert len({text_of(answer) for answer in answers}) == 1
        assert len(engine.requests) == 1 and gateway.answers.stats.joined == 7
        sampled = await asyncio.gather(
            *(client.post(CHAT, json=FIXED | {"temperature": 1}) for _ in range(3))
        )
        assert len(sampled) == 3 and len(engine.requests) == 4  # each wants a random answer of its own


async def test_a_client_that_leaves_does_not_end_the_answer_for_others(checkpoint: Path):
    engine = fake(10, 0.5, 11, 12)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        first = asyncio.create_task(client.post(CHAT, json=FIXED))
        while not engine.requests:
            await asyncio.sleep(0.005)
        second = asyncio.create_task(client.post(CHAT, json=FIXED))
        while not gateway.answers.stats.joined:
            await asyncio.sleep(0.005)
        first.cancel()
        assert text_of(await second) and len(engine.requests) == 1
        await settled(gateway)
        assert cached(await client.post(CHAT, json=FIXED)) == "exact"


async def test_when_all_clients_leave_the_work_is_cancelled(checkpoint: Path):
    engine = fake(10, 30.0)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        tasks = [asyncio.create_task(client.post(CHAT, json=FIXED)) for _ in range(2)]
        while not gateway.answers.stats.joined:
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        for _ in range(400):
            if not engine.open and not gateway.server.running:
                break
            await asyncio.sleep(0.02)
        assert not engine.open and not gateway.server.running and not gateway.answers._flights
        assert gateway.answers.stats.kept == 0


class FailingRelay:
    """A relay whose first runs raise, after a pause in which others can join."""

    def __init__(self, failures: int) -> None:
        self.runs = 0
        self.failures = failures
        self.registry = SimpleNamespace(workers={}, model=lambda name: SimpleNamespace(name="tiny"))  # pyright: ignore

    def admit(self, exchange: RelayedExchange) -> None:
        pass

    async def run(self, exchange: RelayedExchange) -> None:
        self.runs += 1
        failed = self.runs <= self.failures
        await asyncio.sleep(0.05)
        if failed:
            raise Unavailable("lost")
        await exchange.send(200, {"content-type": "application/json"}, b"{}", False)


@pytest.mark.parametrize(("failures", "answered", "runs"), [(1, 4, 2), (9, 0, 2)])
async def test_a_failed_leaders_followers_try_once_more_together(failures: int, answered: int, runs: int):
    relay = FailingRelay(failures)
    answers = Answers(GatewayConfig(caches={"ann": CachePolicy()}), cast(Relay, relay))
    got: list[bytes] = []

    async def ask() -> None:
        async def send(status: int, headers: Any, body: bytes, more: bool) -> None:
            got.append(body)

        body = json.dumps(WHOLE).encode()
        await answers.run(
            RelayedExchange("chat", CHAT, "ann", body, read_fields(body)[0], time.monotonic(), send)
        )

    results = await asyncio.gather(*(ask() for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, Unavailable) for result in results) == 5 - answered
    assert (len(got), relay.runs) == (answered, runs)


async def test_tenants_share_no_answer(checkpoint: Path):
    engine = fake(10)
    policies = {"caches": {"*": CachePolicy()}}
    async with cluster(checkpoint, engine, **TWO, **policies) as (client, gateway):
        for key, kind in ((ANN, None), (BOB, None), (ANN, "exact"), (BOB, "exact")):
            assert cached(await client.post(CHAT, json=WHOLE, headers=key)) == kind
            await settled(gateway)
        for user, kind in (("u1", None), ("u2", None), ("u1", "exact")):
            assert cached(await client.post(CHAT, json=WHOLE | {"user": user}, headers=ANN)) == kind
            await settled(gateway)


async def test_new_weights_make_kept_answers_unreachable(checkpoint: Path):
    engine = fake(10)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        await asked_twice(client, gateway, WHOLE)
        engine.models = {"tiny": structs.replace(info(vocab=4096), revision="new")}
        worker = next(iter(gateway.registry.workers.values()))
        for _ in range(400):
            known = worker.models["tiny"]
            if known is not None and known.revision == "new":
                break
            await asyncio.sleep(0.02)
        await asked_twice(client, gateway, WHOLE)


async def test_a_tenant_erases_its_answers_and_its_prompts_on_the_workers(checkpoint: Path):
    engine = fake(10)
    async with cluster(checkpoint, engine, **TWO, caches={"*": CachePolicy()}) as (client, gateway):
        for key in (ANN, BOB):
            for user in ("u1", "u2"):
                await client.post(CHAT, json=WHOLE | {"user": user}, headers=key)
                await settled(gateway)
        erased = await client.delete("/v1/cache?subject=u1", headers=ANN)
        assert erased.status_code == 200 and erased.json()["answers"] == 1
        assert list(erased.json()["blocks"].values()) == [5] and engine.erased == [("ann", "u1")]
        for key, user, kind in ((ANN, "u1", None), (ANN, "u2", "exact"), (BOB, "u1", "exact")):
            assert cached(await client.post(CHAT, json=WHOLE | {"user": user}, headers=key)) == kind
            await settled(gateway)
        assert (await client.delete("/v1/cache?tenant=bob", headers=ANN)).status_code == 403
        assert (await client.delete("/v1/cache")).status_code == 401
        erased = await client.delete("/v1/cache?tenant=bob", headers=OPERATOR)
        assert erased.json()["answers"] == 2 and engine.erased[-1] == ("bob", None)
        state = (await client.get("/state", headers=ANN)).json()["cache"]
        assert (state["erased"], state["entries"]) == (3, 2)


async def test_an_answer_that_an_erasure_overtakes_is_not_kept(checkpoint: Path):
    engine = fake(10, 0.5, 11)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        asked = asyncio.create_task(client.post(CHAT, json=WHOLE))
        while not engine.requests:
            await asyncio.sleep(0.005)
        assert (await client.delete("/v1/cache")).status_code == 200
        assert cached(await asked) is None
        await settled(gateway)
        assert gateway.answers.stats.entries == 0


async def test_who_reads_on_pays_what_is_still_to_come(checkpoint: Path):
    """Two clients share an answer, and the one that asked first leaves early."""
    engine = fake(10, 11, 0.5, *range(12, 30))
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        stats = gateway.answers.stats
        first = asyncio.create_task(left_when(client, lambda: stats.joined == 1))
        while not engine.requests:
            await asyncio.sleep(0.005)
        second = await client.post(CHAT, json=FIXED | {"stream_options": None})
        await first
        assert len(engine.requests) == 1 and "[DONE]" in second.text
        (row,) = (await client.get("/v1/usage")).json()["rows"]
        assert (row["requests"], row["completion_tokens"]) == (2, 20)
        whole = await client.post(CHAT, json=WHOLE | {"max_tokens": 100})
        (row,) = (await client.get("/v1/usage")).json()["rows"]
        assert row["prompt_tokens"] == 2 * whole.json()["usage"]["prompt_tokens"]


async def left_when(client: httpx.AsyncClient, condition: Callable[[], bool]) -> None:
    async with client.stream("POST", CHAT, json=FIXED):
        while not condition():
            await asyncio.sleep(0.005)
