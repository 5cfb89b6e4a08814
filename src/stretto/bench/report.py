"""A replay as one self-contained page: tables and plots, with the plotting library inside.

Knows reports and how they look; the page needs no network and follows light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from math import isfinite
from typing import Any

import msgspec

from stretto.simulator.replay import ReplayReport, Told

Trace = dict[str, Any]
COLOURS = {"priority": "#d9480f", "default": "#2f6fde", "flex": "#2b8a3e", "all": "#868e96"}
DASHES = ("solid", "dash", "dot", "dashdot")
POINTS, SLICES = 300, 30
COLUMNS = ("tier", "sent", "on time", "goodput /s", "TTFT p50 ms", "p99", "max", "TPOT p50 ms", "ITL p99 ms")
MORE = ("ITL max", "refused", "overdue")


def page(title: str, runs: Sequence[tuple[ReplayReport, Sequence[Told]]]) -> str:
    """The page of some runs of one trace, HTML."""
    reports = [report for report, _ in runs]
    plots = [_goodput(reports)] if len({report.load for report in reports}) > 1 else []
    first, sections = _places(range(len(plots))), list[str]()
    for report, told in runs:
        own = [_ttft(told), _over_time(report, told), _itl(told)]
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


def _section(report: ReplayReport, plots: Iterable[int]) -> str:
    where = f"on {report.server}" if report.server else "in virtual time"
    head = f"{report.schedule or 'a server'} at load {report.load:g}"
    facts = [
        f"{report.rate:.3g} requests/s over {report.duration_s:,.0f} s {where}",
        f"load 1 is {report.capacity:.3g} requests/s",
        f"{report.wasted:.1%} of the tokens computed were for answers that came late or not at all",
    ]
    if report.best_goodput:
        facts.append(f"no schedule could have more than {report.best_goodput['all']:.3g} good answers/s")
    facts += [f"{count} failed: {kind}" for kind, count in report.errors.items()]
    lines = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f"<section><h2>{escape(head)}</h2><ul>{lines}</ul>{_table(report)}{_places(plots)}</section>"


def _places(plots: Iterable[int]) -> str:
    return "".join(f"<div class='plot' data-plot='{number}'></div>" for number in plots)


def _table(report: ReplayReport) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in (*COLUMNS, *MORE))
    rows: list[str] = []
    for name, tier in report.tiers.items():
        if not tier.sent:
            continue
        ttft, tpot, itl = tier.ttft_ms, tier.tpot_ms, tier.itl_ms
        times = (ttft and ttft.p50, ttft and ttft.p99, ttft and ttft.max, tpot and tpot.p50, itl and itl.p99)
        shown = ["-" if value is None else f"{value:,.0f}" for value in (*times, itl and itl.max)]
        cells = [name, f"{tier.sent:,}", f"{tier.attainment:.1%}", f"{tier.goodput:.3g}", *shown]
        cells += [str(tier.refused), str(tier.overdue)]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class='wide'>{table}</div>"


def _groups(told: Sequence[Told]) -> Iterator[tuple[str, list[Told]]]:
    for name in COLOURS:
        group = [one for one in told if one.request.tier == name]
        if group:
            yield name, group


def _ttft(told: Sequence[Told]) -> Trace:
    """The share of a tier's requests whose first token had come by then; those without one never count."""
    lines = [
        _line(name, *_cumulative([one.first - one.request.arrival for one in group if one.count], len(group)))
        for name, group in _groups(told)
    ]
    return _plot("Time to first token", lines, "seconds", "share of requests", {"rangemode": "tozero"})


def _itl(told: Sequence[Told]) -> Trace:
    lines: list[Trace] = []
    for name, group in _groups(told):
        gaps = [gap for one in group for gap in one.gaps]
        lines.append(_line(name, *_cumulative(gaps, len(gaps))))
    return _plot("Between tokens", lines, "milliseconds", "share of gaps", {"type": "log"})


def _over_time(report: ReplayReport, told: Sequence[Told]) -> Trace:
    """Attainment by when a request arrived."""
    width = max(report.duration_s / SLICES, 1e-9)
    lines: list[Trace] = []
    for name, group in _groups(told):
        counts, good = [0] * SLICES, [0] * SLICES
        for one in group:
            at = min(int(one.request.arrival / width), SLICES - 1)
            counts[at] += 1
            good[at] += one.good
        held = [number for number in range(SLICES) if counts[number]]
        shares = [good[number] / counts[number] for number in held]
        lines.append(_line(name, [(number + 0.5) * width for number in held], shares))
    return _plot("Attainment", lines, "arrival, seconds", "share on time", {})


def _goodput(reports: Sequence[ReplayReport]) -> Trace:
    lines: list[Trace] = []
    for dash, schedule in zip(DASHES, dict.fromkeys(report.schedule for report in reports), strict=False):
        ran = sorted((each for each in reports if each.schedule == schedule), key=lambda each: each.load)
        goodput = [each.tiers["all"].goodput for each in ran]
        line = _line(schedule or "goodput", [each.load for each in ran], goodput)
        lines.append(line | {"mode": "lines+markers", "line": {"dash": dash}})
    return _plot("Goodput against load", lines, "load", "on-time answers per second", {})


def _cumulative(values: Sequence[float], whole: int) -> tuple[list[float], list[float]]:
    """At most `POINTS` points of the rising share of `whole` that is no larger."""
    ordered = sorted(value for value in values if isfinite(value))
    if not ordered:
        return [], []
    picked = sorted({round(step * (len(ordered) - 1) / (POINTS - 1)) for step in range(POINTS)})
    return [ordered[index] for index in picked], [(index + 1) / whole for index in picked]


def _line(name: str, x: list[float], y: list[float]) -> Trace:
    return {"name": name, "x": x, "y": y, "mode": "lines", "line": {"color": COLOURS.get(name)}}


def _plot(title: str, lines: list[Trace], across: str, up: str, axis: Trace) -> Trace:
    layout = {
        "title": {"text": title},
        "xaxis": {"title": {"text": across}} | axis,
        "yaxis": {"title": {"text": up}, "rangemode": "tozero"},
    }
    return {"data": lines, "layout": layout}
