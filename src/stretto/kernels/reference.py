"""The kernels table in plain torch: correct on any device, and the reference that other tables are
tested against.

A step of a small model on one core spends most of its time dispatching torch operations. Hence the code makes
few calls per layer, even where more of them would be easier to read. Knows no model family.
"""

# torch's stubs do not type `vector_norm` and `tolist`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.kernels import Activation, Attention, Batch, Cache, Geometry, Kernels, Rotation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
# Decodes share one attention call if their contexts are similar, so that padding to the longest wastes
# little, and if the keys they gather fit into the processor's cache.
SIMILAR_TOKENS = 64
SIMILAR_SHARE = 0.75
GATHER_ELEMENTS = 2**19

Decode = tuple[int, int, int, int]
"""Keys seen, sequence, token row, context."""


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
class AttentionGroup:
    """Sequences whose attention is one call: decodes of one row each, or one prefill.

    `rows`: their token rows.
    `count`, `queries`: how many sequences there are, and the queries of each.
    `blocks`: the rows of the cache, seen as [-1, block_size * head_dim], with their keys, then their values.
    `gathered`: the buffer that these are copied to; `keys` and `values` are views of it.
    `mask`: added to the scores, [count or 1, 1, queries, keys].
    """

    rows: Tensor | slice
    count: int
    queries: int
    blocks: Tensor
    gathered: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """What the layers of a step share.

    `rotations`: cosines and signed sines [T, 1, dims] of each rotary embedding.
    `rows`: the cache rows that each token's keys and values are written to, [T, 2 * kv_heads].
    `groups`: the attention calls for layers with each window.
    """

    rotations: list[tuple[Tensor, Tensor]]
    rows: Tensor
    groups: dict[int, list[AttentionGroup]]


