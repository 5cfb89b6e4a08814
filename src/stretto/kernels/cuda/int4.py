"""Weights of four bits: how they are rounded and laid out, and the linear layer that reads them.

A byte holds the weights of one column in two rows: row n, and in the upper half row n + half. GROUP columns
of a row share a scale (float16), chosen for the least squared error; a weight is scale * (level - 8).
"""
# Triton's kernels are no Python a type checker knows.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportPrivateImportUsage=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.cuda.launch import OPTIONS, pow2, release, wait

GROUP = 128
MIDDLE = 8
# The group's peak is the lowest level, or somewhat beyond it.
SHARES = tuple(1.0 - i * 0.04 for i in range(8))
ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Int4:
    """`weight` uint8 [half, columns padded to groups], `scales` float16 [groups, 2 * half], for rows [N] of
    `columns`."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def shares(self, weight: Tensor) -> bool:
        return False

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights that these stand for, [N, columns]."""
        half, padded = self.weight.shape
        out = torch.empty((self.rows, self.columns), dtype=dtype, device=self.weight.device)
        block = min(pow2(padded), 4096)
        _widen[(half, triton.cdiv(padded, block))](
            self.weight, self.scales, out, self.rows, self.columns, half, padded,
            GROUP=GROUP, BLOCK=block, **OPTIONS,
        )  # fmt: skip
        return out


def to_int4(weight: Tensor, bias: Tensor | None = None) -> Int4:
    """Round [N, K]: for each group the scale, of several, that leaves the least squared error."""
    rows, columns = weight.shape
    parts = [_rounded(some) for some in weight.split(ROWS_AT_ONCE)]
    levels, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    levels, scales = (F.pad(each, (0, 0, 0, rows % 2)) for each in (levels, scales))
    low, high = levels.chunk(2)
    return Int4(low | (high << 4), scales.t().contiguous(), bias, rows, columns)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels from 0 to 15, uint8 [N, padded], and scales [N, groups]."""
    groups = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.full_like(peak, torch.inf)
    kept, scales = torch.zeros_like(groups), torch.zeros_like(peak)
    for share in SHARES:
        step = peak * (-share / MIDDLE)
        levels = (groups / torch.where(step == 0, 1.0, step)).round_().clamp_(-MIDDLE, MIDDLE - 1)
        norm = levels.square().sum(-1, keepdim=True).clamp_min_(1.0)
        scale = ((levels * groups).sum(-1, keepdim=True) / norm).half().float()
        error = (groups - scale * levels).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        kept = torch.where(better, levels, kept)
    return (kept + MIDDLE).to(torch.uint8).flatten(1), scales[..., 0].half()


@triton.jit
def _levels(nibbles, like):
    """What nibbles stand for, without their scale, in the type of `like`."""
    if like.dtype.element_ty == tl.bfloat16:
        # Their bits are put into those of 128: a device does few conversions at once.
        return (nibbles.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    return nibbles.to(like.dtype.element_ty) - 8.0


@triton.jit
def _widen(weight, scales, out, n, k, half, padded, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    release()
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = tl.load(weight + row * padded + column, column < padded, 0)
    spot = scales + (column // GROUP).to(tl.int64) * 2 * half + row
    low = tl.load(spot, column < padded, 0.0).to(tl.float32)
    high = tl.load(spot + half, column < padded, 0.0).to(tl.float32)
    wait()
    kind = out.dtype.element_ty
    tl.store(out + row * k + column, (((held & 15).to(tl.float32) - 8.0) * low).to(kind), column < k)
    if row + half < n:
        further = out + (row + half) * k + column
        tl.store(further, (((held >> 4).to(tl.float32) - 8.0) * high).to(kind), column < k)


@triton.jit
def _store(sums, out, bias, row, until, place, m, n):
    """Outputs of the rows before `until`."""
    if bias is not None:
        sums += tl.load(bias + row, row < until, 0.0).to(tl.float32)[:, None]
    there = (row < until)[:, None] & (place < m)[None]
    tl.store(out + place[None] * n + row[:, None], sums.to(out.dtype.element_ty), there)


@triton.jit
def _tile(
    x, weight, scales, bias, out, parts, arrived, m, n, k, half, padded, reach,
    M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """N_BLOCK outputs and those half further on, of all rows of x, over a share of the groups. Levels go to
    the tensor cores as they are; the sums of a group are scaled. The last share to end adds the parts up."""
    release()
    split, tile = tl.program_id(0), tl.program_id(1)
    row, column = tile * N_BLOCK + tl.arange(0, N_BLOCK), tl.arange(0, GROUP)
    place, inside = tl.arange(0, M_BLOCK), row < half
    at = weight + row.to(tl.int64)[:, None] * padded + column[None]
    across = x + place[None] * k + column[:, None]
    lows = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
    highs = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
    begin = split * reach
    wait()
    for start in range(begin, tl.minimum(begin + reach, padded), GROUP):
        held = tl.load(at + start, inside[:, None], 0, eviction_policy="evict_first")
        values = tl.load(across + start, (place < m)[None] & (start + column < k)[:, None], 0.0)
        spot = scales + start // GROUP * 2 * half + row
        low = tl.load(spot, inside, 0.0).to(tl.float32)
        high = tl.load(spot + half, inside, 0.0).to(tl.float32)
        below = tl.dot(_levels(held & 15, x), values, input_precision="ieee" if EXACT else "tf32")
        above = tl.dot(_levels(held >> 4, x), values, input_precision="ieee" if EXACT else "tf32")
        lows += below * low[:, None]
        highs += above * high[:, None]
    if SPLITS > 1:
        own = parts + (place[None] * SPLITS).to(tl.int64) * 2 * half + row[:, None]
        there = inside[:, None] & (place < m)[None]
        tl.store(own + split * 2 * half, lows, there)
        tl.store(own + split * 2 * half + half, highs, there)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") != SPLITS - 1:
            return
        lows = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
        highs = tl.zeros((N_BLOCK, M_BLOCK), tl.float32)
        for other in tl.static_range(SPLITS):
            lows += tl.load(own + other * 2 * half, there, 0.0, cache_modifier=".cg")
            highs += tl.load(own + other * 2 * half + half, there, 0.0, cache_modifier=".cg")
        tl.store(arrived + tile, 0)
    _store(lows, out, bias, row, half, place, m, n)
    _store(highs, out, bias, row + half, n, place, m, n)


N_BLOCK, PROGRAMS = 64, 528


def tiled_int4(x: Tensor, packed: Int4, arrived: Tensor) -> Tensor:
    """For some rows [M, K]: [M, N]. `arrived`: int32 zeros, one for each tile of outputs, left as they
    were."""
    (m, k), n = x.shape, packed.rows
    half, padded = packed.weight.shape
    tiles, steps, splits = triton.cdiv(half, N_BLOCK), padded // GROUP, 1
    while tiles * splits * 2 <= PROGRAMS and splits * 4 <= steps:
        splits *= 2
    out = x.new_empty(m, n)
    parts = out.new_empty((m, splits, 2 * half) if splits > 1 else 0, dtype=torch.float32)
    _tile[(splits, tiles)](
        x, packed.weight, packed.scales, packed.bias, out, parts, arrived, m, n, k, half, padded,
        triton.cdiv(steps, splits) * GROUP,
        M_BLOCK=pow2(m, 16), N_BLOCK=N_BLOCK, GROUP=GROUP, SPLITS=splits, EXACT=x.dtype == torch.float32,
        num_warps=4, num_stages=4, **OPTIONS,
    )  # fmt: skip
    return out
