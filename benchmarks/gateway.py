"""Measures what a gateway adds: the null worker asked directly, through Stretto's gateway, and through peers.

    python benchmarks/gateway.py [--rounds 3] [--json] [--peers nginx,envoy,litellm,vllm-router] [--path DIR]

All run in one go and take turns. TTFT added is the median time to the first token less that of the direct
way. With 32 clients a step takes 10 ms, because at 0 ms they would measure only their own closed loop. CPU is
the processor time of the proxy's processes, for each request and for each streamed token: it says what one
process can carry even when the machine is busy. A peer that is not installed is skipped; `--path` names a
folder to look for it before the usual ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from urllib.request import urlopen

import msgspec
import uvloop
from failover import free_port
from front import WORDS, Case, measure
from rich.table import Table
from serving import serving

from stretto import terminal
from stretto.bench.metrics import LoadReport

CASES = (
    Case("c=1", 1, 100, 8, 0, "<= 1 ms"),
    Case("c=32", 32, 128, 32, 10, "<= 5 ms"),
    Case("stream", 32, 32, 500, 0, ">= 20,000"),
)
READY_S = 90.0
TICKS = os.sysconf("SC_CLK_TCK")
NGINX = """worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log stderr error;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream worker {{ server {host}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://worker; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_set_header Host {host};
    }}
  }}
}}
"""
ENVOY = """static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": {manager}
          stat_prefix: front
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route: {{cluster: worker, host_rewrite_literal: "{host}", timeout: 0s}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: worker
    type: STATIC
    load_assignment:
      cluster_name: worker
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {worker_port}}}}}}}
"""
MANAGER = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
LITELLM = """model_list:
  - model_name: null
    litellm_params: {{model: openai/null, api_base: "{url}/v1", api_key: none}}
"""
Command = Callable[[str, str, int, Path], list[str]]  # program, URL of the worker, port, folder


def nginx(program: str, url: str, port: int, folder: Path) -> list[str]:
    """The command that starts nginx in front of the worker."""
    file = folder / f"nginx{port}.conf"
    file.write_text(NGINX.format(folder=folder, host=url.removeprefix("http://"), port=port))
    return [program, "-c", str(file), "-p", str(folder)]


def envoy(program: str, url: str, port: int, folder: Path) -> list[str]:
    """The command that starts Envoy with one worker thread."""
    file = folder / f"envoy{port}.yaml"
    host = url.removeprefix("http://")
    manager = f"{MANAGER}.HttpConnectionManager"
    worker_port = host.rpartition(":")[2]
    file.write_text(ENVOY.format(port=port, host=host, worker_port=worker_port, manager=manager))
    base = ["--concurrency", "1", "--log-level", "error", "--base-id", str(port)]
    return [program, "-c", str(file), *base]


def litellm(program: str, url: str, port: int, folder: Path) -> list[str]:
    """The command that starts LiteLLM's proxy with one worker process."""
    file = folder / f"litellm{port}.yaml"
    file.write_text(LITELLM.format(url=url))
    return [program, "--config", str(file), "--port", str(port), "--host", "127.0.0.1", "--num_workers", "1"]


def vllm_router(program: str, url: str, port: int, folder: Path) -> list[str]:
    """The command that starts vllm-router."""
    return [program, "--worker-urls", url, "--port", str(port), "--host", "127.0.0.1"]


def stretto(program: str, url: str, port: int, folder: Path) -> list[str]:
    """The command that starts Stretto's gateway."""
    return [sys.executable, "-m", "stretto", "gateway", "--port", str(port), "--worker", url]


PEERS: dict[str, Command] = {"nginx": nginx, "envoy": envoy, "litellm": litellm, "vllm-router": vllm_router}


class Front(msgspec.Struct):
    """A way to the worker: its URLs for quick and for slow steps, and its processes."""

    name: str
    urls: dict[int, str]
    processes: tuple[int, ...]


