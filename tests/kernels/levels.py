r"""A fixture that runs each test of the C kernels at every ISA level of this CPU.

AddressSanitizer finds reads and writes out of bounds. Compiling for it takes some minutes. To use it:

    CFLAGS="-fsanitize=address -g -O1" python setup.py build_ext --inplace --force
    LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
        python -m pytest tests/kernels -k cpu
    python setup.py build_ext --inplace --force
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stretto.kernels.cpu.native import Native, load

LIBRARY = load()
LEVELS = list(LIBRARY.levels) if LIBRARY else ["none built"]


@pytest.fixture(params=LEVELS)
def native(request: pytest.FixtureRequest) -> Iterator[Native]:
    """The library at one ISA level, on two threads. The best level is restored afterwards."""
    if LIBRARY is None:
        pytest.skip("the C kernels are not built: no compiler at install time")
    LIBRARY.use(request.param)
    LIBRARY.threads(2)
    yield LIBRARY
    LIBRARY.use(LEVELS[0])
