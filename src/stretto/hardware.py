"""What this machine has, as a snapshot, and what is chosen because of it: device, dtype, threads, KV memory.

The engine decides and `stretto doctor` explains with the same functions. Nothing here imports torch: whoever
knows what CUDA can do passes it in. Every decision carries the sentence that says why.
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
CACHES = frozenset({"float32", "bfloat16", "int8"})  # what the C kernels read
KV_SHARE = 0.25
KV_MOST = 0.75
GIB = 2**30


class Machine(Struct, frozen=True, kw_only=True):
    """What this process may use. `memory` and `available` are bytes, the container's limit taken in.

    `cores` counts physical cores the process may run on; `quota` is the container's share of them in cores.
    `gpus` names the NVIDIA devices the driver shows, which torch may or may not be able to use.
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
    """A device torch can use: bytes of its memory, and of what is free."""

    name: str
    memory: int
    free: int


class Stored(Struct, frozen=True, kw_only=True):
    """A checkpoint as it lies on disk, `bytes` of it. `dtype` is the one it is stored in, `parameters` counts
    all its tensors' elements; `token_elements` are the keys and values of one token in all layers, which come
    in `token_rows` rows."""

    family: str
    dtype: str
    context: int
    vocab: int
    parameters: int
    token_elements: int
    token_rows: int
    bytes: int


class Probed(Struct, frozen=True, kw_only=True):
    """What only a process with torch can say of a machine and of a checkpoint: `stretto.profiler.probe`."""

    cuda: bool
    isa: str
    kernels: str
    kernels_why: str
    gpus: tuple[Gpu, ...]
    stored: Stored | None = None
    error: str | None = None


class Decision(Struct, Generic[T], frozen=True):
    """A decision, and the sentence that says why."""

    value: T
    why: str


class KvShape(Struct, frozen=True, kw_only=True):
    """What one model needs of KV memory. `block_bytes`: K and V of one block over all layers."""

    block_bytes: int
    block_size: int
    context: int
    max_running: int


class KvPlan(Struct, frozen=True, kw_only=True):
    """How many blocks to hold, and the longest context that then is served."""

    blocks: int
    bytes: int
    tokens: int
    context: int


def snapshot(root: Path = Path("/")) -> Machine:
    """Reads the machine below `root`, the file system's root (tests pass a directory of their own)."""
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


def cache_folder(asked: str = "") -> Path:
    """Where what was measured or made once is kept for the next start (XDG Base Directory, unless asked)."""
    if asked:
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stretto"


def packed_folder(asked: str = "") -> Path:
    """Where quantised weights are kept, as the kernels read them."""
    return cache_folder(asked) / "packed"


def choose_device(asked: str, cuda_usable: bool) -> Decision[str]:
    """`cuda_usable` is torch's word on it. Raises StartError when CUDA is asked for and cannot be used."""
    if asked == "cuda" and not cuda_usable:
        raise StartError(
            "--device cuda: torch finds no usable CUDA device; see `stretto doctor`, or use --device cpu"
        )
    if asked != "auto":
        return Decision(asked, "asked for")
    if cuda_usable:
        return Decision("cuda", "a CUDA device is usable")
    return Decision("cpu", "no usable CUDA device")


def choose_dtype(machine: Machine, checkpoint: str, *, device: str, asked: str = "auto") -> Decision[str]:
    """The dtype to compute in, as torch names it. `checkpoint` is the dtype the weights are stored in."""
    if asked != "auto":
        return Decision(asked, "asked for")
    if checkpoint not in ("bfloat16", "float16"):
        return Decision("float32", f"the checkpoint is {checkpoint}")
    if device != "cpu":
        return Decision(checkpoint, "the checkpoint's own")
    native = sorted(BF16_ISA.intersection(machine.isa))
    if native:
        return Decision("bfloat16", f"the CPU computes in it ({native[0]})")
    return Decision("float32", "the CPU has no bfloat16 instructions: emulating them is slower than float32")


