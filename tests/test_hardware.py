"""Reading a machine from fake /proc and /sys files, and the settings derived from it."""

# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
from __future__ import annotations

import os
from math import inf
from pathlib import Path

import msgspec
import pytest

from stretto.errors import StartError
from stretto.hardware import (
    GIB,
    KvShape,
    Machine,
    cache_folder,
    check_fit,
    choose_device,
    choose_dtype,
    choose_kv,
    choose_running,
    choose_step_tokens,
    choose_threads,
    gib,
    home,
    packed_folder,
    snapshot,
)


def machine(*, cores: int = 4, quota: float | None = None, isa: tuple[str, ...] = ()) -> Machine:
    return Machine(
        cpu="test",
        arch="x86_64",
        logical_cores=8,
        cores=cores,
        quota=quota,
        isa=isa,
        memory=8 * GIB,
        available=8 * GIB,
    )


def shape(*, context: int = 1024, max_running: int = 8) -> KvShape:
    return KvShape(block_bytes=2**20, block_size=16, context=context, max_running=max_running)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


BASE = {
    "proc/cpuinfo": "model name\t: Test CPU 9\nflags\t\t: sse fma avx2 avx512_vnni avx512_bf16\n",
    "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   8388608 kB\n",
}


def test_cpu_and_memory_are_read_from_proc_outside_a_container(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    seen = snapshot(tmp_path)
    assert (seen.cpu, seen.isa) == ("Test CPU 9", ("avx2", "fma", "avx512_vnni", "avx512_bf16"))
    assert (seen.memory, seen.available, seen.quota, seen.gpus) == (16 * GIB, 8 * GIB, None, ())
    assert seen.cores == seen.logical_cores == len(os.sched_getaffinity(0))


def test_two_threads_of_one_core_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    cpus = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    write(tmp_path, {**BASE, cpus.format(0): "0,2\n", cpus.format(1): "1,3\n", cpus.format(2): "0,2\n"})
    assert (snapshot(tmp_path).cores, snapshot(tmp_path).logical_cores) == (2, 3)


def test_cgroup_v2_limits_are_the_tightest_of_all_parents(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pod/app\n",
        "sys/fs/cgroup/pod/app/memory.max": "max\n",
        "sys/fs/cgroup/pod/app/cpu.max": "max 100000\n",
        "sys/fs/cgroup/pod/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/pod/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
    }
    write(tmp_path, BASE | files)
    seen = snapshot(tmp_path)
    assert (seen.memory, seen.available, seen.quota) == (4 * GIB, 2 * GIB, 1.5)


def test_cgroup_v1_limits_are_read(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
    }
    write(tmp_path, BASE | files)
    seen = snapshot(tmp_path)
    assert (seen.memory, seen.available, seen.quota) == (2 * GIB, GIB, 2.0)


def test_gpus_are_read_from_the_nvidia_driver(tmp_path: Path) -> None:
    write(tmp_path, {**BASE, "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t NVIDIA H200\n"})
    assert snapshot(tmp_path).gpus == ("NVIDIA H200",)


@pytest.mark.parametrize(
    ("checkpoint", "isa", "device", "dtype"),
    [
        ("bfloat16", ("avx512_bf16",), "cpu", "bfloat16"),
        ("float16", ("amx_bf16",), "cpu", "bfloat16"),
        ("bfloat16", ("avx2", "avx512_vnni"), "cpu", "float32"),
        ("float32", ("avx512_bf16",), "cpu", "float32"),
        ("float16", (), "cuda", "float16"),
        ("float32", (), "cuda", "float32"),
    ],
)
def test_the_dtype_follows_checkpoint_device_and_instruction_set(
    checkpoint: str, isa: tuple[str, ...], device: str, dtype: str
) -> None:
    assert choose_dtype(machine(isa=isa), checkpoint, device=device).value == dtype
    assert choose_dtype(machine(isa=isa), checkpoint, device=device, requested="float16").value == "float16"


def test_threads_are_physical_cores_within_the_quota() -> None:
    assert choose_threads(machine(cores=4)).value == 4
    assert choose_threads(machine(cores=4, quota=2.5)).value == 2
    assert choose_threads(machine(cores=4, quota=0.5)).value == 1
    assert choose_threads(machine(cores=4, quota=16.0)).value == 4
    assert choose_threads(machine(cores=4), requested=7).value == 7


def test_the_device_is_cuda_when_it_is_usable() -> None:
    assert choose_device("auto", True).value == "cuda"
    assert choose_device("auto", False).value == "cpu"
    assert choose_device("cpu", True).value == "cpu"
    with pytest.raises(StartError, match="no usable CUDA"):
        choose_device("cuda", False)


def test_the_kv_cache_takes_a_quarter_of_available_memory() -> None:
    plan = choose_kv(shape(), 1024 * 2**20).value
    assert (plan.blocks, plan.bytes, plan.tokens, plan.context) == (256, 256 * 2**20, 4096, 1024)


def test_a_gpu_runs_more_sequences_at_once_unless_the_user_says() -> None:
    assert choose_running(0, "cuda").value > choose_running(0, "cpu").value
    assert choose_running(7, "cuda").value == choose_running(7, "cpu").value == 7


def test_the_kv_cache_is_at_most_max_running_full_contexts() -> None:
    choice = choose_kv(shape(max_running=2), 1024 * 2**20)
    assert choice.value.blocks == 2 * 64
    assert choice.why == "2 contexts of 1024 tokens"


def test_the_kv_cache_of_a_small_model_is_what_its_sequences_can_use() -> None:
    """The bundled model (5.2 M parameters, 3 KiB for a token) took 1.5 GiB on a machine with 20 GiB."""
    desk = KvShape(block_bytes=48 * 2**10, block_size=16, context=2048, max_running=256)
    choice = choose_kv(desk, 20 * GIB)
    assert (choice.value.bytes, choice.value.context) == (192 * 2**20, 2048)
    assert choice.why == "256 sequences of 256 tokens"
    few = choose_kv(msgspec.structs.replace(desk, max_running=32), 20 * GIB)
    assert (few.value.tokens, few.why) == (8 * 2048, "8 contexts of 2048 tokens")


def test_a_user_without_a_home_directory_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> object:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert cache_folder() is None and packed_folder() is None and home() is None
    assert cache_folder("/somewhere") == Path("/somewhere")
    with pytest.raises(StartError, match=r"cache_dir ~/x: .*write the whole path"):
        cache_folder("~/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/stretto")


def test_the_kv_cache_exceeds_a_quarter_to_hold_one_full_context() -> None:
    plan = choose_kv(shape(context=8192), 1024 * 2**20).value
    assert (plan.blocks, plan.context) == (512, 8192)


def test_the_model_context_is_reduced_to_fit_with_a_reason() -> None:
    choice = choose_kv(shape(context=131072), 1024 * 2**20)
    assert (choice.value.blocks, choice.value.context) == (768, 768 * 16)
    assert "cut from 131072 to 12288" in choice.why
    with pytest.raises(StartError, match="lower --context"):
        choose_kv(shape(context=131072), 1024 * 2**20, requested_context=131072)


def test_a_requested_kv_cache_size_is_exact_or_an_error() -> None:
    choice = choose_kv(shape(), 1024 * 2**20, requested_bytes=100 * 2**20, requested_context=512)
    assert (choice.value.blocks, choice.value.context) == (100, 512)
    with pytest.raises(StartError, match=r"is more than the 1\.00 GiB available"):
        choose_kv(shape(), GIB, requested_bytes=2 * GIB)
    with pytest.raises(StartError, match="beyond the model's own 1024"):
        choose_kv(shape(), GIB, requested_context=2048)
    with pytest.raises(StartError, match=r"needs 64\.0 MiB"):
        choose_kv(shape(), GIB, requested_bytes=1000)


def test_weights_larger_than_memory_are_refused() -> None:
    check_fit("m", GIB, GIB)
    with pytest.raises(StartError, match=r"model m needs 2\.00 GiB .* 1\.00 GiB is available"):
        check_fit("m", 2 * GIB, GIB)


def test_a_number_of_bytes_is_printed_with_a_unit() -> None:
    assert [gib(512 * 1024), gib(3 * 2**20), gib(GIB * 3 // 2)] == ["512 KiB", "3.0 MiB", "1.50 GiB"]


@pytest.mark.parametrize(
    ("base", "per_token", "itl", "tokens"),
    [
        (4.0, 0.022, 150.0, 1792),  # an 8B model on a GPU: ten bases
        (4.0, 0.022, 20.0, 768),  # the same, where a tier asks for 20 ms between tokens
        (4.0, 0.022, 5.0, 512),  # no fewer: the schedule shortens the steps of streams that need it
        (40.0, 3.3, 150.0, 512),  # a CPU
        (0.5, 0.0001, inf, 8192),
        (20.0, 0.0, inf, 8192),
        (200.0, 0.0, 150.0, 512),  # a step alone takes longer than the objective
    ],
)
def test_the_tokens_of_a_step_follow_from_the_device_and_the_tightest_objective(
    base: float, per_token: float, itl: float, tokens: int
) -> None:
    assert choose_step_tokens(0, base_ms=base, per_token_ms=per_token, itl_ms=itl).value == tokens
    assert choose_step_tokens(96, base_ms=base, per_token_ms=per_token, itl_ms=itl).value == 96
    assert choose_step_tokens(0, base_ms=base, per_token_ms=per_token, itl_ms=itl, most=600).value <= 600
