"""Compares Stretto's engine with its peers on one machine, from one checkpoint and with two threads.

`python benchmarks/peers/run.py --home DIR [--shape qwen3-0.6b] [--rounds 5] [--only int8] [--docs docs]`
prints the median over the rounds of every figure and the ratio to the best peer, and writes them to `--docs`.
The first run installs the peers and exports the checkpoint for each (minutes). Every round measures each
engine once, while the others are stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import msgspec
from engines import FORMATS, THREADS, Format, Home
from page import Measured, Result, best_peer, ratio, write

from stretto.hardware import snapshot
from stretto.profiler.protocol import Measurement, Workload

FIRST = Workload(prompt_tokens=16, output_tokens=2)
TASKS = {
    "short": Workload(prompt_tokens=512, output_tokens=32),
    "eight": Workload(batch=8, prompt_tokens=128, output_tokens=16),
    "long": Workload(prompt_tokens=2048, output_tokens=2),
    "far": Workload(prompt_tokens=4000, output_tokens=16),
}
# A prompt that nobody has read in each round; the others' are read once, and then only spoken to.
FRESH = ("short", "long")


class Engine:
    """An engine's process. It is stopped while it has no task."""

    def __init__(self, home: Home, shape: str, format: Format) -> None:
        command, first = home.command(shape, format)
        self.format = format
        self._began = time.perf_counter()
        # These variables choose another CPU for OpenBLAS. A user's peer runs without them.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environ
        )
        ready = msgspec.json.decode(self._exchange(first), type=dict)
        self.ready_s = time.perf_counter() - self._began
        self.run(FIRST)
        self.first_token_s = time.perf_counter() - self._began
        self.version = ready.get("version", ready.get("kernels", ""))
        self.pause()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def run(self, task: Workload) -> Measurement:
        self._process.send_signal(signal.SIGCONT)
        took = msgspec.json.decode(self._exchange(msgspec.json.encode(task) + b"\n"), type=Measurement)
        self.pause()
        return took

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _exchange(self, line: bytes) -> bytes:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._said.seek(0)
            sys.exit(f"{self.format.name} ended: {self._said.read().decode(errors='replace')[-2000:]}")
        return answer


def measure(home: Home, shape: str, formats: Sequence[Format], rounds: int) -> Result:
    """Run all rounds and take the medians."""
    started = _starts(home, shape, formats, rounds)
    engines = [Engine(home, shape, format) for format in formats]
    say = _progress(rounds)
    tasks = {name: task for name, task in TASKS.items() if _length(task) <= home.context(shape)}
    seen: dict[tuple[str, str], list[Measurement]] = {}
    memory: dict[str, int] = {}
    try:
        for number in range(rounds):
            for name, task in tasks.items():
                asked = msgspec.structs.replace(task, seed=number + 1 if name in FRESH else 0)
                for engine in engines:
                    took = engine.run(asked)
                    memory.setdefault(engine.format.name, took.peak_bytes)
                    seen.setdefault((engine.format.name, name), []).append(took)
                    say(number, engine.format.name, name, took)
    finally:
        for engine in engines:
            engine.close()
    return Result(
        shape=shape,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        cpu=snapshot().cpu,
        isa=[name for name in snapshot().isa if name.startswith(("avx", "amx"))],
        threads=THREADS,
        rounds=rounds,
        load=os.getloadavg()[0],
        engines=[
            _measured(engine, started[engine.format.name], memory[engine.format.name], seen)
            for engine in engines
        ],
    )


def _length(task: Workload) -> int:
    return task.prompt_tokens + task.output_tokens


def _starts(
    home: Home, shape: str, formats: Sequence[Format], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Start and end each engine in rounds. Returns seconds to ready and to the first token, for each round.

    The first round fills the engines' caches on disk and does not count.
    """
    seen: dict[str, list[tuple[float, float]]] = {format.name: [] for format in formats}
    for _ in range(rounds + 1):
        for format in formats:
            engine = Engine(home, shape, format)
            seen[format.name].append((engine.ready_s, engine.first_token_s))
            engine.close()
    return {name: each[1:] for name, each in seen.items()}


def _measured(
    engine: Engine,
    started: list[tuple[float, float]],
    memory: int,
    seen: dict[tuple[str, str], list[Measurement]],
) -> Measured:
    took = {name: each for (owner, name), each in seen.items() if owner == engine.format.name}

    def speed(name: str) -> float | None:
        rates = [each.decode_tokens / each.decode_ms * 1e3 for each in took.get(name, [])]
        return median(rates) if rates else None

    def first(name: str) -> float | None:
        waits = [each.ttft_ms / 1e3 for each in took.get(name, [])]
        return median(waits) if waits else None

    return Measured(
        name=engine.format.name,
        bits=engine.format.bits,
        version=engine.version,
        ready_s=median(ready for ready, _ in started),
        first_token_s=median(first for _, first in started),
        ttft_512_s=first("short"),
        ttft_2048_s=first("long"),
        decode_1=speed("short"),
        decode_8=speed("eight"),
        decode_4000=speed("far"),
        memory_gib=memory / 2**30,
    )


def _progress(rounds: int):
    def say(number: int, engine: str, case: str, took: Measurement) -> None:
        rate = took.decode_tokens / took.decode_ms * 1e3
        print(
            f"round {number + 1}/{rounds} {case:5} {engine:15} TTFT {took.ttft_ms:7.0f} ms, {rate:6.1f} tok/s"
            f" load {os.getloadavg()[0]:.1f}",
            file=sys.stderr,
        )

    return say


def show(result: Result) -> None:
    for figure in Measured.__struct_fields__[3:]:
        print(f"\n{figure}")
        for each in result.engines:
            value = getattr(each, figure)
            print(f"  {each.name:15} {'-' if value is None else f'{value:.2f}':>8}")
        for ours in result.engines:
            peer = best_peer(ours, result.engines, figure)
            if peer is not None:
                times = ratio(ours, peer, figure)
                print(f"  {ours.name} against {peer.name}: {times:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True, help="keeps environments and exports")
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="formats whose name has this in it: int8, stretto|Q4, ...")
    parser.add_argument("--prepare", action="store_true", help="install and export, and measure nothing")
    parser.add_argument("--docs", type=Path, help="write the table and the plot here")
    asked = parser.parse_args()
    wanted = asked.only.split("|")
    formats = [format for format in FORMATS if any(part in format.name for part in wanted)]
    home = Home(asked.home)
    home.prepare(asked.shape, formats)
    if asked.prepare:
        return
    result = measure(home, asked.shape, formats, asked.rounds)
    show(result)
    if asked.docs:
        write(result, asked.docs)


if __name__ == "__main__":
    main()
