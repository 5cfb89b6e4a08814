"""Measures the error of the step-time model: calibrates it on a checkpoint, then serves a mixed load.

The time of every step is compared with three predictions: by the calibration alone, by the model as refined
so far, and by one fit to all steps afterwards.

`python benchmarks/steptime.py MODEL_DIR --quantise int8 --seconds 40 --save FILE`
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import NamedTuple

import msgspec

from stretto.config import EngineConfig, ModelConfig
from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.calibrate import CALIBRATION_STEPS, Calibrator, calibrate, fit, fits
from stretto.engine.runners.factory import ModelLoader
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence
from stretto.engine.step_time import StepCost, StepLoad
from stretto.types import Objective, Request, Sampling, StepStats, TokenEvent

CLIENTS = 8  # most requests at once
SLOW = Objective(ttft_ms=20_000, itl_ms=500)


class MeasuredStep(NamedTuple):
    """A step of the mixed load: its load, its milliseconds and the prediction just before it."""

    load: StepLoad
    ms: float
    predicted: float


def main() -> None:
    options = _arguments()
    config = EngineConfig(
        models=(ModelConfig(name="model", path=options.model, quantise=options.quantise),),
        context=4096,
        kv_bytes=2**30,
    )
    loader = ModelLoader(config)
    runner, limits = loader.runners[0], Limits(64, 512)
    started = time.perf_counter()
    possible = [step for step in CALIBRATION_STEPS if fits(step, runner, limits)]
    model = calibrate(Calibrator(runner).run, possible)
    calibrated, took = model.cost, time.perf_counter() - started
    steps: list[MeasuredStep] = []

    def emit(events: list[TokenEvent], stats: StepStats | None) -> None:
        pass

    engine = EngineCore(
        [LoadedModel(runner, model)],
        limits=limits,
        schedule=SCHEDULES["deadline"],
        clock=time.monotonic,
        emit=emit,
    )
    (state,) = engine.models.values()
    observe = model.observe

    def watch(load: StepLoad, ms: float) -> None:
        steps.append(MeasuredStep(load, ms, state.history.times.cost(load)))
        observe(load, ms)

    model.observe = watch  # type: ignore[method-assign]
    _serve(engine, runner.info.vocab, options.seconds)
    whole = fit([(one.load, one.ms) for one in steps])
    report = {
        "machine": loader.machine,
        "kernels": runner.info.kernels,
        "calibration_s": round(took, 2),
        "calibrated": msgspec.to_builtins(calibrated),
        "refined": msgspec.to_builtins(state.history.times.cost),
        "fitted": msgspec.to_builtins(whole),
        "steps": len(steps),
        "error_calibrated": _errors(steps, calibrated),
        "error_fitted": _errors(steps, whole),
        "error_refined": _spread([abs(one.ms / one.predicted - 1) for one in steps]),
        "by_kind_refined": _by_kind(steps),
    }
    print(json.dumps(report, indent=2))
    if options.save:
        options.save.write_bytes(msgspec.json.format(msgspec.json.encode(whole)))


def _serve(engine: EngineCore, vocab: int, seconds: float) -> None:
    """Serve a mixed load: prompts of 20 to 1,500 tokens and answers of 8 to 120, at random times."""
    rng, ident, until = Random(0), 0, time.monotonic() + seconds
    pause = 0.0
    while (now := time.monotonic()) < until:
        if now >= pause and sum(1 for _ in _active(engine)) < CLIENTS:
            ident += 1
            count = min(max(int(rng.lognormvariate(5.0, 1.2)), 20), 1500)
            request = Request(
                id=ident,
                model="model",
                prompt=tuple(rng.randrange(vocab) for _ in range(count)),
                arrival=now,
                sampling=Sampling(max_tokens=rng.randrange(8, 120), ignore_eos=True, temperature=0.0),
                objective=SLOW,
            )
            engine.submit(Sequence.of(request, 4096))
            pause = now + rng.expovariate(0.7)
        if not engine.step():
            time.sleep(0.005)


def _active(engine: EngineCore) -> list[Sequence]:
    (state,) = engine.models.values()
    return [*state.queues.waiting, *state.queues.running]


def _errors(steps: list[MeasuredStep], cost: StepCost) -> dict[str, float]:
    return _spread([abs(one.ms / cost(one.load) - 1) for one in steps])


def _by_kind(steps: list[MeasuredStep]) -> dict[str, dict[str, float]]:
    kinds = {
        "decode alone": [one for one in steps if not one.load.prefill],
        "prompt alone": [one for one in steps if not one.load.decode],
        "mixed": [one for one in steps if one.load.prefill and one.load.decode],
    }
    return {
        name: {"steps": len(group), **_spread([abs(one.ms / one.predicted - 1) for one in group])}
        for name, group in kinds.items()
        if len(group) > 1
    }


def _spread(errors: list[float]) -> dict[str, float]:
    return {"p50": round(median(errors), 4), "p90": round(quantiles(errors, n=10)[8], 4)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--quantise", choices=["int8", "int4"])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--save", type=Path, help="write the fitted step-time model to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
