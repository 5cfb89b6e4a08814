"""Serves a model on this GPU with Stretto, and with vLLM if there is one, and sends both the same requests.

`python benchmarks/gpu_serve.py MODEL_DIR [--vllm PYTHON] [--steady 10] [--rates 8 16] [--json FILE]`

Each server runs alone. The first pass follows its start at once; the warm pass repeats it with other prompts.
`--steady` adds a pass with that many times as many requests as are sent at once, in which the burst at the
start and the last answers weigh less.
`--vllm` names a Python that has vLLM. `--rates` adds Poisson arrivals after the last pass. Goodput is at
`ttft:500,tpot:50`, and for the rates Stretto starts again with these limits as the objective of its tier.
The file is written after every load. With `--seconds-left`, a load that would not fit is skipped and named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

REQUESTS = {1: 16, 16: 128, 64: 256, 256: 768}  # by how many are sent at once
INPUT, OUTPUT = 512, 128
GOOD = "ttft:500,tpot:50"
GOOD_TIER = "[tiers.default]\nttft_ms = 500\nitl_ms = 50\n"
START_S, POLL_S = 300.0, 0.05
LOAD_S, REQUEST_S = 240, 1  # the most that a load may take, and what each request adds
RATE_S = 20  # of requests at each rate
PASSES, STEADY = ("first", "warm"), "steady"
START = "start"  # stands where a load has its title


class Server(NamedTuple):
    """A server to measure: how it is started, and where it says that it is ready."""

    name: str
    command: list[str]
    port: int
    health: str
    objective: tuple[str, ...] = ()  # further options for the loads of a rate


def servers(model: Path, vllm: str | None, extra: list[str], folder: Path) -> list[Server]:
    tiers = folder / "tiers.toml"
    tiers.write_text(GOOD_TIER)
    ours = [
        sys.executable,
        "-m",
        "stretto",
        "serve",
        f"m={model}",
        "--port",
        "8011",
        "--context",
        "8192",
        *extra,
    ]
    found = [Server("stretto", ours, 8011, "/ready", ("--config", str(tiers)))]
    if vllm is not None:
        theirs = f"{vllm} -m vllm.entrypoints.openai.api_server --served-model-name m --port 8012"
        options = "--max-model-len 8192 --gpu-memory-utilization 0.6 --no-enable-prefix-caching --model"
        found.append(Server("vllm", [*theirs.split(), *options.split(), str(model)], 8012, "/health"))
    return found


@contextmanager
def running(server: Server) -> Generator[float]:
    """Run a server. Yields the seconds from its start until it was ready."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(server.command, stdout=log, stderr=log)
        try:
            while not _answers(f"http://127.0.0.1:{server.port}{server.health}"):
                if process.poll() is not None or time.monotonic() > started + START_S:
                    log.seek(0)
                    sys.exit(f"{server.name} did not start:\n{log.read()[-3000:]}")
                time.sleep(POLL_S)
            yield time.monotonic() - started
        finally:
            process.terminate()
            process.wait()
            log.seek(0)
            if text := log.read()[-2000:].strip():
                print(f"{server.name}'s last lines:\n{text}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def load(server: Server, shape: list[str], requests: int, seed: int) -> dict[str, Any]:
    """The report of `stretto bench serve` on one load."""
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    command = [sys.executable, "-m", "stretto", "bench", "serve", url, *shape, "--requests", str(requests)]
    command += ["--random-input", str(INPUT), "--output-tokens", str(OUTPUT), "--seed", str(seed)]
    command += ["--goodput", GOOD, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LOAD_S + REQUEST_S * requests, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)["report"]


class Load(NamedTuple):
    """One load: its pass and title, how it is made, and how many requests it has."""

    run: str
    title: str
    shape: list[str]
    requests: int


def loads_of(
    passes: list[str], at_once: list[int], rates: list[float], steady: int = 0
) -> tuple[list[Load], list[Load]]:
    """The loads of so many requests at once, pass by pass, and those of a rate."""
    closed = [
        Load(
            run,
            f"{n} at once",
            ["--concurrency", str(n)],
            steady * n if run == STEADY else REQUESTS.get(n, 3 * n),
        )
        for run in (*passes, *([STEADY] if steady else []))
        for n in at_once
    ]
    arrivals = [Load(passes[-1], f"{rate:g}/s", ["--rate", str(rate)], int(rate * RATE_S)) for rate in rates]
    return closed, arrivals


class Budget:
    """The seconds that are left. A load is expected to need as many seconds a request as the slowest earlier
    one of its title. If there is none, it is expected to take as long as the slowest load or start so far."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._slowest, self._each = 0.0, dict[str, float]()

    def took(self, title: str, seconds: float, requests: int = 1) -> None:
        self._slowest = max(seconds, self._slowest)
        self._each[title] = max(seconds / requests, self._each.get(title, 0.0))

    def fits(self, title: str, requests: int = 1) -> bool:
        each = self._each.get(title)
        return time.monotonic() + (self._slowest if each is None else each * requests) < self._end


def measure(
    server: Server, closed: list[Load], arrivals: list[Load], budget: Budget
) -> Iterator[dict[str, Any]]:
    """A row of figures for each load, as soon as it is done."""
    if not server.objective or not closed or not arrivals:
        options = server.objective if arrivals else ()
        yield from _measure(server, options, closed + arrivals, 1, budget)
        return
    yield from _measure(server, (), closed, 1, budget)
    yield from _measure(server, server.objective, arrivals, 1 + len(closed), budget)


def _measure(
    server: Server, options: tuple[str, ...], loads: list[Load], seed: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    if not budget.fits(START):
        skip(server, loads)
        return
    with running(server._replace(command=[*server.command, *options])) as ready_s:
        budget.took(START, ready_s)
        print(f"\n{server.name}: ready after {ready_s:.1f} s", flush=True)
        for number, each in enumerate(loads, seed):
            if not budget.fits(each.title, each.requests):
                skip(server, [each])
                continue
            before = time.monotonic()
            report = load(server, each.shape, each.requests, number)
            budget.took(each.title, time.monotonic() - before, each.requests)
            told = {"server": server.name, "ready_s": ready_s, "pass": each.run, "load": each.title}
            show({**told, **report})
            yield {**told, **report}


def skip(server: Server, loads: list[Load]) -> None:
    for each in loads:
        print(f"{server.name:>8} {each.run:>6} {each.title:>12}: skipped, too little time left", flush=True)


def show(row: dict[str, Any]) -> None:
    spread: dict[str, dict[str, float]] = {name: row[f"{name}_ms"] or {} for name in ("ttft", "itl")}
    figures = [
        f"{name.upper()} " + " / ".join(f"{each.get(key, 0.0):.1f}" for key in ("p50", "p99", "max"))
        for name, each in spread.items()
    ]
    print(
        f"{row['server']:>8} {row['pass']:>6} {row['load']:>12}: {row['output_tokens_per_s']:8.0f} tokens/s,"
        f" {', '.join(figures)} ms (p50 / p99 / max), goodput {row['goodput'] or 0:.2f}/s,"
        f" failed {row['failed']}",
        flush=True,
    )


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows so that the file is whole at every moment."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(rows, indent=1))
    new.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="directory of a checkpoint")
    parser.add_argument("--vllm", help="a Python that has vLLM")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--steady", type=int, default=0, help="requests for each that is sent at once")
    parser.add_argument("--at-once", nargs="*", type=int, default=list(REQUESTS))
    parser.add_argument("--rates", nargs="*", type=float, default=[])
    parser.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="further options of stretto serve"
    )
    parser.add_argument("--json", type=Path, help="write the reports to this file, after every load")
    parser.add_argument("--seconds-left", type=float, default=inf, help="skip the loads that do not fit")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    budget = Budget(options.seconds_left)
    closed, arrivals = loads_of(options.passes, options.at_once, options.rates, options.steady)
    with tempfile.TemporaryDirectory() as folder:
        for server in servers(options.model, options.vllm, options.serve, Path(folder)):
            for row in measure(server, closed, arrivals, budget):
                rows.append(row)
                if options.json:
                    write(options.json, rows)


if __name__ == "__main__":
    main()
