"""Measures the engine alone, without a server: runs workloads in rounds and reports their medians.

The engine is a child process that exchanges lines of JSON (`stretto.profiler.protocol`). So its start is
measured too, and nothing here loads torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import TypeVar

import msgspec
from msgspec import Struct

from stretto.config import EngineConfig
from stretto.errors import StartError
from stretto.hardware import snapshot
from stretto.profiler.protocol import Measurement, ModelReady, StepProfile, Workload
from stretto.types import ModelInfo

T = TypeVar("T")
ROUNDS = 5
FIRST = Workload(prompt_tokens=16, output_tokens=1)


class Figure(Struct, frozen=True, kw_only=True):
    """Medians over `rounds` of a batch of `batch` sequences with prompts of `context` tokens.

    `ttft_ms`: until every sequence had its first token; `prefill_tokens_per_s` follows from it. With more
    than one sequence, both come from the first round only, because later rounds find the prompts in the
    prefix cache. `decode_tokens_per_s`: of the whole batch. `step_ms`: one decode step. `mbu`: model
    bandwidth utilisation, the bytes that such a step must read over the bytes that memory could deliver in
    its time; None if not measured.
    """

    batch: int
    context: int
    rounds: int
    ttft_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    step_ms: float
    mbu: float | None = None


class LayerShare(Struct, frozen=True, kw_only=True):
    """One kind of layer in a decode step of one sequence.

    `floor`: the time that its bytes need at the measured bandwidth, as a share of the time it took. None for
    a layer that reads hardly anything.
    """

    layer: str
    bytes: int
    ms: float
    floor: float | None


class EngineReport(Struct, frozen=True, kw_only=True):
    """The engine's figures. `start_s`: until the process was ready.

    `first_token_s`: until it had answered a prompt of 16 tokens. `load`: the machine's load average over the
    last minute. `parts`: the layers of a step; the part `between` is the time outside all kernels.
    """

    cpu: str
    load: float
    model: ModelInfo
    kernels: str
    threads: int
    start_s: float
    first_token_s: float
    peak_bytes: int
    bandwidth_gb_s: float | None
    figures: list[Figure]
    parts: list[LayerShare]


class EngineProcess:
    """An engine in a child process. Raises StartError with its last error line when it ends early."""

    def __init__(self, config: EngineConfig) -> None:
        on_cpu = ["--cpu"] if config.device == "cpu" else []
        command = [sys.executable, "-m", "stretto.engine", *on_cpu, "stretto.profiler.worker"]
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.ready = self._exchange(msgspec.json.encode(config), ModelReady)
        self.start_s = time.perf_counter() - self.started

    def run(self, workload: Workload) -> Measurement:
        """Run a workload."""
        return self._exchange(msgspec.json.encode(workload), Measurement)

    def profile_step(self) -> StepProfile:
        """Profile one decode step."""
        return self._exchange(b"", StepProfile)

    def _exchange(self, line: bytes, kind: type[T]) -> T:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # The process has ended. Its error output is read below.
        answer = self._process.stdout.readline()
        if not answer:
            assert self._process.stderr is not None
            lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            raise StartError(lines[-1] if lines else f"the engine ended (exit code {self._process.wait()})")
        return msgspec.json.decode(answer, type=kind)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def measure(
    config: EngineConfig, batches: Sequence[int], contexts: Sequence[int], output_tokens: int
) -> EngineReport:
    """Measure every batch with every context, `ROUNDS` times. Raises StartError when one does not fit."""
    with EngineProcess(config) as engine:
        engine.run(FIRST)
        first_token_s = time.perf_counter() - engine.started
        cases = [
            Workload(batch=batch, prompt_tokens=context, output_tokens=output_tokens)
            for context in contexts
            for batch in batches
        ]
        seen: dict[Workload, list[Measurement]] = {case: [] for case in cases}
        for number in range(ROUNDS):
            for case in cases:
                seed = number + 1 if case.batch == 1 else 0
                seen[case].append(engine.run(msgspec.structs.replace(case, seed=seed)))
        parts = engine.profile_step() if engine.ready.model.device == "cpu" else None
        return EngineReport(
            cpu=snapshot().cpu,
            load=os.getloadavg()[0],
            model=engine.ready.model,
            kernels=engine.ready.kernels,
            threads=engine.ready.threads,
            start_s=engine.start_s,
            first_token_s=first_token_s,
            peak_bytes=max(took.peak_bytes for each in seen.values() for took in each),
            bandwidth_gb_s=None if parts is None else parts.bandwidth / 1e9,
            figures=[_figure(case, took, engine.ready.model, parts) for case, took in seen.items()],
            parts=[] if parts is None else _shares(parts),
        )


def _figure(
    case: Workload, seen: Sequence[Measurement], model: ModelInfo, parts: StepProfile | None
) -> Figure:
    ttft = median(took.ttft_ms for took in seen if not took.cached_tokens)
    rate = median(took.decode_tokens / took.decode_ms * 1e3 for took in seen)
    step_ms = case.batch / rate * 1e3
    return Figure(
        batch=case.batch,
        context=case.prompt_tokens,
        rounds=len(seen),
        ttft_ms=ttft,
        prefill_tokens_per_s=case.batch * case.prompt_tokens / ttft * 1e3,
        decode_tokens_per_s=rate,
        step_ms=step_ms,
        mbu=None if parts is None else _bytes_read(case, model, parts) / parts.bandwidth / step_ms * 1e3,
    )


def _bytes_read(case: Workload, model: ModelInfo, parts: StepProfile) -> float:
    """Bytes that a decode step of this case must read: all weights once, and all keys and values."""
    weights = sum(part.bytes for part in parts.parts if part.layer != "attention")
    keys = case.batch * (case.prompt_tokens + case.output_tokens / 2)
    return weights + keys * model.kv_bytes / (model.blocks * model.block_size)


def _shares(parts: StepProfile) -> list[LayerShare]:
    shares = [
        LayerShare(
            layer=part.layer,
            bytes=part.bytes,
            ms=part.ms,
            floor=part.bytes / parts.bandwidth / part.ms * 1e3 if part.bytes else None,
        )
        for part in sorted(parts.parts, key=lambda part: -part.ms)
    ]
    between = parts.step_ms - sum(part.ms for part in parts.parts)
    return [*shares, LayerShare(layer="between", bytes=0, ms=between, floor=None)]
