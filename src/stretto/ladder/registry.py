"""`ladder.json`: the variants of one model and what was measured of each. Reads strictly, and checks files.

It knows directories and digests, and neither tensors nor requests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta, Struct

from stretto.config import Quantise
from stretto.engine.step_time import StepCost
from stretto.errors import CheckpointError, StartError, reason_of
from stretto.ladder.estimate import QualityBin, QualityModel
from stretto.ladder.lengths import LengthModel
from stretto.ladder.strict import convert

FILE = "ladder.json"
VERSION = 2
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
TOKENIZER = "tokenizer.json"
WEIGHTS = "*.safetensors"
PIECE = 2**20
MeasuredShare = Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]


class QualityInterval(Struct, frozen=True, forbid_unknown_fields=True):
    """A measured share, with its 95 % confidence interval and the number of prompts or texts behind it."""

    mean: MeasuredShare
    low: MeasuredShare
    high: MeasuredShare
    count: Count


class Flips(Struct, frozen=True, forbid_unknown_fields=True):
    """Shares of the prompts whose answer became wrong, or right, compared with the top variant."""

    worse: MeasuredShare = 0.0
    better: MeasuredShare = 0.0


class TokenEnergy(Struct, frozen=True, forbid_unknown_fields=True):
    """The energy of a token at batch 1. `source` says how it was measured, or `estimate: ...` from what."""

    joules_per_token: Amount
    source: str


class Lengths(Struct, frozen=True, forbid_unknown_fields=True):
    """Quantiles of the tokens of prompts and answers."""

    prompt_p50: Count = 0
    p50: Count = 0
    p90: Count = 0


class Origin(Struct, frozen=True, forbid_unknown_fields=True):
    """How a variant was made: the step, its parent, and what it cost."""

    step: str
    parent: str | None = None
    options: dict[str, Any] = {}
    seed: int = 0
    seconds: Amount = 0.0
    versions: dict[str, str] = {}


class MeasuredCascade(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A smaller variant that begins the answers of this one. This one goes on with an answer from the first
    token of which the other is not sure: whose likeliest token has a log-probability less than `below`.

    `quality`: of these answers to held-out prompts; `loss`: how much less than that of this variant alone.
    `escalated`: the share of the answers that this variant ended; `begun`: the share of their tokens that the
    other wrote. `bins`: how often the other's own answers are right, by the probability of the token that
    was least sure.
    """

    begins: str
    below: Annotated[float, Meta(le=0)]
    quality: QualityInterval
    loss: MeasuredShare
    escalated: MeasuredShare
    begun: MeasuredShare
    bins: tuple[QualityBin, ...] = ()


class Variant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One variant. `path` is its checkpoint, relative to the ladder; several variants may share one.

    `files`: the digest of each weight file (blake2b, 32 hex digits). `exclude`: matrices that `quantise`
    leaves in a wider format. `times`: step-time coefficients by machine. `kl`: mean KL(top || variant) in
    nats per token. `tasks`: quality by task, then difficulty.
    """

    name: str
    path: str
    bytes: Count
    quality: QualityInterval
    files: dict[str, str]
    quantise: Quantise | None = None
    exclude: tuple[str, ...] = ()
    tasks: dict[str, dict[str, QualityInterval]] = {}
    kl: Amount = 0.0
    same_top1: MeasuredShare = 1.0
    perplexity: Amount | None = None
    flips: Flips = Flips()
    times: dict[str, StepCost] = {}
    energy: TokenEnergy | None = None
    lengths: Lengths = Lengths()
    estimate: QualityModel | None = None
    cascade: MeasuredCascade | None = None
    origin: Origin


class Dropped(Struct, frozen=True, forbid_unknown_fields=True):
    """A variant that was measured and not kept."""

    name: str
    why: str


class Ladder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model's variants, the best first. `tokenizer` is the digest of the tokenizer.json that all share.
    `lengths`: the tokens of an answer of the top, by the prompt."""

    version: int = VERSION
    model: str
    family: str
    vocab: Count
    tokenizer: str
    top: str
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1)]
    lengths: LengthModel | None = None
    dropped: tuple[Dropped, ...] = ()

    def variant(self, name: str) -> Variant:
        """The variant of that name. Raises KeyError."""
        return {each.name: each for each in self.variants}[name]


