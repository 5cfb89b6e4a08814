"""The C sources of the kernels: each header includes everything it uses."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from stretto.kernels import cpu

SOURCES = Path(cpu.__file__).parent / "csrc"
HEADERS = sorted(str(header.relative_to(SOURCES)) for header in SOURCES.rglob("*.h"))
FLAGS = {
    "isa/vec256.h": ["-mavx2", "-mfma"],
    "isa/vec512.h": [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")],
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("header", HEADERS)
def test_each_header_compiles_alone(header: str):
    if header in FLAGS and platform.machine() != "x86_64":
        pytest.skip("vectors of x86-64")
    command = [
        "gcc",
        "-std=gnu11",
        "-Wall",
        "-Wno-unused-function",
        "-Werror",
        "-fopenmp-simd",
        "-fsyntax-only",
    ]
    done = subprocess.run(
        [*command, *FLAGS.get(header, []), "-x", "c", SOURCES / header],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
