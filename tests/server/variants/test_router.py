"""Which variant a request gets, from snapshots of the engine."""

from __future__ import annotations

from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from stretto.config import TIERS, ModelConfig
from stretto.engine.scheduler.admission import Outlook
from stretto.ladder.estimate import BUCKETS, FEATURES, features
from stretto.ladder.learning.bandit import context
from stretto.ladder.learning.feedback import FeedbackStore, MadeChoice, Reward
from stretto.ladder.learning.learner import Learner
from stretto.ladder.lengths import LengthBin, LengthModel, OutputLengths
from stretto.ladder.serving import ServedLadder
from stretto.server.variants.router import LadderRequest, VariantRouter
from stretto.types import Objective, Request
from tests.ladder.tiny_ladder import ladder_of, variant
from tests.server.fake_engine import info
from tests.server.variants.snapshots import FULL, INT8, SMALL, outlook

NAMES = ("full", "int8", "small")
NOW = 1000.0
QUESTION = "What is 1 + 2?"


def learner(**votes: float) -> Learner:
    """What 60 rewards for each of these variants have taught, for questions like those here."""
    made = Learner(FeedbackStore(), {"m": [f"m:{name}" for name in NAMES]}, np.random.default_rng(0))
    described = context(features(QUESTION))
    for number in range(60):
        for name, reward in votes.items():
            choice = MadeChoice("m", f"m:{name}", (f"m:{name}",), (1.0,), (0.9,), described)
            made.remember("local", f"{name} {number}", choice, NOW)
            made.reward("local", f"{name} {number}", Reward(reward), NOW)
    return made


def router(outlooks: dict[str, Outlook], context: int = 4096, learnt: Learner | None = None) -> VariantRouter:
    models = {name: ModelConfig(name=f"m:{name}", path=name) for name in NAMES}
    served = ServedLadder("m", Path(), ladder_of(*map(variant, NAMES)), models)
    infos = {f"m:{name}": info(f"m:{name}", vocab=99, context=context) for name in NAMES}
    return VariantRouter(served, TIERS, lambda: outlooks, lambda: infos, learnt or learner())


def idle() -> dict[str, Outlook]:
    return {"m:full": outlook(FULL), "m:int8": outlook(INT8), "m:small": outlook(SMALL)}


def asked(**fields: Any) -> LadderRequest:
    usual: dict[str, Any] = {
        "question": QUESTION,
        "prompt_tokens": 100,
        "longest_prompt": 100,
        "arrival": NOW,
        "max_tokens": 10,
        "objective": Objective(ttft_ms=5000),
    }
    return LadderRequest(**(usual | fields))


def test_an_idle_machine_answers_with_the_best_variant() -> None:
    placed = router(idle()).place(asked(), NOW)
    assert (placed.model, placed.reason) == ("m:full", "best")
    assert placed.lighter == ("m:int8", "m:small")


@pytest.mark.parametrize(
    ("ttft_ms", "model", "reason"),
    [
        (130, "m:full", "best"),
        (110, "m:int8", "deadline"),
        (20, "m:small", "deadline"),
        (5, "m:small", "late"),
    ],
)
def test_a_tighter_deadline_gets_a_lighter_variant(ttft_ms: float, model: str, reason: str) -> None:
    placed = router(idle()).place(asked(objective=Objective(ttft_ms=ttft_ms)), NOW)
    assert (placed.model, placed.reason) == (model, reason)


def test_time_that_has_passed_counts() -> None:
    placed = router(idle()).place(asked(objective=Objective(ttft_ms=130)), NOW + 0.05)
    assert placed.model == "m:int8"


