"""What is made from the catalogue: the files in docs/ are what it says now, and Prometheus reads them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stretto.telemetry.catalogue import METRICS
from stretto.telemetry.dashboard import grafana, reference, rules

DOCS = Path(__file__).parent.parent.parent / "docs"
promtool = shutil.which("promtool") or ""
needs_promtool = pytest.mark.skipif(not promtool, reason="promtool is not installed (package prometheus)")


@pytest.mark.parametrize(
    ("file", "make"), [("grafana.json", grafana), ("rules.yaml", rules), ("metrics.md", reference)]
)
def test_the_docs_are_up_to_date(file: str, make: Callable[[], str]) -> None:
    assert (DOCS / file).read_text().endswith(make()), f"see docs/metrics.md for how to make {file} again"


def test_every_metric_is_named_once_and_as_prometheus_names() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names) > 20
    for metric in METRICS:
        assert metric.name.startswith("stretto_") and not metric.name.endswith("_total")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads(grafana())
    graphs = [panel for panel in board["panels"] if panel["type"] == "timeseries"]
    asked = " ".join(target["expr"] for graph in graphs for target in graph["targets"])
    known = {metric.shown for metric in METRICS}
    found = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"stretto_\w+", asked)}
    assert found <= known
    assert {metric.shown for metric in METRICS if metric.panels} <= found
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken = [
        (graph["gridPos"]["x"] + x, graph["gridPos"]["y"] + y)
        for graph in graphs
        for x in range(graph["gridPos"]["w"])
        for y in range(graph["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken), "no graph lies over another"
    assert max(x for x, _ in taken) < 24


@needs_promtool
def test_promtool_reads_the_rules(tmp_path: Path) -> None:
    """Nine of ten priority requests on time for a while: attainment is recorded, by tier and in all, and the
    alert fires; a cancelled one counts nowhere."""
    (tmp_path / "rules.yaml").write_text(rules())
    series = 'stretto_judged_requests_total{tier="%s",model="m",verdict="%s"}'
    case = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": series % ("priority", "on_time"), "values": "0+54x30"},
                    {"series": series % ("priority", "late"), "values": "0+6x30"},
                    {"series": series % ("priority", "cancelled"), "values": "0+60x30"},
                    {"series": series % ("default", "on_time"), "values": "0+60x30"},
                ],
                "promql_expr_test": [
                    {
                        "expr": "stretto:attainment:ratio5m",
                        "eval_time": "20m",
                        "exp_samples": [
                            {"labels": f'stretto:attainment:ratio5m{{tier="{tier}"}}', "value": value}
                            for tier, value in (("all", 0.95), ("default", 1), ("priority", 0.9))
                        ],
                    },
                    {
                        "expr": 'stretto:goodput:rate5m{tier="all"}',
                        "eval_time": "20m",
                        "exp_samples": [{"labels": 'stretto:goodput:rate5m{tier="all"}', "value": 1.9}],
                    },
                    {
                        "expr": 'ALERTS{alertstate="firing"}',
                        "eval_time": "20m",
                        "exp_samples": [
                            {
                                "labels": 'ALERTS{alertname="StrettoPriorityLate",alertstate="firing",'
                                'severity="critical",tier="priority"}',
                                "value": 1,
                            }
                        ],
                    },
                ],
            }
        ],
    }
    (tmp_path / "case.yaml").write_text(json.dumps(case))
    checked = subprocess.run(
        [promtool, "test", "rules", "case.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