class FrontFigure(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the rounds. CPU in microseconds of the proxy; None for the direct way."""

    front: str
    case: str
    ttft_added_p50_ms: float
    ttft_p99_ms: float
    ttft_max_ms: float
    tokens_per_s: float
    cpu_request_us: float | None
    cpu_token_us: float | None
    failed: int


def cpu_s(processes: tuple[int, ...]) -> float:
    """Seconds of processor time of these processes and all their descendants."""
    parents: dict[int, tuple[int, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS
    wanted = set(processes)
    for _ in range(4):  # a proxy's tree is not deeper
        wanted |= {pid for pid, (parent, _) in parents.items() if parent in wanted}
    return sum(spent for pid, (_, spent) in parents.items() if pid in wanted)


@contextmanager
def proxied(name: str, command: Command, program: str, workers: dict[int, str]) -> Generator[Front | None]:
    """One proxy process for each worker. Yields None when one does not become ready."""
    with tempfile.TemporaryDirectory() as folder:
        ports = {step: free_port() for step in workers}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for step, url in workers.items():
                line = command(program, url, ports[step], Path(folder))
                quiet = subprocess.DEVNULL
                started.append(subprocess.Popen(line, stdout=quiet, stderr=quiet, cwd=folder))
            urls = {step: f"http://127.0.0.1:{port}" for step, port in ports.items()}
            well = all(ready(f"{url}/v1/models") for url in urls.values())
            yield Front(name, urls, tuple(each.pid for each in started)) if well else None
        finally:
            for each in started:
                each.terminate()
            for each in started:
                try:
                    each.wait(5)
                except subprocess.TimeoutExpired:
                    each.kill()


def ready(url: str) -> bool:
    """Whether the URL answers within READY_S seconds."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        try:
            with urlopen(url, timeout=2) as answer:
                if b'"null"' in answer.read():
                    return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def figure(
    front: Front, case: Case, direct: list[LoadReport], runs: list[tuple[LoadReport, float]]
) -> FrontFigure:
    """The medians of one front in one case."""
    spreads = [report.ttft_ms for report, _ in runs if report.ttft_ms is not None]
    base = [report.ttft_ms.p50 for report in direct if report.ttft_ms is not None]
    sent = case.requests + case.concurrency  # with those that warm up
    spent = median(seconds for _, seconds in runs) * 1e6
    own = bool(front.processes)
    return FrontFigure(
        front=front.name,
        case=case.name,
        ttft_added_p50_ms=median(spread.p50 for spread in spreads) - median(base)
        if spreads
        else float("nan"),
        ttft_p99_ms=median(spread.p99 for spread in spreads) if spreads else float("nan"),
        ttft_max_ms=median(spread.max for spread in spreads) if spreads else float("nan"),
        tokens_per_s=median(report.output_tokens_per_s for report, _ in runs),
        cpu_request_us=spent / sent if own else None,
        cpu_token_us=spent / (sent * case.output_tokens) if own else None,
        failed=sum(report.failed for report, _ in runs),
    )


def compare(fronts: list[Front], prompts: Path, rounds: int) -> list[FrontFigure]:
    """Load all fronts in turns."""
    runs: dict[tuple[str, str], list[tuple[LoadReport, float]]] = {}
    for _ in range(rounds):
        for case in CASES:
            for front in fronts:
                before = cpu_s(front.processes)
                report = uvloop.run(measure(front.urls[case.step_ms], prompts, case))
                runs.setdefault((case.name, front.name), []).append((report, cpu_s(front.processes) - before))
    return [
        figure(front, case, [report for report, _ in runs[case.name, "direct"]], runs[case.name, front.name])
        for case in CASES
        for front in fronts
    ]


def show(figures: list[FrontFigure]) -> None:
    """Print the table."""
    heads = ("added p50 ms", "p99", "max", "tok/s", "CPU us/req", "us/tok", "failed")
    table = Table("TTFT of", "front", *heads, box=None)
    for each in figures:
        cpu = [
            "" if value is None else f"{value:,.0f}" if value > 100 else f"{value:.1f}"
            for value in (each.cpu_request_us, each.cpu_token_us)
        ]
        times = (f"{value:.2f}" for value in (each.ttft_added_p50_ms, each.ttft_p99_ms, each.ttft_max_ms))
        table.add_row(each.case, each.front, *times, f"{each.tokens_per_s:,.0f}", *cpu, str(each.failed))
    terminal.out.print(table)


def main() -> None:
    """Start everything, run the cases and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--path", default="", help="a folder with the programs of peers")
    options = parser.parse_args()
    search = os.pathsep.join([options.path, os.environ.get("PATH", ""), "/usr/sbin"])
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(f"{number}. {WORDS * 6}" for number in range(64)))
        workers = {step: stack.enter_context(serving(f"null=null:{step}")) for step in (0, 10)}
        fronts = [Front("direct", workers, ())]
        wanted: dict[str, Command] = {"stretto": stretto}
        wanted |= {name: PEERS[name] for name in options.peers.split(",") if name}
        for name, command in wanted.items():
            program = sys.executable if name == "stretto" else shutil.which(name, path=search)
            if program is None:
                terminal.err.print(f"{name} is not installed: skipped")
                continue
            front = stack.enter_context(proxied(name, command, program, workers))
            if front is None:
                terminal.err.print(f"{name} did not become ready in {READY_S:g} s: skipped")
            else:
                fronts.append(front)
        figures = compare(fronts, prompts, options.rounds)
    if options.json:
        terminal.print_json(figures)
    else:
        show(figures)


if __name__ == "__main__":
    main()
