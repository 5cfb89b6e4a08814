r"""What the tests of the C kernels share: every level this CPU has, each in turn.

To run them under AddressSanitizer (it finds reads and writes outside of what a kernel was given; compiling so
takes some minutes):

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
    """The library at one level, on two threads; the best level afterwards."""
    if LIBRARY is None:
        pytest.skip("the C kernels are not built: no compiler at install time")
    LIBRARY.use(request.param)
    LIBRARY.threads(2)
    yield LIBRARY
    LIBRARY.use(LEVELS[0])
