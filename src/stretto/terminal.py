"""Output of the commands: results on standard output, everything else on standard error.

Colours and progress bars appear only on a terminal. This module formats reports and computes none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from stretto.bench import engine
from stretto.bench.load import Outcome
from stretto.bench.metrics import Sample
from stretto.bench.report import COUNTS, TIMES, counts, objectives, times
from stretto.errors import StrettoError
from stretto.hardware import gib, process_age
from stretto.simulator.report import ReplayReport
from stretto.statistics import Spread
from stretto.types import WorkerState

FILE_WIDTH = 200  # columns of a table in a file or a pipe, where nothing is cut to the width of a window
QUESTION = "What is 22.53 + 32.62?"


def open_missing_streams() -> None:
    """Opens the null device in the place of a standard stream that the caller has closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


open_missing_streams()
out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
err = Console(stderr=True, soft_wrap=True, highlight=False, width=None if sys.stderr.isatty() else FILE_WIDTH)


def write_any_text() -> None:
    """Has a question mark written for a character that the locale of the terminal lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def drop_output() -> None:
    """Lose what waits for a standard output that cannot be written, so that no further error follows."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: object) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
    sys.stdout.flush()


def print_error(error: StrettoError) -> None:
    """Print the message of an error as one line on standard error."""
    err.print("[bold red]error:[/]", end=" ")
    err.print(error.message, markup=False)


class LoadingBars:
    """A progress bar for each stage of a long start: downloads, weights. Only terminals show it."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        self._progress = _progress(*columns)
        self._stages: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of a stage are loaded."""
        if not self._stages:
            self._progress.start()
        if stage not in self._stages:
            self._stages[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._stages[stage], completed=done, total=total)

    def stop(self) -> None:
        """Remove the bars."""
        self._progress.stop()

    def __enter__(self) -> LoadingBars:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class StepBars:
    """A progress bar with an estimate of the time left, for one piece of work after another."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = _progress(*columns)
        self._stage, self._task = "", TaskID(0)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of a stage are done. A new stage replaces the bar."""
        if stage != self._stage:
            if self._stage:
                self._progress.remove_task(self._task)
            self._stage, self._task = stage, self._progress.add_task(stage, total=total)
        self._progress.update(self._task, completed=done, total=total)

    def __enter__(self) -> StepBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@contextmanager
