"""The pure parts of the gateway: prefixes, breaker, hedging, and what a client has of a stream."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.gateway.routing.hedge import FEW, Errors, HedgeBudget
from stretto.gateway.routing.prefixes import PIECE, PrefixIndex, keys_of
from stretto.gateway.upstream.health import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, SLOW_START_S, Breaker
from stretto.gateway.upstream.progress import Progress
from stretto.protocol.relay import EmittedAnswer, error_mark, mark, variant_mark

EVENT = b'data: {"id":"c1","created":7,"choices":[]}\n\n'


def test_equal_beginnings_of_one_owner_have_equal_keys():
    one, other = bytes(PIECE) * 3 + b"x" * PIECE, bytes(PIECE) * 3 + b"y" * PIECE
    assert keys_of(one, "ann", "m")[:3] == keys_of(other, "ann", "m")[:3]
    assert keys_of(one, "ann", "m")[3] != keys_of(other, "ann", "m")[3]
    assert not set(keys_of(one, "ann", "m")) & set(keys_of(one, "bob", "m"))
    assert keys_of(b"short", "ann", "m") == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(1, 6)), max_size=30))
def test_the_index_matches_no_more_than_was_added(adds: list[tuple[str, int, int]]):
    index, held = PrefixIndex(), dict[str, set[int]]()
    for worker, start, count in adds:
        keys = [start * 100 + piece for piece in range(count)]
        index.add(worker, keys, capacity=1000)
        held.setdefault(worker, set()).update(keys)
    for start in range(4):
        keys = [start * 100 + piece for piece in range(6)]
        found = index.match(keys)
        for worker, keys_held in held.items():
            run = next((count for count, key in enumerate(keys) if key not in keys_held), len(keys))
            assert found.get(worker, 0) == run


def test_a_full_index_forgets_the_least_recent_end_first():
    index = PrefixIndex()
    index.add("a", [1, 2, 3], capacity=4)
    index.add("a", [7, 8], capacity=4)
    assert index.match([1, 2, 3]) == {"a": 2}
    assert index.match([7, 8]) == {"a": 2}
    index.forget("a")
    assert index.match([7, 8]) == {}


def test_the_breaker_opens_after_failures_in_a_row_and_a_report_closes_it():
    breaker = Breaker()
    for _ in range(FAILURES - 1):
        breaker.fail(0.0)
    breaker.succeed()
    breaker.fail(0.0)
    assert breaker.state(0.0) == "closed"
    for _ in range(FAILURES - 1):
        breaker.heard(1.0)  # says nothing of the answers
        breaker.fail(1.0)
    assert breaker.state(1.0) == "open"
    breaker.heard(1.1)
    assert breaker.broken
    assert breaker.state(1.0 + FIRST_PAUSE_S) == "half-open"
    breaker.heard(2.0)
    assert breaker.state(2.0) == "closed"
    assert breaker.weight(2.0) < 0.2 and breaker.weight(2.0 + SLOW_START_S) == 1.0


def test_the_pause_of_a_worker_that_flaps_doubles_up_to_a_limit():
    breaker, now, pauses = Breaker(), 0.0, list[float]()
    for _ in range(10):
        breaker.fail(now, lost=True)
        pauses.append(breaker.pause)
        now += breaker.pause
        breaker.heard(now)
    assert pauses[0] == FIRST_PAUSE_S and pauses[1] == 2 * FIRST_PAUSE_S and pauses[-1] == LONGEST_PAUSE_S
    breaker.fail(now + SLOW_START_S, lost=True)
    assert breaker.pause == FIRST_PAUSE_S


@given(st.floats(0.05, 60.0), st.integers(1, 64))
def test_a_worker_is_used_soon_after_an_outage_however_long_it_was(outage: float, streams: int):
    """All its streams fail at once, and then each report for a while."""
    breaker, now = Breaker(), 0.0
    for _ in range(streams):
        breaker.fail(now, lost=True)
    while now < outage:
        breaker.fail(now, lost=True)
        now += 0.05
    while breaker.broken:
        breaker.heard(now)
        now += 0.05
    assert now <= max(outage, FIRST_PAUSE_S) + 0.2


def test_a_second_attempt_starts_when_a_miss_is_likely_and_not_before():
    errors = Errors()
    assert errors.wait_before(1.0, 2.0, 0.5) == inf
    for step in range(90):
        errors.add(1.0, 1.0 + step / 900)  # nearly all answers come within 1.1 times the prediction
    for _ in range(10):
        errors.add(1.0, 10.0)
    wait = errors.wait_before(1.0, 2.0, 0.5)
    assert 1.0 < wait < 1.1
    assert errors.miss_chance(1.0, 2.0, 0.0) < 0.2 < 0.5 < errors.miss_chance(1.0, 2.0, wait)
    assert errors.wait_before(1.0, 20.0, 0.5) == 10.0  # only a wait longer than all before is a sign
    few = Errors()
    for _ in range(FEW - 1):
        few.add(1.0, 10.0)
    assert few.wait_before(1.0, 2.0, 0.5) == inf


@given(st.lists(st.floats(0.1, 5.0), min_size=FEW, max_size=60), st.floats(0.1, 6.0), st.floats(0.05, 1.0))
def test_a_second_attempt_waits_until_a_miss_is_likely_and_no_longer(
    ratios: list[float], limit: float, bound: float
):
    errors = Errors()
    for ratio in ratios:
        errors.add(1.0, ratio)
    likely = [
        wait
        for wait in (0.0, *sorted(ratios))
        if wait < limit and errors.miss_chance(1.0, limit, wait) > bound
    ]
    assert errors.wait_before(1.0, limit, bound) == min(likely, default=inf)


def test_hedges_stay_within_their_share():
    budget, spent = HedgeBudget(0.05), 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 40 <= spent <= 50


@given(st.integers(1, 40))
def test_a_stream_reaches_the_client_whole_however_it_is_cut(size: int):
    stream = (
        EVENT + mark(0, [5, 6], complete=False, last=False)
        + EVENT + EVENT + mark(1, [8], complete=True, last=False, late=True)
        + EVENT + b"data: [DONE]\n\n" + mark(0, [9], complete=True, last=True)
    )  # fmt: skip
    progress, passed = Progress(lambda: 1.25), b""
    for start in range(0, len(stream), size):
        passed += progress.push(stream[start : start + size])
    assert passed == EVENT * 4 + b"data: [DONE]\n\n"
    assert progress.ended
    continuation = progress.continuation(1.0)
    assert continuation is not None and (continuation.id, continuation.created) == ("c1", 7)
    assert continuation.answers == [
        EmittedAnswer([5, 6, 9], True, False, 250.0, 250.0),
        EmittedAnswer([8], True, True, 250.0, 250.0),
    ]


def test_lines_of_json_have_marks_too_and_tokens_without_events_count():
    progress = Progress(lambda: 0.0)
    assert progress.push(mark(0, [1, 2], complete=False, last=False)) == b""
    assert not progress.begun and progress.continuation(0.0) is None
    line = b'{"model":"m","created_at":"2026-01-01T00:00:00Z","response":"Hi"}\n'
    assert progress.push(line + mark(0, [3], complete=False, last=False)) == line
    continuation = progress.continuation(0.0)
    assert continuation is not None and continuation.answers[0].tokens == [1, 2, 3]


def test_the_id_of_a_response_is_found_in_its_first_event():
    event = b'event: response.created\ndata: {"response":{"id":"resp_1","created_at":9}}\n\n'
    progress = Progress(lambda: 0.0)
    progress.push(event + mark(0, [1], complete=False, last=False))
    continuation = progress.continuation(0.0)
    assert continuation is not None and (continuation.id, continuation.created) == ("resp_1", 9)


def test_the_variant_of_each_answer_is_kept_and_the_client_does_not_see_it():
    progress = Progress(lambda: 0.0)
    stream = EVENT + variant_mark(1, "m:int8") + mark(1, [4], complete=False, last=False)
    assert b"".join(progress.push(bytes([byte])) for byte in stream) == EVENT
    continuation = progress.continuation(0.0)
    assert continuation is not None
    assert [answer.variant for answer in continuation.answers] == ["", "m:int8"]


def test_events_without_their_mark_are_held_back_and_dropped_with_the_worker():
    progress = Progress(lambda: 0.0)
    assert progress.push(EVENT + mark(0, [1], complete=False, last=False) + EVENT) == EVENT
    progress.lost()
    continuation = progress.continuation(0.0)
    assert continuation is not None
    assert continuation.answers == [EmittedAnswer([1], False, False, 0.0, 0.0)]
    assert progress.push(EVENT + mark(0, [2], complete=False, last=False)) == EVENT


@pytest.mark.parametrize(("code", "retriable"), [("engine_died", True), ("invalid_value", False)])
def test_an_error_at_the_end_of_a_stream_says_whether_another_worker_may_go_on(code: str, retriable: bool):
    progress = Progress(lambda: 0.0)
    event = b'data: {"error":{"message":"m","type":"t","param":null,"code":"%b"}}\n\n' % code.encode()
    stream = EVENT + mark(0, [1], complete=False, last=False) + event + error_mark(code)
    assert progress.push(stream) == (EVENT if retriable else EVENT + event)
    assert (progress.error, progress.ended) == (code, not retriable)


def test_a_malformed_mark_is_an_error():
    with pytest.raises(ValueError):
        Progress(lambda: 0.0).push(EVENT + b":~x y\n\n")
