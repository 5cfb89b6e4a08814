"""The recipe of a ladder: which model, which data, which steps. Read strictly from YAML.

It imports no torch, so a wrong recipe is reported at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Struct, field

from stretto.config import Quantise
from stretto.errors import StartError, reason_of
from stretto.ladder.registry import NAME
from stretto.ladder.strict import convert, nearest

TILE = 32  # outputs that the kernels compute together: other widths waste part of a tile
FULL = "full"
RESERVED = ("evaluation", "ladder.json", "report.html")
SizeCount = Annotated[int, Meta(ge=1)]
StepCount = Annotated[int, Meta(ge=0, le=10_000_000)]
Rate = Annotated[float, Meta(gt=0, le=1)]
RecipeShare = Annotated[float, Meta(ge=0, le=1)]
Factor = Annotated[float, Meta(ge=0)]


class DataFiles(Struct, frozen=True, forbid_unknown_fields=True):
    """JSON lines, or plain text (`.txt`). A missing `validation` or `test` is a tenth of `train`, taken by a
    hash of the prompt."""

    train: str
    validation: str | None = None
    test: str | None = None


class Training(Struct, frozen=True, kw_only=True):
    """How a step trains: AdamW with a linear warm-up and a cosine to zero.

    `batch`: examples of a training step. `weights`: by task, a factor on the weight of its examples.
    """

    batch: SizeCount = 16
    rate: Rate = 3e-4
    warm_up: RecipeShare = 0.1
    max_tokens: SizeCount = 512
    weights: dict[str, Factor] = {}


class FinetuneStep(
    Training, frozen=True, kw_only=True, tag_field="step", tag="finetune", forbid_unknown_fields=True
):
    """Train on the data. `lora` trains a low-rank update and merges it into the weights.

    `feedback`: a file of corrected answers, as a server exports them, to train on too. Their task is
    `feedback`, for `weights`.
    """

    name: str
    parent: str = field(default=FULL, name="from")
    method: Literal["full", "lora"] = "full"
    steps: StepCount = 500
    rank: SizeCount = 16
    feedback: str | None = None


class DistilStep(
    Training, frozen=True, kw_only=True, tag_field="step", tag="distil", forbid_unknown_fields=True
):
    """Train a smaller student to answer as its parent does.

    The student is the parent with fewer `layers`, a smaller `intermediate` or a smaller `hidden`, or the
    checkpoint `student`. The loss is KL(parent || student) plus `cross_entropy` times the cross-entropy on
    the parent's own right answers. With `replies: ideal` both are on the replies of the data, and the parent
    is not asked, which is faster. Then `on_policy_steps` on answers that the student draws.
    """

    name: str
    parent: str = field(default=FULL, name="from")
    student: str | None = None
    layers: SizeCount | None = None
    intermediate: SizeCount | None = None
    hidden: SizeCount | None = None
    steps: StepCount = 1000
    on_policy_steps: StepCount = 100
    cross_entropy: Factor = 0.5
    replies: Literal["teacher", "ideal"] = "teacher"


class PruneStep(
    Training, frozen=True, kw_only=True, tag_field="step", tag="prune", forbid_unknown_fields=True
):
    """Remove the layers and the neurons that matter least, and heal the rest by distillation from the parent.

    Layers go by the change that each makes to its input (`block_influence`), or by the KL of the model
    without them (`kl`), which is slower and better. Neurons go by their mean activation. `replies` means
    what it means for `distil`.
    """

    name: str
    parent: str = field(default=FULL, name="from")
    layers: SizeCount | None = None
    by: Literal["block_influence", "kl"] = "kl"
    intermediate: SizeCount | None = None
    heal_steps: StepCount = 300
    cross_entropy: Factor = 0.5
    replies: Literal["teacher", "ideal"] = "teacher"


class QuantiseStep(
    Struct, frozen=True, kw_only=True, tag_field="step", tag="quantise", forbid_unknown_fields=True
):
    """Quantise the weights while they are loaded.

    With `max_kl`, the matrices whose quantisation adds the most KL stay in a wider format, until the KL is no
    more than that or `exclude` of them are left out.
    """

    name: str
    parent: str = field(default=FULL, name="from")
    format: Quantise = "int8"
    max_kl: Annotated[float, Meta(gt=0)] | None = None
    exclude: Annotated[int, Meta(ge=0)] = 8


class EvaluateStep(
    Struct, frozen=True, kw_only=True, tag_field="step", tag="evaluate", forbid_unknown_fields=True
):
    """Measure every variant.

    `top`: the variant that KL and flips are relative to; default: the last that was fine-tuned, or else the
    model itself. `prompts` and `texts`: how many are used, in the order of the data.
    """

    top: str | None = None
    prompts: SizeCount = 1000
    texts: SizeCount = 200
    max_tokens: SizeCount = 256


class LadderStep(
    Struct, frozen=True, kw_only=True, tag_field="step", tag="ladder", forbid_unknown_fields=True
):
    """Keep the variants that earn their place, and write ladder.json and report.html.

    A variant stays when it is `faster` times as fast as the next slower one, or statistically better than the
    next faster one. The smallest variant and the best one are measured as a cascade, which may lose so much
    quality on the validation split; null: none is measured.
    """

    faster: Annotated[float, Meta(ge=1)] = 1.2
    cascade: Annotated[float, Meta(ge=0, le=1)] | None = 0.002


Making = FinetuneStep | DistilStep | PruneStep | QuantiseStep
Step = Making | EvaluateStep | LadderStep
STEPS = (FinetuneStep, DistilStep, PruneStep, QuantiseStep, EvaluateStep, LadderStep)


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole recipe. `folder` is where it was read from; its paths are relative to that."""

    model: str
    data: DataFiles | str
    steps: Annotated[tuple[Step, ...], Meta(min_length=1)]
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0

    @property
    def files(self) -> DataFiles:
        return DataFiles(self.data) if isinstance(self.data, str) else self.data

    @property
    def making(self) -> list[tuple[int, Making]]:
        """The steps that make a variant, with their places."""
        return [(at, step) for at, step in enumerate(self.steps) if isinstance(step, Making)]


