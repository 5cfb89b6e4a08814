"""An engine over the CUDA runner, for tests: on a GPU, or without one in Triton's interpreter.

In the interpreter the runner executes each step instead of replaying a graph.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportArgumentType=false
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.scheduler.fcfs import fcfs
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence
from stretto.engine.speculative.policy import Speculation
from stretto.engine.step_time import StepTime
from stretto.kernels import Batch
from stretto.models.decoder import Decoder
from stretto.models.load import load
from stretto.types import ModelInfo, Request, Sampling, StepStats, TokenEvent
from tests.kernels.cuda import DEVICE, GPU
from tests.models.checkpoints import VOCAB, make
from tests.models.stepping import Driver, Text

from stretto.engine.runners import cuda  # isort: skip
from stretto.kernels.cuda.table import table  # isort: skip

BLOCK, OUTPUT = 4, 8 if GPU else 3
PROMPTS = [
    [3 + (7 * i * k + k) % (VOCAB - 3) for i in range(length)]
    for k, length in enumerate((5, 23, 1, 40, 12) if GPU else (5, 9, 1), 1)
]
# The interpreter is slow, so it runs one layer.
LAYERS = {} if GPU else {"num_hidden_layers": 1}


class CompletedEvent:
    """A CUDA event that has always completed."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Counting(cuda.CudaRunner):
    """A CUDA runner that counts its graphs. Without a GPU it runs every step and captures none."""

    captures = 0

    def _capture(self, memory: cuda.StepMemory) -> None:
        self.captures += 1
        if GPU:
            super()._capture(memory)


class DeviceDriver(Driver):
    """A driver that copies its batches to the device."""

    def batch(self, work: list[tuple[Text, int]], outputs: list[int] | None = None) -> Batch:
        made = super().batch(work, outputs)
        values = {field.name: getattr(made, field.name) for field in fields(made)}
        return Batch(**{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in values.items()})


class Bench:
    """One decoder, and a new engine for each run."""

    def __init__(self, path: Path) -> None:
        self.decoder: Decoder = load(path, dtype=torch.float32, device=DEVICE, kernels=table(DEVICE))
        self.events: list[TokenEvent] = []
        self.steps: list[StepStats] = []

    def runner(self, blocks: int = 256, step_tokens: int = 512, eos: int = -1) -> Counting:
        info = ModelInfo(
            name="m", path="", family="", dtype="", device=str(DEVICE), context=blocks * BLOCK,
            vocab=VOCAB, parameters=0, weight_bytes=0, kv_bytes=0, load_s=0, block_size=BLOCK, blocks=blocks,
        )  # fmt: skip
        return Counting(self.decoder, info, eos=frozenset({eos}), max_running=6, most_tokens=step_tokens)

    def engine(
        self,
        *,
        blocks: int = 256,
        step_tokens: int = 512,
        eos: int = -1,
        speculation: Speculation | None = None,
        times: StepTime | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> EngineCore:
        runner = self.runner(blocks, step_tokens, eos)
        self.events, self.steps = [], []
        return EngineCore(
            [LoadedModel(runner, times or StepTime(), speculation)],
            limits=Limits(6, step_tokens),
            schedule=fcfs,
            clock=clock,
            emit=self.on_events,
        )

    def on_events(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        self.events += events
        self.steps += [] if stats is None else [stats]

    def run(
        self, engine: EngineCore, prompts: list[list[int]], *samplings: dict[str, object]
    ) -> list[list[int]]:
        """Send all prompts at once and return the output tokens of each."""
        self.events.clear()
        for ident, prompt in enumerate(prompts):
            chosen = samplings[ident % len(samplings)] if samplings else {}
            sampling = Sampling(**{"max_tokens": OUTPUT, "temperature": 0.0, **chosen})  # type: ignore[arg-type]
            request = Request(id=ident, model="m", prompt=tuple(prompt), arrival=0.0, sampling=sampling)
            engine.submit(Sequence.of(request, engine.models["m"].runner.info.context))
        while engine.step() or not engine.idle:
            engine.check()
        tokens: list[list[int]] = [[] for _ in prompts]
        for event in self.events:
            if event.token is not None:
                tokens[event.id].append(event.token)
        return tokens


@pytest.fixture(autouse=True)
def events(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(torch.cuda, "Event", CompletedEvent)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("llama")
    make("llama", path, **LAYERS)
    return Bench(path)
