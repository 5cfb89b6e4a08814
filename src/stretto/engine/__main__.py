"""Where an engine process starts: `python -m stretto.engine MODULE`.

It settles what of torch is imported, so it imports nothing that imports torch.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from types import ModuleType

from stretto.hardware import snapshot

# What torch's compilers know of shapes, its export and its distributions: a third of the time that importing
# torch takes, and never asked here.
UNUSED = ("torch._meta_registrations", "torch.export", "torch.distributions")


def main() -> None:
    """Run the module that the first argument names. On a GPU torch is left whole: Triton is a compiler."""
    if not snapshot().gpus:
        sys.modules.update((name, ModuleType(name)) for name in UNUSED)
    gc.disable()  # nothing that is imported becomes garbage
    module = import_module(sys.argv.pop(1))
    gc.freeze()
    gc.enable()
    module.main()


if __name__ == "__main__":
    main()
