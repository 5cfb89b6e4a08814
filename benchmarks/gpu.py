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
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_engine import (
    BLOCK,
    DEVICE,
    MODELS,
    PROMPT,
    Driver,
    build,
    bytes_read,
    copy_bandwidth,
    new_runner,
    random_prompt,
)
from torch import Tensor

from stretto.engine.scheduler.types import Limits
from stretto.kernels import Activation, AnyKernels, Batch
from stretto.kernels.cuda.table import CudaQuantise, table
from stretto.kernels.reference import REFERENCE, Dense, DenseExperts
from stretto.models.decoder import Decoder

BLOCKS, CONTEXT, LIMITS = 11264, 9216, Limits(256, 4096)
CASES = ((1, PROMPT), (8, PROMPT), (32, PROMPT), (1, 8192), (128, PROMPT), (256, PROMPT))
PAUSE_S = 0.25  # in which the clock of a card that was at its power limit rises again
# A mixture of experts is compared over a few layers, because there is no room for the whole model twice.
CHECKED_LAYERS, CHECKED_TOKENS = 4, 96


def plain(quantise: CudaQuantise | None) -> AnyKernels:
    """The torch kernels, with weights rounded as the format rounds them."""
    held = table(DEVICE, quantise)

    def rounded(weight: Tensor, bias: Tensor | None) -> Dense:
        packed = held.pack(weight, None)
        return Dense(weight if isinstance(packed, Dense) else packed.widened(weight.dtype), bias)

    def rounded_experts(gate_up: Tensor, down: Tensor, activation: Activation) -> DenseExperts:
        packed = held.pack_experts(gate_up, down, activation)
        return packed if isinstance(packed, DenseExperts) else packed.widened(gate_up.dtype)

    return replace(REFERENCE, pack=rounded, pack_experts=rounded_experts)


def beside(driver: Driver, batch: int, length: int, times: int) -> float:
    """Median milliseconds to the first token of a prompt of `length`, beside `batch` decodes."""
    idents = [driver.submit_random(length, 8 * times + 64) for _ in range(batch)]
    driver.step_until(idents, 4)
    took: list[float] = []
    for _ in range(times):
        started = time.perf_counter()
        driver.step_until([driver.submit_random(length, 1)], 1)
        took.append((time.perf_counter() - started) * 1e3)
    driver.finish(*idents)
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
    text = [*random_prompt(driver.runner.info.vocab, 64, ident), *driver.tokens[ident]]
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


def measure(name: str, bandwidth: float, deadline: float) -> dict[str, Any]:
    config, quantise = MODELS[name]
    decoder = build(config, table(DEVICE, quantise))
    torch.cuda.synchronize()
    made = time.perf_counter()
    spec = decoder.spec
    runner = new_runner(decoder, LIMITS, BLOCKS, CONTEXT)
    runner.start()
    graphs = time.perf_counter() - made
    while runner.prepare():
        pass
    all_graphs, made = time.perf_counter() - made, time.perf_counter()
    driver = Driver(runner, LIMITS)
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
        "ttft_ms": {str(length): driver.ttft_ms(length) for length in (512, 2048)},
        "rested_ttft_ms": driver.ttft_ms(2048, pause_s=PAUSE_S),
        "beside_ms": beside(driver, 15, PROMPT, 12),
    }
    torch.cuda.empty_cache()
    if spec.routing:
        result["experts_chosen"] = {str(count): experts_chosen(decoder, count) for count in (8, 32, 128)}
    token = decoder.cache_bytes_per_block(1)
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
    ident = driver.submit_random(PROMPT, 40)
    driver.step_until([ident], 8)
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        for _ in range(10):
            driver.engine.step()
    driver.finish(ident)
    calls = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("cuda")}
    return dict(sorted(calls.items()))


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
    print(
        "  TTFT "
        + ", ".join(f"{tokens} tokens: {ms:.2f} ms" for tokens, ms in result["ttft_ms"].items())
        + f", 2048 after a pause of {PAUSE_S} s: {result['rested_ttft_ms']:.2f} ms"
    )
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
