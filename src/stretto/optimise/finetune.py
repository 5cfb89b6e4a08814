"""The step `finetune`: training on the ideal replies of the data, of all weights or of a low-rank update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from stretto.errors import StartError
from stretto.optimise.data import DataSample
from stretto.optimise.job import StepJob
from stretto.optimise.recipe import FinetuneStep
from stretto.optimise.training.batches import TrainingRow
from stretto.optimise.training.trainer import (
    Phase,
    TrainedModel,
    cross_entropy,
    load_model,
    save_model,
    train,
)

PEFT = "peft"  # imported on demand: only `method: lora` needs it


def finetune(job: StepJob, step: FinetuneStep) -> dict[str, Any]:
    """Write the trained checkpoint to `job.made`. Raises StartError when the data has no replies."""
    rows = ideal_rows(job, job.corpus.train, step.weights)
    model = load_model(job.parent, job.session.device)
    if step.method == "lora":
        model = adapted(model, step.rank, job.seed)
    train(model, rows, cross_entropy, Phase("train", step.steps, step, job.seed), job.session)
    if step.method == "lora":
        model = model.merge_and_unload()
    save_model(model, job.parent, job.made)
    return {"examples": len(rows)}


def ideal_rows(
    job: StepJob, samples: Sequence[DataSample], weights: Mapping[str, float]
) -> list[TrainingRow]:
    """The samples with their ideal replies. `weights` are factors by task. Raises StartError."""
    rows = [
        TrainingRow(text, sample.weight * weights.get(sample.task, 1.0))
        for sample in samples
        if (text := job.codec.whole(sample)) is not None
    ]
    if not any(row.weight for row in rows):
        raise StartError(
            f"{job.at}: no line of the data has a reply to learn: give `reply`, or an exact answer"
        )
    return rows


def adapted(model: TrainedModel, rank: int, seed: int) -> TrainedModel:
    """The model with a low-rank update of every linear layer, which alone is trained (E. Hu et al., "LoRA",
    2021). Raises StartError when peft is not installed."""
    try:
        peft: Any = import_module(PEFT)
    except ImportError:
        raise StartError(
            "`method: lora` needs peft, which is not installed: pip install 'stretto[optimise]'"
        ) from None
    torch: Any = import_module("torch")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)
