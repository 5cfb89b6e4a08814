"""Where an engine process starts: `python -m stretto.engine process ADDRESS`, or `measure`, to be measured.

It settles what of torch is imported, so it imports nothing that imports torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from stretto.machine import snapshot

# What torch's compilers know of shapes: a fifth of the time it takes to import torch, and never asked here.
UNUSED = ("torch._meta_registrations",)


def main() -> None:
    """Run the module that the first argument names. On a GPU torch is left whole: Triton is a compiler."""
    if not snapshot().gpus:
        sys.modules.update((name, ModuleType(name)) for name in UNUSED)
    import_module(f"stretto.engine.{sys.argv.pop(1)}").main()


if __name__ == "__main__":
    main()
