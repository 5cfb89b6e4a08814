"""`stretto bench trace`: what is asked, parsed, and every load of it run, in virtual or in real time.

Runs share one rate for load 1.0, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from stretto.bench.live import Server
from stretto.bench.metrics import Sample
from stretto.bench.report import page
from stretto.config import TIERS, Terms, Tier, TierName, tiers_of
from stretto.errors import StartError
from stretto.simulator.replay import CPU_TIERS, ReplayReport, Setting, Told, capacity, replayed
from stretto.types import Arrival

Run = tuple[ReplayReport, list[Told]]
DEFAULT_SCHEDULE = "deadline"


class Asked(Struct, frozen=True, kw_only=True):
    """Loads and schedules to run, the share of each tier, and what tiers ask (None: nothing was said)."""

    loads: list[float]
    schedules: list[str]
    mix: dict[str, float]
    tiers: dict[str, Tier] | None = None

    @classmethod
    def of(
        cls, *, load: str, schedule: str | None, tiers: str, objectives: Mapping[TierName, Terms] | None
    ) -> Asked:
        """Parses what the command was given. Raises StartError that names the flag."""
        try:
            loads = [float(part) for part in load.split(",")]
        except ValueError:
            raise StartError(f"--load: {load!r} is no number, nor several like 0.7,1,2") from None
        asked = cls(
            loads=loads,
            schedules=schedule.split(",") if schedule else [],
            mix=_mix(tiers),
            tiers=None if objectives is None else tiers_of(objectives),
        )
        for name in asked.schedules or [DEFAULT_SCHEDULE]:
            for each in loads:
                Setting(schedule=name, load=each)
        return asked


def virtual(arrivals: Sequence[Arrival], asked: Asked, *, seed: int, rate: float | None) -> list[Run]:
    """Every schedule at every load in virtual time."""
    settings = [
        Setting(schedule=name, load=load, mix=asked.mix, tiers=asked.tiers or CPU_TIERS, seed=seed)
        for load in asked.loads
        for name in asked.schedules or [DEFAULT_SCHEDULE]
    ]
    full = rate or capacity(arrivals, settings[0])
    return [replayed(arrivals, setting, rate=full) for setting in settings]


class Target(Struct, frozen=True, kw_only=True):
    """A server to ask, and who hears of each answer."""

    url: str
    key: str | None
    on_done: Callable[[Sample], None]


async def live(
    target: Target, arrivals: Sequence[Arrival], asked: Asked, *, seed: int, rate: float | None
) -> list[Run]:
    """Every load against a server in real time, one after the other. Raises StartError when it does not
    answer, or runs another schedule than was named."""
    server = await Server.of(target.url, api_key=target.key)
    try:
        named = asked.schedules or [server.schedule or DEFAULT_SCHEDULE]
        if len(named) > 1 or server.schedule not in ("", *named):
            runs = server.schedule or "one schedule"
            raise StartError(f"--schedule {','.join(named)}: {target.url} runs {runs}, set at its start")
        settings = [
            Setting(
                schedule=named[0],
                load=load,
                mix=asked.mix,
                tiers=asked.tiers or TIERS,
                seed=seed,
                context=server.model.context,
            )
            for load in asked.loads
        ]
        full = rate or await server.capacity(arrivals, settings[0], target.on_done)
        return [await server.replay(arrivals, setting, full, target.on_done) for setting in settings]
    finally:
        server.close()


def write(file: Path, title: str, runs: Sequence[Run]) -> None:
    """A page of these runs. Raises StartError when it cannot be written."""
    try:
        file.write_text(page(title, runs), encoding="utf-8")
    except OSError as error:
        raise StartError(f"--report: cannot write {file}: {error.strerror or error}") from error


def _mix(text: str) -> dict[str, float]:
    """`priority=0.2,default=0.8` as shares that sum to 1. Raises StartError."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise StartError(f"--tiers: {part!r} is no share: write TIER=0.2") from None
        if name not in TIERS or not 0 <= shares[name] <= 1:
            raise StartError(f"--tiers: {part!r}; tiers are {', '.join(TIERS)}, shares from 0 to 1")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise StartError(f"--tiers: the shares sum to {sum(shares.values()):g}, not to 1")
    return shares
