"""The step `evaluate`: what each variant gets right, how far it is from the top, its speed and its cost.

Answers come from the kernels that serve. Step times come from the engine's own calibration, of all variants
in turns.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import exp
from pathlib import Path
from random import Random
from time import perf_counter
from typing import TypeVar

import msgspec
import torch
from msgspec import Struct, structs

from stretto.config import EngineConfig, ModelConfig
from stretto.engine.runners.calibrate import Calibrator, calibrate_together, steps_of
from stretto.engine.runners.factory import ModelLoader, machine_name
from stretto.engine.runners.interface import Runner
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler.types import Limits
from stretto.engine.step_time import StepCost
from stretto.errors import StartError
from stretto.hardware import MOST_STEP_TOKENS
from stretto.ladder.estimate import QualityModel
from stretto.ladder.lengths import LengthModel
from stretto.ladder.registry import Lengths, QualityInterval, TokenEnergy
from stretto.models.decoder import Decoder
from stretto.optimise.answers import Ids, TextScore, generate, mean_kl, read_scores
from stretto.optimise.data import DataSample, groups, right
from stretto.optimise.estimates.lengths import fitted_lengths
from stretto.optimise.estimates.quality import fitted
from stretto.optimise.job import StepJob, load_decoder
from stretto.optimise.recipe import EvaluateStep
from stretto.optimise.training.trainer import write_whole
from stretto.statistics import quantile, wilson

log = logging.getLogger(__name__)
KeptStruct = TypeVar("KeptStruct", bound=Struct)
LIMITS = Limits(256, MOST_STEP_TOKENS)
RESAMPLES = 1000
KV_BYTES = 256 * 2**20  # enough to calibrate with; the cache of answers is the evaluation's own
RAPL = Path("/sys/class/powercap")
CORE_WATTS = 8.0  # of a busy core with its share of memory: typical of servers, for estimates only


@dataclass(frozen=True, slots=True)
class Subject:
    """A variant to measure."""

    name: str
    path: Path
    config: ModelConfig


class Measured(Struct, frozen=True, kw_only=True):
    """All that was measured of one variant. `key`: of what it depends on.

    `rights`: whether each answer was right, in the order of the prompts; empty for plain text. `similar`:
    exp(-KL from the top) of each text. `cost` and estimated energy are filled in by `timed`; `energy` before
    that is what was measured on `machine`, which gave the answers.
    """

    key: str
    name: str
    bytes: int
    rights: list[bool]
    similar: list[float]
    replies: list[str]
    quality: QualityInterval
    tasks: dict[str, dict[str, QualityInterval]]
    kl: float
    same_top1: float
    perplexity: float | None
    machine: str
    cost: StepCost = StepCost()
    energy: TokenEnergy | None
    lengths: Lengths
    estimate: QualityModel | None
    length_model: LengthModel | None = None
    seconds: float


def measure(job: StepJob, step: EvaluateStep, subject: Subject, key: str) -> Measured:
    """Measure a variant. `job.parent` is the top variant. Raises StartError when it cannot be loaded."""
    started = perf_counter()
    decoder = _decoder(*_loader([subject], job.session.device).runners)
    samples = [sample for sample in job.corpus.test if sample.answer is not None][: step.prompts]
    prompts = [job.codec.prompt(sample) for sample in samples]
    meter = _Meter()
    answers = generate(decoder, prompts, job.generation(), job.counting(f"{subject.name}: answers"))
    tokens = sum(map(len, answers))
    joules = meter.joules()
    replies = [job.codec.text.decode(ids) for ids in answers]
    rights = [right(sample, reply) for sample, reply in zip(samples, replies, strict=True)]
    texts = job.texts(job.corpus.test[: step.texts])
    scores: list[TextScore] = []
    reference = load_decoder(job.parent, job.session.device)
    for score in read_scores(reference, decoder, texts):
        scores.append(score)
        job.session.progress(f"{subject.name}: KL", len(scores), len(texts))
    similar = [exp(-score.kl) for score in scores]
    count = sum(score.tokens for score in scores)
    return Measured(
        key=key,
        name=subject.name,
        bytes=decoder.weight_bytes,
        rights=rights,
        similar=similar,
        replies=replies,
        quality=interval(rights) if rights else bootstrap(similar),
        tasks=by_task(samples, rights),
        kl=mean_kl(scores),
        same_top1=sum(score.same * score.tokens for score in scores) / max(count, 1),
        perplexity=None if samples else exp(sum(s.nll * s.tokens for s in scores) / max(count, 1)),
        machine=machine_name(_config([subject], job.session.device)),
        energy=_measured_energy(joules, tokens),
        lengths=_lengths(prompts or [text.ids for text in texts], answers),
        estimate=fitted(samples, rights),
        # The token that ends an answer is computed too.
        length_model=fitted_lengths(samples, [len(ids) + 1 for ids in answers]),
        seconds=perf_counter() - started,
    )


class StepTimes(Struct, frozen=True):
    """Step-time models of variants, measured together. `key`: of the machine and the variants."""

    key: str
    costs: dict[str, StepCost]


def timed(
    file: Path, subjects: Sequence[Subject], measured: Sequence[Measured], device: torch.device
) -> list[Measured]:
    """The measurements with the step times of this machine, and energy where that was not measured on it.

    Variants are timed in turns, so that what disturbs the machine disturbs all of them. Times in `file` stay
    as they are while machine and variants are the same.
    """
    machine = machine_name(_config(subjects, device))
    key = blake2b("\n".join([machine, *(each.key for each in measured)]).encode(), digest_size=16).hexdigest()
    times = _read(file, StepTimes)
    if times is None or times.key != key:
        costs = _costs(subjects, device)
        times = StepTimes(key, {subject.name: cost for subject, cost in zip(subjects, costs, strict=True)})
        write_whole(file, msgspec.json.format(msgspec.json.encode(times), indent=1))
    found: list[Measured] = []
    for each in measured:
        cost = times.costs[each.name]
        energy = each.energy if each.machine == machine else None
        energy = energy or _estimated_energy(cost, device)
        found.append(structs.replace(each, machine=machine, cost=cost, energy=energy))
    return found


def _costs(subjects: Sequence[Subject], device: torch.device) -> list[StepCost]:
    """The cost of each variant. Those that do not fit into memory together are measured one by one."""
    try:
        runners = _loader(subjects, device).runners
    except StartError:
        if len(subjects) == 1:
            raise
        log.warning("the variants do not fit into memory together: their times are measured one by one")
        return [cost for subject in subjects for cost in _costs([subject], device)]
    steps = [steps_of(runner, LIMITS) for runner in runners]
    return calibrate_together([Calibrator(runner).run for runner in runners], steps)


def _config(subjects: Sequence[Subject], device: torch.device) -> EngineConfig:
    return EngineConfig(
        models=tuple(subject.config for subject in subjects),
        device="cuda" if device.type == "cuda" else "cpu",
        kv_bytes=KV_BYTES,
        cache_bytes=0,
        speculate="off",
    )


def _loader(subjects: Sequence[Subject], device: torch.device) -> ModelLoader:
    """The variants as one engine would load them."""
    threads = torch.get_num_threads()
    try:
        return ModelLoader(_config(subjects, device))
    finally:
        torch.set_num_threads(threads)


def _decoder(runner: Runner) -> Decoder:
    decoder = runner.decoder if isinstance(runner, TorchRunner) else getattr(runner, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise StartError(f"{runner.info.name} has no weights to measure")
    return decoder


def interval(rights: Sequence[bool]) -> QualityInterval:
    """The share of right answers, with Wilson's interval."""
    good = sum(rights)
    low, high = wilson(good, len(rights))
    return QualityInterval(good / max(1, len(rights)), low, high, len(rights))