def read(path: Path, feedback: Path | None = None) -> Recipe:
    """The recipe in a YAML file. `feedback`: a file for every step `finetune` that names none.

    Raises StartError that names the path of what is wrong.
    """
    try:
        data = msgspec.yaml.decode(path.read_bytes())
    except ImportError:
        raise StartError(
            "a recipe is YAML, and PyYAML is not installed: pip install 'stretto[optimise]'"
        ) from None
    except OSError as error:
        raise StartError(f"cannot read the recipe {path}: {reason_of(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise StartError(f"{path} cannot be read as YAML: {' '.join(reason_of(error).split())}") from error
    if data is None:
        raise StartError(f"{path} is empty; docs/ladder.md shows a recipe")
    recipe = parse(data, str(path))
    return recipe if feedback is None else _with_feedback(recipe, feedback, str(path))


def parse(data: object, where: str) -> Recipe:
    """The recipe from plain data. Raises StartError that starts with `where`."""
    _check_tags(data, where)
    recipe = convert(data, Recipe, where, lax=True)
    _check_names(recipe, where)
    _check_order(recipe, where)
    for at, step in recipe.making:
        if isinstance(step, DistilStep | PruneStep):
            _check_sizes(step, f"{where}: $.steps[{at}]")
    return recipe


def reference() -> str:
    """The steps and their keys with defaults, as a Markdown table."""
    rows = ["| step | what it does | keys |", "| --- | --- | --- |"]
    for kind in STEPS:
        about = (kind.__doc__ or "").splitlines()[0]
        keys = [_shown(info) for info in msgspec.structs.fields(kind)]
        rows.append(f"| `{kind.__struct_config__.tag}` | {about} | {', '.join(keys)} |")
    return "\n".join(rows) + "\n"


def _shown(info: msgspec.structs.FieldInfo) -> str:
    """A key with its default; in bold when it must be given."""
    if info.default is not msgspec.NODEFAULT:
        return f"`{info.encode_name}` = {msgspec.json.encode(info.default).decode()}"
    made = info.default_factory is not msgspec.NODEFAULT
    return f"`{info.encode_name}` = {{}}" if made else f"**`{info.encode_name}`**"


def _with_feedback(recipe: Recipe, feedback: Path, where: str) -> Recipe:
    if not any(isinstance(step, FinetuneStep) for step in recipe.steps):
        raise StartError(f"{where}: $.steps has no `finetune`, which alone trains on feedback: add one")
    file = str(feedback.resolve())
    steps = [
        msgspec.structs.replace(step, feedback=step.feedback or file)
        if isinstance(step, FinetuneStep)
        else step
        for step in recipe.steps
    ]
    return msgspec.structs.replace(recipe, steps=tuple(steps))


def _check_tags(data: object, where: str) -> None:
    """Every step must say what it is, by a name that is known."""
    known = [str(each.__struct_config__.tag) for each in STEPS]
    steps: Any = cast("dict[str, Any]", data).get("steps") if isinstance(data, dict) else None
    for at, step in enumerate(cast("list[Any]", steps) if isinstance(steps, list) else []):
        if not isinstance(step, dict):
            continue
        tag = cast("dict[str, Any]", step).get("step")
        if tag is None:
            raise StartError(
                f"{where}: $.steps[{at}] has no key `step`: write one like `step: {known[0]}`; "
                f"known are {', '.join(known)}"
            )
        if tag not in known:
            raise StartError(
                f"{where}: $.steps[{at}].step: there is no step {tag!r}{nearest(str(tag), known)}"
            )


def _check_names(recipe: Recipe, where: str) -> None:
    known = [FULL]
    quantised: set[str] = set()
    for at, step in recipe.making:
        here = f"{where}: $.steps[{at}]"
        if not NAME.fullmatch(step.name) or step.name in RESERVED:
            raise StartError(f"{here}.name: {step.name!r} is no name: use letters, digits, '.', '_' and '-'")
        if step.name in known:
            raise StartError(f"{here}.name: {step.name} is the name of an earlier variant")
        if step.parent not in known:
            raise StartError(
                f"{here}.from: no earlier step makes {step.parent!r}{nearest(step.parent, known)}"
            )
        if step.parent in quantised:
            raise StartError(
                f"{here}.from: {step.parent} is quantised, and a step needs full weights: "
                "name its parent instead"
            )
        known.append(step.name)
        if isinstance(step, QuantiseStep):
            quantised.add(step.name)
    for at, step in enumerate(recipe.steps):
        if isinstance(step, EvaluateStep) and step.top is not None and step.top not in known:
            raise StartError(
                f"{where}: $.steps[{at}].top: no step makes {step.top!r}{nearest(step.top, known)}"
            )


def _check_order(recipe: Recipe, where: str) -> None:
    """At most one `evaluate`, after all variants; at most one `ladder`, after it."""
    last = max((at for at, _ in recipe.making), default=-1)
    evaluated = [at for at, step in enumerate(recipe.steps) if isinstance(step, EvaluateStep)]
    ladders = [at for at, step in enumerate(recipe.steps) if isinstance(step, LadderStep)]
    for at in (*evaluated[1:], *ladders[1:]):
        raise StartError(f"{where}: $.steps[{at}]: a recipe has this step only once")
    if evaluated and evaluated[0] < last:
        raise StartError(f"{where}: $.steps[{last}] makes a variant after `evaluate`: put it before")
    if ladders and (not evaluated or ladders[0] < evaluated[0]):
        raise StartError(
            f"{where}: $.steps[{ladders[0]}]: `ladder` needs the measurements of `evaluate` before it"
        )


def _check_sizes(step: DistilStep | PruneStep, here: str) -> None:
    hidden = step.hidden if isinstance(step, DistilStep) else None
    for key, value in (("intermediate", step.intermediate), ("hidden", hidden)):
        if value is not None and value % TILE:
            raise StartError(f"{here}.{key}: {value} is no multiple of {TILE}, the tile of the kernels")
    sizes = [step.layers, step.intermediate, hidden]
    student = step.student if isinstance(step, DistilStep) else None
    if student is not None and any(size is not None for size in sizes):
        raise StartError(
            f"{here}.student: a checkpoint has its own size: leave out layers, intermediate and hidden"
        )
    if student is None and all(size is None for size in sizes):
        keys = (
            "layers, intermediate, hidden or student"
            if isinstance(step, DistilStep)
            else "layers or intermediate"
        )
        raise StartError(f"{here}: nothing would become smaller: give {keys}")