def choose_kv_dtype(dtype: str, *, quantised: bool, asked: str, cached: frozenset[str]) -> Decision[str]:
    """The dtype to keep keys and values in, for a model computed in `dtype`; the kernels can read `cached`
    beside it. Raises StartError when another is asked for."""
    if asked not in ("auto", dtype) and asked not in cached:
        able = ", ".join(sorted(cached | {dtype}))
        raise StartError(f"kv_dtype {asked}: the kernels that run this model read a cache of {able}")
    if asked != "auto":
        return Decision(asked, "asked for")
    if quantised and "int8" in cached:
        return Decision(
            "int8", "the weights are quantised, which costs more of what the model says than this"
        )
    return Decision(dtype, "as the model computes")


def choose_threads(machine: Machine, asked: int = 0) -> Decision[int]:
    """How many threads compute: the physical cores the process may use, or the container's quota if less."""
    if asked:
        return Decision(asked, "asked for")
    if machine.quota is not None and machine.quota < machine.cores:
        return Decision(max(1, int(machine.quota)), f"the container may use {machine.quota:g} cores")
    return Decision(machine.cores, "one per physical core this process may use")


def choose_kv(
    shape: KvShape, available: int, *, asked_bytes: int = 0, asked_context: int = 0
) -> Decision[KvPlan]:
    """KV blocks for one model, given the `available` bytes once its weights are in.

    Unasked, it is a quarter of what is available, at most what `max_running` full contexts take, and more
    when one full context needs it. A context nobody asked for shrinks to what fits; one that was asked for
    raises StartError.
    """
    if asked_context > shape.context:
        raise StartError(f"--context {asked_context} is beyond the model's own {shape.context} tokens")
    context = asked_context or shape.context
    one = -(-context // shape.block_size)
    most = int(available * KV_MOST) // shape.block_bytes
    if asked_bytes:
        if asked_bytes > available:
            raise StartError(f"--kv-memory {gib(asked_bytes)} is more than the {gib(available)} available")
        blocks, why = asked_bytes // shape.block_bytes, f"{gib(asked_bytes)} asked for"
    else:
        share = int(available * KV_SHARE) // shape.block_bytes
        blocks, why = min(share, one * shape.max_running), f"a quarter of {gib(available)} available"
        if blocks == one * shape.max_running:
            why = f"{shape.max_running} contexts of {context} tokens"
        elif blocks < one:
            blocks, why = min(one, most), "one full context"
    tokens = blocks * shape.block_size
    if blocks < 1 or (asked_context and tokens < asked_context):
        need, had = gib(one * shape.block_bytes), gib(blocks * shape.block_bytes)
        raise StartError(
            f"a context of {context} tokens needs {need} of KV memory and {had} is to be had:"
            " lower --context or raise --kv-memory"
        )
    if tokens < context:
        why += f"; the context is cut from {context} to {tokens} tokens to fit it"
    plan = KvPlan(
        blocks=blocks, bytes=blocks * shape.block_bytes, tokens=tokens, context=min(context, tokens)
    )
    return Decision(plan, why)


def check_fit(name: str, weight_bytes: int, available: int) -> None:
    """Raises StartError when the weights of model `name` cannot be held in the `available` bytes."""
    if weight_bytes > available:
        raise StartError(
            f"model {name} needs {gib(weight_bytes)} for its weights and {gib(available)} is available:"
            " free memory, or serve a smaller model"
        )


def process_age() -> float:
    """Seconds since this process was started, importing included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def gib(size: int) -> str:
    """A size for people: `512 KiB`, `23.4 MiB`, `1.50 GiB`."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _text(path: Path) -> str:
    try:
        return path.read_text()
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
    """Threads of one core have equal sibling lists; where the kernel tells none, each CPU counts."""
    topology = root / "sys/devices/system/cpu"
    siblings = {_text(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, len(siblings))


def _cgroups(root: Path, controller: str) -> list[Path]:
    """This process's control group and those around it, innermost first, for version 2 or 1."""
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
    """The tightest limit over this process and what is used below it, bytes; reclaimable cache is not use."""
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
