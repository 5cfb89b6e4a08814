"""Runs a recipe: one step after the other, each with a manifest, so that an interrupted run can go on.

A step works in a hidden folder and is moved to its name when it is whole. Its manifest holds a key of all
that it depends on; with `resume`, a step with the same key and intact files is not run again.
"""

from __future__ import annotations

import fcntl
import platform
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from msgspec import Struct, structs

from stretto import __version__
from stretto.config import ModelConfig, Quantise
from stretto.errors import StartError
from stretto.hardware import choose_threads, snapshot
from stretto.kernels.cpu import native
from stretto.ladder import registry
from stretto.ladder.registry import Ladder, MeasuredCascade, Origin, Variant, weight_digests
from stretto.ladder.strict import nearest
from stretto.models import families, source
from stretto.optimise import data, frontier, report
from stretto.optimise.answers import TextCodec
from stretto.optimise.cascade.calibrate import CascadeSide, kept_cascade, measure_cascade
from stretto.optimise.data import Corpus, CorrectedAnswers
from stretto.optimise.distil import distil
from stretto.optimise.evaluate import Measured, Subject, measure, stored, timed
from stretto.optimise.finetune import finetune
from stretto.optimise.job import StepJob, load_decoder
from stretto.optimise.prune import prune
from stretto.optimise.quantise import quantise
from stretto.optimise.recipe import (
    FULL,
    EvaluateStep,
    FinetuneStep,
    LadderStep,
    Making,
    QuantiseStep,
    Recipe,
)
from stretto.optimise.training import sizes
from stretto.optimise.training.trainer import SNAPSHOT_S, StageCallback, StepSession, no_stage, write_whole

WORK = ".working"
EVALUATION = "evaluation"
TIMES = "step-times.json"
MAKERS: dict[str, Callable[[StepJob, Any], dict[str, Any]]] = {
    "finetune": finetune,
    "distil": distil,
    "prune": prune,
    "quantise": quantise,
}


class Manifest(Struct, frozen=True, kw_only=True):
    """How a variant was made. `path`: its checkpoint, relative to the output. `seconds`: of all attempts."""

    name: str
    step: str
    parent: str | None
    key: str
    path: str
    files: dict[str, str]
    options: dict[str, Any]
    seed: int
    seconds: float
    device: str
    versions: dict[str, str]
    quantise: Quantise | None = None
    exclude: tuple[str, ...] = ()
    report: dict[str, Any] = {}


class RunOptions(Struct, frozen=True, kw_only=True):
    """How a recipe is run.

    `out`: the folder of the ladder. `folder`: what paths in the recipe are relative to. `until`: the variant
    after which the run ends; None: all steps.
    """

    out: Path
    folder: Path
    resume: bool = False
    skip_bad_lines: bool = False
    device: str = "auto"
    progress: StageCallback = no_stage
    snapshot_s: float = SNAPSHOT_S
    until: str | None = None


class StepReport(Struct, frozen=True):
    """What happened to one step. `kept`: an earlier run had finished it."""

    name: str
    step: str
    status: Literal["made", "kept"]
    seconds: float


class RunReport(Struct, frozen=True, kw_only=True):
    """The result of a run. `ladder` is None for a recipe without the step `ladder`."""

    out: str
    steps: list[StepReport]
    bad_lines: int
    ladder: Ladder | None = None
    usual_ms: dict[str, float] = {}


def run(recipe: Recipe, options: RunOptions) -> RunReport:
    """Run a recipe.

    Raises StartError for wrong data, wrong sizes, an unknown `until`, or an output folder that is in use.
    What is finished stays, and `resume` goes on from there.
    """
    names = [step.name for _, step in recipe.making]
    if options.until is not None and options.until not in names:
        raise StartError(f"--until: no step makes {options.until!r}{nearest(options.until, names)}")
    corpus = data.read(recipe.files, options.folder, skip_bad_lines=options.skip_bad_lines)
    try:
        with _locked(options):
            _use_threads()
            return _Run(recipe, options, corpus).run()
    except OSError as error:
        raise StartError(
            f"{options.out}: {error.strerror or error}; mend that, then go on with --resume"
        ) from error


