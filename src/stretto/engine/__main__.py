"""The entry point of a process that runs an engine: `python -m stretto.engine [--cpu] MODULE` calls MODULE's
`main`. `--cpu`: it uses no GPU.

It decides which parts of torch are imported, so it must not import a module that imports torch.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from importlib import import_module
from threading import Thread
from types import ModuleType

from stretto.hardware import snapshot

# Shape rules of torch's compilers, export and distributions take a third of the time of importing torch and
# are never used on a CPU. An empty module takes the place of each.
UNUSED = ("torch._meta_registrations", "torch.export", "torch.distributions")
DRIVER = "libcuda.so.1"


def open_device() -> None:
    """Create the context of the first GPU, which torch then finds. What fails here, torch will report.

    The driver takes a while and needs no Python, so torch is imported meanwhile.
    """
    with suppress(OSError, AttributeError):
        driver, device, context = ctypes.CDLL(DRIVER), ctypes.c_int(), ctypes.c_void_p()
        if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), 0):
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def main() -> None:
    """Run the module named by the first argument. With a GPU torch is complete, because Triton needs it."""
    on_cpu = sys.argv[1] == "--cpu"
    if on_cpu:
        del sys.argv[1]
    if not snapshot().gpus:
        sys.modules.update((name, ModuleType(name)) for name in UNUSED)
    elif not on_cpu:
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch has it
        Thread(target=open_device, name="device", daemon=True).start()
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