def test_the_queue_of_a_variant_counts_and_so_does_that_of_the_others() -> None:
    prompts = {2.0: [(NOW + 0.32, 300.0, 1.0)]}
    busy = idle() | {"m:full": outlook(FULL, jobs=prompts)}
    asks = asked(objective=Objective(ttft_ms=400))
    assert router(busy).place(asks, NOW).model == "m:int8", "its own queue makes the top late"
    elsewhere = idle() | {"m:int8": outlook(INT8, jobs=prompts)}
    tight = asked(objective=Objective(ttft_ms=330))
    assert router(idle()).place(tight, NOW).model == "m:full"
    fast = asked(objective=Objective(ttft_ms=330), prompt_tokens=155)
    assert router(elsewhere).place(fast, NOW).model == "m:small", "variants take turns on one device"


def test_what_was_sent_since_the_snapshot_counts() -> None:
    outlooks = idle()
    waits = Request(id=1, model="m:full", prompt=(0,) * 200, arrival=NOW, objective=Objective(ttft_ms=300))
    asks = asked(objective=Objective(ttft_ms=310))
    assert router(outlooks).place(asks, NOW).model == "m:full"
    outlooks["m:full"].sent(waits)
    assert router(outlooks).place(asks, NOW).model == "m:int8"


def test_streams_of_any_variant_slow_every_other_one_down() -> None:
    streams: dict[str, Any] = {"streams": 4, "itl_ms": 250.0, "load": 0.02}
    busy = idle() | {"m:int8": outlook(INT8, **streams)}
    asks = asked(objective=Objective(itl_ms=25))
    assert router(idle()).place(asks, NOW).model == "m:full"
    assert router(busy).place(asks, NOW).model == "m:int8", "a step of the top waits for one of int8: 31 ms"


def test_a_stream_that_would_crowd_out_others_is_late() -> None:
    full = outlook(FULL, streams=8, itl_ms=30.0, load=0.25)
    objective = Objective(itl_ms=250, on_miss="reject")
    others = {"m:int8": outlook(INT8, elsewhere=0.92), "m:small": outlook(SMALL, elsewhere=0.92)}
    placed = router(others | {"m:full": full}).place(asked(objective=objective), NOW)
    assert placed.model is None and placed.late and placed.retry_after == pytest.approx(0.05)


def test_the_preference_decides_among_those_on_time() -> None:
    assert router(idle()).place(asked(prefer="latency"), NOW).model == "m:small"
    assert router(idle()).place(asked(prefer="energy"), NOW).model == "m:small"
    floor = Objective(ttft_ms=5000, min_quality=0.8)
    placed = router(idle()).place(asked(prefer="energy", objective=floor), NOW)
    assert (placed.model, placed.reason) == ("m:int8", "floor"), "0.85 is sure"
    assert placed.lighter == ("m:small",), "with degrade, time goes before quality"


@pytest.mark.parametrize(
    ("on_miss", "model", "reason", "lighter"),
    [
        ("degrade", "m:small", "below_floor", ()),
        ("late", "m:int8", "late", ()),
        ("reject", None, "late", ()),
    ],
)
def test_on_miss_decides_when_floor_and_deadline_contradict(
    on_miss: Any, model: str | None, reason: str, lighter: tuple[str, ...]
) -> None:
    objective = Objective(ttft_ms=20, min_quality=0.8, on_miss=on_miss)
    placed = router(idle()).place(asked(objective=objective), NOW)
    assert (placed.model, placed.reason, placed.lighter) == (model, reason, lighter)
    assert placed.late is (on_miss == "reject")


def test_a_floor_that_no_variant_reaches_is_refused_on_reject_only() -> None:
    out_of_reach = Objective(ttft_ms=5000, min_quality=0.99, on_miss="reject")
    placed = router(idle()).place(asked(objective=out_of_reach), NOW)
    assert placed.model is None and not placed.late and placed.best_quality == pytest.approx(0.9)
    degraded = structs.replace(out_of_reach, on_miss="degrade")
    assert router(idle()).place(asked(objective=degraded), NOW)[:2] == ("m:full", "below_floor")


