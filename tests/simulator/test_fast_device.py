"""An overload of a fast device: objectives are short, answers take much of its time, and slots run out."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.fast_device import KNOWN, closed_loop, played
from stretto.config import TIERS
from stretto.engine.core import LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.admission import predict, snapshot
from stretto.engine.scheduler.estimate import Estimate, ends_of
from stretto.engine.scheduler.lengths import AnswerLengths, ArrivalRate
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence
from stretto.engine.step_time import StepTime
from stretto.simulator.overload import OverloadWorld
from stretto.simulator.report import RequestOutcome
from stretto.types import Objective, Request, Sampling

CAPACITY = 53.0  # requests per second of 512 and 128 tokens
SECONDS = 15.0


@cache
def outcomes_of(rate: float, slots: int, blocks: int = 26000) -> list[RequestOutcome]:
    """What became of the requests that came for `SECONDS`."""
    return played(rate, SECONDS, slots=slots, blocks=blocks).outcomes()


@pytest.mark.parametrize(
    ("rate", "slots", "blocks"),
    [(65.0, 256, 26000), (100.0, 128, 26000), (100.0, 512, 26000), (65.0, 512, 8000)],
)
def test_what_cannot_be_done_is_refused_and_the_rest_is_on_time(rate: float, slots: int, blocks: int):
    """With 256 slots 14 of 53 were on time in each second of a minute, and half of the streams paused for
    more than 40 s: newcomers took the slots of streams that were late, and those took them back."""
    outcomes = outcomes_of(rate, slots, blocks)
    good = sum(one.good for one in outcomes)
    assert good >= 0.9 * CAPACITY * SECONDS
    served = [one for one in outcomes if one.count]
    assert good >= 0.97 * len(served)
    assert max(max(one.gaps, default=0.0) for one in served) <= 3500
    assert max(one.first - one.request.arrival for one in served) <= 3 * 0.5


def test_what_can_be_done_is_not_refused():
    assert all(one.good for one in outcomes_of(0.85 * CAPACITY, 256))


@pytest.mark.parametrize(
    ("at_once", "count", "least", "longest_ms"),
    [(16, 96, 2600, 8), (64, 192, 5500, 11), (256, 512, 7200, 40)],
)
def test_steps_of_equal_length_serve_most_tokens(at_once: int, count: int, least: float, longest_ms: float):
    """Whole prompts in some steps and none in others give 2,496, 5,417 and 7,145 tokens/s, and gaps of up to
    64 ms."""
    world = closed_loop(at_once, count)
    outcomes = world.outcomes()
    assert sum(one.count for one in outcomes) / world.clock() >= least
    assert max(max(one.gaps) for one in outcomes) <= longest_ms


def late_of_four(estimate: Estimate) -> int:
    """How many of four prompts would be late that take 10 ms each and are due in 0.5 s."""
    return len(estimate.defer({1.0: [(0.5, 10.0, 0.0)] * 4}, lambda _: 0.0, 0.0).late_by)


def test_a_prompt_beyond_the_free_places_waits_until_a_sequence_ends():
    assert late_of_four(Estimate(KNOWN, 1.0)) == 0
    # Sequences that end in a second leave places to 50 ms of prompts: each prompt waits 0.2 s.
    assert late_of_four(Estimate(KNOWN, 1.0, places=2, place_pace=50.0)) == 0, "two start at once"
    assert late_of_four(Estimate(KNOWN, 1.0, places=1, place_pace=50.0)) == 1
    assert late_of_four(Estimate(KNOWN, 1.0, places=0, place_pace=50.0)) == 2
    assert late_of_four(Estimate(KNOWN, 1.0, places=0, place_pace=50.0, place_s=0.2)) == 3, "all begin later"
    assert late_of_four(Estimate(KNOWN, 1.0, places=3, place_pace=50.0, place_s=0.5)) == 1


def test_the_outlook_counts_all_prompts_that_wait_though_it_names_the_first_ones():
    """It counted the first 64: on a fast device they are a second's work, so a queue of a minute seemed short
    and everybody was admitted and late."""
    clock = VirtualClock()
    runner = NullRunner(null_info(context=16384, blocks=26000), cost=KNOWN, sleep=clock.sleep)
    model = LoadedModel(runner, StepTime(KNOWN, [0.05] * 16))
    world = OverloadWorld(clock, [model], Limits(512, 8192, TIERS), SCHEDULES["deadline"])
    for ident in range(1, 1001):
        world.submit(one_token(ident, 0.0))
    world.step()
    seen = snapshot(world.engine.context("null"), 1000)
    assert sum(map(len, seen.prompts.values())) <= 65
    left = len(world.engine.models["null"].queues.waiting) * KNOWN.prefill(0, 512)
    assert sum(ms for jobs in seen.prompts.values() for _, ms, _ in jobs) == pytest.approx(left, rel=0.05)
    told = predict(one_token(1001, clock()), seen, TIERS["default"].weight, clock())
    world.run()
    assert told.ttft_ms == pytest.approx(clock() * 1e3, rel=0.15)


def one_token(ident: int, at: float) -> Request:
    return Request(
        id=ident,
        model="null",
        prompt=(ident,) * 512,
        arrival=at,
        sampling=Sampling(max_tokens=1),
        objective=Objective(ttft_ms=60_000, on_miss="late"),
        tier="default",
    )


def test_places_become_free_in_the_order_in_which_answers_end():
    assert ends_of([], 10.0) == ()
    assert ends_of([100, 50], 10.0) == (0.5, 1.0)
    assert ends_of([5000] * 100 + [16] * 16, 10.0) == (0.16,) * 16


def test_an_answer_longer_than_usual_is_expected_to_become_half_as_long_again():
    lengths = AnswerLengths(usual=100)
    ran = {40: 60, 90: 45, 200: 100, 395: 5}
    sequences = [
        Sequence.of(
            Request(id=1, model="null", prompt=(1,), arrival=0.0, sampling=Sampling(max_tokens=400)), 8192
        )
        for _ in ran
    ]
    for seq, done in zip(sequences, ran, strict=True):
        seq.tokens.extend([2] * done)
    assert lengths.left(sequences) == list(ran.values())


def test_how_much_comes_is_known_sooner_where_prompts_are_short():
    """An overload of short prompts took 7 s to be noticed, which is 14 times their objective."""
    known: dict[float, float] = {}
    for ms in (12.0, 250.0):
        rates, now = ArrivalRate(10.0), 0.0
        while now < 60.0:
            busy = 2.0 if now > 50.0 else 0.5
            now += ms / 1e3 / busy
            rates.offer(1.0, ms)
            rates.fade(now)
            if now > 50.0 and rates.recent((1.0,))[1.0] > 1.0:
                known.setdefault(ms, now - 50.0)
    assert known[12.0] < 0.8
    assert 2.0 < known[250.0] < 6.0, "few long prompts say little, so a burst is no overload"