@dataclass(frozen=True, slots=True)
class CacheReader:
    """Finds the keys and values of a step's sequences. `heads`: what to add to the row of a block's first key
    to get the rows of its keys, then its values, for every head: [2, 1, kv_heads, 1]."""

    cache: Cache
    tables: Tensor
    heads: Tensor

    def group(
        self, rows: Tensor | slice, queries: int, table: Tensor, keys: slice, mask: Tensor | None
    ) -> AttentionGroup:
        """Attention of `queries` rows for each line of `table` [G, n], to those of its blocks' keys that
        `keys` selects."""
        layer = self.cache.layers[0]
        _, _, kv_heads, size, head_dim = layer.shape
        blocks = (table[:, None] * kv_heads + self.heads).view(-1)
        needed = blocks.shape[0] * size * head_dim
        # The buffer is kept: fresh memory for every layer would cost more than the copy.
        if self.cache.scratch.numel() < needed or self.cache.scratch.dtype != layer.dtype:
            self.cache.scratch = layer.new_empty(needed * 5 // 4)
        gathered = self.cache.scratch[:needed].view(-1, size * head_dim)
        both = gathered.view(2, table.shape[0], kv_heads, -1, head_dim)[:, :, :, keys]
        return AttentionGroup(rows, table.shape[0], queries, blocks, gathered, both[0], both[1], mask)


def linear(x: Tensor, packed: Dense) -> Tensor:
    return F.linear(x, packed.weight, packed.bias)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == torch.float32:
        return _unit(x, eps).mul_(weight)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = residual.add_(x)
    return norm(residual, weight, eps), residual


def _unit(x: Tensor, eps: float) -> Tensor:
    """RMS norm without a weight. In float32 it takes three torch operations, by
    x / sqrt(mean(x * x) + eps) = sqrt(n) * x / hypot(|x|, sqrt(n * eps))."""
    size = x.shape[-1]
    if x.dtype != torch.float32:
        return F.rms_norm(x, (size,), None, eps)
    nothing, floor = _constants(size, eps, x.device)
    length = torch.linalg.vector_norm(x, 2, -1, True).hypot_(floor)
    return torch.addcdiv(nothing, x, length, value=size**0.5)


@functools.cache
def _constants(size: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros((), device=device), torch.tensor((size * eps) ** 0.5, device=device)


def act_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    gates, ups = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gates).mul_(ups)


def linear_act_and_mul(x: Tensor, packed: Dense, activation: Activation) -> Tensor:
    return act_and_mul(linear(x, packed), activation)


def prepare(batch: Batch, cache: Cache, geometry: Geometry) -> TorchPlan:
    layer = cache.layers[0]
    _, blocks, kv_heads, size, _ = layer.shape
    positions = batch.positions.to(torch.float32)[:, None, None]
    # The key of head h is row (block * kv_heads + h) * size + offset; its value is blocks * kv_heads * size
    # rows further.
    first = batch.slots + batch.slots.div(size, rounding_mode="floor") * (size * (kv_heads - 1))
    heads, lanes = _offsets(blocks, kv_heads, size, layer.device)
    reader = CacheReader(cache, batch.tables, heads)
    return TorchPlan(
        rotations=[_rotation(rotation, positions, layer.dtype) for rotation in geometry.rotations],
        rows=first[:, None] + lanes,
        groups={window: _groups(batch, reader, window) for window in geometry.windows},
    )


@functools.cache
def _offsets(blocks: int, kv_heads: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    heads = torch.arange(kv_heads, device=device)
    both = torch.cat((heads, heads + blocks * kv_heads))
    return both.view(2, 1, kv_heads, 1), both * size


def _rotation(rotation: Rotation, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Negating the angle of the first half negates its sine and leaves its cosine unchanged.
    angles = positions * torch.cat((-rotation.frequencies, rotation.frequencies))
    cosines, sines = angles.cos(), angles.sin()
    if rotation.scale != 1.0:
        cosines, sines = cosines.mul_(rotation.scale), sines.mul_(rotation.scale)
    return cosines.to(dtype), sines.to(dtype)


def _groups(batch: Batch, reader: CacheReader, window: int) -> list[AttentionGroup]:
    groups: list[AttentionGroup] = []
    decodes: list[Decode] = []
    start = 0
    for sequence, (queries, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        if queries == 1:
            decodes.append((min(context, window or context), sequence, start, context))
        else:
            groups.append(_prefill(reader, sequence, slice(start, start + queries), context, window))
        start += queries
    if decodes:
        layer = reader.cache.layers[0]
        for members in group_by_length(decodes, GATHER_ELEMENTS // (2 * layer.shape[2] * layer.shape[4])):
            groups.append(_decode(reader, members, whole=len(members) == start))
    return groups


def group_by_length(decodes: list[Decode], budget: int) -> list[list[Decode]]:
    """Split decodes into groups of similar length, each of at most `budget` keys, padding included."""
    longest, shortest = max(decodes)[0], min(decodes)[0]
    if (
        shortest >= min(longest - SIMILAR_TOKENS, longest * SIMILAR_SHARE)
        and longest * len(decodes) <= budget
    ):
        return [decodes]
    groups: list[list[Decode]] = []
    for decode in sorted(decodes, reverse=True):
        longest = groups[-1][0][0] if groups else 0
        similar = decode[0] >= min(longest - SIMILAR_TOKENS, longest * SIMILAR_SHARE)
        if groups and similar and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(decode)
        else:
            groups.append([decode])
    return groups


def _decode(reader: CacheReader, members: list[Decode], *, whole: bool) -> AttentionGroup:
    """Decodes of one row each. `whole`: the step has no other rows."""
    size, device = reader.cache.block_size, reader.tables.device
    if len(members) == 1:
        seen, sequence, row, context = members[0]
        first = (context - seen) // size
        table = reader.tables[sequence : sequence + 1, first : (context - 1) // size + 1]
        skip = context - seen - first * size
        return reader.group(slice(row, row + 1), 1, table, slice(skip, skip + seen), None)
    width = max((context - 1) // size - (context - seen) // size for seen, _, _, context in members) + 1
    seen, sequence, row, context = torch.tensor(members, device=device).t()[:, :, None]
    first = (context - seen).div(size, rounding_mode="floor")
    # Columns are clamped to a sequence's last block, so that padding reads no other sequence's keys.
    last = (context - 1).div(size, rounding_mode="floor")
    columns = torch.minimum(first + torch.arange(width, device=device), last)
    keys = first * size + torch.arange(width * size, device=device)
    mask = _mask((keys >= context) | (keys < context - seen), reader)
    rows = slice(0, len(members)) if whole else row[:, 0]
    return reader.group(rows, 1, reader.tables[sequence, columns], slice(None), mask[:, None, None])


def _prefill(reader: CacheReader, sequence: int, rows: slice, context: int, window: int) -> AttentionGroup:
    size, device, queries = reader.cache.block_size, reader.tables.device, rows.stop - rows.start
    oldest = max(0, context - queries - window + 1) if window else 0
    first = oldest // size
    table = reader.tables[sequence : sequence + 1, first : (context - 1) // size + 1]
    keys = slice(oldest - first * size, context - first * size)
    if queries == context <= (window or context):
        return replace(reader.group(rows, queries, table, keys, None), causal=True)
    query = torch.arange(context - queries, context, device=device)[:, None]
    key = torch.arange(oldest, context, device=device)
    hidden = key > query
    if window:
        hidden |= key <= query - window
    return reader.group(rows, queries, table, keys, _mask(hidden, reader))


def _mask(hidden: Tensor, reader: CacheReader) -> Tensor:
    mask = torch.zeros(hidden.shape, dtype=reader.cache.layers[0].dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf)


def rope_and_cache(
    qkv: Tensor, weights: Tensor | None, kind: Attention, layer: Tensor, plan: TorchPlan
) -> Tensor:
    tokens, heads, rotated = qkv.shape[0], kind.heads, kind.heads + kind.kv_heads
    lanes = qkv.view(tokens, -1, kind.head_dim)
    both = lanes[:, :rotated]
    if weights is not None:
        if kind.norm == "head":
            scales = weights.view(rotated, kind.head_dim)
            torch.mul(_unit(both, kind.eps), scales, out=both)
        else:
            for part in (slice(heads * kind.head_dim), slice(heads * kind.head_dim, rotated * kind.head_dim)):
                row = qkv[:, part]
                row.copy_(norm(row, weights[part], kind.eps))
    cosines, sines = plan.rotations[kind.rotation]
    dims = cosines.shape[-1]
    if dims != kind.head_dim:
        both = both[:, :, :dims]
    swapped = both.roll(dims // 2, -1)
    both.mul_(cosines).addcmul_(swapped, sines)
    layer.view(-1, kind.head_dim).index_put_((plan.rows,), lanes[:, heads:])
    return lanes[:, :heads]


def paged_attention(q: Tensor, kind: Attention, layer: Tensor, plan: TorchPlan) -> Tensor:
    groups = plan.groups[kind.window]
    if len(groups) == 1:
        return _attend(q, kind, layer, groups[0]).reshape(q.shape[0], -1)
    out = q.new_empty(q.shape)
    for group in groups:
        out[group.rows] = _attend(q[group.rows], kind, layer, group)
    return out.view(q.shape[0], -1)


def _attend(q: Tensor, kind: Attention, layer: Tensor, group: AttentionGroup) -> Tensor:
    """Attention of one group. `q` [count * queries, heads, head_dim] -> the same shape."""
    kv_heads, share, keys, values = kind.kv_heads, kind.heads // kind.kv_heads, group.keys, group.values
    torch.index_select(layer.view(-1, group.gathered.shape[1]), 0, group.blocks, out=group.gathered)
    if group.queries == 1:
        # The heads that share a key are treated as its queries, so that keys need not be repeated.
        q = q.reshape(group.count, kv_heads, share, kind.head_dim)
        return _scores(q, keys, values, kind, group).view(-1, kind.heads, kind.head_dim)
    q = q.view(group.queries, kv_heads, share, kind.head_dim).permute(1, 2, 0, 3)
    keys, values = (x[0][:, None].expand(-1, share, -1, -1) for x in (keys, values))
    out = _scores(q, keys, values, kind, group)
    return out.permute(2, 0, 1, 3).reshape(group.queries, kind.heads, kind.head_dim)


def _scores(q: Tensor, keys: Tensor, values: Tensor, kind: Attention, group: AttentionGroup) -> Tensor:
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


def experts(x: Tensor, logits: Tensor, packed: DenseExperts, k: int, normalise: bool) -> Tensor:
    def compute(rows: Tensor, expert: int) -> Tensor:
        hidden = act_and_mul(F.linear(rows, packed.gate_up[expert]), packed.activation)
        return F.linear(hidden, packed.down[expert])

    return mix_experts(x, logits, k, normalise, compute)


def mix_experts(
    x: Tensor, logits: Tensor, k: int, normalise: bool, compute: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """As `Kernels.experts`, where `compute` applies one expert to the rows of its tokens."""
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
        out.index_add_(0, rows, compute(x[rows], expert) * weights[picks])
        start += count
    return out


REFERENCE: Kernels[Dense, DenseExperts, TorchPlan] = Kernels(
    name="torch",
    pack=Dense,
    linear=linear,
    norm=norm,
    add_norm=add_norm,
    act_and_mul=act_and_mul,
    linear_act_and_mul=linear_act_and_mul,
    prepare=prepare,
    rope_and_cache=rope_and_cache,
    paged_attention=paged_attention,
    pack_experts=DenseExperts,
    experts=experts,
)