def bootstrap(values: Sequence[float], seed: int = 0) -> QualityInterval:
    """The mean of some values from 0 to 1, with the percentile interval of its bootstrap (B. Efron, 1979)."""
    if not values:
        return QualityInterval(0.0, 0.0, 1.0, 0)
    rng = Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    low, high = (min(1.0, max(0.0, quantile(means, q))) for q in (0.025, 0.975))
    return QualityInterval(sum(values) / len(values), low, high, len(values))


def difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of mean(first) - mean(second), by a bootstrap over the prompts that both answered."""
    gains = [a - b for a, b in zip(first, second, strict=True)]
    if not gains:
        return 0.0, 0.0
    rng = Random(seed)
    means = sorted(sum(rng.choices(gains, k=len(gains))) / len(gains) for _ in range(RESAMPLES))
    return quantile(means, 0.025), quantile(means, 0.975)


def by_task(samples: Sequence[DataSample], rights: Sequence[bool]) -> dict[str, dict[str, QualityInterval]]:
    """The share of right answers by task, then by difficulty, and `all` difficulties of a task."""
    tasks: dict[str, dict[str, QualityInterval]] = {}
    for task, places in sorted(groups(samples, lambda sample: sample.task).items()):
        levels = groups([samples[place] for place in places], lambda sample: sample.level)
        cells = {
            level: interval([rights[places[place]] for place in held])
            for level, held in sorted(levels.items())
        }
        tasks[task] = cells | {"all": interval([rights[place] for place in places])}
    return tasks


def _lengths(prompts: Sequence[Ids], answers: Sequence[Ids]) -> Lengths:
    read, said = sorted(map(len, prompts)), sorted(map(len, answers))
    if not said:
        return Lengths(round(quantile(read, 0.5))) if read else Lengths()
    return Lengths(round(quantile(read, 0.5)), round(quantile(said, 0.5)), round(quantile(said, 0.9)))


class _Meter:
    """The energy counters of the processor's packages (RAPL), where this user may read them."""

    def __init__(self) -> None:
        self._started = self._read()

    def joules(self) -> float | None:
        """The energy since the start; None when it cannot be read, or a counter overflowed."""
        now = self._read()
        if self._started is None or now is None or now < self._started:
            return None
        return (now - self._started) / 1e6

    @staticmethod
    def _read() -> int | None:
        try:
            counters = [
                int(file.read_text(encoding="utf-8")) for file in RAPL.glob("intel-rapl:[0-9]/energy_uj")
            ]
        except (OSError, ValueError):
            return None
        return sum(counters) if counters else None


def _measured_energy(joules: float | None, tokens: int) -> TokenEnergy | None:
    """Joules per token while the answers were generated; None where the counters cannot be read."""
    if not joules or not tokens:
        return None
    return TokenEnergy(joules / tokens, "measured: RAPL, batches of up to 32")


def _estimated_energy(cost: StepCost, device: torch.device) -> TokenEnergy | None:
    """Joules per token, estimated from the step time. None on a GPU, whose power is not known here."""
    if device.type != "cpu":
        return None
    watts = CORE_WATTS * torch.get_num_threads()
    return TokenEnergy(
        cost.decodes(1, 256) / 1e3 * watts, f"estimate: {watts:g} W times the step time at batch 1"
    )


def stored(file: Path, key: str, make: Callable[[], Measured]) -> Measured:
    """The measurement in `file` if it has this key; otherwise a new one, which is kept there."""
    found = _read(file, Measured)
    if found is not None and found.key == key:
        return found
    made = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, msgspec.json.format(msgspec.json.encode(made), indent=1))
    return made


def _read(file: Path, kind: type[KeptStruct]) -> KeptStruct | None:
    """What is in a file; None when there is no such file, or it is damaged."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
