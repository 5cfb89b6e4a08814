"""`stretto doctor`: the machine, the choices Stretto makes on it and why, and whether a model fits.

The choices are made by `stretto.hardware`, as in the engine. A separate process asks torch, so that this one
need not import it.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec
from msgspec import Struct

from stretto import hardware
from stretto.config import EngineConfig, ModelConfig
from stretto.errors import CheckpointError, StartError
from stretto.hardware import Decision, Gpu, KvPlan, KvShape, Machine, Probed, Stored, gib

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
PACKAGES = ("stretto", "torch", "tokenizers", "llguidance", "msgspec", "pyzmq", "uvicorn")
PROBE_S = 120
FactRow = tuple[str, str, str]
FactSection = tuple[str, list[FactRow]]


class ModelFit(Struct, frozen=True, kw_only=True):
    """How a model fits this machine. `problem` says why it does not run here; `kv` is then None."""

    name: str
    path: str
    stored: Stored
    dtype: Decision[str]
    kv_dtype: Decision[str]
    weight_bytes: int
    kv: Decision[KvPlan] | None
    problem: str | None


class CacheUsage(Struct, frozen=True):
    """The quantised weights kept in `folder` for the next start. `bytes` and `limit` are sizes."""

    folder: str
    files: int
    bytes: int
    limit: int


class Diagnosis(Struct, frozen=True, kw_only=True):
    """What `stretto doctor --json` prints. Sizes are bytes."""

    machine: Machine
    compiler: str | None
    disk_free: int
    packed: CacheUsage
    python: str
    versions: dict[str, str]
    torch_isa: str
    gpus: tuple[Gpu, ...]
    kernels: Decision[str]
    device: Decision[str]
    threads: Decision[int]
    model: ModelFit | None


def diagnose(engine: EngineConfig, model: ModelConfig | None) -> Diagnosis:
    """Examine this machine, and `model` on it. Raises CheckpointError when its directory holds no model."""
    seen = hardware.snapshot()
    probed = _probe(model)
    device = hardware.choose_device(engine.device, probed.cuda)
    available = probed.gpus[0].free if device.value == "cuda" else seen.available
    fit = None
    if model is not None and probed.stored is not None:
        dtype = hardware.choose_dtype(seen, probed.stored.dtype, device=device.value, requested=model.dtype)
        own = device.value == "cpu" and probed.kernels.startswith("cpu-")
        running = hardware.choose_running(engine.max_running, device.value).value
        engine = msgspec.structs.replace(engine, max_running=running)
        fit = _fit(engine, model, probed.stored, available, dtype, _kv_dtype(engine, model, dtype, own))
    compiler = shutil.which("gcc")
    return Diagnosis(
        machine=seen,
        compiler=compiler and _output([compiler, "--version"]).partition("\n")[0],
        disk_free=shutil.disk_usage(hardware.home() or Path.cwd()).free,
        packed=_packed(engine),
        python=platform.python_version(),
        versions={package: version(package) for package in PACKAGES},
        torch_isa=probed.isa,
        gpus=probed.gpus,
        kernels=Decision(probed.kernels, probed.kernels_why),
        device=device,
        threads=hardware.choose_threads(seen, engine.threads),
        model=fit,
    )


def sections(found: Diagnosis) -> list[FactSection]:
    """The diagnosis as titled sections with rows of name, value and reason."""
    choices = {"device": found.device, "threads": found.threads, "kernels": found.kernels}
    return [
        ("This machine", _machine_rows(found)),
        ("Choices", [(name, str(choice.value), choice.why) for name, choice in choices.items()]),
        *([] if found.model is None else [(f"Model {found.model.name}", _model_rows(found.model))]),
        ("Software", [("python", found.python, ""), *((k, v, "") for k, v in found.versions.items())]),
    ]


def _probe(model: ModelConfig | None) -> Probed:
    command = [sys.executable, "-m", "stretto.profiler.probe", *([] if model is None else [model.path])]
    probed = msgspec.json.decode(_output(command), type=Probed)
    if probed.error is not None:
        raise CheckpointError(probed.error)
    return probed


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise StartError(f"`{' '.join(command)}` failed: {last}") from error
    return done.stdout


def _packed(engine: EngineConfig) -> CacheUsage:
    folder = hardware.packed_folder(engine.cache_dir)
    if folder is None:
        return CacheUsage("kept nowhere: set cache_dir, as this user has no home directory", 0, 0, 0)
    sizes = [file.stat().st_size for file in folder.glob("*.packed.safetensors")]
    return CacheUsage(str(folder), len(sizes), sum(sizes), engine.cache_bytes)


def _kv_dtype(engine: EngineConfig, model: ModelConfig, dtype: Decision[str], own: bool) -> Decision[str]:
    """`own`: Stretto's C kernels run the model, not torch."""
    cached = hardware.CACHES if own and dtype.value in hardware.CACHES else frozenset[str]()
    quantised = model.quantise is not None
    return hardware.choose_kv_dtype(
        dtype.value, quantised=quantised, requested=engine.kv_dtype, cached=cached
    )


