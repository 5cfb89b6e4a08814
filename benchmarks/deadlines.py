"""Compares the deadline schedule with fcfs in real time on this machine: the same load on both in turn.

`python benchmarks/deadlines.py MODEL_DIR TRACE [--load 1.5] [--seconds 75] [--rounds 1] [--quantise int8]`
Each round starts a server for each schedule and replays a window of the trace against it. A CPU takes seconds
for a request of the Azure conversations, so prompts, answers and the TTFT objectives are cut to a tenth. Load
1.0 is the rate that fcfs completes with a backlog, measured once.
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

import msgspec
from rich.table import Table
from serving import serving

from stretto import terminal
from stretto.bench import traces
from stretto.bench.live import LoadedServer
from stretto.bench.metrics import Sample
from stretto.config import Tier
from stretto.simulator.report import ReplayReport
from stretto.simulator.setting import CPU_TIERS, Arrival, Setting

SHORTER = 10
SCHEDULES = ("fcfs", "deadline")


def shorter(arrivals: list[Arrival]) -> list[Arrival]:
    """The same requests with a tenth of the tokens, at the same times."""
    return [
        msgspec.structs.replace(
            arrival,
            prompt_tokens=max(arrival.prompt_tokens // SHORTER, 1),
            output_tokens=max(arrival.output_tokens // SHORTER, 2),
        )
        for arrival in arrivals
    ]


def tiers() -> dict[str, Tier]:
    """The objectives of the virtual replay, with a tenth of the time to the first token."""
    scaled: dict[str, Tier] = {}
    for name, tier in CPU_TIERS.items():
        ttft = tier.objective.ttft_ms
        objective = msgspec.structs.replace(tier.objective, ttft_ms=None if ttft is None else ttft / SHORTER)
        scaled[name] = msgspec.structs.replace(tier, objective=objective)
    return scaled


def started(model: Path, schedule: str, quantise: str) -> AbstractContextManager[str]:
    """Run a server of the model with this schedule. Yields its address."""
    weights = ["--quantise", quantise] if quantise else []
    return serving(f"model={model}", "--schedule", schedule, "--context", "4096", *weights)


async def capacity(url: str, arrivals: list[Arrival], setting: Setting) -> float:
    server = await LoadedServer.of(url, api_key=None)
    try:
        return await server.capacity(arrivals, setting, _ignore)
    finally:
        server.close()


async def replay(url: str, arrivals: list[Arrival], setting: Setting, rate: float) -> ReplayReport:
    server = await LoadedServer.of(url, api_key=None)
    try:
        return (await server.replay(arrivals, setting, rate, _ignore))[0]
    finally:
        server.close()


def _ignore(sample: Sample) -> None:
    """Show no progress."""


def show(reports: dict[str, list[ReplayReport]]) -> None:
    """Print every round of both schedules, and the ratio of their goodput."""
    for several in reports.values():
        for report in several:
            terminal.show_replay(report)
    table = Table("goodput, deadline over fcfs", "ratio by round", "median", box=None)
    for name in ("timed", "all"):
        pairs = zip(reports["deadline"], reports["fcfs"], strict=True)
        ratios = [ours.tiers[name].goodput / max(plain.tiers[name].goodput, 1e-9) for ours, plain in pairs]
        table.add_row(name, ", ".join(f"{each:.2f}" for each in ratios), f"{median(ratios):.2f}")
    terminal.out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--load", type=float, default=1.5)
    parser.add_argument(
        "--seconds", type=float, default=75.0, help="seconds of the trace to replay, for each schedule"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--quantise", default="int8", help="int8, int4, or an empty string for no quantisation"
    )
    parser.add_argument("--rate", type=float, help="requests per second of load 1.0; default: measured")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    known = shorter(traces.read(options.trace, requests=2000))
    settings = {
        name: Setting(schedule=name, load=options.load, tiers=tiers(), context=4096) for name in SCHEDULES
    }
    reports: dict[str, list[ReplayReport]] = {name: [] for name in SCHEDULES}
    rate: float | None = options.rate
    for _ in range(options.rounds):
        for name in SCHEDULES:
            with started(options.model, name, options.quantise) as url:
                if rate is None:
                    rate = asyncio.run(capacity(url, known, settings["fcfs"]))
                window = known[: max(int(rate * options.load * options.seconds), 2)]
                reports[name].append(asyncio.run(replay(url, window, settings[name], rate)))
    if options.json:
        terminal.print_json(reports)
    else:
        show(reports)


if __name__ == "__main__":
    main()
