"""Compiles kernels for a Hopper GPU that need not be there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

START = """
import re
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
target = GPUTarget("cuda", 90, 32)
driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target))
run, made = JITFunction.run, {}
def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    made[kernel.hash] = kernel.asm["ptx"]
JITFunction.run = compile_only
"""
END = """
for ptx in made.values():
    print(*set(re.findall(r"m64n\\d+k16|cp.async.bulk.tensor.2d", ptx)))
"""


def compiled(code: str, folder: Path) -> list[set[str]]:
    """The kernels that the code launches: of each, its instructions for products and bulk copies."""
    settings = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": ":".join(sys.path),
    }
    command = [sys.executable, "-c", START + code + END]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return [set(line.split()) for line in done.stdout.splitlines()]
