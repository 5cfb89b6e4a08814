"""Which sizes of step have a graph at start and later, and which of them serves a step."""

from __future__ import annotations

import pytest

from stretto.engine.runners.calibrate import GPU_CALIBRATION_STEPS
from stretto.engine.runners.graphs import (
    MOST_TOKENS,
    StepSize,
    decode_size,
    first_sizes,
    later_sizes,
    nearest,
)
from stretto.engine.scheduler.plan_builder import nearest_size


@pytest.mark.parametrize(("running", "most"), [(256, 8192), (6, 16), (1, 512), (40, 700)])
def test_every_step_has_a_graph_that_holds_it_before_the_first_request(running: int, most: int) -> None:
    sizes = first_sizes(running, most)
    for rows in range(1, running + 1):
        held = nearest(sizes, decode_size(rows))
        assert held is not None and held.decodes and rows <= held.rows <= running
    for tokens in range(1, min(most, MOST_TOKENS) + 1):
        for rows in {1, min(17, tokens, running), min(tokens, running)}:
            held = nearest(sizes, StepSize(tokens, rows, False))
            assert held is not None and not held.decodes and held.tokens >= tokens and held.rows >= rows


def test_later_graphs_waste_less_and_none_is_captured_twice() -> None:
    first, later = first_sizes(256, 2048), later_sizes(256, 2048)
    assert not {*first} & {*later} and len({*first, *later}) == len(first) + len(later)
    for tokens in range(64, 2049):
        held = nearest([*first, *later], StepSize(tokens, 1, False))
        assert held is not None and held.tokens <= tokens * 1.5


def test_steps_of_the_sizes_that_a_schedule_prefers_need_no_padding() -> None:
    sizes = {size.tokens for size in [*first_sizes(256, 8192), *later_sizes(256, 8192)] if not size.decodes}
    assert {nearest_size(tokens) for tokens in range(1, MOST_TOKENS + 1)} <= sizes


def test_the_smallest_graph_that_holds_a_step_serves_it() -> None:
    sizes = [StepSize(512, 64, False), StepSize(512, 16, False), StepSize(1024, 16, False), decode_size(8)]
    assert nearest(sizes, StepSize(300, 4, False)) == StepSize(512, 16, False)
    assert nearest(sizes, StepSize(300, 17, False)) == StepSize(512, 64, False)
    assert nearest(sizes, StepSize(600, 17, False)) is None
    assert nearest(sizes, decode_size(3)) == decode_size(8)
    assert nearest(sizes, decode_size(9)) is None


def test_a_gpu_is_calibrated_with_steps_that_need_no_padding() -> None:
    sizes = first_sizes(256, 8192)
    longest = 0
    for step in GPU_CALIBRATION_STEPS:
        tokens, rows = step.decodes + step.prefill, step.decodes + (step.prefill > 0)
        held = nearest(sizes, StepSize(tokens, rows, not step.prefill))
        assert held is not None and held.tokens == tokens, step
        longest = max(longest, step.prefill)
    assert longest >= 2048, "a GPU takes as long for a few tokens as for one"