def load(folder: Path, *, digests: bool = True) -> Ladder:
    """The ladder in `folder`, checked. `digests = False` skips reading the weights to compare checksums.

    Raises CheckpointError, in one sentence, for a file that is missing, malformed or of another version; for
    a variant that is missing, of another model or tokenizer, or whose weights have another checksum.
    """
    file = folder / FILE
    try:
        data: Any = msgspec.json.decode(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no ladder: it has no {FILE}; `stretto optimise` makes one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {reason_of(error)}") from error
    _check_version(file, data)
    try:
        ladder = convert(data, Ladder, str(file))
    except StartError as error:
        raise CheckpointError(error.message, param=error.param) from None
    _check_names(file, ladder)
    for place, variant in enumerate(ladder.variants):
        _check_files(file, f"$.variants[{place}]", ladder, variant, digests)
    return ladder


def save(ladder: Ladder, folder: Path) -> None:
    """Write `ladder.json` in one atomic step."""
    file = folder / FILE
    temporary = file.with_suffix(".partial")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(ladder), indent=1) + b"\n")
    temporary.replace(file)


def digest(path: Path) -> str:
    """The blake2b digest of a file, 32 hex digits."""
    seen = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            seen.update(piece)
    return seen.hexdigest()


def weight_digests(folder: Path) -> dict[str, str]:
    """The digest of each weight file of a checkpoint, by name."""
    return {file.name: digest(file) for file in sorted(folder.glob(WEIGHTS))}


def _check_version(file: Path, data: object) -> None:
    """Raises CheckpointError for another version, before anything else is compared with this one's format."""
    version = cast("dict[str, Any]", data).get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise CheckpointError(
            f"{file}: $.version is {version}, and this Stretto reads {VERSION}: make the ladder again"
        )


def _check_names(file: Path, ladder: Ladder) -> None:
    names = [variant.name for variant in ladder.variants]
    for place, name in enumerate(names):
        if not NAME.fullmatch(name):
            raise CheckpointError(
                f"{file}: $.variants[{place}].name: {name!r} is no name: use letters, digits, '.', '_', '-'"
            )
        if name in names[:place]:
            raise CheckpointError(f"{file}: $.variants[{place}].name: {name} is the name of two variants")
    for place, variant in enumerate(ladder.variants):
        if variant.cascade is not None and variant.cascade.begins not in names:
            raise CheckpointError(
                f"{file}: $.variants[{place}].cascade.begins: {variant.cascade.begins!r} is none of the"
                f" variants {', '.join(names)}"
            )
    if ladder.top not in names:
        raise CheckpointError(f"{file}: $.top: {ladder.top!r} is none of the variants {', '.join(names)}")


def _check_files(file: Path, at: str, ladder: Ladder, variant: Variant, digests: bool) -> None:
    """Raises CheckpointError unless the variant's checkpoint is there, and is the one that was measured."""
    home, folder = file.parent.resolve(), (file.parent / variant.path).resolve()
    name = variant.name
    if not folder.is_relative_to(home):
        raise CheckpointError(
            f"{file}: {at}.path: {variant.path!r} of variant {name} leaves the ladder's folder"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{file}: {at}: variant {name} is missing: there is no directory {folder}")
    config = _config(folder)
    if (config.get("model_type"), config.get("vocab_size")) != (ladder.family, ladder.vocab):
        raise CheckpointError(
            f"{file}: {at}: variant {name} is of another model: {folder} is {config.get('model_type')} with "
            f"{config.get('vocab_size')} tokens, and the ladder is {ladder.family} with {ladder.vocab}"
        )
    tokenizer = folder / TOKENIZER
    if not tokenizer.is_file() or digest(tokenizer) != ladder.tokenizer:
        raise CheckpointError(
            f"{file}: {at}: variant {name} has another tokenizer than the ladder: {tokenizer} is not the one "
            "that its variants share"
        )
    wrong = _changed(folder, variant.files, digests)
    if wrong is not None:
        raise CheckpointError(
            f"{file}: {at}.files: {folder / wrong} is not the file that was measured as variant {name}: its "
            "checksum differs; restore it, or make the ladder again"
        )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {reason_of(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} must hold a JSON object")
    return cast("dict[str, Any]", config)


def _changed(folder: Path, files: dict[str, str], digests: bool) -> str | None:
    """The first weight file that is missing, unknown or changed; None: all are as they were."""
    present = {file.name for file in folder.glob(WEIGHTS)}
    strange: Iterable[str] = sorted(present ^ files.keys())
    for name in strange:
        return name
    if digests:
        for name, expected in files.items():
            if digest(folder / name) != expected:
                return name
    return None
