"""What each component is told at start, as one frozen struct per component, and where it comes from.

Flags win over the environment (`STRETTO_PORT`), that over a file (`port = 8000`), that over the defaults.
One name everywhere. `stretto.cli` passes flags and environment in; nothing else reads the environment.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field, structs
from msgspec.structs import FieldInfo, fields

from stretto.errors import StartError
from stretto.types import Objective

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KvDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Quantise = Literal["int8", "int4", "fp8"]
Count = Annotated[int, Meta(ge=1)]
Limit = Annotated[float, Meta(gt=0, le=86_400_000)]
TierName = Literal["priority", "default", "flex"]
FILE_ONLY = ("api_keys", "tiers")
SIZES = {"kv_memory", "cache_size"}
ENVIRONMENT = "STRETTO_"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?", re.IGNORECASE)


class Tier(Struct, frozen=True, kw_only=True):
    """A named default objective. Where not all can be on time, those of lower weight give way."""

    objective: Objective
    weight: float


# The objectives are what people notice, not what a machine can do, so they hold on a slow CPU and on a GPU:
# 250 ms a token is about how fast one reads, 10 s is how long attention stays. A CPU that reads 300 tokens a
# second keeps them for prompts of up to some 1,500 and 6,000 tokens; where it cannot, on_miss decides.
TIERS: dict[str, Tier] = {
    "priority": Tier(objective=Objective(ttft_ms=5_000, itl_ms=150), weight=4.0),
    "default": Tier(objective=Objective(ttft_ms=20_000, itl_ms=250), weight=2.0),
    "flex": Tier(objective=Objective(), weight=1.0),
}


class Terms(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tier's objective as a configuration writes it, the whole of it: what is left out has no limit."""

    ttft_ms: Limit | None = None
    itl_ms: Limit | None = None
    total_ms: Limit | None = None
    on_miss: Literal["degrade", "reject", "late"] = "degrade"


Tiers = Annotated[
    dict[TierName, Terms],
    Meta(
        description="what a tier's requests ask of time, as `[tiers.priority]` with `ttft_ms`, `itl_ms`, ..."
    ),
]


Schedule = Annotated[
    Literal["fcfs", "deadline"],
    Meta(description="what runs first; fcfs: first come, first served; deadline: so that most are on time"),
]
SCHEDULE: Schedule = "deadline"


def tiers_of(terms: Mapping[TierName, Terms]) -> dict[str, Tier]:
    """The tiers, those that `terms` names with the objective it says."""
    return TIERS | {
        name: Tier(objective=Objective(**structs.asdict(asked)), weight=TIERS[name].weight)
        for name, asked in terms.items()
    }


class ModelConfig(Struct, frozen=True, kw_only=True):
    """One model to hold. `path` is a directory in the Hugging Face layout, or `null` for the null model,
    whose steps take no time, or as many milliseconds as `null:20` says.
    """

    name: str
    path: str
    dtype: Dtype = "auto"
    quantise: Quantise | None = None

    @property
    def null_ms(self) -> float | None:
        """Milliseconds of a null model's step; None: it is a real one. Raises StartError for no number."""
        name, _, text = self.path.partition(":")
        if name != "null":
            return None
        try:
            return float(text or 0.0)
        except ValueError:
            raise StartError(f"{self.path!r}: write null, or null:20 for steps of 20 ms") from None


class EngineConfig(Struct, frozen=True, kw_only=True):
    """The engine process. Zero means: derived from the machine and the model (`stretto doctor` says how)."""

    models: tuple[ModelConfig, ...]
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="where to compute; auto takes a usable CUDA device")
    ] = "auto"
    threads: Annotated[
        int, Meta(ge=0, description="threads that compute; 0: one per physical core this process may use")
    ] = 0
    kv_bytes: Annotated[
        int, Meta(ge=0, description="memory for the KV cache, as 2GiB (a bare number is GiB); 0: a quarter")
    ] = field(default=0, name="kv_memory")
    kv_dtype: Annotated[
        KvDtype, Meta(description="what the KV cache holds; auto: int8 beside quantised weights on a CPU")
    ] = "auto"
    context: Annotated[
        int, Meta(ge=0, description="longest prompt and answer together, tokens; 0: what the model allows")
    ] = 0
    block_size: Annotated[int, Meta(ge=1, le=1024, description="tokens of a KV block")] = 16
    max_running: Annotated[int, Meta(ge=1, description="sequences in a step at most")] = 256
    max_step_tokens: Annotated[int, Meta(ge=1, description="tokens in a step at most")] = 512
    schedule: Schedule = SCHEDULE
    speculate: Annotated[
        str,
        Meta(
            description="guess ahead where it pays: off; ngram: from an answer's own text; NAME: also with"
            " that model, one of those held"
        ),
    ] = "ngram"
    prefix_cache: Annotated[bool, Meta(description="share the KV blocks of equal beginnings")] = True
    cache_dir: Annotated[
        str,
        Meta(description="where quantised weights and step times are kept; empty: $XDG_CACHE_HOME/stretto"),
    ] = ""
    cache_bytes: Annotated[
        int, Meta(ge=0, description="disk space for quantised weights, as 8GiB; the oldest go; 0: none kept")
    ] = field(default=20 * 2**30, name="cache_size")
    tiers: Tiers = {}


