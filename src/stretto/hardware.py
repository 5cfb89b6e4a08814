"""A snapshot of the machine, and the decisions that follow from it: device, dtype, threads, KV memory.

The engine and `stretto doctor` use the same functions. Each decision has a reason for the user. This module
never imports torch: callers pass the facts about CUDA.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Generic, TypeVar

from msgspec import Struct

from stretto.errors import StartError

T = TypeVar("T")

ISA = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
BF16_ISA = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
CACHES = frozenset({"float32", "bfloat16", "int8"})  # dtypes of a KV cache that the C kernels read
FEWEST_STEP_TOKENS, MOST_STEP_TOKENS = 512, 8192
MOST_RUNNING = {"cpu": 256, "cuda": 512}  # sequences in a step
STEP_BASES = 10  # a longer step would gain less than a tenth, and the next request would wait for it
STEP_TOKENS_ROUNDED = 256
KV_SHARE = 0.25  # of the available memory, by default
USUAL_PART = 8  # a usual sequence has at most an eighth of the context
FULL_CONTEXTS = 8  # that fit beside each other
KV_MOST = 0.75  # of the available memory, when one full context needs it
GIB = 2**30


class Machine(Struct, frozen=True, kw_only=True):
    """Hardware that this process may use. `memory` and `available` are bytes, within the container's limit.

    `cores` counts the physical cores that the process may run on, `quota` the container's share in cores.
    `gpus` names the NVIDIA devices of the driver, even those that torch cannot use.
    """

    cpu: str
    arch: str
    logical_cores: int
    cores: int
    quota: float | None
    isa: tuple[str, ...]
    memory: int
    available: int
    gpus: tuple[str, ...] = ()


class Gpu(Struct, frozen=True):
    """A device that torch can use. `memory` and `free` are bytes."""

    name: str
    memory: int
    free: int


class Stored(Struct, frozen=True, kw_only=True):
    """A checkpoint on disk, `bytes` long. `parameters` counts the elements of all tensors.

    `token_elements` counts the keys and values of one token over all layers. They come in `token_rows` rows.
    """

    family: str
    dtype: str
    context: int
    vocab: int
    parameters: int
    token_elements: int
    token_rows: int
    bytes: int


class Probed(Struct, frozen=True, kw_only=True):
    """Facts about the machine and a checkpoint that need torch. `stretto.profiler.probe` collects them."""

    cuda: bool
    isa: str
    kernels: str
    kernels_why: str
    gpus: tuple[Gpu, ...]
    stored: Stored | None = None
    error: str | None = None


class Decision(Struct, Generic[T], frozen=True):
    """A decision and its reason."""

    value: T
    why: str


class KvShape(Struct, frozen=True, kw_only=True):
    """The KV memory that one model needs. `block_bytes`: keys and values of a block over all layers."""

    block_bytes: int
    block_size: int
    context: int
    max_running: int


class KvPlan(Struct, frozen=True, kw_only=True):
    """The size of a KV cache, and the longest context that it serves."""

    blocks: int
    bytes: int
    tokens: int
    context: int


def snapshot(root: Path = Path("/")) -> Machine:
    """Read the machine from the files below `root`. Tests pass a directory of their own."""
    info = _text(root / "proc/cpuinfo")
    flags = set((_field(info, "flags") or _field(info, "Features")).split())
    allowed = os.sched_getaffinity(0)
    limit, used = _container_memory(root)
    meminfo = _text(root / "proc/meminfo")
    total, available = _kib(meminfo, "MemTotal"), _kib(meminfo, "MemAvailable")
    if limit is not None:
        total, available = min(total, limit), max(0, min(available, limit - used))
    return Machine(
        cpu=_field(info, "model name") or platform.processor() or platform.machine(),
        arch=platform.machine(),
        logical_cores=len(allowed),
        cores=_physical_cores(root, allowed),
        quota=_quota(root),
        isa=tuple(name for name in ISA if name in flags),
        memory=total,
        available=available,
        gpus=_gpus(root),
    )


def home() -> Path | None:
    """The user's home directory; None for a user without one, as containers have them."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_folder(requested: str = "") -> Path | None:
    """The cache directory: `requested`, or the one of the XDG Base Directory Specification.

    None when neither is there: nothing is cached then. Raises StartError for `~` without a home directory.
    """
    if requested:
        try:
            return Path(requested).expanduser()
        except RuntimeError as error:
            raise StartError(f"cache_dir {requested}: {error}; write the whole path") from error
    own = home()
    base = os.environ.get("XDG_CACHE_HOME") or (own and own / ".cache")
    return Path(base) / "stretto" if base else None


