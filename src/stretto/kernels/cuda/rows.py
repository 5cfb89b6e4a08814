"""Kernels that treat each token row by itself: norms, activations, the rotary embedding, writing to
the cache, quantisation.

Values are computed in float32 and rounded once, when they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels import Activation, Attention, Batch, Rotation
from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
ACT_BLOCK = 1024
# A step of many tokens has enough programs when each of them rotates several heads.
LANES, LANES_FROM = 16, 128
# Columns of a row that share a scale, in int4 weights and in the e4m3 rows that experts multiply.
GROUP = 128
ZERO_POINT = 8
PADDED, SPARE_ROWS = range(65, 513), 128  # rows that the vendor's products may pad, and by how many at most


@dataclass(frozen=True, slots=True)
class Operand:
    """Rows [M, K] as a product multiplies them. Those in e4m3 have a float32 scale each, [M]. Many rows in
    front of int4 weights have `zeros` float32 [groups, M]: -ZERO_POINT / 512 times the sum of each GROUP
    columns of a row, which is what levels around zero have less than levels from zero."""

    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * tl.sigmoid(x)
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if KIND == "gelu_tanh":
        # (1 + tanh(y)) / 2 is sigmoid(2 y)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return tl.maximum(x, 0.0)


@triton.jit
def quantised(value, scale_at, MAX: tl.constexpr):
    """A row divided by the scale that brings its largest magnitude to MAX; the scale is stored."""
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / MAX
    tl.store(scale_at, scale)
    return value / scale


@triton.jit
def _norm(
    x, residual, weight, out, scales_out, width, x_stride, out_stride, eps,
    ADD: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    release()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scales = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    wait()
    value = tl.load(x + row * x_stride + columns, inside, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * width + columns, inside, 0.0).to(tl.float32)
        total = value.to(residual.dtype.element_ty)
        tl.store(residual + row * width + columns, total, inside)
        value = total.to(tl.float32)
    mean = tl.sum(value * value, 0) / width
    value = value * tl.rsqrt(mean + eps) * scales
    if scales_out is not None:
        value = quantised(value, scales_out + row, MAX)
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), inside)


def _launch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float, scales: Tensor | None = None
) -> None:
    block = pow2(x.shape[-1])
    _norm[(x.shape[0],)](
        x, residual, weight, out, scales, x.shape[-1], x.stride(0), out.stride(0), eps,
        ADD=residual is not None, MAX=FP8_MAX, BLOCK=block,
        num_warps=min(max(block // 512, 1), 16), **OPTIONS,
    )  # fmt: skip


def new_rows(like: Tensor, rows: int, width: int) -> Tensor:
    """An empty matrix in the dtype of `like`. If its products may be padded, there is room for SPARE_ROWS
    more rows behind it."""
    spare = SPARE_ROWS if rows in PADDED else 0
    return like.new_empty(rows + spare, width)[:rows]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = new_rows(x, *x.shape)
    if x.shape[0]:
        _launch_norm(x, None, weight, out, eps)
    return out


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    out = new_rows(x, *x.shape)
    if x.shape[0]:
        _launch_norm(x, residual, weight, out, eps)
    return out, residual


def quantised_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x, plus the residual sum if there is one, as `quantise_rows` rounds it -> (e4m3 [M, K],
    scales [M], the sum). `residual` is overwritten."""
    out, scales = torch.empty_like(x, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)
    _launch_norm(x, residual, weight, out, eps, scales)
    return out, scales, x if residual is None else residual


@triton.jit
def _act_and_mul(both, out, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    release()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    wait()
    gates = tl.load(both + row * 2 * width + columns, inside, 0.0).to(tl.float32)
    ups = tl.load(both + (row * 2 + 1) * width + columns, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + columns, activate(gates, KIND) * ups, inside)


def act_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = new_rows(gate_up, rows, width)
    block = min(pow2(width), ACT_BLOCK)
    if rows:
        grid = (rows, triton.cdiv(width, block))
        _act_and_mul[grid](gate_up, out, width, KIND=activation, BLOCK=block, **OPTIONS)
    return out


@triton.jit
def _quantised_act_and_mul(
    both, out, scales, width, KIND: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    release()
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < width
    wait()
    gates = tl.load(both + row * 2 * width + columns, inside, 0.0).to(tl.float32)
    ups = tl.load(both + (row * 2 + 1) * width + columns, inside, 0.0).to(tl.float32)
    value = quantised(activate(gates, KIND) * ups, scales + row, MAX)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), inside)


