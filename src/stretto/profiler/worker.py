"""The engine alone, to be measured: the real loop and runner, and tasks in place of a server's requests.

Started with an `EngineConfig` (JSON) on the first line of standard input; each further line is a
`stretto.profiler.protocol.Task`, or empty to have a step taken apart. Each is answered with one line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

import msgspec

from stretto.config import EngineConfig, tiers_of
from stretto.engine.core import EngineCore, LoadedModel, Runner
from stretto.engine.runners.factory import ModelLoader
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler.deadline import SCHEDULES
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence
from stretto.engine.worker import end_with_parent
from stretto.errors import StartError, StrettoError
from stretto.hardware import choose_threads, snapshot
from stretto.profiler.layers import Apart, bandwidth
from stretto.profiler.protocol import Parts, Ready, Task, Took
from stretto.types import Request, Sampling, StepStats, TokenEvent

APART_PROMPT, APART_STEPS = 512, 24


@dataclass
class EngineBench:
    """One runner behind an engine's loop. `first` is when each prompt of the task had its first token, `over`
    whether an answer has ended."""

    runner: Runner
    config: EngineConfig
    idents: count[int] = field(default_factory=lambda: count(1))
    first: dict[int, float] = field(default_factory=dict)
    cached: int = 0
    tokens: int = 0
    over: bool = False

    def __post_init__(self) -> None:
        config = self.config
        self.engine = EngineCore(
            [LoadedModel(self.runner)],
            limits=Limits(config.max_running, config.max_step_tokens, tiers_of(config.tiers)),
            schedule=SCHEDULES[config.schedule],
            clock=time.monotonic,
            emit=self._heard,
            share=config.prefix_cache,
        )

    def run(self, task: Task, on_decode: Callable[[], object] = lambda: None) -> Took:
        """Carry out a task; `on_decode` is called when all its prompts are read. Raises StartError when the
        model's context or its KV memory is too small for it."""
        self._check(task)
        self.first, self.cached, self.over = {}, 0, False
        started = time.monotonic()
        for request in self._requests(task, started):
            self.engine.submit(Sequence.of(request, self.runner.info.context))
        while len(self.first) < task.batch and self.engine.step():
            pass
        on_decode()
        together, self.tokens = time.monotonic(), 0
        while not self.over and self.engine.step():
            pass
        tokens, decoded = self.tokens, time.monotonic()
        while self.engine.step():
            pass
        return Took(
            ttft_ms=(max(self.first.values()) - started) * 1e3,
            cached_tokens=self.cached,
            decode_tokens=tokens,
            decode_ms=(decoded - together) * 1e3,
            peak_bytes=_peak_bytes(),
        )

    def _check(self, task: Task) -> None:
        info, length = self.runner.info, task.prompt_tokens + task.output_tokens
        if length > info.context:
            raise StartError(
                f"{length} tokens do not fit the context of {info.context}: ask for a shorter one"
            )
        needed = task.batch * -(-length // info.block_size)
        if needed > info.blocks or task.batch > self.config.max_running:
            raise StartError(
                f"{task.batch} sequences of {length} tokens need {needed} KV blocks and places, and there are"
                f" {info.blocks} and {self.config.max_running}: raise kv_memory or max_running"
            )

    def _requests(self, task: Task, arrival: float) -> list[Request]:
        vocab = self.runner.info.vocab
        random = Random(f"{task.seed} {task.prompt_tokens}")
        sampling = Sampling(max_tokens=task.output_tokens, temperature=0.0, ignore_eos=True)
        return [
            Request(
                id=next(self.idents),
                model=self.runner.info.name,
                prompt=tuple(random.choices(range(vocab // 4, vocab * 3 // 4), k=task.prompt_tokens)),
                arrival=arrival,
                sampling=sampling,
                tier="flex",
            )
            for _ in range(task.batch)
        ]

    def _heard(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        now = time.monotonic()
        for event in events:
            if event.token is not None:
                self.first.setdefault(event.id, now)
                self.tokens += 1
            if event.finish is not None:
                self.over = True
                self.cached += event.finish.cached_tokens
                if event.finish.error is not None:
                    raise StartError(f"the model cannot be measured: {event.finish.error}")


def apart(runner: Runner, config: EngineConfig) -> Parts:
    """Raises StartError for a runner that is not the plain one on a CPU."""
    if not isinstance(runner, TorchRunner) or runner.info.device != "cpu":
        raise StartError(f"a step can be taken apart on the CPU alone, not on {runner.info.device}")
    watched = Apart(runner.decoder)
    plain = TorchRunner(watched.decoder, runner.info, eos=runner.eos, max_running=config.max_running)
    alone = EngineBench(plain, config)
    prompt = min(APART_PROMPT, runner.info.context // 2)
    took = alone.run(Task(prompt_tokens=prompt, output_tokens=APART_STEPS), watched.seconds.clear)
    context = prompt + APART_STEPS // 2
    read = bandwidth()
    return Parts(
        bandwidth=read,
        step_ms=took.decode_ms / took.decode_tokens,
        parts=watched.parts(took.decode_tokens, context),
    )


def _peak_bytes() -> int:
    """The most memory that this process has had at once."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def say(value: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Serve tasks until the input ends. Exit code 1: it could not, and said why on standard error."""
    end_with_parent()
    lines = sys.stdin.buffer
    asked = msgspec.json.decode(lines.readline(), type=EngineConfig)
    # Nothing here has a due, and guesses at random text would measure how a random model repeats itself.
    config = msgspec.structs.replace(asked, schedule="fcfs", speculate="off")
    try:
        (runner,) = ModelLoader(config).runners
        kernels = runner.decoder.kernels.name if isinstance(runner, TorchRunner) else runner.info.device
        threads = choose_threads(snapshot(), config.threads).value
        say(Ready(model=runner.info, kernels=kernels, threads=threads))
        alone = EngineBench(runner, config)
        for line in lines:
            say(alone.run(msgspec.json.decode(line, type=Task)) if line.strip() else apart(runner, config))
    except StrettoError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
