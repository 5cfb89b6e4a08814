"""The ladder as one HTML page: the frontier, the table of tasks, the lineage. It needs no network.

It uses the page of the bench's reports, which includes the plotting library and follows the browser's theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import msgspec

from stretto.ladder.registry import Dropped, Ladder, QualityInterval, Variant

LadderPlot = dict[str, Any]
COLOUR = "#2f6fde"
SUMMARY = (
    "variant",
    "quality",
    "95 %",
    "ms per request",
    "ms per token",
    "MB",
    "KL",
    "same top-1",
    "J/token",
)


def page(ladder: Ladder, times: dict[str, float], reliability: bool = True) -> str:
    """The page. `times`: the milliseconds of a usual request, by variant."""
    plots = [frontier(ladder.variants, times)]
    if reliability and any(variant.estimate for variant in ladder.variants):
        plots.append(diagram(ladder.variants))
    parts = [
        f"<ul><li>{len(ladder.variants)} variants of {escape(ladder.model)}</li>"
        f"<li>the top variant is {escape(ladder.top)}</li>"
        "<li>quality is the share of right answers to the test prompts, or exp(-KL) for plain text</li></ul>",
        _table(SUMMARY, (summary(variant, times) for variant in ladder.variants)),
        _plot(0),
        "<h2>Tasks</h2>",
        tasks(ladder.variants),
        "<h2>Lineage</h2>",
        lineage(ladder.variants, ladder.dropped),
    ]
    if len(plots) > 1:
        parts += ["<h2>Reliability of the quality estimate</h2>", _plot(1)]
    return _filled(f"Ladder of {ladder.model}", "\n".join(parts), plots)


def summary(variant: Variant, times: dict[str, float]) -> list[str]:
    """The row of a variant in the columns of `SUMMARY`."""
    cost = next(iter(variant.times.values()))
    energy = variant.energy
    joules = "-" if energy is None else f"{energy.joules_per_token:.3g}{_mark(energy.source)}"
    return [
        variant.name,
        f"{variant.quality.mean:.1%}",
        f"{variant.quality.low:.1%} to {variant.quality.high:.1%}",
        f"{times[variant.name]:,.1f}",
        f"{cost.decodes(1, 256):.3f}",
        f"{variant.bytes / 1e6:,.2f}",
        f"{variant.kl:.4f}",
        f"{variant.same_top1:.1%}",
        joules,
    ]


def _mark(source: str) -> str:
    return " (estimate)" if source.startswith("estimate") else ""


def frontier(variants: Sequence[Variant], times: dict[str, float]) -> LadderPlot:
    """Quality against the time of a usual request, with 95 % intervals."""
    points = {
        "name": "variants",
        "x": [times[each.name] for each in variants],
        "y": [each.quality.mean for each in variants],
        "text": [each.name for each in variants],
        "mode": "markers+text",
        "textposition": "top center",
        "marker": {"color": COLOUR, "size": 9},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [each.quality.high - each.quality.mean for each in variants],
            "arrayminus": [each.quality.mean - each.quality.low for each in variants],
        },
    }
    return _figure("Frontier", [points], "milliseconds of a usual request", "quality")


def diagram(variants: Sequence[Variant]) -> LadderPlot:
    """Measured share of right answers against the estimated chance, in the bins of the calibration."""
    lines: list[LadderPlot] = [
        {
            "name": each.name,
            "x": [b.score for b in each.estimate.bins],
            "y": [b.mean for b in each.estimate.bins],
        }
        | {"mode": "lines+markers"}
        for each in variants
        if each.estimate is not None
    ]
    lines.append({"name": "perfect", "x": [0, 1], "y": [0, 1], "mode": "lines", "line": {"dash": "dot"}})
    return _figure("Reliability", lines, "estimated chance before calibration", "share of right answers")


def tasks(variants: Sequence[Variant]) -> str:
    """A row for each task and difficulty, a column for each variant."""
    rows: list[list[str]] = []
    for task, cells in variants[0].tasks.items():
        for level in cells:
            found = [variant.tasks.get(task, {}).get(level) for variant in variants]
            rows.append([f"{task}, {level}", *(_share(each) for each in found)])
    if not rows:
        return "<p>The data is plain text, which has no tasks.</p>"
    return _table(["task, difficulty", *(variant.name for variant in variants)], rows)


def _share(cell: QualityInterval | None) -> str:
    return "-" if cell is None else f"{cell.mean:.1%} ({cell.low:.0%} to {cell.high:.0%})"


def lineage(variants: Sequence[Variant], dropped: Sequence[Dropped]) -> str:
    """What each variant was made from, how, and at what cost; then what was dropped, and why."""
    columns = ("variant", "from", "step", "options", "seed", "seconds")
    rows = [
        [
            each.name,
            each.origin.parent or "-",
            each.origin.step,
            ", ".join(f"{name} {value}" for name, value in each.origin.options.items()) or "-",
            str(each.origin.seed),
            f"{each.origin.seconds:,.0f}",
        ]
        for each in variants
    ]
    table = _table(columns, rows)
    return (
        table
        if not dropped
        else table + "<p>Not kept</p>" + _table(("variant", "why"), ([d.name, d.why] for d in dropped))
    )


def _figure(title: str, lines: list[LadderPlot], x_title: str, y_title: str) -> LadderPlot:
    layout = {
        "title": {"text": title},
        "xaxis": {"title": {"text": x_title}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": y_title}},
    }
    return {"data": lines, "layout": layout}


def _plot(number: int) -> str:
    return f"<div class='plot' data-plot='{number}'></div>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _filled(title: str, body: str, plots: Sequence[LadderPlot]) -> str:
    library = files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    parts = {
        "title": escape(title),
        "body": body,
        "plots": msgspec.json.encode(plots).decode().replace("</", "<\\/"),
        "library": library.replace("</script", "<\\/script"),
    }
    text = files("stretto.bench").joinpath("report.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{{ {name} }}}}", part)
    return text
