"""Measures the scheduler's own time: planning a step, and refusing a request before any work.

The real schedules plan for the null model in virtual time, with 256 running and 1,000 waiting requests.

`python benchmarks/schedule.py --steps 400`
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from random import Random
from statistics import median, quantiles

import msgspec

from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.admission import Outlook, snapshot
from stretto.engine.scheduler.types import Limits, Plan
from stretto.engine.sequence import Sequence
from stretto.engine.step_time import StepCost, StepTime
from stretto.simulator.setting import CPU_TIERS, SMALL_CPU
from stretto.types import Objective, Request, Sampling

RUNNING, WAITING = 256, 1000
# 256 streams fit in a step.
FAST = StepCost(base=5.0, per_decode=0.02, per_prefill=0.02, per_key=1e-6, per_pair=1e-8)


def main() -> None:
    options = _arguments()
    report = {
        f"{name} {machine}": _spread(_planning(name, cost, options.steps))
        for name in SCHEDULES
        for machine, cost in (("all streams fit", FAST), ("crowded", SMALL_CPU))
    }
    report["refusal"] = _spread(_refusals(options.steps))
    print(json.dumps(report, indent=2))


def _planning(name: str, cost: StepCost, steps: int) -> list[float]:
    """The microseconds of each of `steps` plans."""
    times: list[float] = []
    plan = SCHEDULES[name]

    def timed(*arguments: object) -> Plan:
        started = time.process_time()
        decided = plan(*arguments)  # type: ignore[arg-type]
        times.append((time.process_time() - started) * 1e6)
        return decided

    engine = _engine(timed, cost)
    for _ in range(60):
        engine.step()
    (model,) = engine.models.values()
    times.clear()
    ident = 10**6
    while len(times) < steps:
        while len(model.queues.running) + len(model.queues.waiting) < RUNNING + WAITING:
            ident += 1
            engine.submit(_sequence(ident, engine))
        engine.step()
    return times


def _refusals(count: int) -> list[float]:
    """The microseconds of each of `count` admission forecasts for a busy engine."""
    engine = _engine(SCHEDULES["deadline"], FAST)
    for _ in range(60):
        engine.step()
    now, outlook = CLOCK(), Outlook(CPU_TIERS)
    outlook.see(snapshot(engine.context("null"), 10**9))
    times: list[float] = []
    for ident in range(count):
        objective = Objective(ttft_ms=1.0, on_miss="reject")
        request = Request(id=ident, model="null", prompt=(1,) * 500, arrival=now, objective=objective)
        started = time.process_time()
        forecast = outlook.forecast(request, now)
        times.append((time.process_time() - started) * 1e6)
        assert forecast is not None and not forecast.feasible
    return times


CLOCK = VirtualClock()
LIMITS = Limits(RUNNING, 512, CPU_TIERS)


def _engine(schedule: Callable[..., Plan], cost: StepCost) -> EngineCore:
    """An engine with `RUNNING` running and `WAITING` waiting sequences."""
    runner = NullRunner(null_info(context=16384, blocks=65536), cost=cost, sleep=CLOCK.sleep)
    engine = EngineCore(
        [LoadedModel(runner, StepTime(cost, [0.02] * 16))],
        limits=LIMITS,
        schedule=schedule,
        clock=CLOCK,
        emit=lambda events, stats: None,
    )
    (model,) = engine.models.values()
    for ident in range(1, RUNNING + 1):
        engine.submit(_sequence(ident, engine, prompt=16))
    while model.queues.waiting:
        engine.step()
    for ident in range(RUNNING + 1, RUNNING + WAITING + 1):
        engine.submit(_sequence(ident, engine))
    return engine


def _sequence(ident: int, engine: EngineCore, prompt: int = 0) -> Sequence:
    rng = Random(ident)
    tier = rng.choices(["priority", "default", "flex"], [0.2, 0.6, 0.2])[0]
    request = Request(
        id=ident,
        model="null",
        prompt=tuple(range(ident, ident + (prompt or rng.randrange(50, 2000)))),
        arrival=CLOCK(),
        sampling=Sampling(max_tokens=rng.randrange(300, 600), seed=ident),
        objective=msgspec.structs.replace(CPU_TIERS[tier].objective, on_miss="late"),
        tier=tier,
        tenant=f"tenant {ident % 7}",
    )
    return Sequence.of(request, 16384)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "best_us": round(min(values), 1),
        "p50_us": round(median(values), 1),
        "p90_us": round(quantiles(values, n=10)[8], 1),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    return parser.parse_args()


if __name__ == "__main__":
    main()
