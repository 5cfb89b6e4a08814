"""Times the kernels of one mixture of experts on this GPU, in the shape of Qwen3-30B-A3B.

`python benchmarks/gpu_experts.py [--sweep]`

The mixtures of several layers run in turn, so that no weights stay in the cache. Times are microseconds of
one layer in a CUDA graph. The floor is the bytes of the experts that the tokens chose, over the copy
bandwidth. With --sweep, the grouped products also run with other tilings.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu import QWEN_30B, copy_bandwidth
from torch import Tensor
from triton.runtime.errors import OutOfResources  # pyright: ignore[reportMissingTypeStubs]

from stretto.kernels.cuda import experts as mixtures
from stretto.kernels.cuda import routing
from stretto.kernels.cuda.experts import CudaExperts, Fp8Experts, GroupTiling
from stretto.kernels.cuda.launch import compiling_ahead
from stretto.kernels.reference import DenseExperts

EXPERTS, TOP = QWEN_30B["num_experts"], QWEN_30B["num_experts_per_tok"]
HIDDEN, INNER = QWEN_30B["hidden_size"], QWEN_30B["moe_intermediate_size"]
LAYERS, ROUNDS, REPLAYS = 4, 4, 7
TOKENS = (1, 2, 4, 5, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SWEPT = (8, 32, 128, 256, 512, 2048)
DEVICE = torch.device("cuda")


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


def layers(fp8: bool) -> list[CudaExperts]:
    """Random experts of several layers."""
    made: list[CudaExperts] = []
    for _ in range(LAYERS):
        shapes = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
        gate_up, down = (
            torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(0.0, shape[-1] ** -0.5)
            for shape in shapes
        )
        made.append(Fp8Experts.pack(gate_up, down, "silu") if fp8 else DenseExperts(gate_up, down, "silu"))
    return made


def step(packed: list[CudaExperts], tokens: int) -> list[Mixture]:
    return [
        Mixture(
            each,
            torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device=DEVICE),
            torch.randn(tokens, EXPERTS, dtype=torch.bfloat16, device=DEVICE),
        )
        for each in packed
    ]


def timed(works: list[Callable[[], Any]]) -> float:
    """Microseconds of one of these, which run in turn in a graph."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(ROUNDS):
            for work in works:
                work()
    took: list[float] = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / (ROUNDS * len(works)))
    return statistics.median(took[1:])


def parts(
    mixture: Mixture, tilings: tuple[GroupTiling, GroupTiling] | None = None
) -> dict[str, Callable[[], Any]]:
    """The kernels of a mixture of more than a few tokens, by name."""
    packed, x, logits = mixture.packed, mixture.x, mixture.logits
    fp8, picks = isinstance(packed, Fp8Experts), x.shape[0] * TOP

    def choose() -> tuple[routing.ExpertChoice, Tensor, Tensor | None]:
        if fp8:
            return routing.choose_and_quantise(logits, TOP, True, x)
        return routing.choose(logits, TOP, True), x, None

    choice, rows, scales = choose()
    order, tile = routing.sort(choice, EXPERTS), mixtures.tile_tokens(picks, EXPERTS)
    up, down = tilings or (mixtures.gate_up_tiling(tile, rows.dtype), mixtures.down_tiling(tile, rows.dtype))
    made, out = x.new_empty(picks, HIDDEN), torch.empty_like(x)

    def gate_up() -> tuple[Tensor, Tensor | None]:
        return mixtures.grouped_gate_up(rows, scales, order, packed, x.dtype, up)

    hidden, levels = gate_up()
    return {
        "choose": choose,
        "sort": lambda: routing.sort(choice, EXPERTS),
        "gate_up": gate_up,
        "down": lambda: mixtures.grouped_down(hidden, levels, order, packed, made, down),
        "combine": lambda: mixtures.combine(made, choice.shares, out),
    }


def whole(mixture: Mixture) -> Callable[[], Tensor]:
    return lambda: mixtures.experts(mixture.x, mixture.logits, mixture.packed, TOP, True)


def floors(mixtures_: list[Mixture], bandwidth: float) -> dict[str, float]:
    """Microseconds to read the chosen experts, and their two parts."""
    chosen = statistics.mean(each.chosen for each in mixtures_) / EXPERTS
    packed = mixtures_[0].packed
    up, down = (each.nbytes * chosen / bandwidth * 1e6 for each in (packed.gate_up, packed.down))
    return {"whole": up + down, "gate_up": up, "down": down}


def variants(tokens: int) -> list[GroupTiling]:
    usual = mixtures.tile_tokens(tokens * TOP, EXPERTS)
    tiles = sorted({max(usual // 2, 16), usual, min(usual * 2, 128)})
    return [
        GroupTiling(tile, 128, row_bytes, warps, stages)
        for tile, row_bytes, warps, stages in product(tiles, (128,), (4, 8), (2, 3, 4, 5))
    ]


def sweep(packed: list[CudaExperts], bandwidth: float, tokens: int) -> dict[str, dict[str, float]]:
    """By part, the microseconds of each tiling that the device can run."""
    mixture = step(packed, tokens)
    floor = floors(mixture, bandwidth)
    found: dict[str, dict[str, float]] = {"gate_up": {}, "down": {}}
    with compiling_ahead():
        for tiling in variants(tokens):
            parts(mixture[0], (tiling, tiling))["down"]()
    for tiling in variants(tokens):
        name = f"{tiling.tokens} tokens, {tiling.warps} warps, {tiling.stages} stages"
        for part, took in found.items():
            try:
                took[name] = timed([parts(each, (tiling, tiling))[part] for each in mixture])
            except OutOfResources:
                break
    for part, took in found.items():
        best = sorted(took.items(), key=lambda item: item[1])[:4]
        shown = "; ".join(f"{name}: {us:.1f}" for name, us in best)
        print(f"    {part} of {tokens} tokens, floor {floor[part]:.1f}: {shown}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=("fp8", "bf16"), default=["fp8", "bf16"])
    parser.add_argument("--sweep", action="store_true", help="time other tilings too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy_tb_per_s": bandwidth / 1e12}
    print(f"{results['device']}, copy {bandwidth / 1e12:.2f} TB/s")
    for name in options.formats:
        packed = layers(name == "fp8")
        for tokens in TOKENS:
            mixture = step(packed, tokens)
            floor, took = floors(mixture, bandwidth), {"whole": timed([whole(each) for each in mixture])}
            if tokens > mixtures.FEW_TOKENS:
                each = [parts(one) for one in mixture]
                took |= {part: timed([some[part] for some in each]) for part in each[0]}
            results[f"{name} {tokens}"] = {"us": took, "floor_us": floor}
            shown = ", ".join(f"{part} {us:.1f}" for part, us in took.items())
            print(f"  {name}, {tokens} tokens: floor {floor['whole']:.1f}, {shown}", flush=True)
        if options.sweep:
            results[f"{name} sweep"] = {tokens: sweep(packed, bandwidth, tokens) for tokens in SWEPT}
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
