"""The training loop: AdamW over the batches of a phase, with snapshots from which it goes on exactly.

The models are those of transformers, which is the trainer of the toolchain and is never served.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from stretto.errors import StartError
from stretto.models.checkpoint import Checkpoint
from stretto.optimise.recipe import Training
from stretto.optimise.training.batches import TrainingBatch, TrainingRow, batch_of, chosen, shortened
from stretto.optimise.training.surgery import copy_beside

BETAS, DECAY, CLIP = (0.9, 0.98), 0.01, 1.0
SNAPSHOT_S = 60.0

TrainedModel = Any
"""A causal language model of transformers."""
Loss = Callable[[TrainedModel, TrainingBatch], Tensor]
StageCallback = Callable[[str, int, int], None]


def no_stage(stage: str, done: int, total: int) -> None:
    """Ignore the progress of a step."""


@dataclass
class StepSession:
    """Where a step works. `folder` holds its unfinished files, `spent_s` the seconds of earlier attempts too.

    `progress(stage, done, total)` is called after each piece of work, and may raise to interrupt it.
    """

    folder: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: StageCallback = no_stage
    snapshot_s: float = SNAPSHOT_S
    started: float = field(default_factory=time.monotonic)
    earlier_s: float = 0.0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "spent.json"
        self.earlier_s = msgspec.json.decode(file.read_bytes()) if file.exists() else 0.0

    @property
    def spent_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    def note(self) -> None:
        """Keep how long the step has worked, for the case that it is interrupted."""
        write_whole(self.folder / "spent.json", msgspec.json.encode(self.spent_s))


def write_whole(file: Path, content: bytes) -> None:
    """Write a file in one atomic step."""
    temporary = file.with_name(file.name + ".partial")
    temporary.write_bytes(content)
    temporary.replace(file)


def load_model(path: Path, device: torch.device) -> TrainedModel:
    """The checkpoint as a float32 model of transformers. No code of the checkpoint is run."""
    transformers_logging.disable_progress_bar()
    model: TrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True
    )
    model.config.use_cache = False
    return model.to(device).train()


def save_model(model: TrainedModel, source: Path, target: Path) -> None:
    """Write the model as a checkpoint in the dtype that `source` has, with the tokenizer of `source`."""
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that was interrupted
    with Checkpoint(source) as stored:
        dtype = getattr(torch, stored.dtype)
    state: dict[str, Tensor] = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    before, model.config.dtype = model.config.dtype, dtype
    model.config.use_cache = True
    model.save_pretrained(target, state_dict=state)
    model.config.dtype, model.config.use_cache = before, False
    copy_beside(source, target)


def next_logits(model: TrainedModel, batch: TrainingBatch) -> Tensor:
    """The logits at the places of the batch, float32 [N, vocab]."""
    out = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    return out[batch.rows, batch.columns].float()


def cross_entropy(model: TrainedModel, batch: TrainingBatch) -> Tensor:
    """The weighted mean cross-entropy of a batch."""
    losses = torch.nn.functional.cross_entropy(next_logits(model, batch), batch.targets, reduction="none")
    return (losses * batch.weights).sum() / batch.weights.sum()


@dataclass(frozen=True, slots=True)
class Phase:
    """A run of the loop. Its `name` is unique in the step; `options` of the step say batch and rate."""

    name: str
    steps: int
    options: Training
    seed: int


def train(
    model: TrainedModel, rows: Sequence[TrainingRow], loss: Loss, phase: Phase, session: StepSession
) -> None:
    """Train `model` in place. A phase that an earlier attempt finished or began goes on from its snapshot.

    Raises StartError when no row is left to learn from, and when the loss is no longer finite.
    """
    held = shortened(rows, phase.options.max_tokens)
    if not held:
        raise StartError(
            f"{phase.name}: no example is shorter than max_tokens ({phase.options.max_tokens}): raise it"
        )
    run = _Loop(model, phase, session)
    for step in range(run.restore(), phase.steps):
        places = chosen(len(held), phase.options.batch, step, phase.seed)
        run.step(step, loss, batch_of([held[place] for place in places], session.device))
    run.snapshot(phase.steps)


class _Loop:
    """The optimiser of one phase and its snapshots."""

    def __init__(self, model: TrainedModel, phase: Phase, session: StepSession) -> None:
        self.model, self.phase, self.session = model, phase, session
        named: list[tuple[str, Tensor]] = list(model.named_parameters())
        self.parameters = {name: each for name, each in named if each.requires_grad}
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=phase.options.rate, betas=BETAS, weight_decay=DECAY, foreach=True
        )
        self.saved = time.monotonic()

    def step(self, step: int, loss: Loss, batch: TrainingBatch) -> None:
        rate = self.rate(step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        fast = torch.autocast("cuda", torch.bfloat16) if self.session.device.type == "cuda" else nullcontext()
        with fast:
            value = loss(self.model, batch)
        if not math.isfinite(value.item()):
            raise StartError(
                f"{self.phase.name}: the loss of training step {step} is not finite: lower `rate`"
            )
        value.backward()  # pyright: ignore[reportUnknownMemberType]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if time.monotonic() - self.saved >= self.session.snapshot_s:
            self.snapshot(step + 1)
        self.session.progress(self.phase.name, step + 1, self.phase.steps)

    def rate(self, step: int) -> float:
        """A linear warm-up, then a cosine to zero."""
        options, steps = self.phase.options, self.phase.steps
        warm = min(1.0, (step + 1) / max(1.0, options.warm_up * steps))
        return options.rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))

    @property
    def _file(self) -> Path:
        return self.session.folder / f"{self.phase.name}.snapshot"

    def snapshot(self, step: int) -> None:
        """Keep the parameters and the optimiser's averages, as they are before `step`."""
        kept = {f"p.{name}": each.detach().contiguous() for name, each in self.parameters.items()}
        for name, each in self.parameters.items() if step < self.phase.steps else ():
            state = self.optimiser.state[each]
            kept |= {f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
        temporary = self._file.with_suffix(".partial")
        save_file({name: each.clone() for name, each in kept.items()}, temporary, {"step": str(step)})
        temporary.replace(self._file)
        self.session.note()
        self.saved = time.monotonic()

    def restore(self) -> int:
        """The step to go on with; 0 when there is no snapshot."""
        if not self._file.exists():
            return 0
        with safe_open(self._file, framework="pt") as opened:
            step = int(opened.metadata()["step"])
        kept = load_file(self._file, device=str(self.session.device))
        with torch.no_grad():
            for name, each in self.parameters.items():
                each.copy_(kept[f"p.{name}"])
                if f"m.{name}" in kept:
                    state = {"exp_avg": kept[f"m.{name}"], "exp_avg_sq": kept[f"v.{name}"]}
                    self.optimiser.state[each] = state | {"step": torch.tensor(float(step))}
        return step
