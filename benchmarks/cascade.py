"""What a cascade gains on a ladder: quality, time and work on held-out prompts, with it and without.

Measures the smallest variant with the best one, by the threshold of the validation split, then asks a real
engine the same prompts in turn: each variant alone, the best one with draft tokens, and the cascade.

`python benchmarks/cascade.py LADDER SAMPLES [--prompts N] [--timed N] [--losses 0,0.002,0.01] [--write]`;
SAMPLES is a folder with validation.jsonl and test.jsonl. `--write` puts the cascade into ladder.json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from msgspec import structs

from stretto.config import EngineConfig, ModelConfig
from stretto.engine.core import EngineCore
from stretto.engine.runners.factory import ModelLoader, step_limits
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.sequence import Sequence
from stretto.ladder import registry, serving
from stretto.ladder.registry import Ladder, MeasuredCascade, Variant
from stretto.models import families
from stretto.optimise.answers import TextCodec
from stretto.optimise.cascade.calibrate import CascadeSide, measure_cascade
from stretto.optimise.data import Corpus, DataSample, right
from stretto.optimise.job import StepJob, load_decoder
from stretto.optimise.training.trainer import StepSession
from stretto.statistics import quantile
from stretto.types import Cascade, Request, Sampling, TokenEvent

MOST_TOKENS = 320
CPU = torch.device("cpu")


def job_of(folder: Path, ladder: Ladder, corpus: Corpus) -> StepJob:
    path = folder / ladder.variant(ladder.top).path
    session = StepSession(folder, CPU)
    return StepJob("$", path, corpus, TextCodec(path, families.read(path).eos), session, 0, MOST_TOKENS)


def side(folder: Path, variant: Variant) -> CascadeSide:
    decoder = load_decoder(folder / variant.path, CPU, variant.quantise, variant.exclude)
    return CascadeSide(variant.name, decoder, next(iter(variant.times.values())))


class Bench:
    """Two engines over all variants of a ladder, with draft tokens and without."""

    def __init__(self, folder: Path, codec: TextCodec) -> None:
        served = serving.read(ModelConfig(name="m", path=str(folder)), "cpu")
        self.names = {name: model.name for name, model in served.models.items()}
        config = EngineConfig(models=tuple(served.models.values()), kv_bytes=2**28, speculate="auto")
        self._codec, self._events = codec, list[TokenEvent]()
        self._engines = {drafts: self._engine(config, drafts) for drafts in (False, True)}
        self._ids = 0

    def _engine(self, config: EngineConfig, drafts: bool) -> EngineCore:
        models = ModelLoader(config).models()
        if not drafts:
            models = [replace(model, speculation=None) for model in models]
        return EngineCore(
            models,
            limits=step_limits(config, models),
            schedule=SCHEDULES["deadline"],
            clock=time.monotonic,
            emit=lambda events, _: self._events.extend(events),
            share=False,
        )

    def ask(
        self, sample: DataSample, variant: str, cascade: Cascade | None, drafts: bool
    ) -> tuple[float, bool]:
        """Milliseconds, and whether the answer is right."""
        self._ids, engine = self._ids + 1, self._engines[drafts]
        self._events.clear()
        request = Request(
            id=self._ids,
            model=self.names[variant],
            prompt=tuple(self._codec.prompt(sample)),
            arrival=time.monotonic(),
            sampling=Sampling(max_tokens=MOST_TOKENS, temperature=0.0),
            cascade=cascade,
        )
        engine.submit(Sequence.of(request, engine.models[request.model].runner.info.context))
        while not engine.idle:
            engine.step()
        spent = (time.monotonic() - request.arrival) * 1e3
        ids = [event.token for event in self._events if event.token is not None]
        return spent, right(sample, self._codec.text.decode(ids))


def timed(bench: Bench, samples: list[DataSample], better: str, found: MeasuredCascade) -> None:
    cascade = Cascade(bench.names[better], found.below)
    modes: dict[str, tuple[str, Cascade | None, bool]] = {
        f"{better} alone": (better, None, False),
        f"{better}, {found.begins} drafts": (better, None, True),
        f"{found.begins} alone": (found.begins, None, False),
        "cascade": (found.begins, cascade, False),
        "cascade, with drafts": (found.begins, cascade, True),
    }
    spent: dict[str, list[float]] = {name: [] for name in modes}
    good = dict.fromkeys(modes, 0)
    for mode in modes.values():
        bench.ask(samples[0], *mode)
    for sample in samples:
        for name, mode in modes.items():
            ms, is_right = bench.ask(sample, *mode)
            spent[name].append(ms)
            good[name] += is_right
    base = sum(spent[f"{better} alone"])
    print("\n| engine, one request at a time | right | mean ms | p50 | p99 | max | times as fast |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, values in spent.items():
        values.sort()
        mean = sum(values) / len(values)
        p50, p99 = quantile(values, 0.5), quantile(values, 0.99)
        print(
            f"| {name} | {good[name] / len(samples):.1%} | {mean:.1f} | {p50:.1f} | {p99:.1f}"
            f" | {values[-1]:.1f} | {base / sum(values):.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ladder", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--prompts", type=int, default=900)
    parser.add_argument("--timed", type=int, default=120)
    parser.add_argument("--losses", default="0.002")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    ladder = registry.load(options.ladder)
    read = msgspec.json.Decoder(DataSample).decode_lines
    validation, test = (
        tuple(read((options.samples / f"{name}.jsonl").read_bytes())) for name in ("validation", "test")
    )
    job = job_of(options.ladder, ladder, Corpus((), validation, test))
    small = min(ladder.variants, key=lambda each: each.bytes)
    best = min(ladder.variants, key=lambda each: (-each.quality.mean, each.bytes))
    print(f"{small.name} begins, {best.name} goes on; {best.name} alone {best.quality.mean:.1%}")
    print("| may lose | threshold | right | lost | taken over | begun by the small one |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    found: MeasuredCascade | None = None
    for loss in map(float, options.losses.split(",")):
        each = measure_cascade(
            job, side(options.ladder, small), side(options.ladder, best), options.prompts, loss
        )
        if each is None:
            print(f"| {loss:.1%} | none pays off | | | | |")
            continue
        found = found or each
        print(
            f"| {loss:.1%} | {each.below:.3f} | {each.quality.mean:.1%} | {each.loss:.2%}"
            f" | {each.escalated:.1%} | {each.begun:.1%} |",
            flush=True,
        )
    if found is None:
        return
    if options.write:
        variants = tuple(
            structs.replace(each, cascade=found if each.name == best.name else None)
            for each in ladder.variants
        )
        registry.save(structs.replace(ladder, variants=variants), options.ladder)
    if options.timed:
        timed(Bench(options.ladder, job.codec), list(test[: options.timed]), best.name, found)


if __name__ == "__main__":
    main()
