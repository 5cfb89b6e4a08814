"""Stretto: a real-time LLM server. `from stretto import LLM, Sampling, Objective`.

Each name is imported on first use, so `import stretto.types` loads nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stretto.llm import LLM as LLM
    from stretto.llm import Completion as Completion
    from stretto.types import Grammar as Grammar
    from stretto.types import Objective as Objective
    from stretto.types import Sampling as Sampling

__version__ = "0.1.0"
_HOMES = {
    "LLM": "stretto.llm",
    "Completion": "stretto.llm",
    "Grammar": "stretto.types",
    "Objective": "stretto.types",
    "Sampling": "stretto.types",
}
__all__ = ["LLM", "Completion", "Grammar", "Objective", "Sampling"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
