"""Deadlines against first come, first served, in real time on this machine: the same load on both in turn.

`python benchmarks/deadlines.py MODEL_DIR TRACE [--load 1.5] [--seconds 75] [--rounds 1] [--quantise int8]`
Each round starts a server per schedule and replays a window of the trace against it. A CPU serves a request
of the Azure conversations in seconds, so prompts and answers are cut to a tenth, and so is the time to their
first token that the virtual replay asks. Load 1.0 is what fcfs completes with a backlog, measured once.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.error import URLError
from urllib.request import urlopen

import msgspec
from rich.table import Table

from stretto import terminal
from stretto.bench import traces
from stretto.bench.live import Server
from stretto.bench.metrics import Sample
from stretto.config import Tier
from stretto.simulator.replay import CPU_TIERS, ReplayReport, Setting
from stretto.types import Arrival

SHORTER = 10
START_S = 120.0
SCHEDULES = ("fcfs", "deadline")


def shorter(arrivals: list[Arrival]) -> list[Arrival]:
    """The same requests with a tenth of the tokens, at the same instants."""
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


@contextmanager
def serving(model: Path, schedule: str, quantise: str) -> Iterator[str]:
    """The address of a server that is ready."""
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "stretto", "serve", f"model={model}", "--port", "0"]
        command += ["--schedule", schedule, "--context", "4096"] + (
            ["--quantise", quantise] if quantise else []
        )
        process = subprocess.Popen(command, stdout=said)
        try:
            deadline = time.monotonic() + START_S
            while "http://" not in (text := Path(f"/proc/self/fd/{said.fileno()}").read_text()):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("the server did not start")
                time.sleep(0.1)
            url = next(word for word in text.split() if word.startswith("http://"))
            while not _ready(url) and time.monotonic() < deadline:
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait()


def _ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/ready") as page:
            return page.status == 200
    except URLError:
        return False


async def capacity(url: str, arrivals: list[Arrival], setting: Setting) -> float:
    server = await Server.of(url, api_key=None)
    try:
        return await server.capacity(arrivals, setting, _ignore)
    finally:
        server.close()


async def replay(url: str, arrivals: list[Arrival], setting: Setting, rate: float) -> ReplayReport:
    server = await Server.of(url, api_key=None)
    try:
        return (await server.replay(arrivals, setting, rate, _ignore))[0]
    finally:
        server.close()


def _ignore(sample: Sample) -> None:
    """Nothing to show while it runs."""


def show(reports: dict[str, list[ReplayReport]]) -> None:
    """Every round of both, and the ratio of their goodput in each."""
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
    parser.add_argument("--seconds", type=float, default=75.0, help="of arrivals, for each schedule")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quantise", default="int8", help="int8, int4 or nothing")
    parser.add_argument("--rate", type=float, help="requests per second of load 1.0; else measured")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    known = shorter(traces.read(asked.trace, requests=2000))
    settings = {
        name: Setting(schedule=name, load=asked.load, tiers=tiers(), context=4096) for name in SCHEDULES
    }
    reports: dict[str, list[ReplayReport]] = {name: [] for name in SCHEDULES}
    rate: float | None = asked.rate
    for _ in range(asked.rounds):
        for name in SCHEDULES:
            with serving(asked.model, name, asked.quantise) as url:
                if rate is None:
                    rate = asyncio.run(capacity(url, known, settings["fcfs"]))
                window = known[: max(int(rate * asked.load * asked.seconds), 2)]
                reports[name].append(asyncio.run(replay(url, window, settings[name], rate)))
    if asked.json:
        terminal.say_json(reports)
    else:
        show(reports)


if __name__ == "__main__":
    main()
