"""Chunk attention on Hopper devices (compute capability 9.0), in Gluon.

One warp requests pages of keys and values from the bulk copy engine, two warpgroups multiply. Each of these
has 64 rows of a tile of 128, and multiplies weights with values while it computes the weights of the next
keys, as FlashAttention 3 does (Shah et al. 2024, arXiv 2407.08608).
"""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stretto.kernels import Attention, Batch
from stretto.kernels.cuda.hopper.device import PROGRAMS, REGISTERS, copy_in
from stretto.kernels.cuda.launch import HOPPER, OPTIONS, pow2, release, wait

ROWS = 128
GROUP = ROWS // 2  # rows of a warpgroup
KEYS, STAGES = 64, 4  # keys at once, and stages of the rings of keys and of values
LOG2_E = 1.4426950408889634


@gluon.jit
def _locate(turn, works, tiles, heads, TOKENS: gl.constexpr, KEYS: gl.constexpr):
    """The tile of this program in a turn -> whether there is one, its key head, its sequence, its first row,
    the queries of the sequence from there on, the position of the first, and how many times KEYS keys it
    reads. Tiles become shorter, so every second turn goes backwards: that gives all programs as much."""
    programs, own = gl.num_programs(0), gl.program_id(0)
    work = turn * programs + gl.where(turn % 2 == 0, own, programs - 1 - own)
    there = work < works
    spot = tiles + 4 * (gl.where(there, work // heads, 0) + 1)
    left, position = gl.load(spot + 2), gl.load(spot + 3)
    end = position + gl.minimum(TOKENS, left)
    reach = gl.maximum((end + KEYS - 1) // KEYS, 1)
    return there, work % heads, gl.load(spot), gl.load(spot + 1), left, position, reach


@gluon.jit
def _load(
    pool, tables, tiles, table_stride, further, heads, k_bufs, v_bufs, bars,
    TOKENS: gl.constexpr, SIZE: gl.constexpr,
):  # fmt: skip
    """Request the keys and values of all tiles of this program, the last ones of a tile first."""
    k_ready, k_free, v_ready, v_free = bars
    STAGES: gl.constexpr = k_bufs.shape[0]
    KEYS: gl.constexpr = k_bufs.shape[1]
    PAGES: gl.constexpr = KEYS // SIZE
    NBYTES: gl.constexpr = KEYS * pool.block_type.shape[1] * 2
    wait()
    works = gl.load(tiles) * heads
    done = 0
    for turn in range(gl.cdiv(works, gl.num_programs(0))):
        there, head, seq, _, left, position, reach = _locate(turn, works, tiles, heads, TOKENS, KEYS)
        if there:
            table = tables + seq.to(gl.int64) * table_stride
            newest = gl.maximum(position + left - 1, 0) // SIZE
            for number in range(reach):
                rows = ()
                for part in gl.static_range(PAGES):
                    page = gl.load(table + gl.minimum((reach - 1 - number) * PAGES + part, newest))
                    rows = rows + ((page * heads + head) * SIZE,)  # noqa: RUF005
                stage, phase = done % STAGES, (done // STAGES) & 1
                mbarrier.wait(k_free.index(stage), phase ^ 1)
                mbarrier.expect(k_ready.index(stage), NBYTES)
                for part in gl.static_range(PAGES):
                    copy_in(
                        pool, [rows[part], 0], k_ready.index(stage),
                        k_bufs.index(stage).slice(part * SIZE, SIZE),
                    )  # fmt: skip
                mbarrier.wait(v_free.index(stage), phase ^ 1)
                mbarrier.expect(v_ready.index(stage), NBYTES)
                for part in gl.static_range(PAGES):
                    copy_in(
                        pool, [further + rows[part], 0], v_ready.index(stage),
                        v_bufs.index(stage).slice(part * SIZE, SIZE),
                    )  # fmt: skip
                done += 1


@gluon.jit
def _weigh(scores, high, total, unit, position, start, end, MASKED: gl.constexpr):
    """Online softmax of scores [rows, keys] -> their weights, the new maximum and sum, and what scales the
    sums so far. With MASKED, the keys from `start` are seen up to a row's position and before `end`."""
    if MASKED:
        layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        KEYS: gl.constexpr = scores.shape[1]
        key = start + gl.arange(0, KEYS, layout)
        seen = (key < end)[None] & (key[None] <= position[:, None])
        scores = gl.where(seen, scores, -float("inf"))
    top = gl.maximum(high, gl.max(scores, 1) * unit)
    floor = top
    if MASKED:  # without a key so far the maximum is -inf, and -inf - -inf would be NaN
        floor = gl.where(top == -float("inf"), 0.0, top)
    fade = gl.exp2(high - floor)
    weights = gl.exp2(scores * unit - floor[:, None])
    return weights, top, total * fade + gl.sum(weights, 1), fade


@gluon.jit
def _advance(
    queries, weights, mixed, high, total, unit, position, start, end, done, k_bufs, v_bufs, bars,
    MASKED: gl.constexpr,
):  # fmt: skip
    """The scores of the `done`th keys, while the weights of those before are multiplied with their values."""
    k_ready, k_free, v_ready, v_free = bars
    STAGES: gl.constexpr = k_bufs.shape[0]
    KEYS: gl.constexpr = k_bufs.shape[1]
    stage, phase = done % STAGES, (done // STAGES) & 1
    last, last_phase = (done - 1) % STAGES, ((done - 1) // STAGES) & 1
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    row: gl.constexpr = gl.SliceLayout(1, mixed.type.layout)
    GROUP: gl.constexpr = queries.shape[0]
    empty = gl.zeros((GROUP, KEYS), gl.float32, layout)
    mbarrier.wait(k_ready.index(stage), phase)
    scores = warpgroup_mma(queries, k_bufs.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(last), last_phase)
    mixed = warpgroup_mma(weights, v_bufs.index(last), mixed, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    fresh, high, total, fade = _weigh(scores, high, total, unit, position, start, end, MASKED)
    mixed = warpgroup_mma_wait(0, deps=[mixed])
    mbarrier.arrive(v_free.index(last), count=1)
    mixed = mixed * gl.convert_layout(fade, row)[:, None]
    weights = gl.convert_layout(fresh.to(weights.dtype), weights.type.layout)
    return weights, mixed, high, total


@gluon.jit
def _attend(queries, lowest, position, end, reach, done, unit, k_bufs, v_bufs, bars):
    """Attention of rows at these positions over the next `reach` times KEYS keys of the rings, float32
    [rows, DIM]. All rows see the keys up to `lowest`, none sees those from `end` on."""
    k_ready, k_free, v_ready, v_free = bars
    STAGES: gl.constexpr = k_bufs.shape[0]
    KEYS: gl.constexpr = k_bufs.shape[1]
    DIM: gl.constexpr = k_bufs.shape[2]
    GROUP: gl.constexpr = queries.shape[0]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    row: gl.constexpr = gl.SliceLayout(1, scored)
    start = (reach - 1) * KEYS
    stage, phase = done % STAGES, (done // STAGES) & 1
    empty = gl.zeros((GROUP, KEYS), gl.float32, scored)
    mbarrier.wait(k_ready.index(stage), phase)
    scores = warpgroup_mma(queries, k_bufs.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    high = gl.full((GROUP,), -float("inf"), gl.float32, row)
    total = gl.zeros((GROUP,), gl.float32, row)
    fresh, high, total, _ = _weigh(scores, high, total, unit, position, start, end, True)
    weights = gl.convert_layout(fresh.to(queries.dtype), gl.DotOperandLayout(0, summed, 2))
    mixed = gl.zeros((GROUP, DIM), gl.float32, summed)
    done += 1
    unmasked = gl.minimum(gl.maximum(lowest + 1, 0) // KEYS, reach - 1)
    for _ in range(reach - 1 - unmasked):
        start -= KEYS
        weights, mixed, high, total = _advance(
            queries, weights, mixed, high, total, unit, position, start, end, done, k_bufs, v_bufs, bars, True
        )
        done += 1
    for _ in range(unmasked):
        weights, mixed, high, total = _advance(
            queries, weights, mixed, high, total, unit, position, start, end, done, k_bufs, v_bufs, bars,
            False,
        )  # fmt: skip
        done += 1
    last, last_phase = (done - 1) % STAGES, ((done - 1) // STAGES) & 1
    mbarrier.wait(v_ready.index(last), last_phase)
    mixed = warpgroup_mma(weights, v_bufs.index(last), mixed, is_async=True)
    mixed = warpgroup_mma_wait(0, deps=[mixed])
    mbarrier.arrive(v_free.index(last), count=1)
    total = gl.where(total == 0.0, 1.0, total)  # a row that pads the step may see no key
    return mixed * gl.convert_layout(1.0 / total, gl.SliceLayout(1, summed))[:, None]


@gluon.jit
def _multiply(
    group, q, out, tiles, q_stride, heads, unit, q_bufs, k_bufs, v_bufs, bars,
    SHARE: gl.constexpr, SHARE_BLOCK: gl.constexpr, DIM: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """The rows of one warpgroup in all tiles of this program."""
    k_ready, k_free, v_ready, v_free = bars
    STAGES: gl.constexpr = k_bufs.shape[0]
    KEYS: gl.constexpr = k_bufs.shape[1]
    GROUP: gl.constexpr = q_bufs.shape[1]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    row: gl.constexpr = gl.SliceLayout(1, scored)
    moved: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    token = (group * GROUP + gl.arange(0, GROUP, row)) // SHARE_BLOCK
    line = group * GROUP + gl.arange(0, GROUP, gl.SliceLayout(1, moved))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, moved))
    queries = q_bufs.index(group)
    wait()
    works = gl.load(tiles) * heads
    done = 0
    for turn in range(gl.cdiv(works, gl.num_programs(0))):
        there, head, _, first, left, lowest, reach = _locate(turn, works, tiles, heads, TOKENS, KEYS)
        if there:
            if group * GROUP < left * SHARE_BLOCK:
                own = ((line // SHARE_BLOCK < left) & (line % SHARE_BLOCK < SHARE))[:, None]
                lanes = (head * SHARE + line % SHARE_BLOCK)[:, None] * DIM + dim[None]
                rows = (first + line // SHARE_BLOCK).to(gl.int64)[:, None]
                queries.store(gl.load(q + rows * q_stride + lanes, own, 0.0))
                fence_async_shared()
                end = lowest + gl.minimum(TOKENS, left)
                mixed = _attend(queries, lowest, lowest + token, end, reach, done, unit, k_bufs, v_bufs, bars)
                queries.store(mixed.to(out.dtype.element_ty))
                gl.store(out + rows * (heads * SHARE * DIM) + lanes, queries.load(moved), own)
            else:
                for number in range(done, done + reach):
                    stage, phase = number % STAGES, (number // STAGES) & 1
                    mbarrier.wait(k_ready.index(stage), phase)
                    mbarrier.arrive(k_free.index(stage), count=1)
                    mbarrier.wait(v_ready.index(stage), phase)
                    mbarrier.arrive(v_free.index(stage), count=1)
            done += reach


@gluon.jit(do_not_specialize=["table_stride", "further", "heads"])
def _chunk(
    q, pool, tables, tiles, out, q_stride, table_stride, further, heads, unit,
    SHARE: gl.constexpr, SHARE_BLOCK: gl.constexpr, DIM: gl.constexpr, SIZE: gl.constexpr,
    TOKENS: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of all tiles. `pool`: the layer's rows of DIM, in blocks of SIZE, values `further` behind
    their keys."""
    release()
    kind: gl.constexpr = q.dtype.element_ty
    q_bufs = gl.allocate_shared_memory(kind, [2, GROUP, DIM], pool.layout)
    k_bufs = gl.allocate_shared_memory(kind, [STAGES, KEYS, DIM], pool.layout)
    v_bufs = gl.allocate_shared_memory(kind, [STAGES, KEYS, DIM], pool.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    bars = (k_ready, k_free, v_ready, v_free)
    gl.warp_specialize([
        (_multiply, (0, q, out, tiles, q_stride, heads, unit, q_bufs, k_bufs, v_bufs, bars, SHARE,
                     SHARE_BLOCK, DIM, TOKENS)),
        (_multiply, (1, q, out, tiles, q_stride, heads, unit, q_bufs, k_bufs, v_bufs, bars, SHARE,
                     SHARE_BLOCK, DIM, TOKENS)),
        (_load, (pool, tables, tiles, table_stride, further, heads, k_bufs, v_bufs, bars, TOKENS, SIZE)),
    ], [4, 1], [232, 40])  # fmt: skip


def supported(kind: Attention, layer: Tensor) -> bool:
    """Whether `chunk` computes attention of this kind."""
    size, dim = layer.shape[3], kind.head_dim
    plain = not kind.window and not kind.softcap and layer.itemsize == 2
    pages = dim in (64, 128) and size % 8 == 0 and KEYS % size == 0
    return HOPPER and plain and pages and kind.heads // kind.kv_heads <= GROUP


def keeps_busy(kind: Attention, sequences: int) -> bool:
    """Whether so many sequences give each program a tile, even if all have one query."""
    return sequences * kind.kv_heads >= PROGRAMS


def chunk(q: Tensor, kind: Attention, layer: Tensor, batch: Batch, tiles: Tensor, out: Tensor) -> None:
    """As `attention.chunk`, of kinds that are `supported`."""
    share, size, dim = kind.heads // kind.kv_heads, layer.shape[3], kind.head_dim
    pages = layer.view(-1, dim)
    layout = gl.NVMMASharedLayout(128, 16)
    pool = TensorDescriptor(pages, list(pages.shape), list(pages.stride()), [size, dim], layout)
    _chunk[(min((tiles.shape[0] - 1) * kind.kv_heads, PROGRAMS),)](
        q, pool, batch.tables, tiles, out, q.stride(0), batch.tables.stride(0),
        layer.shape[1] * kind.kv_heads * size, kind.kv_heads, kind.scale * LOG2_E,
        SHARE=share, SHARE_BLOCK=pow2(share), DIM=dim, SIZE=size, TOKENS=ROWS // pow2(share), GROUP=GROUP,
        KEYS=KEYS, STAGES=STAGES, num_warps=4, maxnreg=REGISTERS, **OPTIONS,
    )  # fmt: skip