class ServeConfig(Struct, frozen=True, kw_only=True):
    """The HTTP front. `max_waiting` bounds the queue; `drain_s` how long a shutdown waits for answers.
    `schedule` and `tiers` are the engine's too. Raises StartError for a tier the schedule cannot keep."""

    host: Annotated[str, Meta(description="address to listen on; 0.0.0.0 is every network")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    max_waiting: Annotated[
        int,
        Meta(
            ge=1, description="answers that wait for their first token at most; one more is refused with 503"
        ),
    ] = 512
    max_body_bytes: Annotated[int, Meta(ge=1024, description="bytes of a request at most")] = 4 * 2**20
    max_n: Annotated[int, Meta(ge=1, description="answers to one request at most")] = 16
    max_stop: Annotated[int, Meta(ge=0, description="stop strings of a request at most")] = 16
    drain_s: Annotated[
        float, Meta(ge=0, description="seconds a shutdown waits for the answers under way")
    ] = field(default=30.0, name="drain")
    api_keys: Annotated[
        dict[str, str], Meta(description="who may ask: a table of key = tenant; empty: anybody, as `local`")
    ] = {}
    priority_share: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="of the machine's time, what one tenant may ask for at priority in a minute; beyond, "
            "its requests are served as default",
        ),
    ] = 0.5
    schedule: Schedule = SCHEDULE
    tiers: Tiers = {}

    def __post_init__(self) -> None:
        for name, terms in self.tiers.items():
            if self.schedule == "fcfs" and terms.on_miss == "reject":
                raise StartError(
                    f"tiers.{name}: on_miss = reject needs the schedule deadline: fcfs refuses nobody"
                )


class Models(Struct, frozen=True, kw_only=True):
    """What to serve, as a user says it."""

    models: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="directories or hub ids, each perhaps as NAME=PATH; the first is the default",
        ),
    ] = ("desk",)
    dtype: Annotated[Dtype, Meta(description="what to compute in; auto: what the CPU or GPU is good at")] = (
        "auto"
    )
    quantise: Annotated[
        Quantise | None,
        Meta(description="hold weights in 8 or 4 bits: int8 or int4 on a CPU, fp8 or int4 on a GPU"),
    ] = None


def known() -> dict[str, FieldInfo]:
    """Every setting by its name."""
    every = (*fields(Models), *fields(ServeConfig), *fields(EngineConfig)[1:])
    return {info.encode_name: info for info in every}


Settings = msgspec.defstruct(
    "Settings", [(name, info.type, None) for name, info in known().items()], forbid_unknown_fields=True
)


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None
) -> tuple[ServeConfig, EngineConfig]:
    """The settings of one server. A model's `path` is still what the user wrote.

    Raises StartError that says where a value is wrong: the file and key, the variable, or the flag.
    """
    merged = {} if file is None else _checked(_read(file), f"{file}", strict=True)
    for name in known():
        variable = ENVIRONMENT + name.upper()
        if name not in FILE_ONLY and variable in environ:
            text = environ[variable]
            value: Any = text.split(",") if name == "models" else text
            merged |= _checked({name: value}, variable, strict=False)
    if key := environ.get("STRETTO_API_KEY"):
        merged["api_keys"] = {key: "local"}
    for name, value in flags.items():
        merged |= _checked({name: value}, f"--{name.replace('_', '-')}", strict=False)
    asked = Models(**_part(Models, merged))
    merged["models"] = _named(asked)
    return ServeConfig(**_part(ServeConfig, merged)), EngineConfig(**_part(EngineConfig, merged))


def reference(flags: Collection[str]) -> str:
    """The settings as a Markdown table. `flags` are the names that have a flag."""
    rows = ["| in the file | environment | flag | default | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, info in known().items():
        variable = "" if name in FILE_ONLY else f"`{ENVIRONMENT}{name.upper()}`"
        variable = "STRETTO_API_KEY (one key)" if name == "api_keys" else variable
        flag = f"`--{name.replace('_', '-')}`" if name in flags else "arguments" if name == "models" else ""
        default = info.default if info.default is not msgspec.NODEFAULT else info.default_factory()
        shown = msgspec.json.encode(default).decode()
        meaning = info.type.__metadata__[0].description
        rows.append(f"| `{name}` | {variable} | {flag} | `{shown}` | {meaning} |")
    return "\n".join(rows) + "\n"


def size(text: object) -> int:
    """Bytes of `2GiB`, `512M` or `1.5` (GiB). Raises ValueError."""
    match = SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write it like 2GiB, 512MiB or 1.5 (GiB)")
    number, unit, _ = match.groups()
    return int(float(number) * 2 ** (10 * ("KMGT".index(unit.upper()) + 1) if unit else 30))


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StartError(f"cannot read the configuration {file}: {error}") from error


def _checked(values: dict[str, Any], where: str, *, strict: bool) -> dict[str, Any]:
    for name in values.keys() - known().keys():
        near = difflib.get_close_matches(name, known(), 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known())}"
        raise StartError(f"{where}: unknown setting {name}{hint}")
    try:
        values = values | {name: size(values[name]) for name in SIZES & values.keys()}
        parsed = msgspec.convert(values, Settings, strict=strict)
    except ValueError as error:
        raise StartError(f"{where}: {error}") from error
    return {name: getattr(parsed, name) for name in values}


def _part(struct: type[Struct], merged: dict[str, Any]) -> dict[str, Any]:
    return {info.name: merged[info.encode_name] for info in fields(struct) if info.encode_name in merged}


def _named(asked: Models) -> tuple[ModelConfig, ...]:
    """`NAME=PATH`, or the name a directory or hub id has. Raises StartError when two are called the same."""
    models: list[ModelConfig] = []
    for written in asked.models:
        name, equals, path = written.partition("=")
        if not equals:
            path = written
            name = Path(path).resolve().name if Path(path).is_dir() else path
        if not name or not path:
            raise StartError(f"{written!r} names no model: write PATH or NAME=PATH")
        if name in {model.name for model in models}:
            raise StartError(f"two models are called {name}: name one of them otherwise, as NAME={path}")
        models.append(ModelConfig(name=name, path=path, dtype=asked.dtype, quantise=asked.quantise))
    return tuple(models)
