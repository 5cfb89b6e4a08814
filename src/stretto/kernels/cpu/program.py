"""All layers of a step in one call of the C library.

Owns the list of C calls for a model's layers, and the workspace that they write to. The calls are the same
that `CpuTable` makes one by one, and give the same numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.kernels import Attention, Batch, Cache, DecoderLayer, LayerStack, Mlp, kv_width
from stretto.kernels.cpu import native as c
from stretto.kernels.cpu.native import Native
from stretto.kernels.cpu.weights import TYPES, PackedLinear

ALIGN = 64
# The buffers of a run, and the calls, by the numbers that the library knows them by.
X, RESIDUAL, QKV, ATTENDED, GATE_UP, GATED = range(6)
LINEAR, NORM, ADD_NORM, ACT_AND_MUL, ROPE_AND_CACHE, PAGED_ATTENTION = range(6)

KindAddress = Callable[[Attention], int]
"""The address of the C form of an attention layer's constants."""
CpuStack = LayerStack[PackedLinear, Any]
_Pointers = ctypes.Array[ctypes.c_void_p]


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A step in the library's form. `step` points into `batch` and the cache that it was prepared with.

    `rotations`: for each rotary embedding its table of cosines and sines (float32 [T, 2, dims / 2]), the
    address of that table, and how many dimensions of a head are rotated.
    """

    step: c.NativeStep
    address: int
    tokens: int
    kv_dtype: torch.dtype
    blocks: int
    rotations: tuple[tuple[Tensor, int, int], ...]
    batch: Batch


class LayerProgram:
    """The calls for all layers of one model. Not thread-safe."""

    def __init__(self, native: Native, stack: CpuStack, kind_address: KindAddress) -> None:
        """Raises ValueError for weights whose shapes do not fit each other."""
        calls = _CallList(stack.final_norm.shape[0])
        for number, layer in enumerate(stack.layers):
            _append_layer(calls, stack, number, kind_address(layer.attention))
        self._native = native
        self._count = len(calls.calls)
        self._calls = (c.NativeCall * self._count)(*calls.calls)
        self._address = ctypes.addressof(self._calls)
        self._widths = calls.widths
        self._dtypes = calls.dtypes
        self._kinds = [layer.attention for layer in stack.layers]
        self._known: tuple[Cache, _Pointers] | None = None

    def __call__(self, residual: Tensor, cache: Cache, plan: CpuPlan) -> Tensor:
        """(residual sum [T, H] consumed, cache, plan) -> normed hidden states [T, H]."""
        hidden = self._widths[X]
        if residual.shape != (plan.tokens, hidden) or residual.dtype not in TYPES:
            raise ValueError(
                f"a residual sum {tuple(residual.shape)}, {residual.dtype}, is not {(plan.tokens, hidden)}"
            )
        if self._dtypes - {residual.dtype}:
            raise ValueError(f"the residual sum is {residual.dtype}, norms are {self._dtypes}")
        residual = residual.contiguous()
        x, step = torch.empty_like(residual), plan.step
        step.type = TYPES[residual.dtype]
        layers = self._layers(cache, plan)
        row = plan.tokens * x.itemsize
        sizes = [-(-width * row // ALIGN) * ALIGN for width in self._widths[QKV:]]
        workspace = torch.empty(sum(sizes), dtype=torch.uint8)
        starts = [workspace.data_ptr() + sum(sizes[:i]) for i in range(len(sizes))]
        buffers = (ctypes.c_void_p * len(self._widths))(x.data_ptr(), residual.data_ptr(), *starts)
        tables = (ctypes.c_void_p * len(plan.rotations))(*(table for _, table, _ in plan.rotations))
        dims = (ctypes.c_int64 * len(plan.rotations))(*(count for _, _, count in plan.rotations))
        shared = c.NativeRun(
            plan.address, *(ctypes.addressof(array) for array in (buffers, layers, tables, dims))
        )
        self._native.run(self._address, self._count, ctypes.addressof(shared))
        return x

    def _layers(self, cache: Cache, plan: CpuPlan) -> _Pointers:
        """The addresses of the cache's layers. A cache is checked when it is first seen."""
        if self._known is None or self._known[0] is not cache:
            for number, (kind, layer) in enumerate(zip(self._kinds, cache.layers, strict=True)):
                width = kv_width(kind.head_dim, layer.dtype)
                wanted = (2, plan.blocks, kind.kv_heads, plan.step.block_size, width)
                if layer.shape != wanted or layer.dtype != plan.kv_dtype or not layer.is_contiguous():
                    raise ValueError(f"layer {number} of the cache is {tuple(layer.shape)}, not {wanted}")
            pointers = (ctypes.c_void_p * len(cache.layers))(*(layer.data_ptr() for layer in cache.layers))
            self._known = cache, pointers
        return self._known[1]


