"""Compares chunk attention on this GPU: our kernels with and without those for Hopper, and PyTorch's.

`python benchmarks/gpu_attention.py [--heads 32] [--kv-heads 8] [--head-dim 128]`

Prints the error against float64, and microseconds of a layer in a CUDA graph. PyTorch's read contiguous keys,
ours pages of a cache. TFLOP/s count the keys that a causal mask lets through.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from gpu_engine import DEVICE, DTYPE, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stretto.kernels import Attention, Batch
from stretto.kernels.cuda import attention
from stretto.kernels.cuda.hopper import attention as hopper

SIZE = 16
LAYERS = 4
# By sequence: its queries, and its context with them.
TIMED = (
    ((512, 512),), ((2048, 2048),), ((4, 4), (300, 300), (208, 2000)), ((448, 448), *((1, 576),) * 64),
    ((512, 4096),), ((8192, 8192),), *(((1, 563),) * count for count in (16, 32, 64, 128, 256)),
    ((1, 8000), *((1, 300),) * 63),
)  # fmt: skip
CHECKED = (
    *TIMED[:-6], ((2, 2),), ((129, 129),), ((17, 1000), (33, 33), (1, 50), (100, 165)), ((31, 31),) * 9,
)  # fmt: skip


def step(lengths: tuple[tuple[int, int], ...], padding: int = 0) -> Batch:
    """A batch of sequences whose blocks are scattered, as a graph pads it: with a sequence of one key."""
    counts, contexts = [count for count, _ in lengths], [context for _, context in lengths]
    if padding:
        counts, contexts = [*counts, padding], [*contexts, 1]
    columns = max(-(-context // SIZE) for context in contexts)
    blocks = torch.randperm(len(contexts) * columns, device=DEVICE).int()
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    rows = torch.zeros(int(starts[-1]), dtype=torch.int64, device=DEVICE)
    return Batch(
        tokens=rows, positions=rows.int(), slots=rows, tables=blocks.view(len(contexts), columns),
        query_starts=starts, contexts=torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        outputs=None, query_lens=[] if padding else counts, context_lens=[] if padding else contexts,
    )  # fmt: skip


def wanted(q: Tensor, layer: Tensor, kind: Attention, batch: Batch, index: int) -> tuple[slice, Tensor]:
    """The rows of a sequence, and their attention in float64."""
    begin, end = batch.query_starts[index : index + 2].tolist()
    context = int(batch.contexts[index])
    blocks = batch.tables[index, : -(-context // SIZE)].long()
    keys, values = (
        side[blocks].transpose(0, 1).reshape(kind.kv_heads, -1, kind.head_dim)[:, :context].double()
        for side in layer
    )
    share = kind.heads // kind.kv_heads
    keys, values = keys.repeat_interleave(share, 0), values.repeat_interleave(share, 0)
    scores = torch.einsum("thd,hkd->htk", q[begin:end].double(), keys) * kind.scale
    position = torch.arange(context - (end - begin), context, device=DEVICE)[:, None]
    scores = scores.masked_fill(torch.arange(context, device=DEVICE) > position, -torch.inf)
    return slice(begin, end), torch.einsum("htk,hkd->thd", scores.softmax(-1), values).flatten(1)


def check(kind: Attention, lengths: tuple[tuple[int, int], ...], padding: int, least: int) -> float:
    """The largest error of a sequence, relative to its norm."""
    batch = step(lengths, padding)
    shape = (2, batch.tables.numel(), kind.kv_heads, SIZE, kind.head_dim)
    layer = torch.randn(shape, dtype=DTYPE, device=DEVICE)
    q = torch.randn(
        len(batch.tokens), kind.heads + 2 * kind.kv_heads, kind.head_dim, dtype=DTYPE, device=DEVICE
    )
    q = q[:, : kind.heads]
    tiles = attention.number_tiles(batch, attention.tile_tokens(kind, 2), least)
    out = torch.full((len(q), kind.heads * kind.head_dim), torch.nan, dtype=DTYPE, device=DEVICE)
    attention.chunk(q, kind, layer, batch, tiles, out)
    errors = [0.0]
    for index, (count, _) in enumerate(lengths):
        rows, right = wanted(q, layer, kind, batch, index)
        if count < least:
            assert bool(out[rows].isnan().all()), "a row of a decode was written"
            continue
        found = out[rows].double()
        errors.append(
            float((found - right).norm() / right.norm()) if bool(found.isfinite().all()) else torch.inf
        )
    return max(errors)


def ours(kind: Attention, lengths: tuple[tuple[int, int], ...], together: bool) -> float:
    """All sequences in one launch, or those with one query in a launch of their own."""
    batch = step(lengths)
    shape = (2, batch.tables.numel(), kind.kv_heads, SIZE, kind.head_dim)
    layers = [torch.randn(shape, dtype=DTYPE, device=DEVICE) for _ in range(LAYERS)]
    q = torch.randn(
        len(batch.tokens), kind.heads + 2 * kind.kv_heads, kind.head_dim, dtype=DTYPE, device=DEVICE
    )
    q, counts = q[:, : kind.heads], batch.query_lens
    tiles = attention.number_tiles(batch, attention.tile_tokens(kind, 2), 1 if together else 2)
    arrived = torch.zeros(2**18, dtype=torch.int32, device=DEVICE)
    workspace = attention.DecodeWorkspace.of(len(counts), kind.heads, layers[0], arrived)

    def run(layer: Tensor) -> None:
        out = None
        if not together and min(counts) == 1:
            out = attention.decode(q, kind, layer, batch, workspace)
        if together or max(counts) > 1:
            attention.chunk(q, kind, layer, batch, tiles, out)

    return timed([lambda layer=layer: run(layer) for layer in layers])


def theirs(kind: Attention, tokens: int, backend: SDPBackend) -> float:
    shape = (1, kind.heads + 2 * kind.kv_heads, tokens, kind.head_dim)
    made = [torch.randn(shape, dtype=DTYPE, device=DEVICE) for _ in range(LAYERS)]
    parts = [each.split([kind.heads, kind.kv_heads, kind.kv_heads], 1) for each in made]
    with sdpa_kernel(backend):
        return timed(
            [lambda p=p: F.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in parts]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    kind = Attention(args.heads, args.kv_heads, args.head_dim, args.head_dim**-0.5)
    assert hopper.supported(kind, torch.empty(2, 1, args.kv_heads, SIZE, args.head_dim, dtype=DTYPE))
    for lengths in CHECKED:
        errors = [check(kind, lengths, padding, least) for padding in (0, 90) for least in (1, 2)]
        print("error", lengths[:4], *(f"{error:.2e}" for error in errors), flush=True)
    supported = hopper.supported
    for lengths in TIMED:
        pairs = sum(count * context - count * (count - 1) // 2 for count, context in lengths)
        line = {"one launch": ours(kind, lengths, True)}
        if 1 in dict(lengths):
            line["decodes apart"] = ours(kind, lengths, False)
        hopper.supported = lambda kind, layer: False
        line["not for Hopper"] = ours(kind, lengths, False)
        hopper.supported = supported
        if len(lengths) == 1 and lengths[0][0] == lengths[0][1]:
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                line[backend.name.lower()] = theirs(kind, lengths[0][0], backend)
        print(len(lengths), lengths[:3], *(
            f"{name} {took:.1f} us {4e-6 * pairs * kind.heads * kind.head_dim / took:.0f} TFLOP/s"
            for name, took in line.items()
        ), sep="  ", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
