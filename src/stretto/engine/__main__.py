"""Where an engine process starts: `python -m stretto.engine process ADDRESS`, or `measure`, to be measured.

It settles how torch is imported, which is most of the time that a start takes: its library is mapped by a
thread while the interpreter reads modules that do not need it.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import ModuleType

BESIDE = ("numpy", "stretto.machine", "stretto.config", "zmq")
# What torch's compilers know of shapes, its export and its distributions: a third of what is imported with
# it, and never asked here.
UNUSED = ("torch._meta_registrations", "torch.export", "torch.distributions")


def main() -> None:
    """Run the module that the first argument names. On a GPU torch is left whole: Triton is a compiler."""
    Thread(target=_map_library, daemon=True).start()
    gc.disable()  # nothing that is imported becomes garbage
    for name in BESIDE:
        import_module(name)
    if not import_module("stretto.machine").snapshot().gpus:
        sys.modules.update((name, ModuleType(name)) for name in UNUSED)
    module = import_module(f"stretto.engine.{sys.argv.pop(1)}")
    gc.freeze()
    gc.enable()
    module.main()


def _map_library() -> None:
    """The largest of torch's libraries. Where it cannot be mapped, importing torch will say why."""
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        try:
            ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so"))
        except OSError:
            pass


if __name__ == "__main__":
    main()
