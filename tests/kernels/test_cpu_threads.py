"""The thread pool of the C kernels: idle threads, forked processes and concurrent callers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from stretto.kernels.cpu.native import Native, load
from stretto.kernels.cpu.table import CpuTable
from stretto.kernels.cpu.weights import pack
from tests.kernels.levels import native

__all__ = ["native"]

FORKED = """
import os, sys, torch
torch.set_num_threads(1)
from stretto.kernels.cpu.native import load
from stretto.kernels.cpu.table import CpuTable
from stretto.kernels.cpu.weights import pack
native = load()
native.threads(2)
packed, x = pack(native, torch.ones(4096, 256), None, "int8"), torch.ones(4, 256)
table = CpuTable(native, None)
wanted = table.linear(x, packed)
child = os.fork()
same = torch.equal(table.linear(x, packed), wanted)
if child == 0:
    os._exit(0 if same else 1)
sys.exit(0 if same and os.waitpid(child, 0)[1] == 0 else 1)
"""


def test_a_library_built_from_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = tmp_path / "_native.so"
    subprocess.run(["gcc", "-shared", "-x", "c", "-o", other, "-"], input=b"int other;", check=True)
    monkeypatch.setattr("stretto.kernels.cpu.native.path", lambda: other)
    assert load.__wrapped__() is None


def test_idle_threads_use_no_cpu_time(native: Native):
    table, packed = CpuTable(native, None), pack(native, torch.ones(4096, 256), None, "int8")
    for _ in range(10):
        table.linear(torch.ones(1, 256), packed)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05


def test_a_forked_process_can_run_the_kernels(native: Native):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], timeout=60, check=False)
    assert done.returncode == 0


def test_calls_from_many_threads_give_correct_results(native: Native):
    table, packed = CpuTable(native, None), pack(native, torch.eye(512), None, "bfloat16")
    wrong: list[int] = []

    def call(number: int) -> None:
        x = torch.full((3, 512), float(number))
        for _ in range(50):
            if not torch.equal(table.linear(x, packed), x):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_the_number_of_threads_can_change_between_calls(native: Native):
    table, packed = CpuTable(native, None), pack(native, torch.eye(512), None, "bfloat16")
    x = torch.arange(512.0)[None]
    for threads in (1, 4, 2, 3, 1, 2):
        native.threads(threads)
        assert torch.equal(table.linear(x, packed).bfloat16(), x.bfloat16())
