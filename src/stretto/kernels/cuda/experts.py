"""Mixtures of experts that the host does not wait for: tokens are sorted by expert on the device, and each
tile of one expert's tokens is a small matrix product.

The number of tiles depends on the routing, which the host does not know. The grid therefore has the largest
number of tiles that is possible, and programs without a tile return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait
from stretto.kernels.cuda.rows import act_and_mul
from stretto.kernels.reference import DenseExperts

N_BLOCK, K_BLOCK = 64, 64
MIN_TILE, MAX_TILE = 16, 64


@triton.jit
def _grouped(
    x, weights, out, order, until, counts, n, k, share,
    EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, TILE: tl.constexpr, N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out[pick] = weights[expert of the pick] @ x[pick // share], for a tile of picks in `order`. A pick is a
    token's choice of an expert. `until` counts the picks of each expert and of those before it."""
    release()
    wait()
    number = tl.program_id(0)
    expert = tl.arange(0, EXPERT_BLOCK)
    known = expert < EXPERTS
    count = tl.load(counts + expert, known, 0)
    tiles = tl.cumsum(tl.cdiv(count, TILE), 0)
    chosen = tl.sum((known & (tiles <= number)).to(tl.int32), 0)
    if chosen >= EXPERTS:
        return
    tile = number - tl.sum(tl.where(expert == chosen, tiles - tl.cdiv(count, TILE), 0), 0)
    end = tl.load(until + chosen)
    place = end - tl.load(counts + chosen) + tile * TILE + tl.arange(0, TILE)
    own = place < end
    pick = tl.load(order + place, own, 0)
    row, column = tl.program_id(1) * N_BLOCK + tl.arange(0, N_BLOCK), tl.arange(0, K_BLOCK)
    at = weights + (chosen.to(tl.int64) * n + row)[:, None] * k + column[None]
    across = x + (pick // share)[None] * k + column[:, None]
    sums = tl.zeros((N_BLOCK, TILE), tl.float32)
    for start in range(0, k, K_BLOCK):
        inside = start + column < k
        left = tl.load(at + start, (row < n)[:, None] & inside[None], 0.0)
        right = tl.load(across + start, own[None] & inside[:, None], 0.0)
        sums = tl.dot(left, right, acc=sums, input_precision="ieee" if EXACT else "tf32")
    spot = out + pick[None] * n + row[:, None]
    tl.store(spot, sums.to(out.dtype.element_ty), (row < n)[:, None] & own[None])


def _each(x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, share: int) -> Tensor:
    """[picks, N]: each pick's row of x times its expert's weights [E, N, K]; `share` picks have the
    same row."""
    (experts, n, k), picks = weights.shape, order.shape[0]
    tile = min(max(pow2(picks // experts), MIN_TILE), MAX_TILE)
    out = x.new_empty(picks, n)
    grid = (min(picks, experts + picks // tile), triton.cdiv(n, N_BLOCK))
    _grouped[grid](
        x, weights, out, order, counts.cumsum(0), counts, n, k, share,
        EXPERTS=experts, EXPERT_BLOCK=pow2(experts), TILE=tile, N_BLOCK=N_BLOCK, K_BLOCK=K_BLOCK,
        EXACT=x.dtype == torch.float32, num_warps=4, num_stages=3, **OPTIONS,
    )  # fmt: skip
    return out


def experts(x: Tensor, logits: Tensor, packed: DenseExperts, k: int, normalise: bool) -> Tensor:
    """As `Kernels.experts`."""
    shares, chosen = logits.softmax(-1, dtype=torch.float32).topk(k, -1)
    if normalise:
        shares = shares / shares.sum(-1, keepdim=True)
    picks = chosen.view(-1)
    order = picks.argsort(stable=True)
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, picks, torch.ones_like(picks))
    hidden = act_and_mul(_each(x.contiguous(), packed.gate_up, order, counts, k), packed.activation)
    made = _each(hidden, packed.down, order, counts, 1)
    return (made.view(-1, k, x.shape[1]).float() * shares[:, :, None]).sum(1).to(x.dtype)
