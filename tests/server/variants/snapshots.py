"""Snapshots of made-up engines."""

from __future__ import annotations

from typing import Any

from stretto.config import TIERS
from stretto.engine.scheduler.admission import Outlook, Snapshot
from stretto.engine.scheduler.estimate import Estimate
from stretto.engine.scheduler.moore_hodgson import Job
from stretto.engine.step_time import StepCost

WEIGHTS = (4.0, 2.0, 1.0, 0.0)
FULL = StepCost(20.0, 1.0, 1.0, 0.0, 0.0)  # a token in 21 ms, 100 tokens of a prompt in 100 ms
INT8 = StepCost(8.0, 0.5, 0.5, 0.0, 0.0)
SMALL = StepCost(2.0, 0.1, 0.1, 0.0, 0.0)


def outlook(cost: StepCost, *, jobs: dict[float, list[Job]] | None = None, **estimate: Any) -> Outlook:
    """An engine of this cost. `jobs`: prompts that wait, by weight; `estimate`: streams, itl_ms and load."""
    made = Outlook(TIERS)
    made.see(
        Snapshot(
            now=1000.0,
            newest=0,
            estimate=Estimate(cost, 1.0, **estimate),
            context=100 * estimate.get("streams", 0),
            prompts={weight: (jobs or {}).get(weight, []) for weight in WEIGHTS},
            inflow=dict.fromkeys(WEIGHTS, 0.0),
            lengths=dict.fromkeys(TIERS, 50),
        )
    )
    return made
