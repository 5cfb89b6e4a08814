"""Whether every step of a recipe fits its parent, checked before the first one runs for hours.

Sizes, tokenizers, tasks that have weights, and formats that this device has kernels for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from msgspec import Struct

from stretto.errors import StartError
from stretto.kernels.choice import choose_kernels
from stretto.models import families
from stretto.models.spec import ModelSpec
from stretto.optimise.recipe import FULL, DistilStep, FinetuneStep, Making, PruneStep, QuantiseStep, Recipe


class LayerSizes(Struct, frozen=True):
    """What steps may make smaller."""

    layers: int
    intermediate: int
    hidden: int

    @classmethod
    def of(cls, spec: ModelSpec) -> LayerSizes:
        return cls(len(spec.layers), spec.intermediate, spec.hidden)

    @property
    def weights(self) -> int:
        """About in proportion to the weights of the layers."""
        return self.layers * self.hidden * (self.hidden + self.intermediate)


def check(
    recipe: Recipe, model: Path, tasks: Collection[str], students: Mapping[str, Path], device: torch.device
) -> None:
    """Check all steps of a recipe on `model`. `tasks`: those of the data; `students`: directories by step.

    Raises StartError that starts with the path of the step.
    """
    sizes = {FULL: LayerSizes.of(families.read(model))}
    for at, step in recipe.making:
        here, parent = f"$.steps[{at}]", sizes[step.parent]
        sizes[step.name] = parent
        if isinstance(step, QuantiseStep):
            _check_format(here, step, device)
            continue
        unknown = sorted(set(step.weights) - set(tasks))
        if unknown:
            raise _error(f"{here}.weights", f"no example has the task {unknown[0]!r}")
        if step.name in students:
            sizes[step.name] = _student(here, students[step.name], model, parent)
        elif not isinstance(step, FinetuneStep):
            sizes[step.name] = _smaller(here, step, parent)


def _smaller(here: str, step: DistilStep | PruneStep, parent: LayerSizes) -> LayerSizes:
    """The sizes of the student. Raises StartError when one exceeds the parent's."""
    hidden = step.hidden if isinstance(step, DistilStep) else None
    wanted = {"layers": step.layers, "intermediate": step.intermediate, "hidden": hidden}
    found: list[int] = []
    for key, value in wanted.items():
        most: int = getattr(parent, key)
        if value is not None and value > most:
            raise _error(
                f"{here}.{key}", f"{value} is more than the parent's {most}: a student must not be larger"
            )
        found.append(most if value is None else value)
    return LayerSizes(*found)


def _student(here: str, path: Path, model: Path, parent: LayerSizes) -> LayerSizes:
    """The sizes of a student of its own. Raises StartError for one that is larger or reads other tokens."""
    spec, teacher = families.read(path), families.read(model)
    files = [folder / "tokenizer.json" for folder in (path, model)]
    same = all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes()
    if spec.vocab != teacher.vocab or not same:
        raise _error(
            f"{here}.student",
            f"{path} has another tokenizer than its teacher: both must read the same tokens",
        )
    sizes = LayerSizes.of(spec)
    if sizes.weights > parent.weights:
        raise _error(f"{here}.student", f"{path} is larger than its teacher: a student must not be larger")
    return sizes


def _check_format(here: str, step: QuantiseStep, device: torch.device) -> None:
    try:
        choose_kernels(device, torch.float32, step.format)
    except StartError as error:
        raise _error(f"{here}.format", error.message) from None


def _error(at: str, problem: str) -> StartError:
    return StartError(f"{at}: {problem}", param=at)


def students(recipe: Recipe) -> dict[str, str]:
    """The checkpoints that steps train instead of a smaller copy of their parent, by the step's name."""
    steps: list[Making] = [step for _, step in recipe.making]
    return {step.name: step.student for step in steps if isinstance(step, DistilStep) and step.student}