def quantised_act_and_mul(gate_up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """`act_and_mul` as `quantise_rows` rounds it."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=FP8, device=gate_up.device)
    scales, block = gate_up.new_empty(rows, dtype=torch.float32), pow2(width)
    _quantised_act_and_mul[(rows,)](
        gate_up, out, scales, width, KIND=activation, MAX=FP8_MAX, BLOCK=block,
        num_warps=min(max(block // 1024, 1), 16), **OPTIONS,
    )  # fmt: skip
    return out, scales


@triton.jit
def store_zeros(rounded, zeros, row, k, GROUP: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr):
    """The `zeros` of an `Operand`, of one row in e4m3 by a program of `row`; programs are as many as rows."""
    group = tl.arange(0, BLOCK // GROUP)
    sums = tl.sum(tl.reshape(rounded.to(tl.float32), (BLOCK // GROUP, GROUP)), 1)
    spot = zeros + group.to(tl.int64) * tl.num_programs(0) + row
    tl.store(spot, sums * (ZERO / -512), group * GROUP < k)


@triton.jit
def _quantise_rows(
    x, out, scales, zeros, k, GROUP: tl.constexpr, ZERO: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    release()
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wait()
    value = tl.load(x + row * k + column, column < k, 0.0).to(tl.float32)
    rounded = quantised(value, scales + row, MAX).to(out.dtype.element_ty)
    tl.store(out + row * k + column, rounded, column < k)
    if zeros is not None:
        store_zeros(rounded, zeros, row, k, GROUP, ZERO, BLOCK)


def _launch_quantise(x: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
    out, scales = torch.empty_like(x, dtype=FP8), x.new_empty(x.shape[0], dtype=torch.float32)
    block = pow2(x.shape[1], GROUP)
    _quantise_rows[(x.shape[0],)](
        x, out, scales, zeros, x.shape[1], GROUP=GROUP, ZERO=ZERO_POINT,
        MAX=FP8_MAX, BLOCK=block, num_warps=min(max(block // 512, 1), 16), **OPTIONS,
    )  # fmt: skip
    return out, scales


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> e4m3 [M, K], and the float32 scale of each row."""
    return _launch_quantise(x, None)


def quantise_and_sum_rows(x: Tensor) -> Operand:
    """As `quantise_rows`, with the `zeros` of an `Operand`."""
    zeros = x.new_empty((triton.cdiv(x.shape[1], GROUP), x.shape[0]), dtype=torch.float32)
    return Operand(*_launch_quantise(x, zeros), zeros)


@triton.jit
def _cos_sin(positions, frequencies, out, pairs, scale, BLOCK: tl.constexpr):
    release()
    wait()
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < pairs
    angles = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + pair, inside, 0.0)
    tl.store(out + row * 2 * pairs + pair, tl.cos(angles) * scale, inside)
    tl.store(out + (row * 2 + 1) * pairs + pair, tl.sin(angles) * scale, inside)


def cos_sin_table(batch: Batch, rotation: Rotation) -> Tensor:
    """Cosines, then sines, of position * frequency for each token of the step: float32 [T, 2, pairs]."""
    tokens, pairs = batch.positions.shape[0], rotation.frequencies.shape[0]
    out = torch.empty((tokens, 2, pairs), dtype=torch.float32, device=batch.positions.device)
    block = pow2(pairs)
    _cos_sin[(tokens,)](
        batch.positions, rotation.frequencies, out, pairs, rotation.scale, BLOCK=block, num_warps=1, **OPTIONS
    )
    return out


