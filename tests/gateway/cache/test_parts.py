"""Keys, kept answers, the store and answers in flight, without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from msgspec import json

from stretto.errors import InvalidRequest
from stretto.gateway.accounts.usage import Tally
from stretto.gateway.cache import answer
from stretto.gateway.cache.answer import Recipient
from stretto.gateway.cache.flight import HIGH_WATER, AnswerFlight, FlightFailed
from stretto.gateway.cache.key import KeyMaker, Source
from stretto.gateway.cache.memory import OVERHEAD, Keeping, MemoryStore
from stretto.gateway.cache.policy import CachePolicy, policy_of, wish_of, without_field
from stretto.gateway.cache.stats import CacheStats
from stretto.protocol.openai import CacheFields

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
SOURCE = Source("chat", "ann", "tiny", ("r1",))
KEYS = KeyMaker(b"secret")
SSE = {"content-type": "text/event-stream; charset=utf-8"}
JSON = {"content-type": "application/json"}


# Keys


def test_what_does_not_shape_an_answer_leaves_its_key():
    key = KEYS.answer(SOURCE, BODY)
    for same in (
        {"stream": True, "stream_options": {"include_usage": True}},
        {"metadata": {"trace": "1"}},
        {"temperature": 0.0},
        {"top_p": None},
        {"model": "tiny"},
    ):
        assert KEYS.answer(SOURCE, BODY | same) == key, same
    reordered = dict(reversed(BODY.items()))
    assert KEYS.answer(SOURCE, reordered) == key


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "Hi "}]},
        {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]},
        {"temperature": 0.1},
        {"seed": 1},
        {"n": 2},
        {"max_tokens": 5},
        {"max_completion_tokens": 5},
        {"stop": ["x"]},
        {"logprobs": True},
        {"top_logprobs": 2},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"logit_bias": {"5": 1}},
        {"objective": {"ttft_ms": 100}},
        {"service_tier": "flex"},
        {"user": "bob"},
        {"cache_salt": "s"},
        {"something_new": 1},
    ],
)
def test_what_shapes_an_answer_changes_its_key(change: dict[str, Any]):
    assert KEYS.answer(SOURCE, BODY | change) != KEYS.answer(SOURCE, BODY)


@pytest.mark.parametrize(
    "source",
    [
        SOURCE._replace(tenant="bob"),
        SOURCE._replace(model="other"),
        SOURCE._replace(revisions=("r2",)),
        SOURCE._replace(revisions=("r1", "r2")),
        SOURCE._replace(operation="completions"),
    ],
)
def test_tenant_model_and_revisions_change_the_key(source: Source):
    assert KEYS.answer(source, BODY) != KEYS.answer(SOURCE, BODY)
    assert KeyMaker(b"other").answer(SOURCE, BODY) != KEYS.answer(SOURCE, BODY)


def test_parts_of_a_key_do_not_run_together():
    assert KEYS.digest(b"a", b"bc") != KEYS.digest(b"ab", b"c")


# What a request asks for


def test_only_repeatable_answers_are_kept_unless_asked():
    policy, off = CachePolicy(), CacheFields()
    raw = json.encode({"messages": []})
    assert wish_of(policy, off, "chat", raw) is None
    assert wish_of(policy, off, "embeddings", json.encode({"input": "x"})) is not None
    for fixed in ({"temperature": 0}, {"temperature": 1, "seed": 3}):
        assert wish_of(policy, off, "chat", json.encode(fixed)) is not None
    assert wish_of(policy, CacheFields(mode="use"), "chat", raw) is not None
    assert wish_of(CachePolicy(sampled=True), off, "chat", raw) is not None


def test_personal_and_bypassing_requests_never_touch_the_cache():
    raw = json.encode({"temperature": 0})
    for fields in (
        CacheFields(personal=True),
        CacheFields(mode="bypass"),
        CacheFields(mode="use", personal=True),
    ):
        assert wish_of(CachePolicy(sampled=True), fields, "chat", raw) is None
    refresh = wish_of(CachePolicy(), CacheFields(mode="refresh"), "chat", raw)
    assert refresh is not None and not refresh.takes


def test_the_field_is_taken_out_of_the_body_and_checked():
    fields, body = without_field(b'{"a":1,"cache":{"mode":"use","personal":true}}')
    assert (fields, body) == (CacheFields(mode="use", personal=True), b'{"a":1}')
    assert without_field(b'{"a": "\\"cache\\""}')[1] == b'{"a": "\\"cache\\""}'
    assert without_field(b'{"cache":null}') == (CacheFields(), b"{}")
    for wrong in (b"1", b'{"mode":"on"}', b'{"personal":1}', b'{"ttl":5}'):
        with pytest.raises(InvalidRequest, match=r"\$\.cache"):
            without_field(b'{"cache":' + wrong + b"}")


def test_no_tenant_has_a_cache_until_it_is_turned_on():
    policy = CachePolicy()
    assert policy_of({}, "ann") is None
    assert policy_of({"ann": policy}, "bob") is None
    assert policy_of({"*": policy}, "bob") is policy
    assert policy_of({"*": policy, "bob": CachePolicy(off=True)}, "bob") is None


@pytest.mark.parametrize("wrong", [{"max_error": 0}, {"max_error": 0.6}, {"ttl": 0}, {"size": "1KiB"}])
def test_wrong_policies_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CachePolicy(**wrong)


# Kept answers


def chunk(choice: dict[str, Any] | None, **extra: Any) -> bytes:
    choices = [] if choice is None else [choice]
    return b"data: " + json.encode({"id": "c-1", "created": 1, "model": "tiny", "choices": choices} | extra)


def event_stream(*chunks: bytes, done: bool = True) -> bytes:
    return b"".join([each + b"\n\n" for each in (*chunks, *([b"data: [DONE]"] if done else []))])


def delta(index: int, finish: str | None = None, **fields: Any) -> bytes:
    return chunk({"index": index, "delta": fields, "logprobs": None, "finish_reason": finish})


def recipient(**body: Any) -> Recipient:
    return Recipient(body, "req", 7, 1.5)


def test_a_stream_comes_back_as_a_stream_and_in_one_piece():
    body = event_stream(
        delta(0, role="assistant", content="Good "),
        delta(1, role="assistant", content="Bye, "),
        delta(0, content="day"),
        chunk(
            {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}, stretto={"variant": "small"}
        ),
        delta(1, "length", content="now"),
        chunk(None, usage={"total_tokens": 9}),
    )
    kept = answer.read("chat", 200, SSE, body)
    assert kept is not None and answer.load(answer.dump(kept)) == kept
    whole = json.decode(kept.bytes_for(recipient(metadata={"a": "b"}), "exact"))
    assert (whole["id"], whole["created"], whole["object"]) == ("chatcmpl-req", 7, "chat.completion")
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["Good day", "Bye, now"]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "length"]
    assert (whole["usage"], whole["metadata"]) == ({"total_tokens": 9}, {"a": "b"})
    assert (whole["stretto"]["cached"], whole["stretto"]["variant"]) == ("exact", "small")
    asked = recipient(stream=True, stream_options={"include_usage": True})
    events = kept.bytes_for(asked, "semantic").split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    chunks = [json.decode(event.removeprefix(b"data: ")) for event in events[:-2]]
    assert [each["usage"] for each in chunks] == [None] * 5 + [{"total_tokens": 9}]
    assert [each["stretto"]["cached"] for each in chunks if "stretto" in each] == ["semantic"] * 2
    assert "usage" not in json.decode(
        kept.bytes_for(recipient(stream=True), "exact").split(b"\n\n")[0].removeprefix(b"data: ")
    )


def test_a_stream_without_usage_does_not_serve_those_who_want_it():
    kept = answer.read("chat", 200, SSE, event_stream(delta(0, "stop", content="x")))
    assert kept is not None and kept.serves(recipient(stream=True))
    assert not kept.serves(recipient())
    assert not kept.serves(recipient(stream=True, stream_options={"include_usage": True}))


def test_tool_calls_are_joined_from_their_parts():
    begin = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a'}}
    other = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    body = event_stream(
        delta(0, role="assistant", tool_calls=[begin]),
        delta(0, tool_calls=[{"index": 0, "function": {"arguments": '": 1}'}}]),
        delta(0, tool_calls=[other]),
        delta(0, "tool_calls"),
        chunk(None, usage={}),
    )
    kept = answer.read("chat", 200, SSE, body)
    assert kept is not None
    message = json.decode(kept.bytes_for(recipient(), "exact"))["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert json.decode(kept.bytes_for(recipient(), "exact")) == json.decode(
        kept.bytes_for(recipient(), "exact")
    )


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (503, JSON, b'{"choices":[]}'),
        (200, SSE, event_stream(delta(0, "stop", content="x"), done=False)),
        (200, SSE, event_stream(delta(0, content="x"))),
        (200, SSE, event_stream(delta(0, "deadline", content="x"))),
        (200, SSE, event_stream(delta(0, "content_filter", content="x"))),
        (200, SSE, event_stream(delta(0, "stop"), delta(1, content="x"))),
        (200, SSE, event_stream(delta(1, "stop"))),
        (200, SSE, event_stream(delta(0, "stop"), delta(0, content="more"))),
        (200, SSE, event_stream(delta(0, "stop"), b'data: {"error":{"code":"engine_died"}}')),
        (200, SSE, b"data: {\n\ndata: [DONE]\n\n"),
        (200, SSE, b"data: [1]\n\ndata: [DONE]\n\n"),
        (200, SSE, b""),
        (200, JSON, b'{"error":{}}'),
        (200, JSON, b'{"choices":[]}'),
        (200, JSON, b"[]"),
        (200, JSON, b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"deadline"}]}'),
        (200, JSON, b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":null}]}'),
        (200, {}, b'{"choices":[{"index":0,"message":{"content":"x"},"finish_reason":"stop"}]}'),
    ],
)
def test_what_is_cut_or_failed_is_no_answer(status: int, headers: dict[str, str], body: bytes):
    assert answer.read("chat", status, headers, body) is None


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\x95", b"\x93\x01\x02\x03", b"\xc0" * 9])
def test_garbage_in_the_store_is_no_answer(raw: bytes):
    assert answer.load(raw) is None


# The store in memory


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_the_store_stays_within_each_tenants_budget():
    stats, clock = CacheStats(), Clock()
    store = MemoryStore(clock, stats)
    budget = 100 * (OVERHEAD + 1000)
    keeping = Keeping(60.0, budget)
    for number in range(500):
        assert await store.put(b"ann", b"%d" % number, bytes(1000), keeping)
    assert (stats.entries, stats.evicted, stats.bytes) == (100, 400, budget)
    assert await store.put(b"bob", b"1", bytes(1000), keeping)
    assert await store.get(b"ann", b"499") is not None and await store.get(b"bob", b"499") is None
    assert not await store.put(b"ann", b"large", bytes(budget // 8), keeping)
    assert stats.entries == 101


async def test_eviction_prefers_what_is_unused_cheap_or_large():
    store = MemoryStore(Clock(), CacheStats())
    keeping = Keeping(60.0, 10 * (OVERHEAD + 500))
    await store.put(b"t", b"used", bytes(500), keeping)
    await store.put(b"t", b"dear", bytes(500), keeping._replace(cost=50.0))
    for _ in range(20):
        await store.get(b"t", b"used")
    for number in range(40):
        await store.put(b"t", b"%d" % number, bytes(500), keeping)
    assert await store.get(b"t", b"used") and await store.get(b"t", b"dear")
    assert await store.get(b"t", b"0") is None
    for number in range(1000):  # what was used once is not kept for ever
        await store.put(b"t", b"n%d" % number, bytes(500), keeping)
    assert await store.get(b"t", b"used") is None


async def test_answers_expire_and_are_deleted_then():
    stats, clock = CacheStats(), Clock()
    store = MemoryStore(clock, stats)
    await store.put(b"ann", b"1", b"x", Keeping(10.0, 1 << 20))
    await store.put(b"ann", b"2", b"x", Keeping(30.0, 1 << 20))
    clock.now = 20.0
    assert await store.get(b"bob", b"0") is None
    assert (stats.expired, stats.entries) == (1, 1)
    await store.put(b"ann", b"2", b"x", Keeping(30.0, 1 << 20))
    clock.now = 40.0
    assert await store.get(b"ann", b"2") == b"x"
    clock.now = 50.0
    assert await store.get(b"ann", b"2") is None and (stats.entries, stats.bytes) == (0, 0)


async def test_erasure_finds_a_subject_or_a_whole_tenant():
    stats = CacheStats()
    store = MemoryStore(Clock(), stats)
    keeping = Keeping(60.0, 1 << 20)
    for tenant in (b"ann", b"bob"):
        await store.put(tenant, b"1", b"x", keeping._replace(subjects=(b"s",)))
        await store.put(tenant, b"2", b"x", keeping._replace(subjects=(b"s", b"t")))
        await store.put(tenant, b"3", b"x", keeping)
    assert await store.erase(b"ann", b"s") == 2 and stats.entries == 4
    assert await store.erase(b"ann", b"s") == 0
    assert await store.erase(b"bob", None) == 3 and stats.entries == 1
    assert await store.get(b"ann", b"3") == b"x"


# Answers in flight


class Client:
    """Reads a flight. It waits before each piece until `open` is set."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, status: int, headers: Mapping[str, str], body: bytes, more: bool) -> None:
        await self.open.wait()
        self.got.append(body)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_all_readers_of_a_flight_get_all_of_it():
    flight, go = AnswerFlight(1 << 20, Tally), asyncio.Event()

    async def work() -> None:
        await flight.send(200, {}, b"one", True)
        await go.wait()
        await flight.send(200, {}, b"two", False)

    flight.start(work)
    clients = [Client() for _ in range(3)]
    tasks = [asyncio.create_task(flight.follow(client.send, lambda: None)) for client in clients]
    await settle()
    tasks[0].cancel()  # the one that started it leaves
    await settle()
    late = Client()
    tasks.append(asyncio.create_task(flight.follow(late.send, lambda: None)))
    go.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [client.got for client in (*clients[1:], late)] == [[b"one", b"two"]] * 3
    assert clients[0].got == [b"one"] and flight.landed


