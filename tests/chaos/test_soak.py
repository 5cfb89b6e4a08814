"""Under a mixed load neither process grows: the slopes of memory, files, threads and blocks are about zero.

`SOAK_S` is the length in seconds: 60 without it, 600 and 7200 for longer runs. `-s` shows the figures.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.chaos.load import show
from tests.chaos.soak import ALLOWED, Growth, slope, soak
from tests.server_process import serving

SECONDS = float(os.environ.get("SOAK_S", "90"))
LEAKING_S = 10.0
# The system gives a KV cache its memory when a block is first used, 2 MiB at a time. A large one grows for
# minutes, and one of a variant that answers rarely for longer still.
MODEL = ("desk", "--kv-memory", "4MiB")
# Python runs this file at the start of every process. It makes the API server keep something of each request.
LEAK = """
import sys
if "serve" in sys.orig_argv:
    import os, threading
    from stretto.server.state import Server
    ended, kept = Server.ended, []
    def leak(server, request):
        kept.append(bytes(65536))
        if len(kept) % 10 == 0:
            kept.append(os.open("/dev/null", os.O_RDONLY))
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        ended(server, request)
    Server.ended = leak
"""


def test_the_slope_is_that_of_the_line_with_the_least_squares() -> None:
    assert slope([0, 1, 2, 3], [5, 5, 5, 5]) == 0
    assert slope([10, 11, 12, 13], [1, 3, 5, 7]) == pytest.approx(2)
    assert slope([0, 1, 2, 3], [0, 2, 0, 2]) == pytest.approx(0.4)


@pytest.mark.parametrize("unit", ALLOWED)
def test_growth_beyond_the_bound_is_a_leak_and_noise_is_none(unit: str) -> None:
    """Noise of as much as is allowed, up and down, is no growth. Half as much again is a leak."""
    for share, leaks in ((0.0, False), (0.5, False), (1.5, True)):
        growth = Growth()
        for number in range(101):
            noise = ALLOWED[unit] * (number % 2)
            growth.add(number, {f"server {unit}": 100 + noise + share * ALLOWED[unit] * number / 100})
        assert bool(growth.leaks()) == leaks


@pytest.mark.slow
async def test_a_leak_is_found_in_ten_seconds(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LEAK)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    with serving(tmp_path, *MODEL, environ={"PYTHONPATH": path}) as server:
        growth, ends = await soak(server, LEAKING_S)
    show(f"with a leak, {LEAKING_S:g} s: {dict(ends)}\n{growth.grown()}")
    assert growth.leaks().keys() >= {"server MiB", "server files", "server threads"}, "the engine warms up"


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
async def test_neither_process_grows_under_a_mixed_load(tmp_path: Path) -> None:
    # Choices that wait for feedback fill a store of their own, which tests/ladder/learning bounds.
    with serving(tmp_path, *MODEL, environ={"STRETTO_FEEDBACK_WAIT": "0"}) as server:
        engine = server.engine
        growth, ends = await soak(server, SECONDS)
        assert server.engine == engine
        await asyncio.to_thread(server.wait_for, "/state", lambda _, state: state["active"] == 0, 5)
        state = server.get("/state")[1]
        log = server.log.read_text()
    show(f"{SECONDS:g} s: {dict(ends)}\n{growth.grown()}")
    assert ends.keys() == {"done", "left", "200", "400", "404"}
    assert min(ends.values()) > 10
    assert growth.leaks() == {}
    assert state["blocks_free"] == state["blocks_total"]
    assert " error " not in log and " critical " not in log
