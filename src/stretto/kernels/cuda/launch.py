"""How a kernel starts here: before the one in front of it has ended, where the device can.

Programmatic dependent launch (CUDA C++ Programming Guide): `release` lets the next kernel's programs take
free places at once, `wait` holds until all before is done and visible. Every kernel of this package calls
both, and touches before `wait` only weights, or what is there before a step's embedding is read: its plan,
and the keys and values of older steps.
"""
# Triton's kernels are no Python a type checker knows.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportPrivateImportUsage=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

INTERPRETED = bool(triton.knobs.runtime.interpret)


def _dependent() -> bool:
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


OPTIONS: dict[str, Any] = {"launch_pdl": True} if _dependent() else {}
DEPENDENT = tl.constexpr(bool(OPTIONS))


@triton.jit
def release():
    """Let the next kernel start as far as it can without our results."""
    if DEPENDENT:
        cuda.gdc_launch_dependents()


@triton.jit
def wait():
    """Until everything launched before has ended."""
    if DEPENDENT:
        cuda.gdc_wait()


def pow2(size: int, least: int = 1) -> int:
    return max(triton.next_power_of_2(size), least)
