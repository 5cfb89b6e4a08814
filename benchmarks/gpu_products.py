"""Compares products of many rows on a Hopper GPU: the gated product and the vendor's, and fast sums in fp8.

`python benchmarks/gpu_products.py [--rows 384 512 ...]`

Prints microseconds in a CUDA graph, in the shapes of Qwen3-8B, and errors relative to the norm of the result
in float64. Several sets of weights are multiplied in turn, so that none stays in the L2 cache.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.kernels.cuda.hopper import gated
from stretto.kernels.cuda.rows import act_and_mul, quantise_rows
from stretto.kernels.cuda.weights import Fp8

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
GATE_UP = (24576, 4096)
FP8_SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": GATE_UP, "down": (4096, 12288)}
CACHE, ROUNDS, REPLAYS = 160e6, 2, 8


def timed(work: Callable[[int], Any], count: int) -> float:
    """Microseconds of one call, of `count` different ones in turn in a graph."""
    for number in range(count):
        work(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in [*range(count)] * ROUNDS:
            work(number)
    took: list[float] = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / (ROUNDS * count))
    return statistics.median(took[1:])


def weights(shape: tuple[int, int], itemsize: int) -> list[Tensor]:
    """Random weights, more than fit the cache."""
    count = int(CACHE // (shape[0] * shape[1] * itemsize)) + 2
    return [torch.randn(shape, dtype=DTYPE, device=DEVICE) * shape[1] ** -0.5 for _ in range(count)]


def error(found: Tensor, wanted: Tensor) -> str:
    return f"{float((found.double() - wanted).norm() / wanted.norm()):.1e}"


def compare_gated(rows: int) -> None:
    sets, x = weights(GATE_UP, 2), torch.randn(rows, GATE_UP[1], dtype=DTYPE, device=DEVICE)
    gates, ups = F.linear(x.double(), sets[0].double()).chunk(2, -1)
    works: dict[str, Callable[[int], Tensor]] = {
        "vendor, then activation": lambda number: act_and_mul(F.linear(x, sets[number]), "silu"),
        "gated": lambda number: gated.linear_act_and_mul(x, sets[number], None, "silu"),
    }
    line = [f"vendor alone {timed(lambda number: F.linear(x, sets[number]), len(sets)):.1f} us"]
    for name, work in works.items():
        off = error(work(0), F.silu(gates) * ups)
        line.append(f"{name} {timed(work, len(sets)):.1f} us, error {off}")
    print(f"gate_up {rows} rows:", "; ".join(line), flush=True)


def compare_sums(name: str, shape: tuple[int, int], rows: int) -> None:
    """Products of e4m3 with sums of more bits and with fast ones."""
    sets = [Fp8.pack(weight, None) for weight in weights(shape, 1)]
    x, scales = quantise_rows(torch.randn(rows, shape[1], dtype=DTYPE, device=DEVICE))
    wanted = F.linear(x.double() * scales[:, None], sets[0].widened(torch.float64))
    line: list[str] = []
    for fast in (False, True):

        def product(number: int, fast: bool = fast) -> Tensor:
            weight, own = sets[number].weight.t(), sets[number].scales[None]
            return torch._scaled_mm(
                x, weight, scales[:, None], own, out_dtype=DTYPE, use_fast_accum=fast
            )  # fmt: skip

        took, off = timed(product, len(sets)), error(product(0), wanted)
        line.append(f"{'fast' if fast else 'exact'} sums {took:.1f} us, error {off}")
    print(f"fp8 {name} {rows} rows:", "; ".join(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[384, 512, 576, 768, 1024, 2048])
    for rows in parser.parse_args().rows:
        compare_gated(rows)
        for name, shape in FP8_SHAPES.items():
            compare_sums(name, shape, rows)


if __name__ == "__main__":
    main()
