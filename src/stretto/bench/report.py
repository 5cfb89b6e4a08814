"""Formats replayed traces as tables, and as one HTML page with tables and plots.

The page includes the plotting library, so it needs no network. It follows the browser's light or dark theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from math import isfinite
from typing import Any

import msgspec

from stretto.simulator.report import ReplayReport, RequestOutcome, TierReport
from stretto.statistics import Spread
from stretto.types import Objective

ReplayRun = tuple[ReplayReport, Sequence[RequestOutcome]]
PlotlyPart = dict[str, Any]  # a trace, a figure or an axis, as Plotly reads it
COLOURS = {"priority": "#d9480f", "default": "#2f6fde", "flex": "#2b8a3e", "all": "#868e96"}
DASHES = ("solid", "dash", "dot", "dashdot")
POINTS, SLICES = 300, 30
COUNTS = ("tier", "sent", "on time", "TTFT p99 s", "max s", "gap max s", "good/s", "refused", "overdue")
TIMES = ("tier", "TTFT p50", "p99", "max", "TPOT p50", "p99", "max", "ITL p50", "p99", "max")


def page(title: str, runs: Sequence[ReplayRun]) -> str:
    """The HTML page about some runs of one trace."""
    reports = [report for report, _ in runs]
    plots = [_goodput(reports)] if len({report.load for report in reports}) > 1 else []
    first, sections = _plots(range(len(plots))), list[str]()
    for report, outcomes in runs:
        own = [_ttft(outcomes), _over_time(report, outcomes), _itl(outcomes)]
        sections.append(_section(report, range(len(plots), len(plots) + len(own))))
        plots += own
    library = files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    parts = {
        "title": escape(title),
        "body": "\n".join([first, *sections]),
        "plots": msgspec.json.encode(plots).decode().replace("</", "<\\/"),
        "library": library.replace("</script", "<\\/script"),
    }
    text = files("stretto.bench").joinpath("report.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{{ {name} }}}}", part)
    return text


def counts(report: ReplayReport) -> list[list[str]]:
    """A row for each tier with requests, in the columns of `COUNTS`."""
    return [
        [
            name,
            f"{tier.sent:,}",
            f"{tier.attainment:.1%}",
            *_seconds(tier),
            f"{tier.goodput:.3f}",
            str(tier.refused),
            str(tier.overdue),
        ]
        for name, tier in report.tiers.items()
        if tier.sent
    ]


def objectives(tiers: Mapping[str, Objective]) -> str:
    """What each tier asks for, in one line."""
    limits = ("ttft_ms", "itl_ms", "total_ms")
    asked = [
        (name, [f"{limit} {value:,.0f}" for limit in limits if (value := getattr(each, limit)) is not None])
        for name, each in tiers.items()
    ]
    return "; ".join(f"{name}: {', '.join(values) or 'none'}" for name, values in asked)


def _asked(report: ReplayReport) -> dict[str, Objective]:
    """The objectives of the tiers that had requests."""
    return {name: each for name, each in report.objectives.items() if report.tiers[name].sent}


def _seconds(tier: TierReport) -> list[str]:
    """The 99th percentile and the maximum of TTFT, and the longest gap, of all that began, on time or not."""
    ttft, gaps = tier.ttft_ms, tier.itl_ms
    values = (ttft and ttft.p99, ttft and ttft.max, gaps and gaps.max)
    return ["-" if value is None else f"{value / 1e3:,.1f}" for value in values]


def times(report: ReplayReport) -> list[list[str]]:
    """A row for each tier with requests, in the columns of `TIMES`: milliseconds."""
    return [
        [name, *_spread(tier.ttft_ms), *_spread(tier.tpot_ms), *_spread(tier.itl_ms)]
        for name, tier in report.tiers.items()
        if tier.sent
    ]


def _spread(spread: Spread | None) -> list[str]:
    values = (None,) * 3 if spread is None else (spread.p50, spread.p99, spread.max)
    return ["-" if value is None else f"{value:,.0f}" for value in values]


def _section(report: ReplayReport, plots: Iterable[int]) -> str:
    where = f"on {report.server}" if report.server else "in virtual time"
    title = f"{report.schedule or 'a server'} at load {report.load:g}"
    facts = [
        f"{report.rate:.3g} requests/s over {report.duration_s:,.0f} s {where}",
        f"load 1 is {report.capacity:.3g} requests/s",
        f"objectives: {objectives(_asked(report))}",
        f"{report.wasted:.1%} of the computed tokens were for answers that were late or not finished",
    ]
    if report.best_goodput:
        facts.append(f"no schedule can exceed {report.best_goodput['all']:.3g} on-time answers/s")
    facts += [f"{count} failed: {kind}" for kind, count in report.errors.items()]
    lines = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    tables = _table(COUNTS, counts(report)) + "<p>milliseconds</p>" + _table(TIMES, times(report))
    return f"<section><h2>{escape(title)}</h2><ul>{lines}</ul>{tables}{_plots(plots)}</section>"


def _plots(plots: Iterable[int]) -> str:
    return "".join(f"<div class='plot' data-plot='{number}'></div>" for number in plots)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _groups(outcomes: Sequence[RequestOutcome]) -> Iterator[tuple[str, list[RequestOutcome]]]:
    for name in COLOURS:
        group = [one for one in outcomes if one.request.tier == name]
        if group:
            yield name, group


def _ttft(outcomes: Sequence[RequestOutcome]) -> PlotlyPart:
    """The cumulative share of a tier's requests by TTFT. A request without a token never adds to it."""
    lines = [
        _line(name, *_cumulative([one.first - one.request.arrival for one in group if one.count], len(group)))
        for name, group in _groups(outcomes)
    ]
    return _plot("Time to first token", lines, "seconds", "share of requests", {"rangemode": "tozero"})


