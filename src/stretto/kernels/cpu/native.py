"""The C kernels' library: its structures, its functions, and the instruction set and threads in use.

It is loaded with ctypes, so the build needs a C compiler and no Python headers. A call costs about a
microsecond and releases the GIL. This module passes addresses and numbers; its callers check shapes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

LEVELS = 4
F32, BF16, I8 = 0, 1, 2
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
NORMS = {"none": 0, "head": 1, "row": 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(*, pointers: str = "", integers: str = "", floats: str = "") -> tuple[tuple[str, type], ...]:
    """The fields of a structure: names with spaces between them, by type."""
    typed = ((pointers, _POINTER), (integers, _INT), (floats, _FLOAT))
    return tuple((name, kind) for names, kind in typed for name in names.split())


class NativeWeights(ctypes.Structure):
    """`Weights` of csrc/api.h."""

    _fields_ = _fields(pointers="data bias", integers="n k group format")


class NativeStep(ctypes.Structure):
    """`Step` of csrc/api.h."""

    _fields_ = _fields(
        pointers="positions slots tables starts contexts",
        integers="tokens sequences width blocks block_size type kv_type",
    )


class NativeAttention(ctypes.Structure):
    """`AttentionConfig` of csrc/api.h."""

    _fields_ = _fields(integers="heads kv_heads head_dim norm window", floats="scale softcap eps")


class NativeCall(ctypes.Structure):
    """`Call` of csrc/api.h."""

    _fields_ = _fields(
        pointers="of config",
        integers="call source target width layer rotation activation",
        floats="eps",
    )


class NativeRun(ctypes.Structure):
    """`Run` of csrc/api.h."""

    _fields_ = _fields(pointers="step buffers layers angles dims")


_FUNCTIONS: dict[str, tuple[type, ...]] = {
    "pack": (_POINTER, _POINTER, _INT, _POINTER),
    "unpack": (_POINTER, _POINTER),
    "linear": (_POINTER, _POINTER, _POINTER, _INT, _INT),
    "norm": (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT, _INT),
    "act_and_mul": (_POINTER, _POINTER, _INT, _INT, _INT, _INT),
    "cos_sin": (_POINTER, _POINTER, _INT, _FLOAT, _POINTER),
    "rope_and_cache": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER),
    "paged_attention": (_POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER),
    "run": (_POINTER, _INT, _POINTER),
    "rescore_top_k": (_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT, _INT),
}
_NO_MEMORY = -1


def path() -> Path | None:
    """The library's file. None when it was not built."""
    here = Path(__file__).parent
    return next((file for suffix in EXTENSION_SUFFIXES if (file := here / f"_native{suffix}").exists()), None)


class Native:
    """The loaded library. Its functions raise ValueError for a shape that they do not compute, and
    MemoryError without memory for their workspace. `check` returns whether a step is wrong.

    All code of a process shares its threads and its level, the instruction set in use. `levels` maps the
    levels that this CPU supports, fastest first, to their numbers.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.stretto_level.restype = ctypes.c_char_p
        library.stretto_packed_bytes.restype = _INT
        library.stretto_packed_bytes.argtypes = library.stretto_check.argtypes = (_POINTER,)
        names = [library.stretto_level(number) for number in range(LEVELS)]
        self.levels: dict[str, int] = {
            name.decode(): number for number, name in enumerate(names) if name is not None
        }
        self.level = ""
        self.use(next(iter(self.levels)))
        self.pack = self._function("pack")
        self.unpack = self._function("unpack")
        self.linear = self._function("linear")
        self.norm = self._function("norm")
        self.act_and_mul = self._function("act_and_mul")
        self.cos_sin = self._function("cos_sin")
        self.rope_and_cache = self._function("rope_and_cache")
        self.paged_attention = self._function("paged_attention")
        self.rescore_top_k = self._function("rescore_top_k")
        self.check: Callable[[int], int] = library.stretto_check
        self.run = self._function("run")
        self.packed_bytes: Callable[[int], int] = library.stretto_packed_bytes

    def use(self, level: str) -> None:
        """Use the kernels of this level from now on. Raises ValueError when this CPU does not support it."""
        if level not in self.levels or self._library.stretto_use(self.levels[level]):
            raise ValueError(f"no level {level!r} on this CPU: it has {', '.join(self.levels)}")
        self.level = level

    def threads(self, count: int) -> None:
        """Compute on `count` threads, the caller included. Raises OSError when they cannot be started."""
        if self._library.stretto_threads(count):
            raise OSError(f"cannot start {count} threads")

    def _function(self, name: str) -> Callable[..., int]:
        function = self._library[f"stretto_{name}"]
        function.argtypes = _FUNCTIONS[name]
        function.errcheck = cast(Any, _raise)
        return function


def _raise(result: int, function: Any, arguments: tuple[float, ...]) -> int:
    """Raise what a result other than 0 means. The message gives the numbers among the arguments."""
    if result:
        typed = zip(function.argtypes, arguments, strict=True)
        numbers = [value for kind, value in typed if kind is not _POINTER]
        if result == _NO_MEMORY:
            raise MemoryError(f"no memory for the workspace of {function.__name__} {numbers}")
        raise ValueError(f"{function.__name__} {numbers}: no kernel for this shape")
    return result


@cache
def load() -> Native | None:
    """The library. None when it was not built, was built from other sources, or cannot run here."""
    found = path()
    if found is None:
        return None
    try:
        return Native(ctypes.CDLL(str(found)))
    except (OSError, AttributeError):
        return None
