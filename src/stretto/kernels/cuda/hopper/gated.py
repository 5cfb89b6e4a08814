"""The gated product of many rows on Hopper devices (compute capability 9.0), in Gluon.

One warp requests blocks of rows and weights from the bulk copy engine. Two warpgroups multiply them, each 64
of the 128 rows of a tile, and store their half while the first warp requests blocks of the next tile. The
design is that of CUTLASS's warp-specialised cooperative kernel (github.com/NVIDIA/cutlass).
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stretto.kernels import Activation
from stretto.kernels.cuda.hopper.device import PROGRAMS, REGISTERS, copy_in, copy_out
from stretto.kernels.cuda.launch import HOPPER, OPTIONS, release, wait
from stretto.kernels.cuda.rows import activate

LEAST_ROWS = 512  # fewer are multiplied by the vendor's product, and another kernel activates
ROWS, COLUMNS = 128, 128  # of a tile of the result
GROUP = ROWS // 2  # rows of a warpgroup
DEPTH, STAGES = 64, 4  # columns of a block, in 128 bytes of a row, and the blocks that fit shared memory
BAND = 16  # tiles of rows that take turns along the columns, so that they find the weights in the cache


@gluon.jit
def _place(tile, row_tiles, column_tiles, BAND: gl.constexpr):
    """The tile of rows and the tile of columns of a tile."""
    first = tile // (BAND * column_tiles) * BAND
    height = gl.minimum(row_tiles - first, BAND)
    within = tile % (BAND * column_tiles)
    return first + within % height, within // height


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and the phase of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _request_weights(weights, ups, bufs, ready, stage, column, k, NBYTES: gl.constexpr):
    """Request a block of gates and one of ups, and announce the bytes of the stage, rows included."""
    COLUMNS: gl.constexpr = weights.block_shape[0]
    mbarrier.expect(ready.index(stage), NBYTES)
    copy_in(weights, [column, k], ready.index(stage), bufs.index(stage).slice(0, COLUMNS))
    copy_in(weights, [ups + column, k], ready.index(stage), bufs.index(stage).slice(COLUMNS, COLUMNS))


@gluon.jit
def _request_rows(x, bufs, ready, stage, row, k):
    GROUP: gl.constexpr = x.block_shape[0]
    copy_in(x, [row, k], ready.index(stage), bufs.index(2 * stage))
    copy_in(x, [row + GROUP, k], ready.index(stage), bufs.index(2 * stage + 1))


@gluon.jit
def _load(x, weights, ups, x_bufs, bufs, bars, counts, STAGES: gl.constexpr, BAND: gl.constexpr):
    """Request the blocks of all tiles of this program. The first weights do not wait for earlier kernels."""
    ready, free = bars
    row_tiles, column_tiles, blocks = counts
    GROUP: gl.constexpr = x.block_shape[0]
    COLUMNS: gl.constexpr = weights.block_shape[0]
    DEPTH: gl.constexpr = x.block_shape[1]
    NBYTES: gl.constexpr = 2 * (GROUP + COLUMNS) * DEPTH * 2
    first = gl.program_id(0)
    row, column = _place(first, row_tiles, column_tiles, BAND)
    for stage in range(STAGES):
        _request_weights(weights, ups, bufs, ready, stage, column * COLUMNS, stage * DEPTH, NBYTES)
    wait()
    for stage in range(STAGES):
        _request_rows(x, x_bufs, ready, stage, row * 2 * GROUP, stage * DEPTH)
    stage, phase = 0, 0
    for tile in range(first, row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(tile, row_tiles, column_tiles, BAND)
        for index in range(gl.where(tile == first, STAGES, 0), blocks):
            mbarrier.wait(free.index(stage), phase)
            _request_weights(weights, ups, bufs, ready, stage, column * COLUMNS, index * DEPTH, NBYTES)
            _request_rows(x, x_bufs, ready, stage, row * 2 * GROUP, index * DEPTH)
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _store(mixed, row, column, bias, ups, out, staged, KIND: gl.constexpr):
    """Store activation(gate) * up of sums [rows, gates and ups]."""
    GROUP: gl.constexpr = out.block_shape[0]
    COLUMNS: gl.constexpr = out.block_shape[1]
    gates, raised = mixed.reshape([GROUP, 2, COLUMNS]).permute(0, 2, 1).split()
    if bias is not None:
        columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, gates.type.layout))
        inside = columns < out.shape[1]
        gates += gl.load(bias + columns, inside, 0.0).to(gl.float32)[None]
        raised += gl.load(bias + ups + columns, inside, 0.0).to(gl.float32)[None]
    made = (activate(gates, KIND) * raised).to(out.dtype)
    tma.store_wait(0)
    staged.store(made)
    fence_async_shared()
    copy_out(out, [row, column], staged)


@gluon.jit
def _multiply(
    group, bias, ups, out, x_bufs, bufs, staged, bars, counts,
    STAGES: gl.constexpr, BAND: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """The rows of one warpgroup in all tiles of this program."""
    ready, free = bars
    row_tiles, column_tiles, blocks = counts
    GROUP: gl.constexpr = out.block_shape[0]
    COLUMNS: gl.constexpr = out.block_shape[1]
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * COLUMNS, 16])
    staged = staged.index(group)
    wait()
    stage, phase, last = 0, 0, 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        mixed = gl.zeros([GROUP, 2 * COLUMNS], gl.float32, summed)
        for index in range(blocks):
            mbarrier.wait(ready.index(stage), phase)
            held = bufs.index(stage).permute((1, 0))
            mixed = warpgroup_mma(x_bufs.index(2 * stage + group), held, mixed, is_async=True)
            mixed = warpgroup_mma_wait(1, deps=[mixed])
            mbarrier.arrive(free.index(last), count=1, pred=index > 0)
            last = stage
            stage, phase = _next(stage, phase, STAGES)
        mixed = warpgroup_mma_wait(0, deps=[mixed])
        mbarrier.arrive(free.index(last), count=1)
        row, column = _place(tile, row_tiles, column_tiles, BAND)
        _store(mixed, (2 * row + group) * GROUP, column * COLUMNS, bias, ups, out, staged, KIND)
    tma.store_wait(0)


@gluon.jit
def _gated(
    x, weights, bias, out, STAGES: gl.constexpr, BAND: gl.constexpr, KIND: gl.constexpr
):  # fmt: skip
    """All tiles. `weights`: gates, then as many ups."""
    release()
    GROUP: gl.constexpr = out.block_shape[0]
    COLUMNS: gl.constexpr = out.block_shape[1]
    DEPTH: gl.constexpr = x.block_shape[1]
    ups = out.shape[1]
    # Blocks behind the last column are zeros, so that each tile has one for each stage.
    counts = (
        gl.cdiv(x.shape[0], 2 * GROUP),
        gl.cdiv(ups, COLUMNS),
        gl.maximum(gl.cdiv(x.shape[1], DEPTH), STAGES),
    )
    x_bufs = gl.allocate_shared_memory(x.dtype, [2 * STAGES, GROUP, DEPTH], x.layout)
    bufs = gl.allocate_shared_memory(x.dtype, [STAGES, 2 * COLUMNS, DEPTH], weights.layout)
    staged = gl.allocate_shared_memory(x.dtype, [2, GROUP, COLUMNS], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    bars = (ready, free)
    gl.warp_specialize([
        (_multiply, (0, bias, ups, out, x_bufs, bufs, staged, bars, counts, STAGES, BAND, KIND)),
        (_multiply, (1, bias, ups, out, x_bufs, bufs, staged, bars, counts, STAGES, BAND, KIND)),
        (_load, (x, weights, ups, x_bufs, bufs, bars, counts, STAGES, BAND)),
    ], [4, 1], [240, 24])  # fmt: skip


def _copyable(matrix: Tensor) -> bool:
    """Whether the bulk copy engine can read its rows."""
    return matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0


def supported(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_act_and_mul` multiplies rows x [M, K] with gates and ups [2 N, K]: on Hopper,
    many, in 16 bits, and where the bulk copy engine can read and write all rows."""
    is_16_bit = x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16)
    many = x.shape[0] >= LEAST_ROWS and weight.shape[0] % 16 == 0
    return HOPPER and is_16_bit and many and _copyable(x) and _copyable(weight)


def linear_act_and_mul(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """[M, K] -> [M, N]: activation(x @ gates.T) * (x @ ups.T) for `weight` [2 N, K], gates, then ups, with
    their `bias` [2 N]. The result alone is rounded. For what is `supported`."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    tiles = triton.cdiv(out.shape[0], ROWS) * triton.cdiv(out.shape[1], COLUMNS)
    _gated[(min(tiles, PROGRAMS),)](
        _blocks(x, GROUP, DEPTH), _blocks(weight, COLUMNS, DEPTH), bias, _blocks(out, GROUP, COLUMNS),
        STAGES=STAGES, BAND=BAND, KIND=activation, num_warps=4, maxnreg=REGISTERS, **OPTIONS,
    )  # fmt: skip
    return out


def _blocks(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix as the bulk copy engine reads or writes it, in blocks."""
    layout = gl.NVMMASharedLayout(128, 16)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)