@triton.jit
def _rope_and_cache(
    qkv, weights, cos_sin, slots, layer, blocks, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, SIZE: tl.constexpr,
    NORM: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """LANES heads of one token. The dimensions of a head are PAIRS firsts, as many seconds, and REST that are
    not rotated."""
    release()
    token, lane = tl.program_id(0).to(tl.int64), tl.program_id(1) * LANES + tl.arange(0, LANES)
    pair, rest = tl.arange(0, PAIR_BLOCK)[None], (2 * PAIRS + tl.arange(0, REST_BLOCK))[None]
    there = (lane < HEADS + 2 * KV_HEADS)[:, None]
    rotates = (lane < HEADS + KV_HEADS)[:, None]
    paired, resting = there & (pair < PAIRS), there & (rest < 2 * PAIRS + REST)
    here = qkv + (token * (HEADS + 2 * KV_HEADS) + lane[:, None]) * DIM
    wait()
    first = tl.load(here + pair, paired, 0.0).to(tl.float32)
    second = tl.load(here + PAIRS + pair, paired, 0.0).to(tl.float32)
    others = tl.load(here + rest, resting, 0.0).to(tl.float32)
    if NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(others * others, 1)
        unit = tl.where(rotates, tl.rsqrt(square / DIM + eps)[:, None], 1.0)
        scales = weights + lane[:, None] * DIM
        first = first * unit * tl.load(scales + pair, paired & rotates, 1.0).to(tl.float32)
        second = second * unit * tl.load(scales + PAIRS + pair, paired & rotates, 1.0).to(tl.float32)
        others = others * unit * tl.load(scales + rest, resting & rotates, 1.0).to(tl.float32)
    cosine = tl.load(cos_sin + token * 2 * PAIRS + pair, paired & rotates, 1.0)
    sine = tl.load(cos_sin + (token * 2 + 1) * PAIRS + pair, paired & rotates, 0.0)
    slot, head = tl.load(slots + token), (lane - HEADS) % KV_HEADS
    block = (lane - HEADS) // KV_HEADS * blocks + slot // SIZE
    cached = layer + ((block * KV_HEADS + head) * SIZE + slot % SIZE)[:, None] * DIM
    out = tl.where((lane < HEADS)[:, None], here, cached)
    kind = qkv.dtype.element_ty
    tl.store(out + pair, (first * cosine - second * sine).to(kind), paired)
    tl.store(out + PAIRS + pair, (second * cosine + first * sine).to(kind), paired)
    tl.store(out + rest, others.to(kind), resting)


def rope_and_cache(
    qkv: Tensor, weights: Tensor | None, kind: Attention, layer: Tensor, cos_sin: Tensor, slots: Tensor
) -> Tensor:
    """As `Kernels.rope_and_cache`; `cos_sin` as `cos_sin_table` makes it."""
    qkv = qkv.contiguous()
    tokens, pairs = qkv.shape[0], cos_sin.shape[2]
    queries, keys = kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim
    if weights is not None and kind.norm == "row":
        for part in (slice(queries), slice(queries, queries + keys)):
            _launch_norm(qkv[:, part], None, weights[part], qkv[:, part], kind.eps)
    rest = kind.head_dim - 2 * pairs
    lanes = LANES if tokens >= LANES_FROM else 1
    _rope_and_cache[(tokens, triton.cdiv(kind.heads + 2 * kind.kv_heads, lanes))](
        qkv, weights, cos_sin, slots, layer, layer.shape[1], kind.eps,
        HEADS=kind.heads, KV_HEADS=kind.kv_heads, DIM=kind.head_dim, PAIRS=pairs, SIZE=layer.shape[3],
        NORM=weights is not None and kind.norm == "head",
        PAIR_BLOCK=pow2(pairs), REST=rest, REST_BLOCK=pow2(rest), LANES=lanes,
        num_warps=1 if lanes == 1 else 4, **OPTIONS,
    )  # fmt: skip
    return qkv.view(tokens, -1, kind.head_dim)[:, : kind.heads]
