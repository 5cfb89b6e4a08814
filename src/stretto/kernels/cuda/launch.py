"""How kernels are launched: each starts before the one in front of it has ended, if the device can do so.

This is programmatic dependent launch (CUDA C++ Programming Guide). `release` lets the next kernel's programs
start on free multiprocessors; `wait` returns when all earlier kernels have ended and their results are
visible. Every kernel of this package calls both. Before `wait` it may only read what no kernel of the step
writes: weights, the plan, and keys and values of earlier steps.
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction

INTERPRETED = bool(triton.knobs.runtime.interpret)


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if not INTERPRETED and torch.cuda.is_available() else (0, 0)


HOPPER = _capability()[0] == 9
OPTIONS: dict[str, Any] = {"launch_pdl": True} if _capability() >= (9, 0) else {}
DEPENDENT = tl.constexpr(bool(OPTIONS))


@triton.jit
def release():
    """Let the next kernel start. It must not read our results before its own `wait`."""
    if DEPENDENT:
        cuda.gdc_launch_dependents()


@triton.jit
def wait():
    """Wait until every kernel launched before this one has ended."""
    if DEPENDENT:
        cuda.gdc_wait()


@contextmanager
def compiling_ahead() -> Generator[None]:
    """Inside, a kernel that is launched does not run, but is compiled in a thread of its own. At the end all
    are compiled."""
    if INTERPRETED:
        yield
        return
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool):
            yield
    finally:
        JITFunction.run = run


class _Loading:
    """Whether launches now only load kernels; no request waits for their results."""

    now = False


@contextmanager
def loading() -> Generator[None]:
    """Inside, what is launched only loads kernels. Choices among kernels may be made by measuring them."""
    _Loading.now = True
    try:
        yield
    finally:
        _Loading.now = False


def is_loading() -> bool:
    return _Loading.now


def pow2(size: int, minimum: int = 1) -> int:
    """The next power of two, but at least `minimum`."""
    return max(triton.next_power_of_2(size), minimum)