def request_bar(total: int | None) -> Generator[Callable[[Sample], None]]:
    """A progress bar over requests; call its value after each one. `total` is None when it is unknown."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _progress(*columns) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda _: progress.advance(task)


def show_ready(url: str, state: WorkerState, name: str, *, locked: bool) -> None:
    """Print that a server is ready, its models, the objectives of its tiers, and a curl command that sends a
    chat to the model `name`."""
    for model in state.models:
        out.print(
            f"[bold]{model.name}[/] · {model.family}, {model.parameters / 1e6:,.1f} M parameters"
            f" · {model.quantise or model.dtype} on {model.device}, {gib(model.weight_bytes)}"
            f" · context {model.context:,}"
            f" · KV cache {gib(model.kv_bytes)}, {model.blocks * model.block_size:,} tokens"
            + (f" ({model.kv_why})" if model.kv_why else "")
        )
    out.print(f"objectives: {objectives(state.objectives)}")
    out.print(f"[bold green]ready[/] in {process_age():.1f} s · {url}")
    key = " -H 'Authorization: Bearer KEY'" if locked else ""
    body = {"model": name, "messages": [{"role": "user", "content": QUESTION}]}
    document = msgspec.json.encode(body).decode()
    out.print(
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{document}'",
        markup=False,
    )


def show_outcome(outcome: Outcome) -> None:
    """Print the figures of a load test."""
    report = outcome.report
    table = _table(
        "milliseconds", "mean", "p50", "p90", "p99", "max", title=f"{outcome.model} at {outcome.url}"
    )
    for name, spread in (
        ("TTFT", report.ttft_ms),
        ("TPOT", report.tpot_ms),
        ("ITL", report.itl_ms),
        ("E2E", report.e2e_ms),
    ):
        table.add_row(name, *_spread(spread))
    out.print(table)
    out.print(
        f"{report.completed} of {report.sent} requests in {report.duration_s:.2f} s, at most"
        f" {report.peak_concurrency} at once"
    )
    out.print(
        f"{report.requests_per_s:.2f} requests/s · {report.output_tokens_per_s:.1f} output tokens/s ·"
        f" {report.total_tokens_per_s:.1f} tokens/s with the prompts"
    )
    if report.goodput is not None and report.good_share is not None:
        out.print(
            f"goodput {report.goodput:.2f} requests/s · {report.good_share:.1%} of all requests were good"
        )
    for kind, count in report.errors.items():
        out.print(f"[red]{count} failed:[/] ", end="")
        out.print(f"{kind}: {outcome.examples[kind]}", markup=False)


def show_replay(report: ReplayReport) -> None:
    """A replayed trace by tier. Tiers without requests are left out."""
    ran = " on ".join(part for part in (report.schedule, report.server) if part)
    table = _table(*COUNTS, title=f"{ran} at load {report.load:g}")
    for row in counts(report):
        table.add_row(*row)
    out.print(table)
    table = _table(*TIMES, title="milliseconds")
    for row in times(report):
        table.add_row(*row)
    out.print(table)
    inside = "" if report.steps is None else f", {report.steps:,} steps, {report.preemptions} preemptions"
    out.print(
        f"{report.rate:.3f} requests/s over {report.duration_s:,.0f} s,"
        f" {report.wasted:.1%} of the tokens wasted{inside}"
    )
    for kind, count in report.errors.items():
        out.print(f"[red]{count} failed:[/] ", end="")
        out.print(kind, markup=False)


def show_engine(report: engine.EngineReport) -> None:
    """Print the speed of the engine without a server, and the time of each kind of layer."""
    model = report.model
    out.print(
        f"[bold]{model.name}[/] · {model.quantise or model.dtype} · {report.kernels}"
        f" · {report.threads} threads · {report.cpu}"
    )
    out.print(
        f"ready in {report.start_s:.2f} s, first token after {report.first_token_s:.2f} s,"
        f" {gib(report.peak_bytes)} of memory at most; load {report.load:.1f}"
    )
    table = _table("batch", "context", "TTFT ms", "prefill tok/s", "decode tok/s", "step ms", "of bandwidth")
    for figure in report.figures:
        numbers = (figure.ttft_ms, figure.prefill_tokens_per_s, figure.decode_tokens_per_s, figure.step_ms)
        shown = [f"{number:,.1f}" for number in numbers]
        table.add_row(str(figure.batch), str(figure.context), *shown, _percent(figure.mbu))
    out.print(table)
    if report.bandwidth_gb_s is not None:
        table = _table("a decode step", "ms", "MB", "of bandwidth", title=f"{report.bandwidth_gb_s:.1f} GB/s")
        for part in report.parts:
            size = f"{part.bytes / 1e6:,.1f}" if part.bytes else ""
            table.add_row(part.layer, f"{part.ms:.3f}", size, _percent(part.floor))
        out.print(table)


def show_ladder(report: Any) -> None:
    """Print the steps of a `stretto.optimise.steps.RunReport`, and the ladder if it made one."""
    for step in report.steps:
        out.print(f"{step.step} [bold]{step.name}[/] {step.status} in {step.seconds:,.1f} s")
    if report.bad_lines:
        out.print(f"[yellow]{report.bad_lines} bad lines of the data were left out[/]")
    if report.ladder is None:
        return
    table = _table("variant", "quality", "95 %", "ms per request", "MB", "KL")
    for variant in report.ladder.variants:
        quality = variant.quality
        table.add_row(
            variant.name,
            f"{quality.mean:.1%}",
            f"{quality.low:.1%} to {quality.high:.1%}",
            f"{report.usual_ms[variant.name]:,.1f}",
            f"{variant.bytes / 1e6:,.2f}",
            f"{variant.kl:.4f}",
        )
    out.print(table)
    for each in report.ladder.dropped:
        out.print(f"{each.name} is not kept: {each.why}")
    out.print(f"{report.out}/ladder.json, {report.out}/report.html")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def show_facts(sections: Iterable[tuple[str, list[tuple[str, str, str]]]]) -> None:
    """Print sections of rows (name, value, reason)."""
    for title, rows in sections:
        table = _table(title, "", "why" if any(why for _, _, why in rows) else "")
        for row in rows:
            table.add_row(*row)
        out.print(table)


def _table(first: str, *others: str, title: str | None = None) -> Table:
    table = Table(first, *others, title=title, title_justify="left", box=None, pad_edge=False)
    table.columns[0].style = "cyan"
    return table


def _spread(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 5
    return [f"{value:.2f}" for value in (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)]


def _progress(*columns: ProgressColumn) -> Progress:
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