@contextmanager
def _locked(options: RunOptions) -> Generator[None]:
    """The output folder, for this process alone. Raises StartError."""
    out = options.out
    # A run that failed before its first variant leaves nothing worth keeping.
    if out.exists() and any(each.name != WORK for each in out.iterdir()) and not options.resume:
        raise StartError(f"{out} is not empty: go on with --resume, or name another folder with --out")
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (out / WORK / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(
                f"another stretto optimise works in {out}: wait for it, or name another --out"
            ) from None
        yield


def _use_threads() -> None:
    library = native.load()
    if library is not None:
        library.threads(choose_threads(snapshot(), 0).value)


class _Run:
    """One run. It owns the output folder; `made` holds the manifests of the variants so far."""

    def __init__(self, recipe: Recipe, options: RunOptions, corpus: Corpus) -> None:
        self.options, self.corpus, self.out = options, corpus, options.out
        self.answer_tokens = [step.max_tokens for step in recipe.steps if isinstance(step, EvaluateStep)]
        ends = [at + 1 for at, step in recipe.making if step.name == options.until]
        self.recipe = structs.replace(recipe, steps=recipe.steps[: ends[0]]) if ends else recipe
        chosen = (
            options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        self.device = torch.device(chosen)
        self.made: dict[str, Manifest] = {}
        self.students: dict[str, Path] = {}
        self.feedback: dict[str, CorrectedAnswers] = {}
        self.done: list[StepReport] = []

    def run(self) -> RunReport:
        path = self._model(self.recipe.model)
        self.students = {name: self._model(student) for name, student in sizes.students(self.recipe).items()}
        self.feedback = {
            step.name: data.read_feedback(self.options.folder / step.feedback, self.corpus)
            for step in self.recipe.steps
            if isinstance(step, FinetuneStep) and step.feedback is not None
        }
        corrected = (sample for each in self.feedback.values() for sample in each.samples)
        tasks = {sample.task for sample in (*self.corpus.train, *corrected)}
        sizes.check(self.recipe, path, tasks, self.students, self.device)
        self._full(path)
        ladder, times = None, dict[str, float]()
        measured: list[Measured] = []
        for at, step in enumerate(self.recipe.steps):
            if isinstance(step, EvaluateStep):
                measured = self._evaluate(at, step)
            elif isinstance(step, LadderStep):
                ladder, times = self._ladder(step, measured)
            else:
                self._make(at, step)
        for left in (self.out / WORK).iterdir():
            if left.is_dir():
                shutil.rmtree(left)
        return RunReport(
            out=str(self.out), steps=self.done, bad_lines=self.corpus.bad.count, ladder=ladder, usual_ms=times
        )

    def _full(self, path: Path) -> None:
        """Copy the model into the output, where every other variant starts from."""
        files = weight_digests(path)
        key = _key({"model": files})
        if not self._is_done(FULL, key):
            work = self._work(FULL, key)
            shutil.rmtree(work / "made", ignore_errors=True)
            shutil.copytree(path, work / "made", ignore=_not_of_the_model)
            self._finish(self._manifest(FULL, "model", None, key=key, files=files, path=FULL), work)
        self._record(FULL)

    def _model(self, name: str) -> Path:
        """The directory of a model: beside the recipe, or as everywhere else. A ladder is its top variant."""
        near = self.options.folder / name
        if (near / "config.json").exists():
            return near
        path = source.resolve(name, self.options.progress)
        if not (path / registry.FILE).exists():
            return path
        ladder = registry.load(path, digests=False)
        return (path / ladder.variant(ladder.top).path).resolve()

    def _make(self, at: int, step: Making) -> None:
        parent = self.made[step.parent]
        located = self._located(step)
        # The key holds no path of this machine, so a run may go on elsewhere.
        parts = {
            "step": {name: value for name, value in msgspec.to_builtins(step).items() if name != "feedback"},
            "parent": parent.files,
            "data": self.corpus.digest,
            "seed": self.recipe.seed,
            "student": weight_digests(self.students[step.name]) if step.name in self.students else {},
        }
        corrected = self.feedback.get(step.name)
        key = _key(parts if corrected is None else parts | {"feedback": corrected.digest})
        if not self._is_done(step.name, key):
            work = self._work(step.name, key)
            job = self._job(f"$.steps[{at}]", parent, work, step.name)
            shutil.rmtree(job.made, ignore_errors=True)
            kind = str(step.__struct_config__.tag)
            made = MAKERS[kind](job if corrected is None else _with_corrected(job, corrected), located)
            if corrected is not None:
                made |= {"feedback": len(corrected.samples), "feedback_held_out": corrected.held}
            self._finish(self._manifest_of(job, step, key, made), work)
        self._record(step.name)

    def _located(self, step: Making) -> Making:
        """The step with the directory of its student."""
        found = self.students.get(step.name)
        return step if found is None else structs.replace(step, student=str(found))

    def _job(self, at: str, parent: Manifest, work: Path, stage: str) -> StepJob:
        path = self.out / parent.path

        def progress(part: str, done: int, total: int) -> None:
            self.options.progress(f"{stage}: {part}", done, total)

        session = StepSession(work, self.device, progress, self.options.snapshot_s)
        codec = TextCodec(path, families.read(path).eos)
        return StepJob(at, path, self.corpus, codec, session, self.recipe.seed, *self.answer_tokens)

    def _manifest_of(self, job: StepJob, step: Making, key: str, made: dict[str, Any]) -> Manifest:
        own = not isinstance(step, QuantiseStep)
        parent = self.made[step.parent]
        job.made.mkdir(exist_ok=True)
        manifest = self._manifest(
            step.name,
            str(step.__struct_config__.tag),
            step.parent,
            key=key,
            files=weight_digests(job.made) if own else parent.files,
            path=step.name if own else parent.path,
        )
        options = {
            k: v
            for k, v in msgspec.to_builtins(step).items()
            if k not in ("step", "name", "from", "feedback") and v not in (None, {})
        }
        quantised = {} if own else {"quantise": step.format, "exclude": tuple(made["exclude"])}
        return structs.replace(
            manifest, options=options, seconds=job.session.spent_s, report=made, **quantised
        )

    def _manifest(
        self, name: str, step: str, parent: str | None, *, key: str, files: dict[str, str], path: str
    ) -> Manifest:
        return Manifest(
            name=name,
            step=step,
            parent=parent,
            key=key,
            path=path,
            files=files,
            options={},
            seed=self.recipe.seed,
            seconds=0.0,
            device=f"{self.device}, {torch.get_num_threads()} threads",
            versions=_versions(),
        )

    def _work(self, name: str, key: str) -> Path:
        """The folder of an unfinished step. What an attempt with another key left there is removed."""
        work, file = self.out / WORK / name, self.out / WORK / name / "key"
        if not file.exists() or file.read_text(encoding="utf-8") != key:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            write_whole(file, key.encode())
        return work

    def _finish(self, manifest: Manifest, work: Path) -> None:
        write_whole(
            work / "made" / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        )
        target = self.out / manifest.name
        shutil.rmtree(target, ignore_errors=True)
        (work / "made").replace(target)
        shutil.rmtree(work)
        self.done.append(StepReport(manifest.name, manifest.step, "made", round(manifest.seconds, 3)))

    def _is_done(self, name: str, key: str) -> bool:
        """Whether an earlier run made this variant from the same inputs, and its files are intact."""
        manifest = self._read(name)
        if manifest is None or manifest.key != key:
            return False
        folder = self.out / manifest.path
        if not folder.is_dir() or weight_digests(folder) != manifest.files:
            return False
        self.done.append(StepReport(name, manifest.step, "kept", round(manifest.seconds, 3)))
        return True

    def _read(self, name: str) -> Manifest | None:
        try:
            return msgspec.json.decode((self.out / name / "manifest.json").read_bytes(), type=Manifest)
        except (OSError, msgspec.DecodeError):
            return None

    def _record(self, name: str) -> None:
        manifest = self._read(name)
        assert manifest is not None
        self.made[name] = manifest

    def _evaluate(self, at: int, step: EvaluateStep) -> list[Measured]:
        top = self._top()
        found: list[Measured] = []
        subjects: list[Subject] = []
        for name, manifest in self.made.items():
            parts = {"variant": manifest.key, "top": self.made[top].files, "data": self.corpus.digest}
            key = _key({**parts, "step": msgspec.to_builtins(step)})
            job = self._job(f"$.steps[{at}]", self.made[top], self.out / WORK / EVALUATION, EVALUATION)
            config = ModelConfig(
                name=name,
                path=str(self.out / manifest.path),
                quantise=manifest.quantise,
                exclude=manifest.exclude,
            )
            subject = Subject(name, self.out / manifest.path, config)
            file = self.out / EVALUATION / f"{name}.json"
            found.append(stored(file, key, partial(measure, job, step, subject, key)))
            subjects.append(subject)
        self.options.progress(f"{EVALUATION}: step times", 0, 1)
        found = timed(self.out / TIMES, subjects, found, self.device)
        self.options.progress(f"{EVALUATION}: step times", 1, 1)
        self.done.append(
            StepReport(EVALUATION, "evaluate", "made", round(sum(each.seconds for each in found), 3))
        )
        return found

    def _top(self) -> str:
        named = next(step.top for step in self.recipe.steps if isinstance(step, EvaluateStep))
        tuned = [step.name for step in self.recipe.steps if isinstance(step, FinetuneStep)]
        return named or (tuned[-1] if tuned else FULL)

    def _ladder(self, step: LadderStep, measured: list[Measured]) -> tuple[Ladder, dict[str, float]]:
        top = self._top()
        kept = frontier.keep(measured, top, step.faster)
        times = frontier.usual_ms(measured, top)
        by_name = {each.name: each for each in measured}
        cascades = self._cascades(step, [by_name[name] for name in kept.names], times)
        spec = families.read(self.out / self.made[top].path)
        ladder = Ladder(
            model=Path(self.recipe.model).name,
            family=spec.family,
            vocab=spec.vocab,
            tokenizer=registry.digest(self.out / self.made[top].path / registry.TOKENIZER),
            top=top,
            variants=tuple(
                structs.replace(self._variant(by_name[name], by_name[top]), cascade=cascades.get(name))
                for name in kept.names
            ),
            lengths=by_name[top].length_model,
            dropped=kept.dropped,
        )
        registry.save(ladder, self.out)
        write_whole(self.out / "report.html", report.page(ladder, times).encode())
        return ladder, times

    def _cascades(
        self, step: LadderStep, kept: list[Measured], times: dict[str, float]
    ) -> dict[str, MeasuredCascade]:
        """The cascade of the smallest variant and the best one, by the name of the latter."""
        best = min(kept, key=lambda each: (-each.quality.mean, times[each.name]))
        small = min(kept, key=lambda each: each.bytes)
        if step.cascade is None or self.made[small.name].path == self.made[best.name].path:
            return {}
        parts = {"of": [small.key, best.key, small.cost, best.cost], "loss": step.cascade}
        job = self._job("$.steps", self.made[self._top()], self.out / WORK / EVALUATION, EVALUATION)
        prompts = next(each.prompts for each in self.recipe.steps if isinstance(each, EvaluateStep))
        found = kept_cascade(
            self.out / "cascade.json",
            _key(parts),
            lambda: measure_cascade(job, self._side(small), self._side(best), prompts, step.cascade or 0.0),
        )
        return {} if found is None else {best.name: found}

    def _side(self, each: Measured) -> CascadeSide:
        made = self.made[each.name]
        decoder = load_decoder(self.out / made.path, self.device, made.quantise, made.exclude)
        return CascadeSide(each.name, decoder, each.cost)

    def _variant(self, each: Measured, top: Measured) -> Variant:
        manifest = self.made[each.name]
        return Variant(
            name=each.name,
            path=manifest.path,
            bytes=each.bytes,
            quality=each.quality,
            files=manifest.files,
            quantise=manifest.quantise,
            exclude=manifest.exclude,
            tasks=each.tasks,
            kl=each.kl,
            same_top1=each.same_top1,
            perplexity=each.perplexity,
            flips=frontier.flips(each, top),
            times={each.machine: each.cost},
            energy=each.energy,
            lengths=each.lengths,
            estimate=each.estimate,
            origin=Origin(
                step=manifest.step,
                parent=manifest.parent,
                options=manifest.options,
                seed=manifest.seed,
                seconds=manifest.seconds,
                versions=manifest.versions,
            ),
        )


def _not_of_the_model(folder: str, names: list[str]) -> list[str]:
    """What is not copied of a model's directory: hidden files, pickles, a ladder and its other variants."""
    others = [name for name in names if (Path(folder) / name / "config.json").exists()]
    return [*others, registry.FILE, *shutil.ignore_patterns(".*", "*.bin", "*.pt")(folder, names)]


def _with_corrected(job: StepJob, corrected: CorrectedAnswers) -> StepJob:
    """The step, with these answers beside the data that it trains on."""
    corpus = structs.replace(job.corpus, train=(*job.corpus.train, *corrected.samples))
    return replace(job, corpus=corpus)


def _key(parts: dict[str, Any]) -> str:
    return blake2b(msgspec.json.encode(parts, order="deterministic"), digest_size=16).hexdigest()


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers")
    own = {"python": platform.python_version(), "stretto": __version__}
    return own | {name: version(name) for name in packages}