async def test_the_work_ends_with_its_last_reader():
    flight, cancelled = AnswerFlight(1 << 20, Tally), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    flight.start(work)
    tasks = [asyncio.create_task(flight.follow(Client().send, lambda: None)) for _ in range(2)]
    await settle()
    tasks[0].cancel()
    await settle()
    assert not cancelled.is_set() and flight.joinable
    tasks[1].cancel()
    await settle()
    assert cancelled.is_set() and not flight.joinable


async def test_a_failure_reaches_all_readers_after_what_came_before_it():
    flight = AnswerFlight(1 << 20, Tally)

    async def work() -> None:
        await flight.send(200, {}, b"one", True)
        raise ValueError("lost")

    flight.start(work)
    clients = [Client(), Client()]
    results = await asyncio.gather(
        *(flight.follow(client.send, lambda: None) for client in clients), return_exceptions=True
    )
    assert [client.got for client in clients] == [[b"one"]] * 2
    assert all(isinstance(each, FlightFailed) and each.begun for each in results)


async def test_a_slow_reader_holds_up_the_worker_only_when_the_answer_is_not_kept():
    sent = 0
    flight = AnswerFlight(2 * HIGH_WATER, Tally)

    async def work() -> None:
        nonlocal sent
        for number in range(64):
            await flight.send(200, {}, bytes(HIGH_WATER // 4), number < 63)
            sent += 1

    slow, fast = Client(), Client()
    slow.open.clear()
    flight.start(work)
    tasks = [asyncio.create_task(flight.follow(client.send, lambda: None)) for client in (slow, fast)]
    for _ in range(40):
        await settle()
    assert 8 <= len(fast.got) <= 14 and sent < 20 and not flight.joinable
    slow.open.set()
    await asyncio.gather(*tasks)
    assert len(slow.got) == len(fast.got) == 64
    assert len(flight.pieces) <= 8  # what all have read is forgotten
