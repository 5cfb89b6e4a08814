"""A model of a known shape with random weights on this GPU, and an engine that runs workloads on it.

What the benchmarks of a GPU share. Without a GPU the device is the CPU, for the tests.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.cuda import CudaRunner
from stretto.engine.scheduler.fcfs import fcfs
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Sequence
from stretto.engine.speculative.policy import Speculation
from stretto.engine.step_time import StepTime
from stretto.kernels import AnyKernels, MixtureOfExperts
from stretto.kernels.cuda.table import CudaQuantise
from stretto.models import families
from stretto.models.decoder import Decoder
from stretto.models.load import WeightReader, read_weights
from stretto.types import ModelInfo, Request, Sampling, StepStats, TokenEvent

LLAMA3 = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
LLAMA_8B = {**LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_1B = {
    **LLAMA3,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN_8B = {
    **LLAMA_8B,
    "model_type": "qwen3",
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}
QWEN_30B: dict[str, Any] = {
    **QWEN_8B,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
MODELS: dict[str, tuple[dict[str, Any], CudaQuantise | None]] = {
    "llama-3.2-1b": (LLAMA_1B, None),
    "llama-3.1-8b": (LLAMA_8B, None),
    "llama-3.1-8b-fp8": (LLAMA_8B, "fp8"),
    "qwen3-8b": (QWEN_8B, None),
    "llama-3.1-8b-int4": (LLAMA_8B, "int4"),
    "qwen3-30b-a3b": (QWEN_30B, None),
    "qwen3-30b-a3b-fp8": (QWEN_30B, "fp8"),
    "qwen3-30b-a3b-int4": (QWEN_30B, "int4"),
}
BLOCK, PROMPT = 16, 512
REPLAYS = 8  # of a graph that is timed; the first is not counted
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Made:
    """A fake checkpoint that has every tensor, with random values.

    Matrices keep the scale of their inputs. The values of vectors are near 1.
    """

    path = Path("random")
    nbytes = 0
    dtype = "BF16"
    entries = ("model.embed_tokens.weight",)

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.shape = shape

    def find(self, name: str, shape: tuple[int, ...]) -> Made:
        return Made(shape)

    def read(self, entry: Made, into: Tensor) -> None:
        if into.dim() > 1:
            into.normal_(0.0, into.shape[-1] ** -0.5)
        else:
            into.normal_(1.0, 0.1)


def build(config: dict[str, Any], kernels: AnyKernels, made: Made | None = None) -> Decoder:
    """A decoder of this shape, with the weights of `made`. They are the same in each call."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        spec = families.read(Path(folder))
    torch.manual_seed(0)
    checkpoint: Any = made or Made()
    reader = WeightReader(checkpoint, kernels, DTYPE, DEVICE)
    return Decoder(spec, kernels, read_weights(reader, spec))


def new_runner(decoder: Decoder, limits: Limits, blocks: int, context: int) -> CudaRunner:
    """A runner that has not started."""
    spec = decoder.spec
    info = ModelInfo(
        name="m", path="", family=spec.family, dtype=str(DTYPE), device=DEVICE.type, context=context,
        vocab=spec.vocab, parameters=decoder.parameters, weight_bytes=decoder.weight_bytes, kv_bytes=0,
        block_size=BLOCK, blocks=blocks, load_s=0.0,
    )  # fmt: skip
    return CudaRunner(
        decoder, info, eos=frozenset(), max_running=limits.max_running, most_tokens=limits.max_step_tokens
    )


