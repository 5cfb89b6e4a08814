"""Measures the overhead of the API server: the real server with the null model, under load over real sockets.

A step of the null model takes a known time, so TTFT minus one step is the overhead. A step takes 0 ms for one
client and for throughput. With 32 clients it takes 10 ms, because at 0 ms they would measure only their own
closed loop.
`python benchmarks/front.py [--json] [--rounds N]`
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import msgspec
import uvloop
from rich.table import Table
from serving import serving

from stretto import terminal
from stretto.bench.load import Load, run
from stretto.bench.metrics import LoadReport, Sample

WORDS = "The order left our warehouse on Monday and should reach you within the week. "


class Case(msgspec.Struct, frozen=True):
    """A load of chat requests with about 500 characters each, `concurrency` of them at once."""

    name: str
    concurrency: int
    requests: int
    output_tokens: int
    step_ms: int
    goal: str


CASES = (
    Case("TTFT added, c = 1", 1, 200, 8, 0, "p50 <= 1.5 ms"),
    Case("TTFT added, c = 32", 32, 256, 64, 10, "p50 <= 10 ms"),
    Case("the same, steps of 0 ms", 32, 640, 8, 0, "the loop's own limit"),
    Case("streamed tokens/s, c = 32", 32, 64, 1000, 0, ">= 40,000"),
)


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the rounds."""

    case: str
    goal: str
    ttft_p50_ms: float
    ttft_p99_ms: float
    ttft_max_ms: float
    tokens_per_s: float
    failed: int


async def measure(url: str, prompts: Path, case: Case) -> LoadReport:
    load = Load(
        requests=case.requests,
        concurrency=case.concurrency,
        prompts=prompts,
        output_tokens=case.output_tokens,
        warm_up=case.concurrency,
    )
    return (await run(url, load, api_key=None, on_done=_ignore)).report


def figure(case: Case, reports: list[LoadReport]) -> Figure:
    seen = [report.ttft_ms for report in reports if report.ttft_ms is not None]
    return Figure(
        case=case.name,
        goal=case.goal,
        ttft_p50_ms=median(spread.p50 for spread in seen) - case.step_ms,
        ttft_p99_ms=median(spread.p99 for spread in seen) - case.step_ms,
        ttft_max_ms=median(spread.max for spread in seen) - case.step_ms,
        tokens_per_s=median(report.output_tokens_per_s for report in reports),
        failed=sum(report.failed for report in reports),
    )


def show(figures: list[Figure]) -> None:
    table = Table("the front alone", "goal", "TTFT p50 ms", "p99", "max", "tokens/s", "failed", box=None)
    for each in figures:
        times = (f"{value:.2f}" for value in (each.ttft_p50_ms, each.ttft_p99_ms, each.ttft_max_ms))
        table.add_row(each.case, each.goal, *times, f"{each.tokens_per_s:,.0f}", str(each.failed))
    terminal.out.print(table)


def _ignore(sample: Sample) -> None:
    """Show no progress, because drawing it takes the client's time."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    reports: dict[str, list[LoadReport]] = {case.name: [] for case in CASES}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("null=null:0") as quick,
        serving("null=null:10") as slow,
    ):
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(f"{number}. {WORDS * 6}" for number in range(64)))
        for _ in range(options.rounds):
            for case in CASES:
                url = slow if case.step_ms else quick
                reports[case.name].append(uvloop.run(measure(url, prompts, case)))
    figures = [figure(case, reports[case.name]) for case in CASES]
    if options.json:
        terminal.print_json(figures)
    else:
        show(figures)


if __name__ == "__main__":
    main()
