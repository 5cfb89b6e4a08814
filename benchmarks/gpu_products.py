"""Compares products of many rows on a Hopper GPU: gated and the vendor's, fast sums in fp8, and padded ones.

`python benchmarks/gpu_products.py [--rows 320 384 ...]`

Prints microseconds in a CUDA graph, in the shapes of Qwen3-8B, and errors relative to the norm of the result
in float64. Several sets of weights are multiplied in turn, so that none stays in the L2 cache.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_engine import DEVICE, DTYPE, timed
from torch import Tensor

from stretto.kernels.cuda.hopper import gated
from stretto.kernels.cuda.launch import loading
from stretto.kernels.cuda.linear import PaddedRows, product_us
from stretto.kernels.cuda.rows import PADDED, act_and_mul, new_rows, quantise_rows
from stretto.kernels.cuda.weights import Fp8

GATE_UP = (24576, 4096)
FP8_SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": GATE_UP, "down": (4096, 12288)}
SHAPES = {**FP8_SHAPES, "gate_up of Llama-3.1-8B": (28672, 4096)}
CACHE, ROUNDS = 160e6, 2


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
    line = [f"vendor alone {timed([lambda w=w: F.linear(x, w) for w in sets], ROUNDS):.1f} us"]
    for name, work in works.items():
        off = error(work(0), F.silu(gates) * ups)
        took = timed([partial(work, number) for number in range(len(sets))], ROUNDS)
        line.append(f"{name} {took:.1f} us, error {off}")
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

        took, off = (
            timed([partial(product, number) for number in range(len(sets))], ROUNDS),
            error(product(0), wanted),
        )
        line.append(f"{'fast' if fast else 'exact'} sums {took:.1f} us, error {off}")
    print(f"fp8 {name} {rows} rows:", "; ".join(line), flush=True)


def compare_padded(name: str, shape: tuple[int, int], rows: int) -> None:
    """The vendor's product, and with the rows to which it is padded while kernels are loaded."""
    weight = torch.randn(shape, dtype=DTYPE, device=DEVICE)
    with loading():
        more = PaddedRows(product_us).pad(new_rows(weight, rows, shape[1]), weight, None).shape[0]
    line = f"{name} {rows} rows: {product_us(rows, weight, None):.1f} us"
    print(
        line + (f", padded to {more} {product_us(more, weight, None):.1f} us" if more > rows else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[320, 384, 448, 512, 576, 768, 1024, 2048])
    for rows in parser.parse_args().rows:
        compare_gated(rows)
        for name, shape in FP8_SHAPES.items():
            compare_sums(name, shape, rows)
        for name, shape in SHAPES.items() if rows in PADDED else ():
            compare_padded(name, shape, rows)


if __name__ == "__main__":
    main()