def random_prompt(vocab: int, length: int, seed: int) -> list[int]:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Driver:
    """An engine over a runner that has started, with methods that run a workload and time it.

    It keeps the tokens of each request, and what each step reported."""

    def __init__(
        self,
        runner: CudaRunner,
        limits: Limits,
        times: StepTime | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.steps: list[StepStats] = []
        self.runner = runner
        self.limits = limits
        self.engine = EngineCore(
            [LoadedModel(runner, times or StepTime(), speculation)],
            limits=limits,
            schedule=fcfs,
            clock=time.monotonic,
            emit=self._emit,
            share=False,
        )
        self._next = 0

    def _emit(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        self.steps += [] if stats is None else [stats]
        for event in events:
            if event.finish is not None and event.finish.error:
                raise RuntimeError(event.finish.error)
            if event.token is not None:
                self.tokens.setdefault(event.id, []).append(event.token)

    def submit(self, prompt: Iterable[int], count: int) -> int:
        """A greedy request for `count` tokens -> its id."""
        self._next += 1
        request = Request(
            id=self._next,
            model="m",
            prompt=tuple(prompt),
            arrival=time.monotonic(),
            sampling=Sampling(max_tokens=count, temperature=0.0, ignore_eos=True),
        )
        self.engine.submit(Sequence.of(request, self.runner.info.context))
        return self._next

    def submit_random(self, length: int, count: int) -> int:
        """As `submit`, with the `random_prompt` whose seed is the id."""
        return self.submit(random_prompt(self.runner.info.vocab, length, self._next + 1), count)

    def step_until(self, idents: list[int], count: int) -> None:
        """Run steps until each of these has `count` tokens."""
        while any(len(self.tokens.get(ident, [])) < count for ident in idents):
            self.engine.step()

    def finish(self, *cancelled: int) -> None:
        """Cancel these, and run steps until nothing is left."""
        for ident in cancelled:
            self.engine.cancel(ident)
        while not self.engine.idle:
            self.engine.step()

    def answer(self, length: int, count: int) -> tuple[int, float]:
        """Run one request alone. Returns its id and the seconds to its first token."""
        started = time.perf_counter()
        ident, first = self.submit_random(length, count), inf
        while not self.engine.idle:
            self.engine.step()
            if first == inf and ident in self.tokens:
                first = time.perf_counter() - started
        return ident, first

    def ttft_ms(self, length: int, times: int = 7, pause_s: float = 0.0) -> float:
        """Median milliseconds to the first token of a prompt of `length` alone, each after a pause. The first
        one is not counted."""
        took: list[float] = []
        for _ in range(times + 1):
            time.sleep(pause_s)
            took.append(self.answer(length, 1)[1])
        return statistics.median(took[1:]) * 1e3

    def decode(self, batch: int, length: int, steps: int) -> list[float]:
        """Seconds of each step of `batch` sequences that decode together after prompts of `length`."""
        # All sequences must still decode `steps` steps after the last one has read its prompt.
        reading = -(-batch * length // (self.limits.max_step_tokens - batch)) + 8
        idents = [self.submit_random(length, reading + steps) for _ in range(batch)]
        self.step_until(idents, 4)
        took: list[float] = []
        for _ in range(steps - 8):
            started = time.perf_counter()
            self.engine.step()
            took.append(time.perf_counter() - started)
        self.finish(*idents)
        return took


def bytes_read(decoder: Decoder, batch: int) -> float:
    """The bytes of weights that a step of `batch` tokens must read. Of a mixture, those of the experts that
    so many tokens choose if all choices are equally likely."""
    spec, total = decoder.spec, float(decoder.weight_bytes)
    if not spec.tied:
        total -= spec.vocab * spec.hidden * 2
    if spec.routing is not None:
        blocks = [layer.feed_forward for layer in decoder.weights.stack.layers]
        experts = sum(each.experts.nbytes for each in blocks if isinstance(each, MixtureOfExperts))
        total -= experts * (1 - spec.routing.top_k / spec.routing.count) ** batch
    return total


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(2**32, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    took: list[float] = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(took)


def timed(works: list[Callable[[], Any]], rounds: int = 4) -> float:
    """Microseconds of one of these, which run in turn in a CUDA graph."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for work in works:
                work()
    took: list[float] = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / (rounds * len(works)))
    return statistics.median(took[1:])
