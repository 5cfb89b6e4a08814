"""Times what follows the layers of a step on this GPU: the product that makes the logits, and the draw.

`python benchmarks/gpu_draw.py [--rows 1 16 64 128 256]`

Prints microseconds in a CUDA graph, also of logits in 16 bits with their copy in float32. Logits that fit
stay in the L2 cache, as they do in a step; the matrix is too large.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from gpu_engine import DEVICE, DTYPE, timed
from torch import Tensor

from stretto.kernels.cuda import draw
from stretto.kernels.cuda import step_inputs as field
from stretto.kernels.cuda.table import CudaQuantise, table

VOCABULARY, HIDDEN = 151936, 4096
RANDOM, SKEWED = "random", "skewed"
DRAWN, TOP_P = {field.TEMPERATURE: 1.0}, {field.TEMPERATURE: 1.0, field.TOP_P: 0.9}
KINDS: dict[str, tuple[str, dict[int, float]]] = {
    "greedy": (RANDOM, {}),
    "temperature 1": (RANDOM, DRAWN),
    "top_p 0.9": (SKEWED, TOP_P),
    "top_k 20 and top_p 0.95": (SKEWED, {**DRAWN, field.TOP_K: 20, field.TOP_P: 0.95}),
    "min_p 0.05": (SKEWED, {**DRAWN, field.MIN_P: 0.05}),
    "top_p 0.9 of random logits": (RANDOM, TOP_P),
}
SKEW = 1.2
FORMATS: dict[str, CudaQuantise | None] = {"bf16": None, "fp8": "fp8"}


def some_logits(rows: int, vocabulary: int) -> dict[str, Tensor]:
    """Two kinds: normal ones, of which top_p 0.9 keeps a ninth, and skewed ones, where the n-th most likely
    token has a probability of n to the power of -SKEW."""
    ranks = torch.stack([torch.randperm(vocabulary, device=DEVICE) for _ in range(rows)])
    return {
        RANDOM: torch.randn(rows, vocabulary, device=DEVICE) * 2.5,
        SKEWED: -SKEW * torch.log1p(ranks.float()),
    }


def draws(rows: int, vocabulary: int) -> dict[str, Callable[[], Tensor]]:
    """What draws a token for each row of logits, by kind of sampling."""
    logits = some_logits(rows, vocabulary)
    known = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    seen = torch.zeros(rows, vocabulary, dtype=torch.int16, device=DEVICE)
    works: dict[str, Callable[[], Tensor]] = {}
    for name, (kind, fields) in KINDS.items():
        inputs = torch.zeros(rows, field.ORDER, dtype=torch.int32)
        inputs[:, field.SLOT] = inputs[:, field.SINK] = torch.arange(rows)
        settings = inputs.view(torch.float32)
        settings[:, field.FRACTION] = torch.rand(rows)
        for place, value in ({field.TOP_P: 1.0, field.REPETITION: 1.0} | fields).items():
            into = settings if place >= field.TEMPERATURE else inputs
            into[:, place] = value
        works[name] = partial(draw.draw, logits[kind], inputs.to(DEVICE), known, seen)
    return works


def products(rows: int, weight: Tensor, quantise: CudaQuantise | None) -> dict[str, Callable[[], Tensor]]:
    """What makes float32 logits of random rows: without a copy if possible, and with one."""
    kernels, x = table(DEVICE, quantise), torch.randn(rows, weight.shape[1], device=DEVICE).to(weight.dtype)
    packed = kernels.pack(weight, None)
    assert kernels.logits is not None
    return {"logits": partial(kernels.logits, x, packed), "copy": lambda: kernels.linear(x, packed).float()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=DTYPE, device=DEVICE) * HIDDEN**-0.5
    for rows in parser.parse_args().rows:
        works = draws(rows, VOCABULARY)
        for name, quantise in FORMATS.items():
            works |= {f"{name} {way}": work for way, work in products(rows, weight, quantise).items()}
        line = [f"{name} {timed([work]):.1f} us" for name, work in works.items()]
        print(f"{rows} rows:", "; ".join(line), flush=True)


if __name__ == "__main__":
    main()