def _token_bytes(stored: Stored, kv_dtype: str) -> int:
    """Bytes of the keys and values of one token. In int8 each row also has a scale of four bytes."""
    return stored.token_elements * WIDTHS[kv_dtype] + (4 * stored.token_rows if kv_dtype == "int8" else 0)


def _fit(
    engine: EngineConfig,
    model: ModelConfig,
    stored: Stored,
    available: int,
    dtype: Decision[str],
    kv_dtype: Decision[str],
) -> ModelFit:
    weights = stored.parameters * WIDTHS[dtype.value]
    shape = KvShape(
        block_bytes=_token_bytes(stored, kv_dtype.value) * engine.block_size,
        block_size=engine.block_size,
        context=stored.context,
        max_running=engine.max_running,
    )
    kv, problem = None, None
    try:
        hardware.check_fit(model.name, weights, available)
        kv = hardware.choose_kv(
            shape, available - weights, requested_bytes=engine.kv_bytes, requested_context=engine.context
        )
    except StartError as error:
        problem = error.message
    return ModelFit(
        name=model.name,
        path=model.path,
        stored=stored,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weight_bytes=weights,
        kv=kv,
        problem=problem,
    )


def _machine_rows(found: Diagnosis) -> list[FactRow]:
    seen = found.machine
    limit = "" if seen.quota is None else f"the container may use {seen.quota:g} of them"
    rows = [
        ("processor", seen.cpu, ""),
        ("cores", f"{seen.cores} physical, {seen.logical_cores} logical", limit),
        ("instructions", " ".join(seen.isa) or "none that Stretto uses", f"torch uses {found.torch_isa}"),
        ("memory", f"{gib(seen.available)} of {gib(seen.memory)} available", ""),
        ("disk", f"{gib(found.disk_free)} free", "for downloaded models"),
        (
            "quantised weights",
            f"{gib(found.packed.bytes)} kept in {found.packed.files} files of {gib(found.packed.limit)}",
            found.packed.folder,
        ),
        ("C compiler", found.compiler or "none", ""),
    ]
    rows += [
        (f"GPU {i}", f"{g.name}, {gib(g.free)} of {gib(g.memory)} free", "") for i, g in enumerate(found.gpus)
    ]
    if seen.gpus and not found.gpus:
        rows.append(
            ("GPU", ", ".join(seen.gpus), "the installed torch cannot use it: it is built without CUDA")
        )
    return rows


def _model_rows(fit: ModelFit) -> list[FactRow]:
    stored = fit.stored
    rows = [
        ("family", stored.family, ""),
        ("parameters", f"{stored.parameters:,}", f"vocabulary of {stored.vocab:,}"),
        ("context", f"{stored.context:,} tokens", "the model's own"),
        ("dtype", fit.dtype.value, fit.dtype.why),
        ("KV dtype", fit.kv_dtype.value, fit.kv_dtype.why),
        ("weights", gib(fit.weight_bytes), f"{gib(stored.bytes)} of {stored.dtype} on disk"),
    ]
    if fit.kv is not None:
        plan = fit.kv.value
        rows.append(("KV cache", f"{gib(plan.bytes)}: {plan.tokens:,} tokens", fit.kv.why))
        rows.append(("fits", "yes", f"serves contexts of {plan.context:,} tokens"))
    else:
        rows.append(("fits", "no", fit.problem or ""))
    return rows
