"""Grafana's dashboard, Prometheus' rules and the reference of all metrics, made from the catalogue.

`python -m stretto.telemetry.dashboard grafana|rules|reference`; docs/ holds what it prints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

from stretto.telemetry.catalogue import METRICS, SELF, Metric, Panel

WIDTH, HEIGHT, ACROSS = 24, 8, 3
SOURCE = {"type": "prometheus", "uid": "${source}"}


def grafana() -> str:
    """The dashboard, to be imported into Grafana 10 or newer."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, titles in _rows().items():
        panels.append(_row(row, top, len(panels) + 1))
        top += 1
        for at, parts in enumerate(titles.values()):
            place = {
                "x": at % ACROSS * (WIDTH // ACROSS),
                "y": top + at // ACROSS * HEIGHT,
                "w": WIDTH // ACROSS,
                "h": HEIGHT,
            }
            panels.append(_graph(parts, place, len(panels) + 1))
        top += -(-len(titles) // ACROSS) * HEIGHT
    board = {
        "title": "Stretto",
        "uid": "stretto",
        "tags": ["stretto", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": panels,
    }
    return json.dumps(board, indent=2) + "\n"


def rules() -> str:
    """Recording and alerting rules, as Prometheus' `rule_files` reads them."""
    lines = ["groups:", "  - name: stretto.records", "    rules:"]
    for metric in METRICS:
        for record in metric.records:
            labels = {} if record.tier is None else {"labels": {"tier": record.tier}}
            lines += _item({"record": record.name, "expr": _of(metric, record.value), **labels})
    lines += ["  - name: stretto.alerts", "    rules:"]
    for metric in METRICS:
        for alert in metric.alerts:
            lines += _item(
                {
                    "alert": alert.name,
                    "expr": _of(metric, alert.when),
                    "for": f"{alert.minutes}m",
                    "labels": {"severity": alert.severity},
                    "annotations": {"summary": alert.summary, "description": alert.do},
                }
            )
    return "\n".join(lines) + "\n"


def reference() -> str:
    """All metrics as a Markdown table."""
    rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.shown}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows) + "\n"


def _rows() -> dict[str, dict[str, list[tuple[Metric, Panel]]]]:
    """Row -> title -> the metrics that share this graph, in the catalogue's order."""
    rows: dict[str, dict[str, list[tuple[Metric, Panel]]]] = {}
    for metric in METRICS:
        for panel in metric.panels:
            rows.setdefault(panel.row, {}).setdefault(panel.title, []).append((metric, panel))
    return rows


def _row(title: str, top: int, ident: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
    return {"type": "row", "id": ident, "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _graph(parts: list[tuple[Metric, Panel]], place: dict[str, int], ident: int) -> dict[str, Any]:
    first = parts[0][1]
    queries = [
        (legend, _of(metric, query)) for metric, panel in parts for legend, query in panel.queries.items()
    ]
    custom: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 30 if first.stacked else 0}
    if first.stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    limits = {"min": 0, "max": 1} if first.title == "Attainment" else {"min": 0}
    return {
        "type": "timeseries",
        "id": ident,
        "title": first.title,
        "description": "\n".join(dict.fromkeys(metric.help for metric, _ in parts)),
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": first.unit, "custom": custom, **limits}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for at, (legend, query) in enumerate(queries)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    models = "label_values(stretto_kv_blocks, model)"
    return [
        {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"},
        {
            "name": "model",
            "label": "Model",
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": models, "refId": "models"},
            "definition": models,
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _of(metric: Metric, query: str) -> str:
    return query.replace(SELF, metric.shown)


def _item(fields: dict[str, Any]) -> Iterable[str]:
    """One item of a YAML list. Scalars are quoted as JSON is, which YAML reads."""
    mark = "      - "
    for name, value in fields.items():
        if isinstance(value, dict):
            yield f"{mark}{name}:"
            yield from (f"          {inner}: {json.dumps(text)}" for inner, text in value.items())
        else:
            yield f"{mark}{name}: {json.dumps(value)}"
        mark = "        "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    made = {"grafana": grafana, "rules": rules, "reference": reference}
    parser.add_argument("what", choices=made)
    sys.stdout.write(made[parser.parse_args().what]())


if __name__ == "__main__":
    main()
