"""The objectives that a machine can promise: the tiers' defaults, from the step times of its models.

The one home of this rule: the server asks at its start, and the replay, the simulator and the benchmarks ask
too. Pure; it knows no configuration, whose tables replace a tier's objective (`config.tiers_of`).
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import structs

from stretto.config import TIERS, Tier
from stretto.engine.step_time import StepCost
from stretto.types import Objective

LONG_PROMPT = 4100  # tokens; nearly all prompts of the Azure conversations are shorter
PROMPTS = {"priority": 3, "default": 6}  # a first token may take as long as so many long prompts alone
PAUSES = {"priority": 5, "default": 10}  # a pause may be so many times as long as that of a stream alone


def default_tiers(costs: Iterable[StepCost]) -> dict[str, Tier]:
    """The tiers of a server whose models have these step times, which the fastest of them can promise.

    They are those of `config.TIERS`, which follow what people notice, and where that is too little for a slow
    machine, a multiple of what a long prompt or a stream takes there alone. The fastest model counts, because
    a ladder answers with it when the others would be late. Without models: `config.TIERS`.
    """
    costs = list(costs)
    prompt_ms = min((cost.base + cost.prefill(0, LONG_PROMPT) for cost in costs), default=0.0)
    pause_ms = min((cost.decodes(1, LONG_PROMPT // 4) for cost in costs), default=0.0)
    return {
        name: structs.replace(
            tier,
            objective=_relaxed(
                tier.objective, PROMPTS.get(name, 0) * prompt_ms, PAUSES.get(name, 0) * pause_ms
            ),
        )
        for name, tier in TIERS.items()
    }


def _relaxed(objective: Objective, ttft_ms: float, itl_ms: float) -> Objective:
    """The objective with limits of at least so many milliseconds, where it has limits."""
    return structs.replace(
        objective,
        ttft_ms=None if objective.ttft_ms is None else max(objective.ttft_ms, ttft_ms),
        itl_ms=None if objective.itl_ms is None else max(objective.itl_ms, itl_ms),
    )