def is_programmable(stack: CpuStack) -> bool:
    """Whether the calls for these layers are known in advance: those of a mixture of experts depend on the
    routing, and the library adds to the residual sum only in front of a norm."""
    norms = (norm for layer in stack.layers for norm in (layer.pre_attention_norm, layer.pre_mlp_norm))
    return all(norm is not None for norm in norms) and all(
        isinstance(layer.feed_forward, Mlp) for layer in stack.layers
    )


class _CallList:
    """C calls in the order in which they are made. `widths`: elements in a row of each buffer, known once
    something writes to it."""

    def __init__(self, hidden: int) -> None:
        self.calls: list[c.NativeCall] = []
        self.widths = [hidden, hidden, 0, 0, 0, 0]
        self.dtypes: set[torch.dtype] = set()

    def append(self, call: int, source: int, target: int, width: int, **fields: float) -> None:
        """Raises ValueError when rows of `width` do not fit the target."""
        if (self.widths[target] or width) != width:
            raise ValueError(f"call {call} writes rows of {width} to rows of {self.widths[target]}")
        self.widths[target] = width
        self.calls.append(c.NativeCall(call=call, source=source, target=target, width=width, **fields))

    def linear(self, weights: PackedLinear, source: int, target: int) -> None:
        if weights.k != self.widths[source]:
            raise ValueError(f"weights {(weights.n, weights.k)} do not fit rows of {self.widths[source]}")
        self.append(LINEAR, source, target, weights.n, of=weights.address)

    def norm(self, call: int, weight: Tensor | None, source: int, eps: float) -> None:
        """A norm whose result is x, if there is a weight."""
        if weight is not None:
            address = self.weights(weight, self.widths[source])
            self.append(call, source, X, self.widths[source], of=address, eps=eps)

    def weights(self, weight: Tensor, count: int) -> int:
        """The address of a norm's weights. Raises ValueError when there are not `count` of them."""
        if weight.shape != (count,):
            raise ValueError(f"a norm of rows of {count} has weights {tuple(weight.shape)}")
        self.dtypes.add(weight.dtype)
        return weight.data_ptr()


def _append_layer(calls: _CallList, stack: CpuStack, number: int, address: int) -> None:
    layer: DecoderLayer[PackedLinear, Any] = stack.layers[number]
    kind, feed_forward, norm = layer.attention, layer.feed_forward, layer.query_key_norm
    assert isinstance(feed_forward, Mlp)
    attended, keys = kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim
    place = {"layer": number, "config": address}
    if number == 0:
        calls.norm(NORM, layer.pre_attention_norm, RESIDUAL, layer.eps)
    calls.linear(layer.qkv, X, QKV)
    weights = 0 if norm is None else calls.weights(norm, attended + keys)
    calls.append(
        *(ROPE_AND_CACHE, QKV, QKV, attended + 2 * keys), of=weights, rotation=kind.rotation, **place
    )
    calls.append(PAGED_ATTENTION, QKV, ATTENDED, attended, **place)
    calls.linear(layer.out, ATTENDED, X)
    calls.norm(NORM, layer.post_attention_norm, X, layer.eps)
    calls.norm(ADD_NORM, layer.pre_mlp_norm, X, layer.eps)
    calls.linear(feed_forward.gate_up, X, GATE_UP)
    activation = c.ACTIVATIONS[feed_forward.activation]
    calls.append(ACT_AND_MUL, GATE_UP, GATED, feed_forward.gate_up.n // 2, activation=activation)
    calls.linear(feed_forward.down, GATED, X)
    calls.norm(NORM, layer.post_mlp_norm, X, layer.eps)
    calls.norm(ADD_NORM, stack.norm_after(number), X, stack.eps)