def test_a_request_never_moves_below_its_floor_unless_it_may_degrade() -> None:
    floor = Objective(ttft_ms=5000, min_quality=0.8, on_miss="late")
    assert router(idle()).place(asked(objective=floor), NOW).lighter == ("m:int8",)


def test_without_a_snapshot_quality_alone_decides() -> None:
    placed = router({"m:full": Outlook(TIERS)}).place(asked(), NOW)
    assert (placed.model, placed.reason) == ("m:full", "no_forecast")


def test_a_variant_whose_context_is_too_short_is_not_chosen() -> None:
    made = router(idle(), context=64)
    assert made.place(asked(longest_prompt=100), NOW).model == "m:full", "as the request was checked"
    assert made.place(asked(longest_prompt=20, objective=Objective(ttft_ms=20)), NOW).model == "m:small"


def test_a_named_variant_is_judged_alone() -> None:
    floor = Objective(min_quality=0.8, on_miss="reject")
    assert router(idle()).place(asked(only="m:small", objective=floor), NOW).model is None
    placed = router(idle()).place(asked(only="m:int8", objective=floor), NOW)
    assert (placed.model, placed.reason, placed.lighter) == ("m:int8", None, ())


def test_more_work_than_the_top_can_do_goes_to_lighter_variants() -> None:
    made = router(idle())
    models: list[str | None] = []
    for number in range(400):  # 20 a second; the top does about 3
        placed = made.place(asked(arrival=NOW + number / 20, objective=Objective()), NOW + number / 20)
        models.append(placed.model)
        made.reprice(NOW + number / 20)
    assert models[0] == "m:full"
    assert set(models[-100:]) <= {"m:int8", "m:small"}
    made.reprice(NOW + 100)
    assert made.place(asked(arrival=NOW + 100, objective=Objective()), NOW + 100).model == "m:full"


def test_without_feedback_a_choice_is_certain_and_recorded() -> None:
    made = router(idle()).place(asked(objective=Objective(ttft_ms=110)), NOW).made
    assert made is not None
    assert (made.model, made.variant) == ("m", "m:int8")
    assert made.variants == ("m:full", "m:int8", "m:small")
    assert made.propensities == (0.0, 1.0, 0.0) and made.expected == (0.95, 0.9, 0.5)


def test_feedback_changes_the_choice_of_its_tenant_alone() -> None:
    learnt = learner(full=0.0, int8=0.9)
    made = router(idle(), learnt=learnt)
    models = [made.place(asked(), NOW).model for _ in range(200)]
    assert models.count("m:int8") > 180
    assert {made.place(asked(tenant="other"), NOW).model for _ in range(50)} == {"m:full"}


def test_feedback_acts_inside_the_feasible_set() -> None:
    made = router(idle(), learnt=learner(full=1.0, int8=0.1, small=1.0))
    tight = asked(objective=Objective(ttft_ms=110))
    found = [made.place(tight, NOW) for _ in range(300)]
    assert {each.model for each in found} <= {"m:int8", "m:small"}, "the top would be late"
    assert [each.model for each in found].count("m:small") > 270
    explored = [each for each in found if each.reason == "explored"]
    assert 0 < len(explored) < 30
    for each in found:
        assert each.made is not None and each.made.propensities[0] == 0.0
        assert sum(each.made.propensities) == pytest.approx(1.0) and min(each.made.propensities[1:]) > 0.0


def test_feedback_moves_no_floor_and_no_preference() -> None:
    made = router(idle(), learnt=learner(full=0.0, small=0.9))
    floor = asked(objective=Objective(ttft_ms=5000, min_quality=0.8))
    assert {made.place(floor, NOW).model for _ in range(200)} == {"m:int8"}, "the others are not sure of 0.8"
    for prefer in ("energy", "latency"):
        found = [made.place(asked(prefer=prefer), NOW) for _ in range(50)]
        assert {each.model for each in found} == {"m:small"}
        assert all(each.made is not None and max(each.made.propensities) == 1.0 for each in found)


