"""Measures the CUDA runner on this GPU, with random weights.

`python benchmarks/gpu.py --json out.json`

It measures the copy bandwidth. For each model it compares logits and greedy tokens with plain torch, and
measures TTFT and ITL through the whole engine loop. It reports ITL as a share of the bandwidth floor: the
bytes of weights and keys that a step must read, over the copy bandwidth.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import replace
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
from stretto.kernels import Activation, AnyKernels, Batch, MixtureOfExperts
from stretto.kernels.cuda.table import CudaQuantise, table
from stretto.kernels.reference import REFERENCE, Dense, DenseExperts
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
}
BLOCK, BLOCKS, CONTEXT, RUNNING, STEP_TOKENS = 16, 11264, 9216, 256, 4096
PROMPT = 512
CASES = ((1, PROMPT), (8, PROMPT), (32, PROMPT), (1, 8192), (128, PROMPT), (256, PROMPT))
# A mixture of experts is compared over a few layers, because there is no room for the whole model twice.
CHECKED_LAYERS, CHECKED_TOKENS = 4, 96
DEVICE = torch.device("cuda")


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
    reader = WeightReader(checkpoint, kernels, torch.bfloat16, DEVICE)
    return Decoder(spec, kernels, read_weights(reader, spec))


def plain(quantise: CudaQuantise | None) -> AnyKernels:
    """The torch kernels, with weights rounded as the format rounds them."""
    held = table(DEVICE, quantise)

    def rounded(weight: Tensor, bias: Tensor | None) -> Dense:
        packed = held.pack(weight, None)
        return Dense(weight if isinstance(packed, Dense) else packed.widened(weight.dtype), bias)

    def rounded_experts(gate_up: Tensor, down: Tensor, activation: Activation) -> DenseExperts:
        packed = held.pack_experts(gate_up, down, activation)
        if isinstance(packed, DenseExperts):
            return packed
        first = packed.gate_up.float() * packed.gate_up_scales[..., None]
        second = packed.down.float() * packed.down_scales[..., None]
        return DenseExperts(first.to(gate_up.dtype), second.to(down.dtype), activation)

    return replace(REFERENCE, pack=rounded, pack_experts=rounded_experts)


class Driver:
    """An engine for one decoder, with methods that run a workload and time it."""

    def __init__(self, decoder: Decoder, runner: CudaRunner) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.runner = runner
        self.engine = EngineCore(
            [LoadedModel(runner)],
            limits=Limits(RUNNING, STEP_TOKENS),
            schedule=fcfs,
            clock=time.monotonic,
            emit=self._emit,
            share=False,
        )
        self._next = 0

    def _emit(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        for event in events:
            if event.finish is not None and event.finish.error:
                raise RuntimeError(event.finish.error)
            if event.token is not None:
                self.tokens.setdefault(event.id, []).append(event.token)

    def submit(self, length: int, count: int) -> int:
        self._next += 1
        vocab = self.runner.info.vocab
        prompt = torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(self._next))
        request = Request(
            id=self._next,
            model="m",
            prompt=tuple(prompt.tolist()),
            arrival=time.monotonic(),
            sampling=Sampling(max_tokens=count, temperature=0.0, ignore_eos=True),
        )
        self.engine.submit(Sequence.of(request, CONTEXT))
        return self._next

    def answer(self, length: int, count: int) -> tuple[int, float]:
        """Run one request alone. Returns its id and the seconds to its first token."""
        started = time.perf_counter()
        ident, first = self.submit(length, count), inf
        while not self.engine.idle:
            self.engine.step()
            if first == inf and ident in self.tokens:
                first = time.perf_counter() - started
        return ident, first

    def decode(self, batch: int, length: int, steps: int) -> list[float]:
        """Seconds of each step of `batch` sequences that decode together after prompts of `length`."""
        # All sequences must still decode `steps` steps after the last one has read its prompt.
        reading = -(-batch * length // (STEP_TOKENS - batch)) + 8
        idents = [self.submit(length, reading + steps) for _ in range(batch)]
        while any(len(self.tokens.get(ident, [])) < 4 for ident in idents):
            self.engine.step()
        took: list[float] = []
        for _ in range(steps - 8):
            started = time.perf_counter()
            self.engine.step()
            took.append(time.perf_counter() - started)
        for ident in idents:
            self.engine.cancel(ident)
        while not self.engine.idle:
            self.engine.step()
        return took

    def beside(self, batch: int, length: int, times: int) -> float:
        """Median milliseconds to the first token of a prompt of `length`, beside `batch` decodes."""
        idents = [self.submit(length, 8 * times + 64) for _ in range(batch)]
        while any(len(self.tokens.get(ident, [])) < 4 for ident in idents):
            self.engine.step()
        took: list[float] = []
        for _ in range(times):
            started, new = time.perf_counter(), self.submit(length, 1)
            while new not in self.tokens:
                self.engine.step()
            took.append((time.perf_counter() - started) * 1e3)
        for ident in idents:
            self.engine.cancel(ident)
        while not self.engine.idle:
            self.engine.step()
        return statistics.median(took)


def one_text(tokens: list[int]) -> Batch:
    """A step that reads a whole text and outputs the logits of every token."""
    count = len(tokens)
    every = torch.arange(count, device=DEVICE)
    return Batch(
        tokens=torch.tensor(tokens, device=DEVICE),
        positions=every,
        slots=every,
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=DEVICE),
        contexts=torch.tensor([count], dtype=torch.int32, device=DEVICE),
        tables=torch.arange(-(-count // BLOCK), dtype=torch.int32, device=DEVICE)[None],
        outputs=every,
        query_lens=[count],
        context_lens=[count],
    )


def check(
    driver: Driver, decoder: Decoder, config: dict[str, Any], quantise: CudaQuantise | None
) -> dict[str, float]:
    """Compare the CUDA runner with plain torch, by logits and by greedy tokens.

    The error of a greedy token is the difference of plain torch's logits for its own choice and for that
    token, in standard deviations of these logits.
    """
    ident, _ = driver.answer(64, 24)
    prompt = torch.randint(0, driver.runner.info.vocab, (64,), generator=torch.Generator().manual_seed(ident))
    text = [*prompt.tolist(), *driver.tokens[ident]]
    reference = build(config, plain(quantise))
    batch = one_text(text)
    reference_logits = reference.logits(reference.forward(batch, reference.new_cache(8, BLOCK)))
    found = decoder.logits(decoder.forward(batch, decoder.new_cache(8, BLOCK)))
    expected = reference_logits[63:-1]
    chosen = expected.gather(1, torch.tensor(text[64:], device=DEVICE)[:, None])[:, 0]
    worse = (expected.max(1).values - chosen) / expected.std(1)
    return {
        "logits_error": float((found - reference_logits).norm() / reference_logits.norm()),
        "greedy_equal": float((worse == 0).float().mean()),
        "greedy_worst": float(worse.max()),
    }


def check_experts(config: dict[str, Any], quantise: CudaQuantise | None) -> dict[str, float]:
    """Compare a few layers of a mixture of experts with plain torch, over one text that is read whole and
    then, its second half, token by token.

    Where two experts are nearly equal, rounding chooses between them, and the row is then another one. The
    error of the logits is therefore that of the median row, the larger one of both ways. A greedy token is
    compared as in `check`.
    """
    small = {**config, "num_hidden_layers": CHECKED_LAYERS}
    tokens = torch.randint(0, config["vocab_size"], (CHECKED_TOKENS,)).tolist()
    text, half = one_text(tokens), CHECKED_TOKENS // 2
    reference = build(small, plain(quantise))
    wanted = reference.logits(reference.forward(text, reference.new_cache(8, BLOCK)))
    del reference
    decoder = build(small, table(DEVICE, quantise))
    cache = decoder.new_cache(8, BLOCK)
    whole = decoder.logits(decoder.forward(text, cache))
    rows = [decoder.logits(decoder.forward(one_token(text, at), cache)) for at in range(half, CHECKED_TOKENS)]
    single, later = torch.cat(rows), wanted[half:]
    errors = [
        ((found - own).norm(dim=1) / own.norm(dim=1)).median().item()
        for found, own in ((whole, wanted), (single, later))
    ]
    worse = (later.max(1).values - later.gather(1, single.argmax(1)[:, None])[:, 0]) / later.std(1)
    return {
        "logits_error": max(errors),
        "greedy_equal": float((worse == 0).float().mean()),
        "greedy_worst": float(worse.max()),
    }


def one_token(text: Batch, at: int) -> Batch:
    """The step that decodes token `at` of a text whose earlier tokens are in the cache."""
    row = slice(at, at + 1)
    return Batch(
        tokens=text.tokens[row],
        positions=text.positions[row],
        slots=text.slots[row],
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        contexts=torch.tensor([at + 1], dtype=torch.int32, device=DEVICE),
        tables=text.tables,
        outputs=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        query_lens=[1],
        context_lens=[at + 1],
    )


def experts_chosen(decoder: Decoder, tokens: int) -> float:
    """The mean number of experts in a layer that so many tokens of a random text choose."""
    found: list[int] = []

    def spy(x: Tensor, logits: Tensor, packed: Any, k: int, normalise: bool) -> Tensor:
        found.append(logits[::4][:tokens].topk(k).indices.unique().numel())
        return decoder.kernels.experts(x, logits, packed, k, normalise)

    kernels = replace(decoder.kernels, experts=spy, layers=None)
    text = one_text(torch.randint(0, decoder.spec.vocab, (4 * tokens,)).tolist())
    cache = decoder.new_cache(-(-4 * tokens // BLOCK), BLOCK)
    Decoder(decoder.spec, kernels, decoder.weights).forward(text, cache)
    return statistics.mean(found)


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


def measure(name: str, bandwidth: float, deadline: float) -> dict[str, Any]:
    config, quantise = MODELS[name]
    decoder = build(config, table(DEVICE, quantise))
    torch.cuda.synchronize()
    made = time.perf_counter()
    spec = decoder.spec
    info = ModelInfo(
        name="m", path="", family=spec.family, dtype="bfloat16", device="cuda", context=CONTEXT,
        vocab=spec.vocab, parameters=decoder.parameters, weight_bytes=decoder.weight_bytes, kv_bytes=0,
        block_size=BLOCK, blocks=BLOCKS, load_s=0.0,
    )  # fmt: skip
    runner = CudaRunner(decoder, info, eos=frozenset(), max_running=RUNNING)
    runner.start()
    graphs = time.perf_counter() - made
    while runner.prepare():
        pass
    all_graphs, made = time.perf_counter() - made, time.perf_counter()
    driver = Driver(decoder, runner)
    driver.answer(PROMPT, 3)
    first = time.perf_counter() - made
    result: dict[str, Any] = {
        "graphs_s": graphs,
        "all_graphs_s": all_graphs,
        "first_tokens_s": first,
        "check": check_experts(config, quantise)
        if spec.routing
        else check(driver, decoder, config, quantise),
        "itl_ms": {},
        "ttft_ms": {},
        "beside_ms": driver.beside(15, PROMPT, 12),
    }
    torch.cuda.empty_cache()
    if spec.routing:
        result["experts_chosen"] = {str(count): experts_chosen(decoder, count) for count in (8, 32, 128)}
    token = decoder.cache_bytes_per_block(1)
    for length in (512, 2048):
        driver.answer(length, 1)
        result["ttft_ms"][str(length)] = (
            statistics.median(driver.answer(length, 1)[1] for _ in range(7)) * 1e3
        )
    result["profile"] = profile(driver)
    for batch, length in CASES:
        if time.monotonic() > deadline:
            break
        took = driver.decode(batch, length, 72)
        itl = statistics.median(took) * 1e3
        floor = (bytes_read(decoder, batch) + batch * length * token) / bandwidth * 1e3
        result["itl_ms"][f"b{batch} {length}"] = {
            "p50": itl,
            "p99": sorted(took)[-2] * 1e3,
            "mbu": floor / itl,
            "tokens_per_s": batch / itl * 1e3,
        }
    return result


def profile(driver: Driver) -> dict[str, int]:
    """The calls from host to device in ten decode steps of one sequence, by kind."""
    ident = driver.submit(PROMPT, 40)
    while len(driver.tokens.get(ident, [])) < 8:
        driver.engine.step()
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        for _ in range(10):
            driver.engine.step()
    driver.engine.cancel(ident)
    while not driver.engine.idle:
        driver.engine.step()
    calls = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("cuda")}
    return dict(sorted(calls.items()))


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


def show(name: str, result: dict[str, Any]) -> None:
    check_ = result["check"]
    print(
        f"\n{name}: logits within {check_['logits_error']:.4f} of plain torch, greedy equal"
        f" {check_['greedy_equal']:.2f}, worst {check_['greedy_worst']:.3f} sd; first graphs"
        f" {result['graphs_s']:.1f} s after the weights, all {result['all_graphs_s']:.1f} s, three tokens"
        f" {result['first_tokens_s']:.2f} s; 512 tokens beside 15 decodes {result['beside_ms']:.1f} ms"
    )
    for case, row in result["itl_ms"].items():
        print(
            f"  {case:>9} context: {row['p50']:7.3f} ms (p99 {row['p99']:7.3f}),"
            f" {row['mbu']:4.0%} of the floor, {row['tokens_per_s']:8.0f} tokens/s"
        )
    print("  TTFT " + ", ".join(f"{tokens} tokens: {ms:.2f} ms" for tokens, ms in result["ttft_ms"].items()))
    if "experts_chosen" in result:
        chosen = ", ".join(f"{n} tokens: {mean:.1f}" for n, mean in result["experts_chosen"].items())
        print(f"  experts that tokens of a random text choose in a layer: {chosen}")
    waits = {call: count for call, count in result["profile"].items() if "Synchronize" in call}
    print(f"  in ten steps the host waits for: {waits}, of {result['profile']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="start no measurement after this many minutes"
    )
    options = parser.parse_args()
    deadline = time.monotonic() + options.minutes * 60
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "models": {}}
    bandwidth = copy_bandwidth()
    results["copy_tb_per_s"] = bandwidth / 1e12
    print(f"{results['device']}, copy {results['copy_tb_per_s']:.2f} TB/s", flush=True)
    for name in options.models:
        if time.monotonic() < deadline:
            results["models"][name] = measure(name, bandwidth, deadline)
            show(name, results["models"][name])
            gc.collect()  # engine and runner reference each other
            torch.cuda.empty_cache()
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