def packed_folder(requested: str = "") -> Path | None:
    """The directory for quantised weights in the layout of the kernels; None: they are not kept."""
    folder = cache_folder(requested)
    return folder and folder / "packed"


def choose_device(requested: str, cuda_usable: bool) -> Decision[str]:
    """The device to compute on. Raises StartError when `requested` is `cuda` and torch cannot use it."""
    if requested == "cuda" and not cuda_usable:
        raise StartError(
            "--device cuda: torch finds no usable CUDA device; run `stretto doctor`, or use --device cpu"
        )
    if requested != "auto":
        return Decision(requested, "set by the user")
    if cuda_usable:
        return Decision("cuda", "a CUDA device is usable")
    return Decision("cpu", "no usable CUDA device")


def choose_dtype(machine: Machine, checkpoint: str, *, device: str, requested: str = "auto") -> Decision[str]:
    """The dtype to compute in, by torch's name. `checkpoint` is the dtype of the stored weights."""
    if requested != "auto":
        return Decision(requested, "set by the user")
    if checkpoint not in ("bfloat16", "float16"):
        return Decision("float32", f"the checkpoint is {checkpoint}")
    if device != "cpu":
        return Decision(checkpoint, "the checkpoint's own")
    native = sorted(BF16_ISA.intersection(machine.isa))
    if native:
        return Decision("bfloat16", f"the CPU computes in it ({native[0]})")
    return Decision(
        "float32", "the CPU has no bfloat16 instructions, and emulating them is slower than float32"
    )


def choose_kv_dtype(dtype: str, *, quantised: bool, requested: str, cached: frozenset[str]) -> Decision[str]:
    """The dtype of the KV cache, for a model computed in `dtype`. The kernels can read `dtype` and `cached`.

    Raises StartError when `requested` is another dtype.
    """
    if requested not in ("auto", dtype) and requested not in cached:
        able = ", ".join(sorted(cached | {dtype}))
        raise StartError(f"kv_dtype {requested}: the kernels of this model can only read {able}")
    if requested != "auto":
        return Decision(requested, "set by the user")
    if quantised and "int8" in cached:
        return Decision("int8", "the weights are quantised, and that costs more quality than an int8 cache")
    return Decision(dtype, "the dtype that the model computes in")


def choose_threads(machine: Machine, requested: int = 0) -> Decision[int]:
    """The number of compute threads: the usable physical cores, or the container's quota if that is less."""
    if requested:
        return Decision(requested, "set by the user")
    if machine.quota is not None and machine.quota < machine.cores:
        return Decision(max(1, int(machine.quota)), f"the container may use {machine.quota:g} cores")
    return Decision(machine.cores, "one per physical core this process may use")


def choose_running(requested: int, device: str) -> Decision[int]:
    """The most sequences in a step on a device of this kind, `cpu` or `cuda`.

    A stream holds its place until its answer ends, and a GPU decodes many streams in the time of one.
    """
    if requested:
        return Decision(requested, "set by the user")
    return Decision(MOST_RUNNING[device], f"the default on {device}")


def choose_step_tokens(
    requested: int, *, base_ms: float, per_token_ms: float, itl_ms: float, most: int = MOST_STEP_TOKENS
) -> Decision[int]:
    """The most tokens in a step, from what a step costs apart from its tokens and what a prompt's token adds;
    no more than `most`.

    `itl_ms` is the tightest inter-token objective of the tiers: a step must not take longer, because streams
    wait for it. The schedule `deadline` also ends each step in time for the streams that are running.
    """
    if requested:
        return Decision(requested, "set by the user")
    ms = max(min(STEP_BASES * base_ms, itl_ms - base_ms), 0.0)
    fitting = min(ms / max(per_token_ms, ms / most, 1e-9), most)
    tokens = max(round(fitting / STEP_TOKENS_ROUNDED) * STEP_TOKENS_ROUNDED, FEWEST_STEP_TOKENS)
    return Decision(tokens, f"{tokens} take about {base_ms + tokens * per_token_ms:.0f} ms")


