"""The torch table against plain definitions in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import get_args

import pytest
import torch
from torch import Tensor

from stretto.kernels import Activation, Attention, Cache, Geometry, Rotation, reference
from stretto.kernels.reference import REFERENCE
from tests.kernels.steps import CPU, Step, attention, rms, rotated, step

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
KIND = Attention(heads=6, kv_heads=2, head_dim=16, scale=0.3)
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003])

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= tolerance, float(error)


def attend(made: Step, kind: Attention, q: Tensor) -> Tensor:
    """Write the keys and values of the step, then run attention. Queries and keys are not rotated."""
    geometry = Geometry((Rotation(torch.zeros(kind.head_dim // 2)),), (kind.window,))
    plan = REFERENCE.prepare(made.batch, made.cache, geometry)
    new = [
        slice(context - count, None)
        for count, context in zip(made.batch.query_lens, made.batch.context_lens, strict=True)
    ]
    keys = torch.cat([keys[rows] for keys, rows in zip(made.keys, new, strict=True)])
    values = torch.cat([values[rows] for values, rows in zip(made.values, new, strict=True)])
    qkv = torch.cat((q, keys, values), 1).flatten(1)
    placed = REFERENCE.rope_and_cache(qkv, None, kind, made.cache.layers[0], plan)
    return REFERENCE.paged_attention(placed, kind, made.cache.layers[0], plan).view(q.shape)


def queries(made: Step, kind: Attention, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(made.batch.tokens.shape[0], kind.heads, kind.head_dim).to(dtype)


def plain(made: Step, kind: Attention, q: Tensor) -> Tensor:
    parts = zip(made.rows, made.keys, made.values, strict=True)
    return torch.cat([attention(q[rows], keys, values, kind) for rows, keys, values in parts])


@dtypes
def test_linear_equals_a_matrix_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows in (1, 7):
        x, weight, bias = torch.randn(rows, 33), torch.randn(20, 33), torch.randn(20)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        near(
            REFERENCE.linear(x, REFERENCE.pack(weight, None)), x.double() @ weight.double().t(), DTYPES[dtype]
        )
        packed = REFERENCE.pack(weight, bias)
        near(REFERENCE.linear(x, packed), x.double() @ weight.double().t() + bias.double(), DTYPES[dtype])
        assert packed.nbytes == weight.nbytes + bias.nbytes
        assert packed.shares(weight) and not packed.shares(weight.clone())


@dtypes
def test_norm_and_add_norm_equal_their_definitions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (
        (torch.randn(5, 40) * torch.tensor([[1e-4], [1e-2], [1.0], [10.0], [0.0]])).to(dtype),
        torch.randn(40).to(dtype),
    )
    near(REFERENCE.norm(x, weight, 1e-5), rms(x, 1e-5) * weight.double(), DTYPES[dtype])
    y = torch.randn(5, 40).to(dtype)
    wanted = x.double() + y.double()
    found, total = REFERENCE.add_norm(x, y.clone(), weight, 1e-5)
    near(total, wanted, DTYPES[dtype])
    near(found, rms(wanted, 1e-5) * weight.double(), DTYPES[dtype])


@dtypes
@pytest.mark.parametrize("activation", get_args(Activation))
def test_act_and_mul_equals_its_definition(dtype: torch.dtype, activation: Activation) -> None:
    torch.manual_seed(0)
    both = torch.randn(3, 24).to(dtype)
    gates, ups = both.double().chunk(2, -1)
    wanted = {
        "silu": gates / (1 + (-gates).exp()),
        "gelu": gates * (1 + torch.erf(gates / 2**0.5)) / 2,
        "gelu_tanh": gates * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gates + 0.044715 * gates**3))) / 2,
        "relu": gates.clamp(min=0),
    }[activation]
    near(REFERENCE.act_and_mul(both.clone(), activation), wanted * ups, DTYPES[dtype])


@dtypes
@pytest.mark.parametrize("norm", ["none", "head", "row"])
@pytest.mark.parametrize("dims", [16, 12])
def test_rope_and_cache_rotates_queries_and_writes_keys_and_values(
    dtype: torch.dtype, norm: str, dims: int
) -> None:
    kind = replace(KIND, norm=norm, eps=1e-5)
    made = step([(3, 9), (1, 30), (1, 1), (5, 5)], kind, dtype=dtype)
    rotation = Rotation(FREQUENCIES[: dims // 2], 1.2)
    plan = REFERENCE.prepare(made.batch, made.cache, Geometry((Rotation(FREQUENCIES), rotation), (0,)))
    qkv = torch.randn(10, 10 * 16).to(dtype)
    weights = None if norm == "none" else torch.randn(8 * 16).to(dtype)
    q, k, v = qkv.double().view(10, 10, 16).split((6, 2, 2), 1)
    if weights is not None:
        scales = weights.double().view(8, 16)
        normed = [rms(x if norm == "head" else x.flatten(1), 1e-5).view(x.shape) for x in (q, k)]
        q, k = normed[0] * scales[:6], normed[1] * scales[6:]
    q, k = (rotated(x, made.batch.positions, rotation.frequencies, 1.2) for x in (q, k))
    before = made.cache.layers[0].clone()
    kind = replace(kind, rotation=1)
    near(REFERENCE.rope_and_cache(qkv.clone(), weights, kind, made.cache.layers[0], plan), q, DTYPES[dtype])
    blocks, offsets = made.batch.slots // 4, made.batch.slots % 4
    near(made.cache.layers[0][0, blocks, :, offsets], k, DTYPES[dtype])
    near(made.cache.layers[0][1, blocks, :, offsets], v, DTYPES[dtype])
    made.cache.layers[0][:, blocks, :, offsets] = before[:, blocks, :, offsets]
    assert torch.equal(made.cache.layers[0], before), "a slot of somebody else was written"


STEPS = {
    "one decode": [(1, 30)],
    "first token": [(1, 1)],
    "near decodes": [(1, 30), (1, 33), (1, 5), (1, 8)],
    "decodes far apart": [(1, 3), (1, 400), (1, 90), (1, 395), (1, 1)],
    "whole prompt": [(21, 21)],
    "continued prompt": [(6, 21)],
    "prompts": [(8, 8), (5, 21), (2, 2), (12, 16)],
    "everything": [(1, 17), (9, 9), (1, 200), (4, 40), (1, 2), (3, 3)],
}


@dtypes
@pytest.mark.parametrize("name", STEPS)
def test_paged_attention_is_causal_attention_over_the_cache(dtype: torch.dtype, name: str) -> None:
    made = step(STEPS[name], KIND, dtype=dtype)
    q = queries(made, KIND, dtype)
    near(attend(made, KIND, q), plain(made, KIND, q), DTYPES[dtype])


CHANGES = [{"window": 1}, {"window": 7}, {"window": 16}, {"softcap": 2.0}, {"window": 6, "softcap": 2.0}]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize(
    "changes", [{"window": 1}, {"window": 7}, {"window": 16}, {"softcap": 2.0}, {"window": 6, "softcap": 2.0}]
)
def test_paged_attention_keeps_to_windows_and_soft_caps(
    name: str, size: int, changes: dict[str, float]
) -> None:
    kind = replace(KIND, **changes)
    made = step(STEPS[name], kind, size=size)
    q = queries(made, kind)
    near(attend(made, kind, q), plain(made, kind, q), 1e-5)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1)])
def test_paged_attention_shares_keys_between_heads(heads: tuple[int, int]) -> None:
    kind = replace(KIND, heads=heads[0], kv_heads=heads[1])
    made = step(STEPS["everything"], kind)
    q = queries(made, kind)
    near(attend(made, kind, q), plain(made, kind, q), 1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_paged_attention_reads_no_block_outside_the_window(name: str) -> None:
    """Blocks before the window, and blocks that belong to no sequence of the step, hold NaN."""
    kind = replace(KIND, window=6)
    made = step(STEPS[name], kind)
    used = torch.zeros(made.cache.layers[0].shape[1], dtype=torch.bool)
    for table, count, context in zip(
        made.batch.tables, made.batch.query_lens, made.batch.context_lens, strict=True
    ):
        oldest = max(0, context - count - 5)
        used[table[oldest // 4 : (context - 1) // 4 + 1].long()] = True
    made.cache.layers[0][:, ~used] = torch.nan
    q = queries(made, kind)
    near(attend(made, kind, q), plain(made, kind, q), 1e-5)


def test_nan_in_one_sequence_does_not_reach_other_sequences() -> None:
    """Decodes share one call, so NaN in the keys of one sequence could reach another."""
    made = step([(1, 9), (1, 30), (1, 14)], KIND)
    made.cache.layers[0][:, made.batch.tables[1].long()] = torch.nan
    q = queries(made, KIND)
    found = attend(made, KIND, q)
    assert found[1].isnan().all()
    wanted = plain(made, KIND, q)
    near(found[[0, 2]], wanted[[0, 2]], 1e-5)


def test_erase_zeroes_blocks_in_every_layer() -> None:
    cache = Cache.zeros(2, (5, 1, 4, 8), torch.bfloat16, CPU)
    assert cache.block_size == 4 and cache.nbytes == 2 * 2 * 5 * 4 * 8 * 2
    for layer in cache.layers:
        assert not layer.any()
        layer.fill_(torch.nan)
    cache.erase([1, 3])
    for layer in cache.layers:
        assert not layer[:, [1, 3]].any()
        assert layer[:, [0, 2, 4]].isnan().all()


def test_decodes_of_similar_length_are_batched_together() -> None:
    """Similar contexts form one group. Contexts far apart form few groups with bounded padding."""
    decodes: list[reference.Decode] = [(500 + i, i, i, 500 + i) for i in range(20)]
    assert reference.group_by_length(decodes, 10**6) == [decodes]
    spread: list[reference.Decode] = [(2**i, i, i, 2**i) for i in range(14)]
    groups = reference.group_by_length(spread, 10**6)
    assert sorted(chain(*groups)) == spread
    assert len(groups) == 8
    for group in groups:
        assert min(group)[0] >= min(max(group)[0] - 64, max(group)[0] * 0.75)
    bounded = reference.group_by_length(decodes, 2000)
    assert sorted(chain(*bounded)) == decodes
    assert all(len(group) * max(group)[0] <= 2000 for group in bounded)


@dtypes
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
def test_experts_equal_their_definition(dtype: torch.dtype, normalise: bool, rows: int) -> None:
    torch.manual_seed(rows)
    x, logits = torch.randn(rows, 16).to(dtype), torch.randn(rows, 5).to(dtype)
    gate_up, down = torch.randn(5, 24, 16).to(dtype), torch.randn(5, 16, 12).to(dtype)
    packed = REFERENCE.pack_experts(gate_up, down, "silu")
    wanted = torch.zeros(rows, 16, dtype=torch.float64)
    for row, weights in enumerate(logits.double().softmax(-1)):
        chosen = weights.argsort(descending=True)[:3].tolist()
        for expert in chosen:
            gates, ups = (gate_up[expert].double() @ x[row].double()).chunk(2)
            made = down[expert].double() @ (gates * gates.sigmoid() * ups)
            share = weights[expert] / weights[chosen].sum() if normalise else weights[expert]
            wanted[row] += share * made
    near(REFERENCE.experts(x, logits, packed, 3, normalise), wanted, DTYPES[dtype])
    assert packed.nbytes == gate_up.nbytes + down.nbytes
