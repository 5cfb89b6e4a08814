"""The process that measures an engine without a server: the real loop and runner, run by workloads.

The first line of standard input is an `EngineConfig` (JSON). Each further line is a
`stretto.profiler.protocol.Workload`, or empty for a profile of one step. Each gets one line as its answer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random

import msgspec

from stretto.config import EngineConfig, tiers_of
from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.factory import ModelLoader
from stretto.engine.runners.interface import Runner
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence
from stretto.engine.worker import end_with_parent
from stretto.errors import StartError, StrettoError
from stretto.hardware import FEWEST_STEP_TOKENS, choose_threads, snapshot
from stretto.profiler.layers import LayerTimer, bandwidth
from stretto.profiler.protocol import Measurement, ModelReady, StepProfile, Workload
from stretto.types import Request, Sampling, StepStats, TokenEvent

PROFILE_PROMPT, PROFILE_STEPS = 512, 24


class EngineProfiler:
    """Measures one runner behind an engine's loop.

    Speculative decoding is off, because its gain on random text says nothing about real text.
    """

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self.runner = runner
        self.config = config
        self._ids = count(1)
        self._first: dict[int, float] = {}  # when each request had its first token
        self._cached = self._tokens = 0
        self._ended = False  # whether an answer has ended
        self.engine = EngineCore(
            [LoadedModel(self.runner)],
            limits=Limits(
                config.max_running, config.max_step_tokens or FEWEST_STEP_TOKENS, tiers_of(config.tiers)
            ),
            schedule=SCHEDULES[config.schedule],
            clock=time.monotonic,
            emit=self._on_step,
            share=config.prefix_cache,
        )

    def run(self, workload: Workload, on_decode: Callable[[], object] = lambda: None) -> Measurement:
        """Run a workload. `on_decode` is called when all its prompts have been read.

        Raises StartError when the model's context or its KV memory is too small.
        """
        self._check(workload)
        self._first, self._cached, self._ended = {}, 0, False
        started = time.monotonic()
        for request in self._requests(workload, started):
            self.engine.submit(Sequence.of(request, self.runner.info.context))
        while len(self._first) < workload.batch and self.engine.step():
            pass
        on_decode()
        decoding, self._tokens = time.monotonic(), 0
        while not self._ended and self.engine.step():
            pass
        tokens, ended = self._tokens, time.monotonic()
        while self.engine.step():
            pass
        return Measurement(
            ttft_ms=(max(self._first.values()) - started) * 1e3,
            cached_tokens=self._cached,
            decode_tokens=tokens,
            decode_ms=(ended - decoding) * 1e3,
            peak_bytes=_peak_bytes(),
        )

    def _check(self, workload: Workload) -> None:
        info, length = self.runner.info, workload.prompt_tokens + workload.output_tokens
        if length > info.context:
            raise StartError(
                f"{length} tokens do not fit the context of {info.context}: use shorter prompts or answers"
            )
        needed = workload.batch * -(-length // info.block_size)
        if needed > info.blocks or workload.batch > self.config.max_running:
            raise StartError(
                f"{workload.batch} sequences of {length} tokens need {needed} KV blocks, and there are"
                f" {info.blocks} and {self.config.max_running}: raise kv_memory or max_running"
            )

    def _requests(self, workload: Workload, arrival: float) -> list[Request]:
        vocab = self.runner.info.vocab
        random = Random(f"{workload.seed} {workload.prompt_tokens}")
        sampling = Sampling(max_tokens=workload.output_tokens, temperature=0.0, ignore_eos=True)
        return [
            Request(
                id=next(self._ids),
                model=self.runner.info.name,
                prompt=tuple(random.choices(range(vocab // 4, vocab * 3 // 4), k=workload.prompt_tokens)),
                arrival=arrival,
                sampling=sampling,
                tier="flex",
            )
            for _ in range(workload.batch)
        ]

    def _on_step(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        now = time.monotonic()
        for event in events:
            if event.token is not None:
                self._first.setdefault(event.id, now)
                self._tokens += 1
            if event.finish is not None:
                self._ended = True
                self._cached += event.finish.cached_tokens
                if event.finish.error is not None:
                    raise StartError(f"the model cannot be measured: {event.finish.error}")


def profile_step(runner: Runner, config: EngineConfig) -> StepProfile:
    """Profile decode steps of one sequence. Raises StartError for a runner that is not on the CPU."""
    if not isinstance(runner, TorchRunner) or runner.info.device != "cpu":
        raise StartError(
            f"a step can only be profiled on the CPU, and this model runs on {runner.info.device}"
        )
    watched = LayerTimer(runner.decoder)
    plain = TorchRunner(watched.decoder, runner.info, eos=runner.eos, max_running=config.max_running)
    alone = EngineProfiler(plain, config)
    prompt = min(PROFILE_PROMPT, runner.info.context // 2)
    took = alone.run(Workload(prompt_tokens=prompt, output_tokens=PROFILE_STEPS), watched.seconds.clear)
    context = prompt + PROFILE_STEPS // 2
    read = bandwidth()
    return StepProfile(
        bandwidth=read,
        step_ms=took.decode_ms / took.decode_tokens,
        parts=watched.parts(took.decode_tokens, context),
    )


def _peak_bytes() -> int:
    """The peak memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reply(value: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Answer lines until the input ends. Exit code 1: it could not start; standard error has the reason."""
    end_with_parent()
    lines = sys.stdin.buffer
    given = msgspec.json.decode(lines.readline(), type=EngineConfig)
    # No request here has an objective.
    config = msgspec.structs.replace(given, schedule="fcfs", speculate="off")
    try:
        loader = ModelLoader(config)
        (runner,), config = loader.runners, loader.config
        kernels = runner.decoder.kernels.name if isinstance(runner, TorchRunner) else runner.info.device
        threads = choose_threads(snapshot(), config.threads).value
        reply(ModelReady(model=runner.info, kernels=kernels, threads=threads))
        profiler = EngineProfiler(runner, config)
        for line in lines:
            reply(
                profiler.run(msgspec.json.decode(line, type=Workload))
                if line.strip()
                else profile_step(runner, config)
            )
    except StrettoError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