def choose_kv(
    shape: KvShape, available: int, *, requested_bytes: int = 0, requested_context: int = 0
) -> Decision[KvPlan]:
    """The KV cache of one model, given the bytes that are `available` beside its weights.

    By default it takes what can use it: `max_running` sequences with an eighth of the context each, or a few
    full contexts if that is more. It takes at most a quarter of the memory, and more when one full context
    needs it. The model's own context is cut to what fits. Raises StartError when `requested_bytes` or
    `requested_context` does not fit.
    """
    if requested_context > shape.context:
        raise StartError(f"--context {requested_context} is beyond the model's own {shape.context} tokens")
    context = requested_context or shape.context
    one = -(-context // shape.block_size)
    most = int(available * KV_MOST) // shape.block_bytes
    if requested_bytes:
        if requested_bytes > available:
            raise StartError(
                f"--kv-memory {gib(requested_bytes)} is more than the {gib(available)} available"
            )
        blocks, why = requested_bytes // shape.block_bytes, f"{gib(requested_bytes)} set by the user"
    else:
        share = int(available * KV_SHARE) // shape.block_bytes
        each = -(-context // USUAL_PART // shape.block_size)
        full = min(shape.max_running, FULL_CONTEXTS)
        used = max(each * shape.max_running, one * full)
        blocks, why = share, f"a quarter of {gib(available)} available"
        if used <= share:
            blocks, why = used, f"{full} contexts of {context} tokens"
            if used > one * full:
                why = f"{shape.max_running} sequences of {each * shape.block_size} tokens"
        elif share < one:
            blocks, why = min(one, most), "one full context"
    tokens = blocks * shape.block_size
    if blocks < 1 or (requested_context and tokens < requested_context):
        need, had = gib(one * shape.block_bytes), gib(blocks * shape.block_bytes)
        raise StartError(
            f"a context of {context} tokens needs {need} of KV memory, but there is only {had}:"
            " lower --context or raise --kv-memory"
        )
    if tokens < context:
        why += f"; the context is cut from {context} to {tokens} tokens to fit it"
    plan = KvPlan(
        blocks=blocks, bytes=blocks * shape.block_bytes, tokens=tokens, context=min(context, tokens)
    )
    return Decision(plan, why)


def check_fit(name: str, weight_bytes: int, available: int) -> None:
    """Raises StartError when the weights of model `name` need more than the `available` bytes."""
    if weight_bytes > available:
        raise StartError(
            f"model {name} needs {gib(weight_bytes)} for its weights and {gib(available)} is available:"
            " free memory, or serve a smaller model"
        )


def process_age() -> float:
    """Seconds since this process started, including its imports."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def gib(size: int) -> str:
    """A number of bytes as text: `512 KiB`, `23.4 MiB`, `1.50 GiB`."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _kib(meminfo: str, name: str) -> int:
    words = _field(meminfo, name).split()
    return int(words[0]) * 1024 if words else 0


def _physical_cores(root: Path, allowed: set[int]) -> int:
    """Threads of one core have equal sibling lists. Without such lists each CPU counts as a core."""
    topology = root / "sys/devices/system/cpu"
    siblings = {_text(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, len(siblings))


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The control groups of this process, the innermost first, of version 2 or 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        inner = base / path.lstrip("/")
        around = [group for group in (inner, *inner.parents) if group.is_relative_to(base)]
        if any(group.is_dir() for group in around):
            return around
    return []


def _quota(root: Path) -> float | None:
    quotas: list[float] = []
    for group in _cgroups(root, "cpu"):
        words = _text(group / "cpu.max").split()
        if not words:
            words = [_text(group / "cpu.cfs_quota_us").strip(), _text(group / "cpu.cfs_period_us").strip()]
        if words[0].isdigit() and words[1].isdigit():
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _container_memory(root: Path) -> tuple[int | None, int]:
    """The lowest memory limit and its usage without reclaimable cache, in bytes."""
    tightest, used = None, 0
    for group in _cgroups(root, "memory"):
        limit = (_text(group / "memory.max") or _text(group / "memory.limit_in_bytes")).strip()
        if not limit.isdigit() or (tightest is not None and int(limit) >= tightest):
            continue
        current = (_text(group / "memory.current") or _text(group / "memory.usage_in_bytes")).strip()
        cached = [
            line.split()[1]
            for line in _text(group / "memory.stat").splitlines()
            if line.startswith(("inactive_file ", "total_inactive_file "))
        ]
        tightest, used = int(limit), int(current or 0) - int(cached[-1] if cached else 0)
    return tightest, used


def _gpus(root: Path) -> tuple[str, ...]:
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    return tuple(_field(_text(file), "Model") or "NVIDIA GPU" for file in files)
