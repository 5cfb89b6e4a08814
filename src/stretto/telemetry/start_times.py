"""Where the time of a start goes: seconds by part, and the one line that tells them.

Each second belongs to one part, so the parts and the rest add up to the whole start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

SHOWN_S = 0.05  # a shorter part is told as part of the rest


class StartTimes:
    """The parts of a start. A part inside another one interrupts it: a second counts for the inner one.

    One thread uses it. `seconds`: by part, in the order in which the parts began. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """The time of the block is that of part `name`, beside what it had before."""
        self._charge()
        self._open.append(name)
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def told(total_s: float, parts: Mapping[str, float]) -> str:
    """`11.5 s: imports 3.1, weights 1.4, rest 0.2`. Parts shorter than `SHOWN_S` are in the rest."""
    shown = {name: seconds for name, seconds in parts.items() if seconds >= SHOWN_S}
    rest = {"rest": total_s - sum(shown.values())}
    return f"{total_s:.1f} s: " + ", ".join(
        f"{name} {seconds:.1f}" for name, seconds in (shown | rest).items()
    )
