"""What the package uses of Triton, which ships no types. The bodies of kernels are not checked."""

from collections.abc import Callable
from typing import Any

knobs: Any

def jit(function: Callable[..., Any] | None = None, /, **options: Any) -> Any: ...
def cdiv(x: int, y: int, /) -> int: ...
def next_power_of_2(n: int, /) -> int: ...
