"""A list of calls as one: all layers of a step without a line of Python between them.

Owns the C form of a step and of the calls, and the room their results lie in. The calls themselves are
those of `stretto.kernels.cpu.table`, which is the plain way to make them, with the same numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from stretto.kernels import Attention, Batch, Buffer, Cache, Op, kv_width
from stretto.kernels.cpu import native as c
from stretto.kernels.cpu.native import Native, complain
from stretto.kernels.cpu.weights import TYPES, PackedLinear

BUFFERS: tuple[Buffer, ...] = get_args(Buffer)
CALLS = {"linear": 0, "norm": 1, "add_norm": 2, "gate": 3, "place": 4, "attend": 5}
ALIGN = 64
_Pointers = ctypes.Array[ctypes.c_void_p]


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A step as the library reads it, in the dtype of what is passed with it. It points into `batch`,
    `cache` and `turns`, which live as long."""

    step: c.NativeStep
    address: int
    tokens: int
    kv_dtype: torch.dtype
    blocks: int
    turns: tuple[tuple[Tensor, int, int], ...]
    batch: Batch


class Program:
    """The compiled calls. `kind` gives the address of an attention kind's C form.

    Not thread-safe. Raises ValueError for calls whose widths do not fit each other.
    """

    def __init__(self, native: Native, ops: list[Op], kind: Callable[[Attention], int]) -> None:
        self._native = native
        self._ops = ops
        self._widths = _widths(ops)
        self._calls = (c.NativeCall * len(ops))(*(_call(op, kind) for op in ops))
        self._address = ctypes.addressof(self._calls)
        self._kinds = {op.layer: op.kind for op in ops if op.kind is not None}
        self._dtypes = {op.of.dtype for op in ops if isinstance(op.of, Tensor)}
        self._known: tuple[Cache, _Pointers] | None = None

    def __call__(self, x: Tensor, residual: Tensor, cache: Cache, plan: CpuPlan) -> Tensor:
        shape, hidden = (plan.tokens, self._widths["x"]), self._widths["x"]
        if x.shape != shape or residual.shape != shape or residual.dtype != x.dtype or x.dtype not in TYPES:
            raise ValueError(
                f"x {tuple(x.shape)}, {x.dtype}, and a residual {tuple(residual.shape)} are not {shape}"
            )
        if self._dtypes - {x.dtype}:
            raise ValueError(f"x is {x.dtype}, norms are {self._dtypes}")
        x, residual, step = x.contiguous(), residual.contiguous(), plan.step
        step.type = TYPES[x.dtype]
        layers = self._layers(cache, plan)
        others = BUFFERS[2:]
        sizes = [-(-plan.tokens * self._widths.get(name, 0) * x.itemsize // ALIGN) * ALIGN for name in others]
        room = torch.empty(sum(sizes), dtype=torch.uint8)
        places = [room.data_ptr() + sum(sizes[:i]) for i in range(len(sizes))]
        buffers = (ctypes.c_void_p * len(BUFFERS))(x.data_ptr(), residual.data_ptr(), *places)
        turns = (ctypes.c_void_p * len(plan.turns))(*(turn for _, turn, _ in plan.turns))
        dims = (ctypes.c_int64 * len(plan.turns))(*(count for _, _, count in plan.turns))
        shared = c.NativeRun(
            plan.address, *(ctypes.addressof(array) for array in (buffers, layers, turns, dims))
        )
        if result := self._native.run(self._address, len(self._ops), ctypes.addressof(shared)):
            complain(result, f"{len(self._ops)} calls over {plan.tokens} rows of {hidden}")
        return x

    def _layers(self, cache: Cache, plan: CpuPlan) -> _Pointers:
        """Where the layers of a cache lie, once it is seen to fit."""
        if self._known is None or self._known[0] is not cache:
            for number, kind in self._kinds.items():
                layer = cache.layers[number]
                width = kv_width(kind.head_dim, layer.dtype)
                wanted = (2, plan.blocks, kind.kv_heads, plan.step.block_size, width)
                if layer.shape != wanted or layer.dtype != plan.kv_dtype or not layer.is_contiguous():
                    raise ValueError(f"layer {number} of the cache is {tuple(layer.shape)}, not {wanted}")
            pointers = (ctypes.c_void_p * len(cache.layers))(*(layer.data_ptr() for layer in cache.layers))
            self._known = cache, pointers
        return self._known[1]


def _call(op: Op, kind: Callable[[Attention], int]) -> c.NativeCall:
    of = 0
    if isinstance(op.of, PackedLinear):
        of = op.of.address
    elif isinstance(op.of, Tensor):
        of = op.of.data_ptr()
    return c.NativeCall(
        of=of,
        config=0 if op.kind is None else kind(op.kind),
        call=CALLS[op.call],
        source=BUFFERS.index(op.source),
        target=BUFFERS.index(op.target),
        width=op.width,
        layer=op.layer,
        rotation=0 if op.kind is None else op.kind.rotation,
        activation=c.ACTIVATIONS[op.activation],
        eps=op.eps,
    )


def _widths(ops: list[Op]) -> dict[str, int]:
    """Elements of a row of each buffer."""
    widths: dict[str, int] = {}
    for op in ops:
        if widths.setdefault(op.target, op.width) != op.width:
            raise ValueError(f"{op.call} writes {op.width} to {op.target}, rows of {widths[op.target]}")
        if isinstance(op.of, Tensor) and op.of.shape != (_weights_of(op),):
            raise ValueError(f"{op.call} of rows of {op.width} with weights {tuple(op.of.shape)}")
        if isinstance(op.of, PackedLinear):
            read = widths.setdefault(op.source, op.of.k)
            if op.of.n != op.width or op.of.k != read:
                raise ValueError(f"weights {(op.of.n, op.of.k)} do not lead from {read} to {op.width}")
    return widths


def _weights_of(op: Op) -> int:
    """How many weights a norm of its rows has; that of queries and keys has none for values."""
    return op.width if op.kind is None else op.width - op.kind.kv_heads * op.kind.head_dim
