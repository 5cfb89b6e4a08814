"""Prints how late the late ones are: attainment, goodput, TTFT and the longest gap by tier, beside `fcfs`.

`python benchmarks/lateness.py azure_2023_conv.csv.gz azure_2023_code.csv.gz mooncake_conversation.jsonl.gz`
Each trace is replayed in virtual time at each load under each schedule. A row of the table is printed as soon
as it is known. `--requests 0` replays whole traces.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stretto.bench import traces
from stretto.simulator.replay import capacity, replay
from stretto.simulator.report import ReplayReport, TierReport
from stretto.simulator.setting import MIX, Setting

COLUMNS = ("load", "schedule", "on time", "goodput", "with objectives", "refused")


def main() -> None:
    options = _arguments()
    for path in options.traces:
        arrivals = traces.read(path, requests=options.requests or None)
        full = capacity(arrivals, Setting())
        print(f"\n{path.name}, {len(arrivals)} requests, load 1 is {full:.4f} requests/s\n")
        tiers = [f"`{name}`: TTFT p50 / p99 / max, gap, s" for name in MIX]
        print(f"| {' | '.join([*COLUMNS, *tiers])} |\n{'| --- ' * (len(COLUMNS) + len(tiers))}|", flush=True)
        for load in map(float, options.loads.split(",")):
            for schedule in options.schedules.split(","):
                print(_row(replay(arrivals, Setting(schedule=schedule, load=load), rate=full)), flush=True)


def _row(report: ReplayReport) -> str:
    """TTFT and the longest gap are those of all requests that began, on time or not."""
    whole = report.tiers["all"]
    values = (
        f"{report.load:g}",
        f"`{report.schedule}`",
        f"{100 * whole.attainment:.1f} %",
        f"{whole.goodput:.4f}",
        f"{report.tiers['timed'].goodput:.4f}",
        str(whole.refused),
        *(_waits(report.tiers[name]) for name in MIX),
    )
    return f"| {' | '.join(values)} |"


def _waits(tier: TierReport) -> str:
    if tier.ttft_ms is None or tier.itl_ms is None:
        return "none began"
    ttft = (_seconds(value) for value in (tier.ttft_ms.p50, tier.ttft_ms.p99, tier.ttft_ms.max))
    return f"{' / '.join(ttft)}, {_seconds(tier.itl_ms.max)}"


def _seconds(ms: float) -> str:
    return f"{ms / 1e3:.1f}" if ms < 99_950 else f"{ms / 1e3:,.0f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--loads", default="0.5,0.7,1,1.5,2")
    parser.add_argument("--schedules", default="fcfs,deadline")
    parser.add_argument("--requests", type=int, default=3000, help="of each trace, from its start; 0: all")
    return parser.parse_args()


if __name__ == "__main__":
    main()
