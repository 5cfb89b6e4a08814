"""The entry point of a process that runs an engine: `python -m stretto.engine MODULE` calls MODULE's `main`.

It decides which parts of torch are imported, so it must not import a module that imports torch.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from types import ModuleType

from stretto.hardware import snapshot

# Shape rules of torch's compilers, export and distributions take a third of the time of importing torch and
# are never used on a CPU. An empty module takes the place of each.
UNUSED = ("torch._meta_registrations", "torch.export", "torch.distributions")


def main() -> None:
    """Run the module named by the first argument. With a GPU torch is complete, because Triton needs it."""
    if not snapshot().gpus:
        sys.modules.update((name, ModuleType(name)) for name in UNUSED)
    gc.disable()  # imports create no garbage
    try:
        module = import_module(sys.argv.pop(1))
    except (ImportError, OSError, MemoryError) as error:
        line = (str(error) or "out of memory").splitlines()[0]
        sys.exit(f"the engine's libraries cannot be loaded ({line}): is there enough memory (ulimit -v)?")
    gc.freeze()
    gc.enable()
    module.main()


if __name__ == "__main__":
    main()
