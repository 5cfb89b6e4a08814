"""The tiers' default objectives follow the machine, and are never tighter than what people notice."""

from __future__ import annotations

import pytest

from stretto.config import TIERS, tiers_of
from stretto.engine.scheduler.default_tiers import LONG_PROMPT, default_tiers
from stretto.engine.step_time import StepCost
from stretto.simulator.setting import CPU_TIERS, SMALL_CPU, Setting
from stretto.types import Objective

GPU = StepCost(base=4.0, per_decode=0.02, per_prefill=0.02, per_key=1e-6, per_pair=1e-8)


def test_a_fast_machine_keeps_the_objectives_that_people_notice() -> None:
    assert default_tiers([GPU]) == default_tiers([StepCost()]) == default_tiers([]) == TIERS


def test_a_slow_machine_promises_what_a_long_prompt_and_a_stream_take_there() -> None:
    tiers = default_tiers([SMALL_CPU])
    alone_ms = SMALL_CPU.base + SMALL_CPU.prefill(0, LONG_PROMPT)
    assert tiers["priority"].objective.ttft_ms == pytest.approx(3 * alone_ms)
    assert tiers["default"].objective.ttft_ms == pytest.approx(6 * alone_ms)
    assert tiers["priority"].objective.itl_ms == pytest.approx(5 * SMALL_CPU.decodes(1, LONG_PROMPT // 4))
    assert tiers["flex"] == TIERS["flex"], "it has no deadlines on any machine"
    assert all(tiers[name].weight == TIERS[name].weight for name in TIERS)


def test_each_limit_is_relaxed_by_itself() -> None:
    """This machine reads prompts slowly and decodes fast."""
    objective = default_tiers([StepCost(base=10.0, per_decode=1.0, per_prefill=5.0)])["priority"].objective
    assert (objective.ttft_ms, objective.itl_ms) == (
        pytest.approx(3 * 20_510),
        TIERS["priority"].objective.itl_ms,
    )


def test_the_fastest_model_counts_and_a_table_of_the_configuration_replaces_its_tier() -> None:
    assert default_tiers([SMALL_CPU, GPU]) == TIERS
    tiers = tiers_of({"priority": Objective(ttft_ms=800)}, default_tiers([SMALL_CPU]))
    assert tiers["priority"].objective == Objective(ttft_ms=800)
    assert tiers["default"] == default_tiers([SMALL_CPU])["default"]


def test_the_replay_uses_the_same_defaults() -> None:
    assert Setting().tiers == CPU_TIERS == default_tiers([SMALL_CPU])