def test_feedback_counts_without_a_snapshot_too() -> None:
    placed = router({"m:full": Outlook(TIERS)}, learnt=learner(full=0.0)).place(asked(), NOW)
    assert (placed.model, placed.reason) == ("m:int8", "no_forecast")
    assert placed.made is not None and placed.made.variant == "m:int8"


def test_a_decision_takes_at_most_100_us_of_processor_time() -> None:
    """Features, standings, estimates and the choice among three variants with queues."""
    prompts = {2.0: [(NOW + 1.0 + k / 10, 30.0, 1.0) for k in range(30)]}
    busy = {
        f"m:{name}": outlook(cost, jobs=prompts)
        for name, cost in zip(NAMES, (FULL, INT8, SMALL), strict=True)
    }
    made, asks, best = router(busy, learnt=learner(full=0.8, int8=0.9)), asked(), 1.0
    for _ in range(20):
        started = process_time()
        for _ in range(100):
            made.place(asks, NOW)
        best = min(best, (process_time() - started) / 100)
    assert best < 250e-6, "five times the usual"


def test_the_variant_that_has_read_the_prompt_answers_unless_it_is_late_or_another_is_surely_better() -> None:
    read: dict[str, Any] = {"cached": {"m:int8": 90}}
    placed = router(idle()).place(asked(**read), NOW)
    assert (placed.model, placed.reason) == ("m:int8", "read_ahead"), "0.9 is not below the top's 0.9 to 1"
    assert placed.lighter == ("m:small",)
    high = Objective(ttft_ms=5000, min_quality=0.88)
    assert router(idle()).place(asked(objective=high, **read), NOW).model == "m:full"
    small = router(idle()).place(asked(cached={"m:small": 90}), NOW)
    assert (small.model, small.reason) == ("m:full", "best"), "the top is sure to be better"
    for prefer in ("energy", "latency"):
        assert router(idle()).place(asked(prefer=prefer, **read), NOW).model == "m:small"


def test_only_what_is_left_to_read_counts() -> None:
    soon = asked(objective=Objective(ttft_ms=40))
    assert router(idle()).place(soon, NOW).model == "m:small"
    placed = router(idle()).place(structs.replace(soon, cached={"m:full": 90}), NOW)
    assert (placed.model, placed.reason) == ("m:full", "best"), "10 tokens and a step take 30 ms"


def test_feedback_explores_nothing_when_the_prompt_is_read() -> None:
    learnt = learner(full=0.6, int8=0.6)
    models = [router(idle(), learnt=learnt).place(asked(cached={"m:full": 90}), NOW) for _ in range(50)]
    assert {(placed.model, placed.reason) for placed in models} == {("m:full", "best")}


def test_a_prompt_with_a_short_answer_gets_a_better_variant_in_the_same_time() -> None:
    asks = tuple(float(index == 3) for index in range(FEATURES))  # a question has the score 1, else 0
    bins = LengthBin(0.0, 150.0, 200.0, 250.0, 90), LengthBin(1.0, 2.0, 3.0, 4.0, 90)
    made = router(idle())
    made.lengths = OutputLengths(100, LengthModel(asks, (0.0,) * BUCKETS, bins))
    total = Objective(total_ms=1000)
    short = made.place(asked(objective=total, max_tokens=None), NOW)
    long = made.place(asked(objective=total, max_tokens=None, question="Add 1 and 2 in steps."), NOW)
    assert (short.model, short.expected_tokens) == ("m:full", 2)
    assert (long.model, long.expected_tokens) == ("m:small", 150)
    for _ in range(20):
        made.lengths.observe("local", 600, long.fitted)
    again = made.place(asked(objective=total, max_tokens=None, question="Add 1 and 2 in steps."), NOW)
    assert again.reason == "late" and again.expected_tokens == 450
