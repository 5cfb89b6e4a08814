"""The settings of a server: one frozen struct for each component, with meaning, bounds and default of each.

`settings/table.py` reads them from flags, environment and file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field
from msgspec.structs import fields

from stretto.errors import StartError
from stretto.settings.table import SettingsTable, part
from stretto.types import Objective, Preference

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
KvDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Quantise = Literal["int8", "int4", "fp8"]
TierName = Literal["priority", "default", "flex"]
API_KEY = re.compile(r"[!-~]+")
HOST_NAME = re.compile(r"\*|(\*\.)?[\w.-]+|\[?[0-9a-fA-F:.]+\]?")
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/@?#]+/?", re.IGNORECASE)


class Tier(Struct, frozen=True, kw_only=True):
    """A named default objective. When not all requests can be on time, lower weights are deferred first."""

    objective: Objective
    weight: float


# The objectives follow what people notice: 250 ms per token is reading speed, and attention lasts about 10 s.
# A machine that is too slow for them promises what it can keep (`engine/scheduler/default_tiers.py`).
TIERS: dict[str, Tier] = {
    "priority": Tier(objective=Objective(ttft_ms=5_000, itl_ms=150), weight=4.0),
    "default": Tier(objective=Objective(ttft_ms=20_000, itl_ms=250), weight=2.0),
    "flex": Tier(objective=Objective(), weight=1.0),
}


Tiers = Annotated[
    dict[TierName, Objective],
    Meta(
        description="objective of each tier, as a table `[tiers.priority]` with `ttft_ms`, `itl_ms`, ...;"
        " without one, by the speed of the machine"
    ),
]


Schedule = Annotated[
    Literal["fcfs", "deadline"],
    Meta(description="order of requests: `deadline` (as many on time as can be) or `fcfs` (by arrival)"),
]
SCHEDULE: Schedule = "deadline"
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    Meta(description="the least severe lines in the log on standard error, of API server and engine"),
]
LOG_LEVEL: LogLevel = "info"


def tiers_of(
    objectives: Mapping[TierName, Objective], defaults: Mapping[str, Tier] = TIERS
) -> dict[str, Tier]:
    """The default tiers, with the objectives that the configuration replaces."""
    return {**defaults} | {
        name: Tier(objective=objective, weight=TIERS[name].weight) for name, objective in objectives.items()
    }


class ModelConfig(Struct, frozen=True, kw_only=True):
    """One model to serve. `path` is a directory in the Hugging Face layout.

    `exclude`: matrices that `quantise` leaves in a wider format, as a ladder names them. `draft`: the model
    of the same engine that drafts for this one where `speculate` is `auto`. `usual_tokens`: of a long answer,
    as a ladder measured it; 0: unknown.

    The path `null` is the null model, whose steps take no time. With `null:38:1.5:2.9` they take what
    `engine.runners.null.null_cost` says.
    """

    name: str
    path: str
    dtype: ComputeDtype = "auto"
    quantise: Quantise | None = None
    exclude: tuple[str, ...] = ()
    draft: str | None = None
    usual_tokens: int = 0

    @property
    def is_null(self) -> bool:
        """Whether it is a null model."""
        return self.path.partition(":")[0] == "null"


class EngineConfig(Struct, frozen=True, kw_only=True):
    """Settings of the engine process. 0 means: derived from machine and model (`stretto doctor` explains)."""

    models: tuple[ModelConfig, ...]
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Meta(description="device to compute on; `auto` takes a usable CUDA device"),
    ] = "auto"
    threads: Annotated[
        int, Meta(ge=0, description="compute threads; 0: one per physical core that this process may use")
    ] = 0
    kv_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="size of the KV cache, like 2GiB (a bare number is GiB); 0: by context and"
            " max_running, at most a quarter of free memory",
        ),
    ] = field(default=0, name="kv_memory")
    kv_dtype: Annotated[
        KvDtype, Meta(description="dtype of the KV cache; `auto`: int8 with quantised weights on a CPU")
    ] = "auto"
    context: Annotated[
        int, Meta(ge=0, description="most tokens of prompt and answer together; 0: the model's own limit")
    ] = 0
    block_size: Annotated[int, Meta(ge=1, le=1024, description="tokens in a block of the KV cache")] = 16
    max_running: Annotated[int, Meta(ge=0, description="most sequences in a step; 0: 256, on a GPU 512")] = 0
    max_step_tokens: Annotated[
        int,
        Meta(
            ge=0,
            description="most tokens in a step; 0: as many as keep the fixed cost of a step below a tenth, "
            "within the tightest ITL objective of the tiers, and on a GPU at most 2,560",
        ),
    ] = 0
    schedule: Schedule = SCHEDULE
    speculate: Annotated[
        str,
        Meta(
            description="speculative decoding: `auto` (prompt lookup, and the smallest variant of a ladder"
            " drafts for the others), `ngram` (prompt lookup), `off`, or the name of a loaded model to use as"
            " the draft model"
        ),
    ] = "auto"
    prefix_cache: Annotated[
        bool, Meta(description="reuse the KV blocks of prompts with equal beginnings")
    ] = True
    cache_dir: Annotated[
        str,
        Meta(
            description="directory of quantised weights, step times and compiled kernels; empty: "
            "$XDG_CACHE_HOME/stretto"
        ),
    ] = ""
    cache_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="disk space for quantised weights, like 8GiB; the oldest are deleted; 0: keep none",
        ),
    ] = field(default=20 * 2**30, name="cache_size")
    engine_timeout_s: Annotated[
        float,
        Meta(
            ge=1,
            description="seconds without a sign of life after which the engine is stopped and started again;"
            " loading, and a single step, may take ten times as long",
        ),
    ] = field(default=30.0, name="engine_timeout")
    tiers: Tiers = {}
    log_level: LogLevel = LOG_LEVEL


class HttpConfig(Struct, frozen=True, kw_only=True):
    """Settings of any server that speaks HTTP to clients.

    Raises StartError for a key, host or origin that nobody can send.
    """

    host: Annotated[str, Meta(description="address to listen on; 0.0.0.0: all networks")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0: any free port")] = 8000
    max_body_bytes: Annotated[int, Meta(ge=1024, description="most bytes of a request")] = 4 * 2**20
    drain_s: Annotated[
        float, Meta(ge=0, description="seconds that a shutdown waits for unfinished answers")
    ] = field(default=30.0, name="drain")
    api_keys: Annotated[
        dict[str, str],
        Meta(description="API keys, as a table of key = tenant; empty: no key needed, the tenant is `local`"),
    ] = {}
    access_log: Annotated[
        bool,
        Meta(description="write one JSON line for each request to standard output, without content or keys"),
    ] = False
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="further host names by which clients reach this server, like llm.example.org or"
            " *.example.org; `*`: any. Always allowed: localhost, and the machine's names if it listens on a"
            " network"
        ),
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="origins whose web pages may use this server, like https://app.example.org; `*`: any"
        ),
    ] = ()
    max_connections: Annotated[int, Meta(ge=1, description="most connections at the same time")] = 4096
    request_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds in which a request must arrive whole; else 408")
    ] = field(default=30.0, name="request_timeout")
    send_timeout_s: Annotated[
        float,
        Meta(gt=0, description="seconds that an answer waits for a client that reads nothing; then it ends"),
    ] = field(default=30.0, name="send_timeout")
    trace_endpoint: Annotated[
        str,
        Meta(
            description="URL of an OpenTelemetry collector (OTLP over HTTP) for traces, like"
            " http://127.0.0.1:4318; needs the extra `otel`; empty: no traces"
        ),
    ] = ""
    gateway_key: str = ""
    log_level: LogLevel = LOG_LEVEL

    @property
    def locked(self) -> bool:
        """Whether a request needs a key."""
        return bool(self.api_keys)

    def __post_init__(self) -> None:
        for key, tenant in self.api_keys.items():
            if not API_KEY.fullmatch(key) or not tenant.strip():
                raise StartError(
                    f"api_keys: the key of tenant {tenant!r} is empty, or has spaces or letters beyond ASCII;"
                    " write a key that a client can send, and name its tenant"
                )
        if self.gateway_key and not API_KEY.fullmatch(self.gateway_key):
            raise StartError("gateway_key has spaces or letters beyond ASCII; write one that can be sent")
        for name in self.allowed_hosts:
            if not HOST_NAME.fullmatch(name):
                raise StartError(f"allowed_hosts: {name!r} is no host name; write one like llm.example.org")
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise StartError(f"cors_origins: {origin!r} is no origin; write one like https://example.org")


class ServeConfig(HttpConfig, frozen=True, kw_only=True):
    """Settings of the API server. `schedule`, `tiers` and `log_level` are also the engine's.

    Raises StartError also for a tier with `on_miss = "reject"` under `fcfs`, which rejects no request.
    """

    max_waiting: Annotated[
        int,
        Meta(ge=1, description="most answers that wait for their first token; more are rejected with 503"),
    ] = 512
    max_n: Annotated[int, Meta(ge=1, description="most answers to one request")] = 16
    max_stop: Annotated[int, Meta(ge=0, description="most stop strings of a request")] = 16
    gateway_key: Annotated[
        str,
        Meta(
            description="secret of the gateways in front of this worker, which speak for their tenants; "
            "empty: with `api_keys` no gateway may, without them any client may"
        ),
    ] = ""
    quality: Annotated[
        float, Meta(gt=0, le=1, description="worth of the answers, which gateways compare between servers")
    ] = 1.0
    priority_share: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="share of the machine's time that one tenant may use at tier priority in a minute; "
            "further requests get tier default",
        ),
    ] = 0.5
    response_store: Annotated[
        int,
        Meta(
            ge=0,
            description="memory that keeps answers of /v1/responses with their conversations, like 64MiB (a"
            " bare number is GiB), for `previous_response_id`; the oldest are dropped; 0: keep none",
        ),
    ] = 0
    prefer: Annotated[
        Preference,
        Meta(description="what counts among variants that are on time: `quality`, `energy` or `latency`"),
    ] = "quality"
    tenants_prefer: Annotated[
        dict[str, Preference], Meta(description="the same, as a table of tenant = preference")
    ] = {}
    cascade: Annotated[
        tuple[str, ...], Meta(description="tenants whose answers a small variant may begin; `*`: all")
    ] = ()
    max_sessions: Annotated[
        int, Meta(ge=0, description="most sockets of /v1/realtime that one tenant may have open; 0: none")
    ] = 64
    session_timeout_s: Annotated[
        float,
        Meta(gt=0, description="seconds without an event of its client after which such a socket is closed"),
    ] = field(default=900.0, name="session_timeout")
    feedback_wait_s: Annotated[
        float, Meta(ge=0, description="seconds that an answer waits for feedback; 0: there is none")
    ] = field(default=86_400.0, name="feedback_wait")
    feedback_prompts: Annotated[
        tuple[str, ...],
        Meta(description="tenants whose prompts are kept with feedback, to train on; `*`: all"),
    ] = ()
    schedule: Schedule = SCHEDULE
    tiers: Tiers = {}

    def __post_init__(self) -> None:
        HttpConfig.__post_init__(self)
        for name, objective in self.tiers.items():
            if self.schedule == "fcfs" and objective.on_miss == "reject":
                raise StartError(
                    f"tiers.{name}: on_miss = reject needs schedule = deadline, as fcfs rejects no request"
                )


class ModelSettings(Struct, frozen=True, kw_only=True):
    """The models to serve, as the user names them."""

    models: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="directories of models or ladders, or hub ids, as PATH or NAME=PATH; the first is the"
            " default",
        ),
    ] = ("desk",)
    dtype: Annotated[
        ComputeDtype, Meta(description="dtype to compute in; `auto`: the fastest that CPU or GPU supports")
    ] = "auto"
    quantise: Annotated[
        Quantise | None,
        Meta(description="quantise the weights: int8 or int4 on a CPU, fp8 or int4 on a GPU"),
    ] = None


SERVE = SettingsTable([*fields(ModelSettings), *fields(ServeConfig), *fields(EngineConfig)[1:]])


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None
) -> tuple[ServeConfig, EngineConfig]:
    """The settings of one server. The `path` of a model is as the user wrote it, perhaps a hub id.

    Raises StartError that names the file and key, the environment variable or the flag of a wrong value.
    """
    merged = SERVE.read(flags, environ, file)
    settings = ModelSettings(**part(ModelSettings, merged))
    merged["models"] = _named(settings)
    return ServeConfig(**part(ServeConfig, merged)), EngineConfig(**part(EngineConfig, merged))


def _named(settings: ModelSettings) -> tuple[ModelConfig, ...]:
    """The models with their names: NAME of `NAME=PATH`, or the directory's, or the hub id.

    Raises StartError when two have the same name.
    """
    models: list[ModelConfig] = []
    for written in settings.models:
        name, equals, path = written.partition("=")
        if not equals:
            path = written
            name = Path(path).resolve().name if Path(path).is_dir() else path
        if not name or not path:
            raise StartError(f"{written!r} names no model: write PATH or NAME=PATH")
        if name in {model.name for model in models}:
            raise StartError(f"two models are called {name}: give one of them another name, as NAME={path}")
        models.append(ModelConfig(name=name, path=path, dtype=settings.dtype, quantise=settings.quantise))
    return tuple(models)
