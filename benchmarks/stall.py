"""Measures in real time how much a long prompt delays the streams beside it, with each schedule in turn.

Four streams with an ITL objective of 150 ms run when a prompt of 2,000 tokens arrives.

`python benchmarks/stall.py MODEL_DIR --quantise int8 --rounds 2`
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from random import Random
from statistics import quantiles

import msgspec

from stretto.config import EngineConfig, ModelConfig
from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.calibrate import known_times
from stretto.engine.runners.factory import ModelLoader
from stretto.engine.runners.interface import Runner
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence
from stretto.engine.step_time import StepTime
from stretto.hardware import cache_folder
from stretto.types import Objective, Request, Sampling, StepStats, TokenEvent

STREAMS, PROMPT, LIMITS = 4, 2000, Limits(16, 512)
LONG = 99


def main() -> None:
    options = _arguments()
    config = EngineConfig(
        models=(ModelConfig(name="model", path=options.model, quantise=options.quantise),),
        context=4096,
        kv_bytes=2**30,
    )
    loader = ModelLoader(config)
    folder = cache_folder() / "step-times"
    times = known_times(loader.runners[0], LIMITS, machine=loader.machine, folder=folder)
    print(json.dumps({"machine": loader.machine, "cost": msgspec.to_builtins(times.cost)}))
    for _ in range(options.rounds):
        for schedule in ("fcfs", "deadline"):
            fresh = StepTime(times.cost, list(times.errors))
            print(
                json.dumps(
                    {"schedule": schedule} | _round(loader.runners[0], schedule, fresh, options.itl_ms)
                )
            )


def _round(runner: Runner, schedule: str, times: StepTime, itl_ms: float) -> dict[str, object]:
    """Run four streams, and send the long prompt when each has ten tokens. Report the gaps after it."""
    times_of: dict[int, list[float]] = {}

    def emit(events: list[TokenEvent], stats: StepStats | None) -> None:
        now = time.monotonic()
        for event in events:
            if event.token is not None:
                times_of.setdefault(event.id, []).append(now)

    engine = EngineCore(
        [LoadedModel(runner, times)],
        limits=LIMITS,
        schedule=SCHEDULES[schedule],
        clock=time.monotonic,
        emit=emit,
    )
    for ident in range(1, STREAMS + 1):
        engine.submit(_sequence(ident, 60, 400, Objective(ttft_ms=10_000, itl_ms=itl_ms)))
    sent = 0.0
    while LONG not in times_of:
        if not sent and len(times_of) == STREAMS and all(len(stamps) >= 10 for stamps in times_of.values()):
            sent = time.monotonic()
            engine.submit(_sequence(LONG, PROMPT, 2, Objective(ttft_ms=60_000)))
        engine.step()
    for ident in range(1, STREAMS + 1):
        engine.cancel(ident)
    while not engine.idle:
        engine.step()
    gaps = [
        [(later - earlier) * 1e3 for earlier, later in pairwise(stamps) if later > sent]
        for ident, stamps in sorted(times_of.items())
        if ident != LONG
    ]
    every = [gap for stream in gaps for gap in stream]
    return {
        "longest_gap_ms": [round(max(stream), 1) for stream in gaps],
        "p99_gap_ms": round(quantiles(every, n=100)[98], 1),
        "beyond": f"{sum(gap > itl_ms for gap in every)} of {len(every)}",
        "long_ttft_s": round(times_of[LONG][0] - sent, 2),
        "model_error": round(times.error, 3),
    }


def _sequence(ident: int, prompt: int, tokens: int, objective: Objective) -> Sequence:
    rng = Random(ident)
    request = Request(
        id=ident,
        model="model",
        prompt=tuple(rng.randrange(1000, 100_000) for _ in range(prompt)),
        arrival=time.monotonic(),
        sampling=Sampling(max_tokens=tokens, ignore_eos=True, temperature=0.0),
        objective=objective,
    )
    return Sequence.of(request, 4096)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--quantise", choices=["int8", "int4"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--itl-ms", type=float, default=150.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
