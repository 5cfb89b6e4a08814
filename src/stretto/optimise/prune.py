"""The step `prune`: remove what matters least, and heal the rest by distillation from the parent.

What is removed is gone: the matrices are smaller and dense, so every kernel runs faster on them.
"""

from __future__ import annotations

import shutil
from typing import Any

from stretto.optimise.distil import heal
from stretto.optimise.job import StepJob
from stretto.optimise.recipe import PruneStep
from stretto.optimise.training.importance import least_influential, least_kl, neurons
from stretto.optimise.training.surgery import Cut, cut

MEASURED = 24  # texts on which the importance of layers and neurons is measured


def prune(job: StepJob, step: PruneStep) -> dict[str, Any]:
    """Write the pruned and healed checkpoint to `job.made`."""
    start = job.session.folder / "start"
    if not (start / "config.json").exists():
        shutil.rmtree(start, ignore_errors=True)
        cut(job.parent, start, what_stays(job, step))
    return heal(job, step, start)


def what_stays(job: StepJob, step: PruneStep) -> Cut:
    """The layers and neurons to keep."""
    total = len(job.spec.layers)
    texts = job.texts(job.corpus.train[:MEASURED])
    layers = tuple(range(total))
    if step.layers is not None and step.layers < total:
        layers = (least_kl if step.by == "kl" else least_influential)(job, texts, step.layers)
    if step.intermediate is None:
        return Cut(layers)
    most = neurons(job, texts, step.intermediate)
    return Cut(layers, tuple(most[number] for number in layers))
