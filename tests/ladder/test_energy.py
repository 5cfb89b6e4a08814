"""The energy of a token on a variant, from the figures of the ladder."""

from __future__ import annotations

from pathlib import Path

import pytest

from stretto.config import ModelConfig
from stretto.engine.step_time import StepCost
from stretto.ladder.energy import joules_by_model, token_joules
from stretto.ladder.registry import Lengths, TokenEnergy
from stretto.ladder.serving import ServedLadder
from tests.ladder.tiny_ladder import ladder_of, variant

COST = StepCost(base=3.0, per_decode=1.0, per_prefill=0.5)  # a prompt's token takes an eighth of a step
ESTIMATED, MEASURED = TokenEnergy(0.8, "estimate: 16 W"), TokenEnergy(0.8, "measured: RAPL")


def test_a_token_of_a_prompt_takes_its_part_of_a_step() -> None:
    found = token_joules(variant("full", energy=ESTIMATED, times={"here": COST}))
    assert found == (pytest.approx(0.1), 0.8, "estimate: 16 W")


def test_a_measured_figure_holds_the_prompts_of_the_evaluation() -> None:
    lengths = Lengths(prompt_p50=32, p50=4, p90=9)
    found = token_joules(variant("full", energy=MEASURED, times={"here": COST}, lengths=lengths))
    assert found is not None and found.source == "measured: RAPL"
    assert found.output == pytest.approx(0.4) and found.prompt == pytest.approx(0.05)
    assert 32 * found.prompt + 4 * found.output == pytest.approx(4 * 0.8), (
        "a usual answer takes what was measured"
    )


def test_without_step_times_only_the_answer_counts() -> None:
    assert token_joules(variant("full", energy=ESTIMATED, times={})) == (0.0, 0.8, "estimate: 16 W")


def test_what_was_not_measured_is_unknown() -> None:
    full, small = variant("full", energy=None), variant("small", energy=ESTIMATED)
    assert token_joules(full) is None
    models = {name: ModelConfig(name=f"m:{name}", path=name) for name in ("full", "small")}
    assert joules_by_model([ServedLadder("m", Path(), ladder_of(full, small), models)]).keys() == {"m:small"}
