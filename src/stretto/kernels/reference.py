"""The table in plain torch: correct on any device, and quick where torch is.

It is what the other tables are tested against. Few dispatches per layer matter more here than elegance per
operation: a step of a small model on one core is mostly dispatch. Knows no family of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.kernels import Activation, Attention, Batch, Cache, Experts, Geometry, Kernels, Linear, Rotation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
# Decodes share one gather while padding them to the longest wastes little, and the copy stays this small.
NEAR_TOKENS = 64
NEAR_SHARE = 0.75
GATHER_ELEMENTS = 2**25


@dataclass(frozen=True, slots=True)
class Dense:
    weight: Tensor
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def shares(self, weight: Tensor) -> bool:
        return self.weight is weight


@dataclass(frozen=True, slots=True)
class DenseExperts:
    gate_up: Tensor
    down: Tensor
    activation: Activation

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def shares(self, weight: Tensor) -> bool:
        return weight is self.gate_up or weight is self.down


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences whose attention is one call. `blocks`: rows of the cache to gather, [2 * G * kv_heads * n].

    `rows`: their token rows; a decode group has one each, a prefill group is one sequence and a slice.
    `first` and `last` bound the keys within what is gathered. `mask`: added to the scores, [G or 1, 1,
    queries, keys].
    """

    rows: Tensor | slice
    count: int
    queries: int
    blocks: Tensor
    first: int
    last: int
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's shared arrays: cosine and signed sine [T, 1, dims] per rotation, the cache rows each token's
    keys and values go to [T, 2 * kv_heads], and the groups of attention by window."""

    rotations: list[tuple[Tensor, Tensor]]
    rows: Tensor
    groups: dict[int, list[Group]]
    cache: Cache


@dataclass(frozen=True, slots=True)
class Pages:
    """The step as the grouping of attention reads it."""

    tables: Tensor
    size: int
    kv_heads: int
    head_dim: int
    blocks: int
    dtype: torch.dtype


def linear(x: Tensor, packed: Linear) -> Tensor:
    assert isinstance(packed, Dense)
    return F.linear(x, packed.weight, packed.bias)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = residual.add_(x)
    return F.rms_norm(residual, weight.shape, weight, eps), residual


def gate(gate_up: Tensor, activation: Activation) -> Tensor:
    gates, ups = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gates).mul_(ups)


def prepare(batch: Batch, cache: Cache, geometry: Geometry) -> Plan:
    _, blocks, kv_heads, size, head_dim = cache.layers[0].shape
    dtype = cache.layers[0].dtype
    positions = batch.positions.to(torch.float32)[:, None, None]
    pages = Pages(batch.tables, size, kv_heads, head_dim, blocks, dtype)
    # A token's key of head h is row (block * kv_heads + h) * size + offset, its value one pool further.
    first = batch.slots + batch.slots.div(size, rounding_mode="floor") * (size * (kv_heads - 1))
    heads = torch.arange(0, kv_heads * size, size, device=first.device)
    lanes = torch.cat((heads, heads + blocks * kv_heads * size))
    return Plan(
        rotations=[_rotation(rotation, positions, dtype) for rotation in geometry.rotations],
        rows=first[:, None] + lanes,
        groups={window: _groups(batch, pages, window) for window in geometry.windows},
        cache=cache,
    )


def _rotation(rotation: Rotation, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # The sine of the first half is negated by negating its angle, which leaves the cosine as it is.
    angles = positions * torch.cat((-rotation.frequencies, rotation.frequencies))
    cosines, sines = angles.cos(), angles.sin()
    if rotation.scale != 1.0:
        cosines, sines = cosines.mul_(rotation.scale), sines.mul_(rotation.scale)
    return cosines.to(dtype), sines.to(dtype)


def _groups(batch: Batch, pages: Pages, window: int) -> list[Group]:
    groups: list[Group] = []
    decodes: list[tuple[int, int, int]] = []
    start = 0
    for sequence, (queries, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        if queries == 1:
            seen = min(context, window) if window else context
            decodes.append((seen, sequence, start))
        else:
            groups.append(_prefill(pages, sequence, slice(start, start + queries), context, window))
        start += queries
    if decodes:
        element = pages.kv_heads * pages.head_dim * 2
        for members in _near(decodes, max(1, GATHER_ELEMENTS // element)):
            contexts = [batch.context_lens[sequence] for _, sequence, _ in members]
            groups.append(_decode(pages, members, contexts, whole=len(members) == start))
    return groups


def _near(decodes: list[tuple[int, int, int]], budget: int) -> list[list[tuple[int, int, int]]]:
    """Split decodes, as (keys seen, sequence, row), into groups of similar length of at most `budget`
    keys."""
    longest, shortest = max(decodes)[0], min(decodes)[0]
    if shortest >= min(longest - NEAR_TOKENS, longest * NEAR_SHARE) and longest * len(decodes) <= budget:
        return [decodes]
    groups: list[list[tuple[int, int, int]]] = []
    longest = 0
    for decode in sorted(decodes, reverse=True):
        near = decode[0] >= min(longest - NEAR_TOKENS, longest * NEAR_SHARE)
        if groups and near and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(decode)
        else:
            groups.append([decode])
            longest = decode[0]
    return groups


def _gather(pages: Pages, table: Tensor) -> Tensor:
    """Cache rows of `block_size * head_dim` holding the keys, then the values, of the blocks [G, n]."""
    heads = torch.arange(pages.kv_heads, device=table.device)[:, None]
    keys = table[:, None, :] * pages.kv_heads + heads
    return torch.stack((keys, keys + pages.blocks * pages.kv_heads)).view(-1)


def _decode(pages: Pages, members: list[tuple[int, int, int]], contexts: list[int], *, whole: bool) -> Group:
    size, device = pages.size, pages.tables.device
    if len(members) == 1:
        seen, sequence, row = members[0]
        first = (contexts[0] - seen) // size
        table = pages.tables[sequence : sequence + 1, first : (contexts[0] - 1) // size + 1]
        skip = contexts[0] - seen - first * size
        return Group(slice(row, row + 1), 1, 1, _gather(pages, table), skip, skip + seen, None, False)
    # Columns are clamped to a sequence's own last block: padding must not read a neighbour's keys.
    firsts = [(context - member[0]) // size for context, member in zip(contexts, members, strict=True)]
    lasts = [(context - 1) // size for context in contexts]
    width = max(last - first for first, last in zip(firsts, lasts, strict=True)) + 1
    numbers = torch.tensor([firsts, lasts, contexts, *zip(*members, strict=True)], device=device)
    first, last, context, seen, sequence, row = numbers[:, :, None]
    columns = torch.minimum(first + torch.arange(width, device=device), last)
    table = pages.tables[sequence, columns]
    keys = first * size + torch.arange(width * size, device=device)
    hidden = (keys >= context) | (keys < context - seen)
    mask = torch.zeros(hidden.shape, dtype=pages.dtype, device=device).masked_fill_(hidden, -torch.inf)
    rows = slice(0, len(members)) if whole else row[:, 0]
    return Group(rows, len(members), 1, _gather(pages, table), 0, width * size, mask[:, None, None, :], False)


def _prefill(pages: Pages, sequence: int, rows: slice, context: int, window: int) -> Group:
    size, queries = pages.size, rows.stop - rows.start
    oldest = max(0, context - queries - window + 1) if window else 0
    first = oldest // size
    table = pages.tables[sequence : sequence + 1, first : (context - 1) // size + 1]
    skip = oldest - first * size
    mask = None
    causal = queries == context and not (0 < window < context)
    if not causal:
        query = torch.arange(context - queries, context, device=table.device)[:, None]
        key = torch.arange(oldest, context, device=table.device)
        hidden = key > query
        if window:
            hidden |= key <= query - window
        mask = torch.zeros(hidden.shape, dtype=pages.dtype, device=table.device)
        mask = mask.masked_fill_(hidden, -torch.inf)[None, None]
    return Group(rows, 1, queries, _gather(pages, table), skip, skip + context - oldest, mask, causal)


def place(qkv: Tensor, weights: Tensor | None, kind: Attention, layer: Tensor, plan: Plan) -> Tensor:
    tokens, heads, rotated = qkv.shape[0], kind.heads, kind.heads + kind.kv_heads
    lanes = qkv.view(tokens, -1, kind.head_dim)
    both = lanes[:, :rotated]
    if weights is not None:
        if kind.norm == "head":
            scales = weights.view(rotated, kind.head_dim)
            torch.mul(F.rms_norm(both, (kind.head_dim,), None, kind.eps), scales, out=both)
        else:
            for part in (slice(heads * kind.head_dim), slice(heads * kind.head_dim, rotated * kind.head_dim)):
                row = qkv[:, part]
                row.copy_(F.rms_norm(row, (row.shape[1],), weights[part], kind.eps))
    cosines, sines = plan.rotations[kind.rotation]
    dims = cosines.shape[-1]
    if dims != kind.head_dim:
        both = both[:, :, :dims]
    swapped = both.roll(dims // 2, -1)
    both.mul_(cosines).addcmul_(swapped, sines)
    layer.view(-1, kind.head_dim).index_put_((plan.rows,), lanes[:, heads:])
    return lanes[:, :heads]


def attend(q: Tensor, kind: Attention, layer: Tensor, plan: Plan) -> Tensor:
    groups = plan.groups[kind.window]
    if len(groups) == 1:
        return _attend(q, kind, layer, groups[0], plan.cache).reshape(q.shape[0], -1)
    out = q.new_empty(q.shape)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], kind, layer, group, plan.cache)
    return out.view(q.shape[0], -1)


def _attend(q: Tensor, kind: Attention, layer: Tensor, group: Group, cache: Cache) -> Tensor:
    """Queries [G * queries, heads, head_dim] of one group -> the same shape."""
    kv_heads, share = kind.kv_heads, kind.heads // kind.kv_heads
    keys, values = _read(layer, group, cache)
    if group.queries == 1:
        # The heads that share a key are that key's queries: nothing is repeated.
        q = q.reshape(group.count, kv_heads, share, kind.head_dim)
        return _scores(q, keys, values, kind, group).view(-1, kind.heads, kind.head_dim)
    q = q.view(group.queries, kv_heads, share, kind.head_dim).permute(1, 2, 0, 3)
    keys, values = (x[0][:, None].expand(-1, share, -1, -1) for x in (keys, values))
    out = _scores(q, keys, values, kind, group)
    return out.permute(2, 0, 1, 3).reshape(group.queries, kind.heads, kind.head_dim)


def _read(layer: Tensor, group: Group, cache: Cache) -> Tensor:
    """Keys and values [2, G, kv_heads, keys, head_dim], gathered into memory that is kept: fresh pages for
    every layer would cost more than the copy."""
    _, _, kv_heads, size, head_dim = layer.shape
    needed = group.blocks.shape[0] * size * head_dim
    if cache.scratch.numel() < needed or cache.scratch.dtype != layer.dtype:
        cache.scratch = layer.new_empty(needed * 5 // 4)
    out = cache.scratch[:needed].view(-1, size * head_dim)
    torch.index_select(layer.view(-1, size * head_dim), 0, group.blocks, out=out)
    return out.view(2, group.count, kv_heads, -1, head_dim)[:, :, :, group.first : group.last]


def _scores(q: Tensor, keys: Tensor, values: Tensor, kind: Attention, group: Group) -> Tensor:
    """Softmax attention of [B, N, queries, head_dim] over [B, N, keys, head_dim]."""
    if not kind.softcap:
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=group.mask, is_causal=group.causal, scale=kind.scale
        )
    scores = torch.matmul(q, keys.transpose(-1, -2)).float().mul_(kind.scale / kind.softcap)
    scores = scores.tanh_().mul_(kind.softcap)
    if group.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(later, -torch.inf)
    elif group.mask is not None:
        scores += group.mask
    return torch.matmul(scores.softmax(-1).to(q.dtype), values)


def experts(x: Tensor, logits: Tensor, packed: Experts, k: int, normalise: bool) -> Tensor:
    assert isinstance(packed, DenseExperts)
    weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(k, -1)
    if normalise:
        weights /= weights.sum(-1, keepdim=True)
    weights = weights.to(x.dtype).view(-1, 1)
    order = chosen.view(-1).argsort(stable=True)
    counts = torch.bincount(chosen.view(-1), minlength=logits.shape[1]).tolist()
    out, start = torch.zeros_like(x), 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        picks = order[start : start + count]
        rows = picks.div(k, rounding_mode="floor")
        hidden = gate(F.linear(x[rows], packed.gate_up[expert]), packed.activation)
        out.index_add_(0, rows, F.linear(hidden, packed.down[expert]) * weights[picks])
        start += count
    return out


REFERENCE = Kernels(
    name="torch",
    pack=Dense,
    linear=linear,
    norm=norm,
    add_norm=add_norm,
    gate=gate,
    prepare=prepare,
    place=place,
    attend=attend,
    pack_experts=DenseExperts,
    experts=experts,
)
