"""`stretto bench trace`: parses its options, and runs every load of them in virtual or in real time.

All runs share one rate for load 1.0, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, structs

from stretto.bench.client import ServedModel
from stretto.bench.live import LoadedServer
from stretto.bench.metrics import Sample
from stretto.bench.report import ReplayRun, page
from stretto.config import TIERS, Tier, TierName, tiers_of
from stretto.errors import StartError
from stretto.simulator.replay import capacity, replayed
from stretto.simulator.setting import CPU_TIERS, Arrival, Setting
from stretto.types import Objective

DEFAULT_SCHEDULE = "deadline"


class TraceOptions(Struct, frozen=True, kw_only=True):
    """What to run. `mix`: the share of each tier. `objectives`: of tiers; the others have the defaults, which
    are those of the small CPU, or of the server.

    `schedules`: empty when none was named. `rate`: requests per second at load 1.0; None measures it.
    """

    loads: list[float]
    schedules: list[str]
    mix: dict[str, float]
    objectives: Mapping[TierName, Objective] = {}
    seed: int = 0
    rate: float | None = None

    @classmethod
    def parse(
        cls,
        *,
        load: str,
        schedule: str | None,
        tiers: str,
        objectives: Mapping[TierName, Objective] | None,
        seed: int,
        rate: float | None,
    ) -> TraceOptions:
        """Parse the flags of the command. Raises StartError that names the wrong flag."""
        try:
            loads = [float(part) for part in load.split(",")]
        except ValueError:
            raise StartError(f"--load: {load!r} is no number; write one, or several like 0.7,1,2") from None
        options = cls(
            loads=loads,
            schedules=schedule.split(",") if schedule else [],
            mix=_mix(tiers),
            objectives=objectives or {},
            seed=seed,
            rate=rate,
        )
        for name in options.schedules or [DEFAULT_SCHEDULE]:
            for each in loads:
                Setting(schedule=name, load=each)
        return options


def virtual(arrivals: Sequence[Arrival], options: TraceOptions) -> list[ReplayRun]:
    """Run every schedule at every load in virtual time."""
    tiers = tiers_of(options.objectives, CPU_TIERS)
    settings = [
        Setting(schedule=name, load=load, mix=options.mix, tiers=tiers, seed=options.seed)
        for load in options.loads
        for name in options.schedules or [DEFAULT_SCHEDULE]
    ]
    rate = options.rate or capacity(arrivals, settings[0])
    return [replayed(arrivals, setting, rate=rate) for setting in settings]


async def live(
    url: str,
    arrivals: Sequence[Arrival],
    options: TraceOptions,
    *,
    api_key: str | None,
    on_done: Callable[[Sample], None],
) -> list[ReplayRun]:
    """Run every load against a server in real time, one after the other.

    `on_done` is called with each answer.

    Raises StartError when the server does not answer, or runs another schedule than the one named.
    """
    server = await LoadedServer.of(url, api_key=api_key)
    try:
        schedule = server.model.schedule
        named = options.schedules or [schedule or DEFAULT_SCHEDULE]
        if len(named) > 1 or schedule not in ("", *named):
            runs = schedule or "one schedule"
            raise StartError(f"--schedule {','.join(named)}: {url} runs {runs}, which is set at its start")
        tiers, context = _tiers_of(server.model, options), server.model.context
        settings = [
            Setting(
                schedule=named[0], load=load, mix=options.mix, tiers=tiers, seed=options.seed, context=context
            )
            for load in options.loads
        ]
        rate = options.rate or await server.capacity(arrivals, settings[0], on_done)
        return [await server.replay(arrivals, setting, rate, on_done) for setting in settings]
    finally:
        server.close()


def write(file: Path, title: str, runs: Sequence[ReplayRun]) -> None:
    """Write a page about these runs. Raises StartError when the file cannot be written."""
    try:
        file.write_text(page(title, runs), encoding="utf-8")
    except OSError as error:
        raise StartError(f"--report: cannot write {file}: {error.strerror or error}") from error


def _tiers_of(model: ServedModel, options: TraceOptions) -> dict[str, Tier]:
    """A server's tiers, with the objectives that the options replace. The usual ones if it names none."""
    named = {
        name: structs.replace(tier, objective=model.objectives.get(name, tier.objective))
        for name, tier in TIERS.items()
    }
    return tiers_of(options.objectives, named)


def _mix(text: str) -> dict[str, float]:
    """Parse `priority=0.2,default=0.8` into shares that sum to 1. Raises StartError."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise StartError(f"--tiers: {part!r} is no share; write it like priority=0.2") from None
        if name not in TIERS or not 0 <= shares[name] <= 1:
            raise StartError(f"--tiers: {part!r} is wrong; tiers are {', '.join(TIERS)}, shares from 0 to 1")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise StartError(f"--tiers: the shares sum to {sum(shares.values()):g}; they must sum to 1")
    return shares
