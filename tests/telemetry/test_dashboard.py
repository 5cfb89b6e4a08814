"""The metric catalogue against the reference page, the Grafana dashboard and the Prometheus rules."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stretto.gateway.operations import catalogue as gateway
from stretto.telemetry.catalogue import METRICS, BulkHistogram
from stretto.telemetry.metrics import Gauges, Metrics

DOCS = Path(__file__).parent.parent.parent / "docs"
BOARD: dict[str, Any] = json.loads((DOCS / "grafana.json").read_text())
GRAPHS = [panel for panel in BOARD["panels"] if panel["type"] == "timeseries"]
RULES = [
    rule for group in yaml.safe_load((DOCS / "rules.yaml").read_text())["groups"] for rule in group["rules"]
]
KINDS = {
    metric.name: type(metric.create(metric.name, metric.help, registry=None)).__name__.lower()
    for metric in (*METRICS, *gateway.METRICS)
}
WITHOUT_GRAPH = {
    "stretto_draining",
    "stretto_build_info",
    "stretto_gateway_draining",
    "stretto_gateway_build_info",
}
promtool = shutil.which("promtool") or ""
needs_promtool = pytest.mark.skipif(not promtool, reason="promtool is not installed (package prometheus)")


def shown(name: str) -> str:
    """The name of a metric in a query."""
    return f"{name}_total" if KINDS[name] == "counter" else name


KNOWN = {shown(metric.name) for metric in METRICS}
OF_GATEWAYS = {shown(metric.name) for metric in gateway.METRICS}
ENGINE_PROCESS = re.compile(r"\bstretto_engine_process_\w+")  # from ProcessCollector, not in the catalogue


def named(query: str) -> set[str]:
    """The names of the metrics that a query reads."""
    names = re.findall(r"\bstretto_\w+", ENGINE_PROCESS.sub("", query))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def queries() -> str:
    return " ".join(target["expr"] for graph in GRAPHS for target in graph["targets"])


def test_metric_names_are_unique_and_follow_prometheus_rules() -> None:
    names = [metric.name for metric in (*METRICS, *gateway.METRICS)]
    assert len(set(names)) == len(names) > 20
    assert [name for name in names if not name.startswith("stretto_") or name.endswith("_total")] == []


def test_the_reference_page_equals_the_catalogue() -> None:
    rows = [
        f"| `{shown(metric.name)}` | {KINDS[metric.name].removeprefix('bulk')} | "
        f"{', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |"
        for metric in (*METRICS, *gateway.METRICS)
    ]
    lines = (DOCS / "metrics.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `")] == rows


def test_the_dashboard_queries_exactly_the_metrics_with_a_graph() -> None:
    assert named(queries()) == (KNOWN | OF_GATEWAYS) - WITHOUT_GRAPH


def test_the_dashboard_has_every_expected_graph() -> None:
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == ["On time", "Latency", "Load", "Steps", "Worker", "Gateway"]
    assert len(GRAPHS) == 46


def test_the_dashboard_queries_existing_metrics_of_both_processes() -> None:
    text = Metrics(lambda: Gauges(0, True, False, 0, engine_pid=os.getpid())).text().decode()
    read = {*re.findall(r"(?<!\w)process_\w+", queries()), *ENGINE_PROCESS.findall(queries())}
    assert len(read) == 6
    assert [name for name in read if f"\n{name} " not in text] == []


def test_dashboard_graphs_do_not_overlap() -> None:
    taken = [
        (graph["gridPos"]["x"] + x, graph["gridPos"]["y"] + y)
        for graph in GRAPHS
        for x in range(graph["gridPos"]["w"])
        for y in range(graph["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_rules_query_only_existing_metrics_and_records() -> None:
    records = {rule["record"] for rule in RULES if "record" in rule}
    read = {name for rule in RULES for name in re.findall(r"stretto:\w+:\w+", rule["expr"])}
    assert set().union(*(named(rule["expr"]) for rule in RULES)) <= KNOWN | OF_GATEWAYS
    assert read <= records == {"stretto:attainment:ratio5m", "stretto:goodput:rate5m"}


def test_every_alert_has_a_severity_and_instructions() -> None:
    alerts = {rule["alert"]: rule for rule in RULES if "alert" in rule}
    assert alerts.keys() == {
        "StrettoPriorityLate",
        "StrettoDefaultLate",
        "StrettoRefusing",
        "StrettoForecastOff",
        "StrettoBlocksShort",
        "StrettoDown",
        "StrettoEngineDown",
        "StrettoEngineRestarted",
        "StrettoGatewayWithoutWorkers",
        "StrettoGatewayWorkerLost",
        "StrettoGatewayBreakerOpen",
        "StrettoGatewayRedisGone",
        "StrettoGatewayFailing",
        "StrettoGatewayKeysStale",
        "StrettoGatewayForecastOff",
    }
    for alert in alerts.values():
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"].keys() == {"summary", "description"}


def test_a_bulk_histogram_equals_single_observations() -> None:
    values = [0.5, 1.0, 1.5, 2.0, 99.0]
    together = BulkHistogram("together", "h", registry=None, buckets=(1.0, 2.0))
    apart = BulkHistogram("together", "h", registry=None, buckets=(1.0, 2.0))
    together.observe_all(values)
    for value in values:
        apart.observe(value)
    (left,), (right,) = together.collect(), apart.collect()
    assert left.samples == right.samples
    assert [sample.value for sample in left.samples] == [2, 4, 5, 5, 104.0]


@needs_promtool
def test_rules_record_attainment_and_alert_on_late_priority_requests(tmp_path: Path) -> None:
    """Nine of ten priority requests are on time for a while. Cancelled requests do not count."""
    series = 'stretto_judged_requests_total{tier="%s",model="m",verdict="%s"}'
    case = {
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": series % ("priority", "on_time"), "values": "0+54x30"},
                    {"series": series % ("priority", "late"), "values": "0+6x30"},
                    {"series": series % ("priority", "cancelled"), "values": "0+60x30"},
                    {"series": series % ("default", "on_time"), "values": "0+60x30"},
                    {"series": 'up{job="stretto"}', "values": "1x30"},
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
    check_rules(tmp_path, case)


@needs_promtool
def test_an_alert_fires_for_a_worker_that_is_down_and_for_none_at_all(tmp_path: Path) -> None:
    """One worker of two stops answering after ten minutes. Later nothing is scraped any more."""

    def firing(minute: int, *labels: str) -> dict[str, Any]:
        name = 'ALERTS{alertname="StrettoDown",alertstate="firing",severity="critical"%s}'
        samples = [{"labels": name % each, "value": 1} for each in labels]
        query = 'ALERTS{alertstate="firing",alertname="StrettoDown"}'
        return {"expr": query, "eval_time": f"{minute}m", "exp_samples": samples}

    up = 'up{job="stretto",instance="%s:8000"}'
    tests = [
        {
            "interval": "1m",
            "input_series": [
                {"series": up % "a", "values": "1x30 _x60"},
                {"series": up % "b", "values": "1x10 0x20 _x60"},
            ],
            "promql_expr_test": [
                firing(9),
                firing(14, ',instance="b:8000",job="stretto"'),
                firing(60, ""),
            ],
        }
    ]
    check_rules(tmp_path, {"tests": tests})


@needs_promtool
def test_alerts_fire_for_a_gateway_without_workers_with_an_open_breaker_and_without_redis(
    tmp_path: Path,
) -> None:
    """All is well for ten minutes. Then one of two workers fails, then the other one, and Redis is gone."""
    of = '%s{instance="g:8080"%s}'
    workers = of % ("stretto_gateway_workers", ',site="",state="usable"')
    breaker = of % ("stretto_gateway_breaker", ',worker="w%d"')
    names = ("BreakerOpen", "RedisGone", "WithoutWorkers")

    def firing(minute: int, **labels: str) -> dict[str, Any]:
        name = 'ALERTS{alertname="StrettoGateway%s",alertstate="firing",instance="g:8080",%s}'
        samples = [{"labels": name % each, "value": 1} for each in labels.items()]
        kinds = "|".join(f"StrettoGateway{name}" for name in names)
        query = f'ALERTS{{alertstate="firing",alertname=~"{kinds}"}}'
        return {"expr": query, "eval_time": f"{minute}m", "exp_samples": samples}

    broken = {"BreakerOpen": 'severity="warning",worker="w1"'}
    tests = [
        {
            "interval": "1m",
            "input_series": [
                {"series": workers, "values": "2x10 1x10 0x20"},
                {"series": breaker % 1, "values": "0x10 2x30"},
                {"series": breaker % 2, "values": "0x10 1x30"},
                {"series": of % ("stretto_gateway_shared_gone", ""), "values": "0x20 1x20"},
            ],
            "promql_expr_test": [
                firing(9),
                firing(18, **broken),
                firing(30, **broken, RedisGone='severity="warning"', WithoutWorkers='severity="critical"'),
            ],
        }
    ]
    check_rules(tmp_path, {"tests": tests})


def check_rules(folder: Path, case: dict[str, Any]) -> None:
    """Run a unit test of the rules with promtool."""
    whole = {"rule_files": [str(DOCS / "rules.yaml")], "evaluation_interval": "1m"} | case
    (folder / "case.yaml").write_text(json.dumps(whole))
    command = [promtool, "test", "rules", "case.yaml"]
    checked = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
