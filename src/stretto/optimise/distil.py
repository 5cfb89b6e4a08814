"""The step `distil`: a smaller student learns to answer as its parent, the teacher, does.

Forward KL at every token of a reply, and cross-entropy where the teacher itself was right. Then a short stage
on answers that the student draws (R. Agarwal et al., "On-policy distillation", 2024).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from stretto.optimise.answers import Encoded
from stretto.optimise.data import DataSample, right
from stretto.optimise.finetune import ideal_rows
from stretto.optimise.job import StepJob
from stretto.optimise.recipe import DistilStep, PruneStep
from stretto.optimise.training.batches import TrainingBatch, TrainingRow
from stretto.optimise.training.importance import dimensions, neurons, spread_layers
from stretto.optimise.training.surgery import Cut, cut
from stretto.optimise.training.trainer import (
    Loss,
    Phase,
    TrainedModel,
    load_model,
    next_logits,
    save_model,
    train,
)

DRAWN = 256  # answers that the student draws for each round
ROUND = 25  # training steps of a round


def distil(job: StepJob, step: DistilStep) -> dict[str, Any]:
    """Write the student to `job.made`."""
    start = job.session.folder / "start"
    if step.student is not None:
        source = Path(step.student)
    else:
        if not (start / "config.json").exists():
            shutil.rmtree(start, ignore_errors=True)
            cut(job.parent, start, student_cut(job, step))
        source = start
    rows = taught_rows(job, step)
    teacher, student = (
        load_model(job.parent, job.session.device).eval(),
        load_model(source, job.session.device),
    )
    offline = job.session.folder / "offline"
    train(
        student,
        rows,
        forward_kl(teacher, step.cross_entropy),
        Phase("distil", step.steps, step, job.seed),
        job.session,
    )
    save_model(student, source, offline)
    first = job.validate(offline, "check")
    report: dict[str, Any] = {"examples": len(rows), "offline": first}
    if not step.on_policy_steps:
        offline.replace(job.made)
        return report
    online = job.session.folder / "online"
    _on_policy(job, step, (teacher, student), online)
    second = job.validate(online, "check on policy")
    better = online if second > first else offline
    better.replace(job.made)
    return report | {"on_policy": second, "kept": better.name}


def heal(job: StepJob, step: PruneStep, source: Path) -> dict[str, Any]:
    """Train the pruned checkpoint in `source` to answer as its parent does -> `job.made`."""
    rows = taught_rows(job, step)
    teacher, student = (
        load_model(job.parent, job.session.device).eval(),
        load_model(source, job.session.device),
    )
    loss = forward_kl(teacher, step.cross_entropy)
    train(student, rows, loss, Phase("heal", step.heal_steps, step, job.seed), job.session)
    save_model(student, source, job.made)
    return {"examples": len(rows)}


def student_cut(job: StepJob, step: DistilStep) -> Cut:
    """Layers at even distances with the first and the last, and the most active neurons and dimensions."""
    spec = job.spec
    kept = spread_layers(len(spec.layers), step.layers or len(spec.layers))
    texts = job.texts(job.corpus.train[:64])
    most = neurons(job, texts, step.intermediate) if step.intermediate else None
    return Cut(
        layers=kept,
        neurons=None if most is None else tuple(most[number] for number in kept),
        hidden=dimensions(job, texts, step.hidden) if step.hidden else None,
    )


def taught_rows(job: StepJob, step: DistilStep | PruneStep) -> list[TrainingRow]:
    """What the student learns from. Texts are learnt as they are.

    The reply is the teacher's where it is right, and otherwise the ideal one, without cross-entropy. With
    `replies: ideal` it is the ideal one, with cross-entropy.
    """
    samples = job.corpus.train
    if step.replies == "ideal":
        return ideal_rows(job, samples, step.weights)
    asked = [sample for sample in samples if sample.answer is not None]
    replies = iter(job.replies(job.parent, asked, "teacher"))
    rows: list[TrainingRow] = []
    for sample in samples:
        weight = sample.weight * step.weights.get(sample.task, 1.0)
        if sample.answer is None:
            text, certain = job.codec.whole(sample), True
        else:
            text, certain = _taught(job, sample, next(replies))
        if text is not None:
            rows.append(TrainingRow(text, weight, certain))
    return rows


def _taught(job: StepJob, sample: DataSample, reply: str) -> tuple[Encoded | None, bool]:
    if right(sample, reply):
        return job.codec.whole(sample, reply), True
    return job.codec.whole(sample), False


def forward_kl(teacher: TrainedModel, share: float) -> Loss:
    """KL(teacher || student), plus `share` times the cross-entropy where the reply is known to be right."""

    def loss(student: TrainedModel, batch: TrainingBatch) -> Tensor:
        with torch.no_grad():
            wanted = next_logits(teacher, batch).log_softmax(-1)
        found = next_logits(student, batch).log_softmax(-1)
        kl = (wanted.exp() * (wanted - found)).sum(-1)
        nll = -found.gather(1, batch.targets[:, None])[:, 0]
        return ((kl + share * batch.certain * nll) * batch.weights).sum() / batch.weights.sum()

    return loss


def reverse_kl(teacher: TrainedModel) -> Loss:
    """KL(student || teacher), for answers that the student drew. It unlearns what the teacher avoids."""

    def loss(student: TrainedModel, batch: TrainingBatch) -> Tensor:
        with torch.no_grad():
            wanted = next_logits(teacher, batch).log_softmax(-1)
        found = next_logits(student, batch).log_softmax(-1)
        kl = (found.exp() * (found - wanted)).sum(-1)
        return (kl * batch.weights).sum() / batch.weights.sum()

    return loss


def _on_policy(
    job: StepJob, step: DistilStep, models: tuple[TrainedModel, TrainedModel], target: Path
) -> None:
    """Rounds of: the student draws answers, and learns from the teacher about them. -> `target`"""
    teacher, student = models
    asked = [sample for sample in job.corpus.train if sample.answer is not None] or list(job.corpus.train)
    options = structs.replace(step, rate=step.rate / 4)  # it only polishes
    for number, first in enumerate(range(0, step.on_policy_steps, ROUND)):
        steps = min(ROUND, step.on_policy_steps - first)
        rows = _drawn_rows(job, student, asked, number)
        phase = Phase(f"on policy {number + 1}", steps, options, job.seed + number + 1)
        if rows:
            train(student, rows, reverse_kl(teacher), phase, job.session)
    save_model(student, job.parent if step.student is None else Path(step.student), target)


def _drawn_rows(
    job: StepJob, student: TrainedModel, asked: list[DataSample], number: int
) -> list[TrainingRow]:
    samples = [asked[(number * DRAWN + index) % len(asked)] for index in range(min(DRAWN, len(asked)))]
    prompts = [job.codec.prompt(s) if s.text is None else job.codec.text.encode(s.text)[:16] for s in samples]
    folder = job.session.folder / "drawing"
    save_model(student, job.parent, folder)
    answers = job.drawn(folder, prompts, job.seed + number, f"draw {number + 1}")
    shutil.rmtree(folder)
    eos = [] if job.codec.eos is None else [job.codec.eos]
    return [
        TrainingRow(Encoded(prompt + answer + eos, len(prompt)))
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(answer) < job.max_answer
    ]