def _itl(outcomes: Sequence[RequestOutcome]) -> PlotlyPart:
    lines: list[PlotlyPart] = []
    for name, group in _groups(outcomes):
        gaps = [gap for one in group for gap in one.gaps]
        lines.append(_line(name, *_cumulative(gaps, len(gaps))))
    return _plot("Between tokens", lines, "milliseconds", "share of gaps", {"type": "log"})


def _over_time(report: ReplayReport, outcomes: Sequence[RequestOutcome]) -> PlotlyPart:
    """Attainment by the time of arrival."""
    width = max(report.duration_s / SLICES, 1e-9)
    lines: list[PlotlyPart] = []
    for name, group in _groups(outcomes):
        counts, good = [0] * SLICES, [0] * SLICES
        for one in group:
            at = min(int(one.request.arrival / width), SLICES - 1)
            counts[at] += 1
            good[at] += one.good
        held = [number for number in range(SLICES) if counts[number]]
        shares = [good[number] / counts[number] for number in held]
        lines.append(_line(name, [(number + 0.5) * width for number in held], shares))
    return _plot("Attainment", lines, "arrival, seconds", "share on time", {})


def _goodput(reports: Sequence[ReplayReport]) -> PlotlyPart:
    lines: list[PlotlyPart] = []
    for dash, schedule in zip(DASHES, dict.fromkeys(report.schedule for report in reports), strict=False):
        ran = sorted((each for each in reports if each.schedule == schedule), key=lambda each: each.load)
        goodput = [each.tiers["all"].goodput for each in ran]
        line = _line(schedule or "goodput", [each.load for each in ran], goodput)
        lines.append(line | {"mode": "lines+markers", "line": {"dash": dash}})
    return _plot("Goodput against load", lines, "load", "on-time answers per second", {})


def _cumulative(values: Sequence[float], whole: int) -> tuple[list[float], list[float]]:
    """The cumulative distribution of `values` as a share of `whole`, in at most `POINTS` points."""
    ordered = sorted(value for value in values if isfinite(value))
    if not ordered:
        return [], []
    picked = sorted({round(step * (len(ordered) - 1) / (POINTS - 1)) for step in range(POINTS)})
    return [ordered[index] for index in picked], [(index + 1) / whole for index in picked]


def _line(name: str, x: list[float], y: list[float]) -> PlotlyPart:
    return {"name": name, "x": x, "y": y, "mode": "lines", "line": {"color": COLOURS.get(name)}}


def _plot(title: str, lines: list[PlotlyPart], x_title: str, y_title: str, axis: PlotlyPart) -> PlotlyPart:
    layout = {
        "title": {"text": title},
        "xaxis": {"title": {"text": x_title}} | axis,
        "yaxis": {"title": {"text": y_title}, "rangemode": "tozero"},
    }
    return {"data": lines, "layout": layout}
