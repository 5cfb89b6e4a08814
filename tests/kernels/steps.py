"""Steps for testing a kernels table, and plain float64 definitions of what the kernels compute."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from stretto.kernels import Attention, Batch, Cache

CPU = torch.device("cpu")


@dataclass
class Step:
    """A batch and its cache of one layer.

    `keys` and `values` hold those of each sequence so far: [context, kv_heads, head_dim]."""

    batch: Batch
    cache: Cache
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def rows(self) -> list[slice]:
        starts = self.batch.query_starts.tolist()
        return [slice(a, b) for a, b in pairwise(starts)]


def step(
    sequences: list[tuple[int, int]], kind: Attention, *, dtype: torch.dtype = torch.float32, size: int = 4
) -> Step:
    """Make a step over blocks in a random order. `sequences` are pairs (queries, context).

    The cache already holds each sequence except its last `queries` tokens."""
    torch.manual_seed(sum(context for _, context in sequences))
    needs = [-(-context // size) for _, context in sequences]
    order = torch.randperm(sum(needs) + 2).tolist()
    tables = torch.zeros(len(sequences), max(needs), dtype=torch.int32)
    for row, need in enumerate(needs):
        tables[row, :need] = torch.tensor(order[:need])
        order = order[need:]
    cache = Cache.zeros(1, (sum(needs) + 2, kind.kv_heads, size, kind.head_dim), dtype, CPU)
    shape = (kind.kv_heads, kind.head_dim)
    keys = [torch.randn(context, *shape).to(dtype) for _, context in sequences]
    values = [torch.randn(context, *shape).to(dtype) for _, context in sequences]
    positions = [torch.arange(context - queries, context) for queries, context in sequences]
    for row, (queries, context) in enumerate(sequences):
        for p in range(context - queries):
            cache.layers[0][0, tables[row, p // size], :, p % size] = keys[row][p]
            cache.layers[0][1, tables[row, p // size], :, p % size] = values[row][p]
    slots = [tables[row, p // size].long() * size + p % size for row, p in enumerate(positions)]
    starts = [0, *accumulate(queries for queries, _ in sequences)]
    batch = Batch(
        tokens=torch.zeros(starts[-1], dtype=torch.int64),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        contexts=torch.tensor([context for _, context in sequences], dtype=torch.int32),
        tables=tables,
        outputs=torch.tensor(starts[1:]) - 1,
        query_lens=[queries for queries, _ in sequences],
        context_lens=[context for _, context in sequences],
    )
    return Step(batch, cache, keys, values)


def attention(q: Tensor, keys: Tensor, values: Tensor, kind: Attention) -> Tensor:
    """Causal attention of the last queries of one sequence, in float64.

    `q` and the result are [queries, heads, head_dim]."""
    queries, context = q.shape[0], keys.shape[0]
    share = kind.heads // kind.kv_heads
    out = torch.empty(q.shape, dtype=torch.float64)
    for row in range(queries):
        end = context - queries + row + 1
        start = max(0, end - kind.window) if kind.window else 0
        for head in range(kind.heads):
            scores = keys[start:end, head // share].double() @ q[row, head].double() * kind.scale
            if kind.softcap:
                scores = kind.softcap * torch.tanh(scores / kind.softcap)
            out[row, head] = scores.softmax(0) @ values[start:end, head // share].double()
    return out


def rms(x: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor, scale: float) -> Tensor:
    """Rotate the first 2 * len(frequencies) dimensions of each head of [T, heads, head_dim], in float64."""
    out, half = x.double().clone(), len(frequencies)
    angles = (positions[:, None].float() * frequencies).double()[:, None]
    first, second = out[..., :half].clone(), out[..., half : 2 * half].clone()
    out[..., :half] = scale * (first * angles.cos() - second * angles.sin())
    out[..., half : 2 * half] = scale * (second * angles.cos() + first * angles.sin())
    return out
