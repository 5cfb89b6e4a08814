"""Compares the formats of a mixture of experts on this GPU, in the shape of Qwen3-30B-A3B.

`python benchmarks/gpu_experts.py [--formats fp8 int4 bf16] [--what kernels model] [--sweep]`

`kernels` times those of one layer, in microseconds in a CUDA graph. The mixtures of several layers run in
turn, so that no weights stay in the cache. The floor is the bytes of the experts that the tokens chose, over
the copy bandwidth. With --sweep, they also run with other tilings. `model` measures ITL and TTFT of the whole
model with random weights, through the engine loop.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_engine import (
    DEVICE,
    DTYPE,
    PROMPT,
    QWEN_30B,
    Driver,
    build,
    bytes_read,
    copy_bandwidth,
    new_runner,
    timed,
)
from torch import Tensor
from triton.runtime.errors import OutOfResources  # pyright: ignore[reportMissingTypeStubs]

from stretto.engine.scheduler.types import Limits
from stretto.kernels.cuda import experts as mixtures
from stretto.kernels.cuda import routing, streaming
from stretto.kernels.cuda.experts import GroupTiling
from stretto.kernels.cuda.launch import compiling_ahead
from stretto.kernels.cuda.routing import ExpertRows
from stretto.kernels.cuda.rows import FP8
from stretto.kernels.cuda.table import CudaQuantise, table
from stretto.kernels.cuda.weights import CudaExperts, rounds_rows
from stretto.kernels.reference import DenseExperts

FORMATS: dict[str, CudaQuantise | None] = {"fp8": "fp8", "int4": "int4", "bf16": None}

EXPERTS, TOP = QWEN_30B["num_experts"], QWEN_30B["num_experts_per_tok"]
HIDDEN, INNER = QWEN_30B["hidden_size"], QWEN_30B["moe_intermediate_size"]
LAYERS = 4
TOKENS = (1, 2, 4, 5, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SWEPT, STAGES, COLUMNS = (1, 4, 8, 32, 128, 256, 2048), (2, 3, 4), (256, 512, 1024)
BATCHES, PROMPTS = (1, 8, 32, 128, 256), (512, 2048)
BLOCKS, CONTEXT, LIMITS = 11264, 9216, Limits(256, 4096)


@dataclass(frozen=True)
class Mixture:
    """One layer, and what a step of some tokens gives it."""

    packed: CudaExperts
    x: Tensor
    logits: Tensor

    @property
    def chosen(self) -> int:
        """How many experts the tokens choose."""
        return self.logits.topk(TOP).indices.unique().numel()


def layers(quantise: CudaQuantise | None) -> list[CudaExperts]:
    """Random experts of several layers."""
    made: list[CudaExperts] = []
    for _ in range(LAYERS):
        shapes = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
        gate_up, down = (
            torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_(0.0, shape[-1] ** -0.5) for shape in shapes
        )
        made.append(table(DEVICE, quantise).pack_experts(gate_up, down, "silu"))
    return made


def step(packed: list[CudaExperts], tokens: int) -> list[Mixture]:
    return [
        Mixture(
            each,
            torch.randn(tokens, HIDDEN, dtype=DTYPE, device=DEVICE),
            torch.randn(tokens, EXPERTS, dtype=DTYPE, device=DEVICE),
        )
        for each in packed
    ]


def parts(
    mixture: Mixture, tilings: tuple[GroupTiling, GroupTiling] | None = None
) -> dict[str, Callable[[], Any]]:
    """The kernels of a mixture of more than a few tokens, by name."""
    packed, x, logits = mixture.packed, mixture.x, mixture.logits
    picks = x.shape[0] * TOP

    def choose() -> tuple[routing.ExpertChoice, ExpertRows]:
        if rounds_rows(packed):
            return routing.choose_and_quantise(logits, TOP, True, x)
        return routing.choose(logits, TOP, True), ExpertRows(x)

    choice, rows = choose()
    order, tile = routing.sort(choice, EXPERTS), mixtures.tile_tokens(picks, EXPERTS)
    dtype, made, out = rows.values.dtype, x.new_empty(picks, HIDDEN), torch.empty_like(x)
    usual = mixtures.gate_up_tiling(tile, dtype, packed), mixtures.down_tiling(tile, dtype, packed)
    up, down = tilings or usual
    hidden = mixtures.grouped_gate_up(rows, order, packed, x.dtype, up)
    return {
        "choose": choose,
        "sort": lambda: routing.sort(choice, EXPERTS),
        "gate_up": lambda: mixtures.grouped_gate_up(rows, order, packed, x.dtype, up),
        "down": lambda: mixtures.grouped_down(hidden, order, packed, made, down),
        "combine": lambda: mixtures.combine(made, choice.shares, out),
    }


def whole(mixture: Mixture) -> Callable[[], Tensor]:
    return lambda: mixtures.experts(mixture.x, mixture.logits, mixture.packed, TOP, True)


def floors(mixtures_: list[Mixture], bandwidth: float) -> dict[str, float]:
    """Microseconds to read the chosen experts, and their two parts."""
    chosen = statistics.mean(each.chosen for each in mixtures_) / EXPERTS
    packed = mixtures_[0].packed
    up, down = packed.gate_up.nbytes, packed.down.nbytes
    if not isinstance(packed, DenseExperts):
        up, down = up + packed.gate_up_scales.nbytes, down + packed.down_scales.nbytes
    up, down = (size * chosen / bandwidth * 1e6 for size in (up, down))
    return {"whole": up + down, "gate_up": up, "down": down}


def variants(tokens: int, part: str) -> list[GroupTiling]:
    """Tilings of one of the two grouped products. What the first one makes has a scale for each 128 rows."""
    usual = mixtures.tile_tokens(tokens * TOP, EXPERTS)
    tiles = sorted({max(usual // 2, 16), usual, min(usual * 2, 128)})
    rows = (64, 128) if part == "down" else (128,)
    return [GroupTiling(each[0], each[1], 128, *each[2:]) for each in product(tiles, rows, (4, 8), STAGES)]


def sweep(packed: list[CudaExperts], bandwidth: float, tokens: int) -> dict[str, dict[str, float]]:
    """By part, the microseconds of each tiling that the device can run; of a few tokens, the microseconds of
    the whole by the most columns that `_stream_down` requests at once."""
    mixture = step(packed, tokens)
    floor = floors(mixture, bandwidth)
    found: dict[str, dict[str, float]] = {}
    if tokens <= mixtures.FEW_TOKENS:
        found["whole"] = {f"{columns} columns": spanned(mixture, columns) for columns in COLUMNS}
    else:
        found = {part: tiled(mixture, part, variants(tokens, part)) for part in ("gate_up", "down")}
    for part, took in found.items():
        best = sorted(took.items(), key=lambda item: item[1])[:4]
        shown = "; ".join(f"{name}: {us:.1f}" for name, us in best)
        print(f"    {part} of {tokens} tokens, floor {floor[part]:.1f}: {shown}", flush=True)
    return found


def spanned(mixture: list[Mixture], columns: int) -> float:
    usual = streaming.STREAMED_COLUMNS, streaming.INT4_COLUMNS
    streaming.STREAMED_COLUMNS = streaming.INT4_COLUMNS = columns
    try:
        return timed([whole(each) for each in mixture])
    finally:
        streaming.STREAMED_COLUMNS, streaming.INT4_COLUMNS = usual


def tiled(mixture: list[Mixture], part: str, tilings: list[GroupTiling]) -> dict[str, float]:
    packed, rows = mixture[0].packed, mixture[0].x.shape[0]
    dtype = FP8 if rounds_rows(packed) else DTYPE
    usual = mixtures.gate_up_tiling(mixtures.tile_tokens(rows * TOP, EXPERTS), dtype, packed)
    pairs = [(tiling, tiling) if part == "gate_up" else (usual, tiling) for tiling in tilings]
    with compiling_ahead():
        for pair in pairs:
            parts(mixture[0], pair)[part]()
    took: dict[str, float] = {}
    for tiling, pair in zip(tilings, pairs, strict=True):
        name = f"{tiling.tokens} tokens, {tiling.rows} rows, {tiling.warps} warps, {tiling.stages} stages"
        try:
            took[name] = timed([parts(each, pair)[part] for each in mixture])
        except OutOfResources:
            continue
    return took


def kernels(formats: list[str], bandwidth: float, swept: bool) -> dict[str, Any]:
    """Print and return the microseconds of a layer by format and tokens."""
    results: dict[str, Any] = {}
    held = {name: layers(FORMATS[name]) for name in formats}
    for tokens in TOKENS:
        for name, packed in held.items():
            mixture = step(packed, tokens)
            floor, took = floors(mixture, bandwidth), {"whole": timed([whole(each) for each in mixture])}
            if tokens > mixtures.FEW_TOKENS:
                each = [parts(one) for one in mixture]
                took |= {part: timed([some[part] for some in each]) for part in each[0]}
            results[f"{name} {tokens}"] = {"us": took, "floor_us": floor}
            shown = ", ".join(f"{part} {us:.1f}" for part, us in took.items())
            print(f"  {name}, {tokens} tokens: floor {floor['whole']:.1f}, {shown}", flush=True)
    for name, packed in held.items() if swept else ():
        print(f"  {name}, other tilings", flush=True)
        results[f"{name} sweep"] = {tokens: sweep(packed, bandwidth, tokens) for tokens in SWEPT}
    return results


def model(quantise: CudaQuantise | None, bandwidth: float) -> dict[str, Any]:
    """TTFT by tokens of the prompt, ITL by batch, and the ITL that reading weights and keys takes; in ms."""
    decoder = build(QWEN_30B, table(DEVICE, quantise))
    runner = new_runner(decoder, LIMITS, BLOCKS, CONTEXT)
    runner.start()
    while runner.prepare():
        pass
    driver, keys = Driver(runner, LIMITS), PROMPT * decoder.cache_bytes_per_block(1)
    found: dict[str, Any] = {"weights_gb": decoder.weight_bytes / 1e9, "itl_ms": {}, "floor_ms": {}}
    found["ttft_ms"] = {str(length): driver.ttft_ms(length) for length in PROMPTS}
    for batch in BATCHES:
        found["itl_ms"][str(batch)] = statistics.median(driver.decode(batch, PROMPT, 72)) * 1e3
        found["floor_ms"][str(batch)] = (bytes_read(decoder, batch) + batch * keys) / bandwidth * 1e3
    return found


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print the models beside each other."""
    print("\n| | " + " | ".join(f"{name} (floor)" for name in results) + " |")
    print("| --- " * (len(results) + 1) + "|")
    for batch in map(str, BATCHES):
        row = [f"{each['itl_ms'][batch]:.2f} ({each['floor_ms'][batch]:.2f})" for each in results.values()]
        print(f"| ITL at batch {batch}, ms | " + " | ".join(row) + " |")
    for length in map(str, PROMPTS):
        row = [f"{each['ttft_ms'][length]:.1f}" for each in results.values()]
        print(f"| TTFT of {length} tokens, ms | " + " | ".join(row) + " |")
    print("| weights, GB | " + " | ".join(f"{each['weights_gb']:.1f}" for each in results.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["fp8", "int4"])
    parser.add_argument("--what", nargs="+", choices=("kernels", "model"), default=["kernels", "model"])
    parser.add_argument("--sweep", action="store_true", help="time other tilings too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy_tb_per_s": bandwidth / 1e12}
    print(f"{results['device']}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    if "kernels" in options.what:
        results |= kernels(options.formats, bandwidth, options.sweep)
    models: dict[str, Any] = {}
    for name in options.formats if "model" in options.what else ():
        gc.collect()  # engine and runner reference each other
        torch.cuda.empty_cache()
        models[name] = model(FORMATS[name], bandwidth)
        print(f"  {name}: {models[name]}", flush=True)
    if models:
        show(models)
    if options.json:
        options.json.write_text(json.dumps(results | {"models": models}, indent=1))


if __name__ == "__main__":
    main()
