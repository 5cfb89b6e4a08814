"""Questions in other words: the guard, the bound on errors, the index, and a gateway that uses them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks import caching
from stretto.gateway.app import Gateway
from stretto.gateway.cache import embedding
from stretto.gateway.cache.embedding import best_embedder, n_grams, static_vectors
from stretto.gateway.cache.guard import LONGEST, likeness, read
from stretto.gateway.cache.policy import CachePolicy, question_of
from stretto.gateway.cache.semantic import (
    MOST_ENTRIES,
    VERIFY_SHARE,
    ErrorBound,
    SemanticIndex,
    SimilarEntry,
    error_bound,
)
from tests.gateway.cache.test_answers import ANN, BOB, CHAT, FIXED, TWO, WHOLE, cached, settled
from tests.gateway.cluster import cluster, fake


def alike(one: str, other: str) -> str | None:
    first, second = read(one), read(other)
    assert first is not None and second is not None
    return likeness(first, second)


# The guard


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the price of order A-17?", "Which price does order A-17 have?"),
        ("What is the price of order A-17?", "Please look up the price for order A-17."),
        ("What is the price of order A-17?", "Hi! Can you tell me the price of order A-17? Thanks."),
        ("What is the price of order A-17?", "what's the cost of order a-17"),
        ("How do I reset my password?", "How can I reset my password?"),
        ("How do I reset my password?", "How to reset my password?"),
        ("Who bought the lamp?", "Who purchased the lamp?"),
        ("It costs 1,000 EUR for two days.", "It costs 1000 EUR for 2 days"),
        ("I can't pay.", "I cannot pay."),
    ],
)
def test_the_same_question_is_seen_through_how_it_is_put(one: str, other: str):
    assert alike(one, other) == "same words"


def test_no_near_duplicate_is_served():
    found = caching.pairs(Random(0), [])
    assert len(found) >= 500
    for embed in (n_grams, best_embedder()[0]):
        for one, other in found:
            index = SemanticIndex(embed, lambda: 0.5, lambda: 0.0)
            first, second = index.read(one), index.read(other.text)
            if first is None or second is None:
                continue
            index.add(b"t", SimilarEntry(b"1", b"c", first, (), 1.0))
            caching.trust(index)
            match = index.find(caching.TENANT, b"c", second, 0.02)
            assert match is None or not match.serve, (one, other)
            assert match is None or match.likeness == "other words", (one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is the US large?", "Is the us large?"),
        ("Is A bigger than B?", "Is B bigger than A?"),
        ("What is -5 + 3?", "What is 5 + 3?"),
        ("Is it 1.5?", "Is it 15?"),
        ("May the lamp come?", "Can the lamp come?"),
        ("Is Anna Ben's boss?", "Is Ben Anna's boss?"),
        ("List all but the red ones.", "List all the red ones."),
        ("Say it twice.", "Say it once."),
    ],
)
def test_small_words_and_signs_keep_questions_apart(one: str, other: str):
    assert alike(one, other) != "same words"


@pytest.mark.parametrize("text", ["", "   ", "?!", "x" * (LONGEST + 1)])
def test_texts_without_words_or_too_long_are_not_compared(text: str):
    assert read(text) is None


@pytest.mark.parametrize(
    "change",
    [
        {"n": 2},
        {"logprobs": True},
        {"messages": []},
        {"messages": None},
        {"messages": ["x"]},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {"messages": [{"role": "tool", "content": "Hi", "tool_call_id": "1"}]},
    ],
)
def test_only_a_users_text_is_a_question(change: dict[str, Any]):
    body = {"messages": [{"role": "user", "content": "Hi"}], "n": 1}
    found = question_of("chat", body)
    assert found is not None and found.text == "Hi" and question_of("chat", body | change) is None
    assert found.rest["messages"] == [{"role": "user", "content": ""}]


# The bound


def test_the_bound_falls_with_verified_answers_and_rises_with_errors():
    assert error_bound(0, 0) == 1.0 and error_bound(10, 10) == 1.0
    values = [error_bound(count, 0) for count in (1, 10, 100, 1000, 10000)]
    assert values == sorted(values, reverse=True) and values[3] < 0.01 < values[2]
    assert error_bound(1000, 5) > error_bound(1000, 1) > error_bound(1000, 0)
    assert error_bound(1000, 5) > 0.005


@pytest.mark.parametrize("rate", [0.0, 0.003, 0.02, 0.2])
@pytest.mark.parametrize("most", [0.01, 0.02])
def test_wrong_answers_stay_within_the_bound_whatever_the_real_rate(rate: float, most: float):
    served = wrong = 0
    for seed in range(5):
        rng, bound = Random(seed), ErrorBound()
        for _ in range(3000):
            right = rng.random() >= rate
            if bound.bound <= most and rng.random() >= VERIFY_SHARE:
                served += 1
                wrong += not right
            else:
                bound.observe(right=right)
    assert wrong <= most * served
    assert served > 5000 if rate == 0 else rate < most or not served


# The index


def index_of(draw: Callable[[], float] = lambda: 0.5) -> SemanticIndex:
    return SemanticIndex(n_grams, draw, lambda: 0.0)


def add(
    index: SemanticIndex, text: str, key: bytes = b"1", tenant: bytes = b"t", **extra: Any
) -> SimilarEntry:
    question = index.read(text)
    assert question is not None
    entry = SimilarEntry(key, extra.get("conversation", b"c"), question, extra.get("subjects", ()), 1.0)
    index.add(tenant, entry)
    return entry


def find(index: SemanticIndex, text: str, tenant: bytes = b"t", conversation: bytes = b"c") -> Any:
    question = index.read(text)
    assert question is not None
    return index.find(tenant, conversation, question, 0.01)


def test_a_question_is_found_by_its_tenant_in_its_conversation_only():
    index = index_of()
    entry = add(index, "What is the price of the lamp?")
    assert find(index, "Which price does the lamp have?").entry is entry
    assert find(index, "Which price does the lamp have?", tenant=b"u") is None
    assert find(index, "Which price does the lamp have?", conversation=b"d") is None
    index.remove(b"t", entry)
    index.remove(b"t", entry)
    assert find(index, "Which price does the lamp have?") is None


def test_nothing_is_served_before_enough_was_verified_and_a_little_is_verified_after():
    draws = iter([0.01, 0.5])
    index = index_of(lambda: next(draws))
    add(index, "What is the price of the lamp?")
    for _ in range(400):
        match = find(index, "Which price does the lamp have?")
        assert not match.serve
        index.observe(b"t", match, right=True)
    for _ in range(600):
        index.observe(b"t", match, right=True)
    assert [find(index, "Which price does the lamp have?").serve for _ in range(2)] == [False, True]


def test_a_question_whose_answer_was_wrong_is_forgotten():
    index = index_of()
    add(index, "What is the price of the lamp?")
    index.observe(b"t", find(index, "Which price does the lamp have?"), right=False)
    assert find(index, "Which price does the lamp have?") is None


def test_other_words_need_verified_answers_of_that_very_question():
    index = index_of()
    add(index, "What is the price of the blue lamp?")
    other = "What is the price of the azure lamp?"
    caching.trust(index)
    match = find(index, other)
    assert match.likeness == "other words" and not match.serve
    for _ in range(1000):
        index.observe(b"t", match, right=True)
    assert find(index, other).serve
    for _ in range(3):
        index.observe(b"t", match, right=False)
    assert not find(index, other).serve and find(index, "Which price does the blue lamp have?").serve


def test_the_index_is_bounded_and_erased_by_subject():
    index = index_of()
    for number in range(MOST_ENTRIES + 50):
        add(index, f"What is the price of order {number}?", b"%d" % number, subjects=(b"%d" % (number % 2),))
    assert len(index.tenant(b"t").recent) == MOST_ENTRIES
    assert find(index, "Which price does order 7 have?") is None
    assert index.erase(b"t", b"1") == MOST_ENTRIES // 2
    assert find(index, "Which price does order 101 have?") is None
    assert find(index, "Which price does order 100 have?") is not None
    assert index.erase(b"t", None) == MOST_ENTRIES // 2 and not index.tenant(b"t").conversations


def test_expired_questions_are_not_found_and_are_swept():
    now = 0.0
    index = SemanticIndex(n_grams, lambda: 0.0, lambda: now)
    add(index, "What is the price of the lamp?")
    add(index, "What is the price of the chair?", b"2")
    now = 2.0
    assert find(index, "Which price does the lamp have?") is None
    index.expire()
    assert not index.tenant(b"t").recent


def test_answers_are_compared_by_what_they_say():
    index = SemanticIndex(best_embedder()[0], lambda: 0.0, lambda: 0.0)
    assert index.same_answer("Berlin\n", "berlin") and not index.same_answer("Berlin", "Bremen")
    long = "The order was sent on Monday and it will arrive at your home within three working days."
    assert index.same_answer(long, long.replace("sent", "shipped"))
    assert not index.same_answer(long, long.replace("three", "four"))
    assert not index.same_answer(long, long.replace("will arrive", "will not arrive"))


def test_vectors_of_the_package_are_used_where_it_is(monkeypatch: pytest.MonkeyPatch):
    vector, name = best_embedder()
    if name != embedding.PACKAGE:
        pytest.skip("the package wordllama is not installed")
    near = float(vector("Who bought the lamp?") @ vector("Who ordered the lamp?"))
    assert near > float(vector("Who bought the lamp?") @ vector("Is it raining?")) + 0.2
    assert abs(float(vector("x") @ vector("x")) - 1.0) < 1e-5 and not vector("").any()
    monkeypatch.setattr(embedding, "PACKAGE", "no_such_package")
    assert best_embedder.__wrapped__() == (n_grams, "n-grams")
    with pytest.raises(OSError):
        static_vectors(Path("/nowhere"))


def test_the_benchmark_measures_hits_and_errors(capsys: pytest.CaptureFixture[str]):
    caching.hits(Namespace(requests=300, prompts=None, model=False, seed=1))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| desk")]
    assert len(rows) == 4 and all(row.split("|")[8].strip() == "0" for row in rows)


# A gateway


ON = {"caches": {"local": CachePolicy(semantic=True)}}


def asking(text: str, base: dict[str, Any] = WHOLE, **extra: Any) -> dict[str, Any]:
    return base | {"messages": [{"role": "user", "content": text}]} | extra


def trust(gateway: Gateway, tenant: str) -> None:
    """Lets a gateway have verified many right answers of a tenant, and verify no more."""
    answers = gateway.answers
    answers._similar.tenant(answers._keys.tenant(tenant)).same_words = caching.trusted()
    answers._similar._draw = lambda: 0.5


async def test_a_similar_question_is_verified_and_then_gets_the_kept_answer(checkpoint: Path):
    engine = fake(10, 11)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        answers = gateway.answers
        for text in ("What is the price of order 7?", "Which price does order 7 have?"):
            assert cached(await client.post(CHAT, json=asking(text))) is None
            await settled(gateway)
        assert (answers.stats.verified, answers.stats.verified_wrong) == (1, 0)
        trust(gateway, "local")
        similar = "Please find the price of order 7."
        whole = await client.post(CHAT, json=asking(similar, metadata={"a": "b"}))
        assert cached(whole) == "semantic" and whole.json()["metadata"] == {"a": "b"}
        assert cached(await client.post(CHAT, json=asking(similar, FIXED))) == "semantic"
        assert len(engine.requests) == 2 and answers.stats.hits["semantic"] == 2
        for other in (
            asking("Please find the price of order 8."),
            asking("Is the price of order 7 high?"),
            asking(similar, cache={"mode": "refresh"}),
            asking(similar, cache={"personal": True}),
            asking(similar, n=2),
            asking(similar, logprobs=True),
            asking(similar, max_tokens=3),
            asking(similar, seed=3),
            asking(similar, user="bob"),
            WHOLE | {"messages": [{"role": "system", "content": "Be short."}, *asking(similar)["messages"]]},
        ):
            assert cached(await client.post(CHAT, json=other)) is None, other
            await settled(gateway)


async def test_a_wrong_answer_is_noticed_and_its_question_forgotten(checkpoint: Path):
    engine = fake(10, 11)
    async with cluster(checkpoint, engine, **ON) as (client, gateway):
        await client.post(CHAT, json=asking("What is the price of order 7?"))
        await settled(gateway)
        engine.script = lambda request: [20, 21, 22]
        await client.post(CHAT, json=asking("Which price does order 7 have?"))
        await settled(gateway)
        stats = gateway.answers.stats
        assert (stats.verified, stats.verified_wrong) == (1, 1)
        trust(gateway, "local")
        answer = await client.post(CHAT, json=asking("Tell me which price order 7 has."))
        known = await client.post(CHAT, json=asking("Which price does order 7 have?"))
        assert cached(known) == "exact" and answer.json()["choices"] == known.json()["choices"]


async def test_similar_questions_are_kept_apart_by_tenant_and_erased(checkpoint: Path):
    engine = fake(10)
    policies = {"caches": {"*": CachePolicy(semantic=True)}}
    async with cluster(checkpoint, engine, **TWO, **policies) as (client, gateway):
        for tenant in ("ann", "bob"):
            trust(gateway, tenant)
        await client.post(CHAT, json=asking("What is the price of order 7?", user="u"), headers=ANN)
        await settled(gateway)
        similar = asking("Which price does order 7 have?", user="u")
        assert cached(await client.post(CHAT, json=similar, headers=BOB)) is None
        assert cached(await client.post(CHAT, json=similar, headers=ANN)) == "semantic"
        assert (await client.delete("/v1/cache?subject=u", headers=ANN)).json()["answers"] == 1
        assert cached(await client.post(CHAT, json=similar, headers=ANN)) is None
