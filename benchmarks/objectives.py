"""Compares `deadline` with `fcfs` on a recorded load in virtual time: goodput, attainment, upper bound.

`python benchmarks/objectives.py TRACE.csv.gz --times COST.json --loads 0.7,1,1.5,2`
COST.json is a step-time model that `benchmarks/steptime.py --save` wrote; `benchmarks/times` has one. The
default is the package's model of a small CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec

from stretto.bench import traces
from stretto.engine.scheduler.default_tiers import default_tiers
from stretto.engine.step_time import StepCost
from stretto.simulator.replay import capacity, replay
from stretto.simulator.report import ReplayReport
from stretto.simulator.setting import SMALL_CPU, Arrival, Setting

COLUMNS = "load schedule goodput ratio of_best of_all weighted priority default flex/s lost steps gap_ms"


def main() -> None:
    options = _arguments()
    cost = msgspec.json.decode(options.times.read_bytes(), type=StepCost) if options.times else SMALL_CPU
    arrivals = traces.read(options.trace, requests=options.requests)
    setting = Setting(cost=cost, tiers=default_tiers([cost]), noise=options.noise, seed=options.seed)
    full = capacity(arrivals, setting)
    tiers = {name: msgspec.to_builtins(tier.objective) for name, tier in setting.tiers.items()}
    print(f"{msgspec.to_builtins(cost)}\n{tiers}\nfcfs saturates at {full:.4f} requests/s")
    print(COLUMNS.replace(" ", "\t"))
    kept: list[dict[str, object]] = []
    for load in map(float, options.loads.split(",")):
        reports = _both(arrivals, msgspec.structs.replace(setting, load=load), full)
        for report in reports:
            print(_line(report, reports[0]), flush=True)
            kept.append(msgspec.to_builtins(report))
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1))


def _both(arrivals: list[Arrival], setting: Setting, full: float) -> list[ReplayReport]:
    return [
        replay(arrivals, msgspec.structs.replace(setting, schedule=name), rate=full)
        for name in ("fcfs", "deadline")
    ]


def _line(report: ReplayReport, fcfs: ReplayReport) -> str:
    """Goodput counts only requests with an objective; `of_best` is its share of the upper bound.

    `of_all` also counts each finished flex request. `weighted` counts each request by its tier's weight.
    """
    timed, whole, best = report.tiers["timed"], report.tiers["all"], report.best_goodput
    values = (
        f"{report.load:g}",
        report.schedule,
        f"{timed.goodput:.4f}",
        f"{timed.goodput / max(fcfs.tiers['timed'].goodput, 1e-9):.2f}",
        f"{timed.goodput / best['timed']:.3f}",
        f"{whole.goodput / best['all']:.3f}",
        f"{report.weighted_goodput / best['weighted']:.3f}",
        f"{report.tiers['priority'].attainment:.4f}",
        f"{report.tiers['default'].attainment:.4f}",
        f"{report.tiers['flex'].completed:.4f}",
        f"{report.wasted:.3f}",
        str(report.steps),
        f"{timed.longest_gap_ms:.0f}",
    )
    return "\t".join(values)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--times", type=Path, help="a step-time model, JSON")
    parser.add_argument("--loads", default="0.7,1,1.5,2")
    parser.add_argument("--requests", type=int, help="replay only this many, from the start")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="relative standard deviation of a step's time"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
