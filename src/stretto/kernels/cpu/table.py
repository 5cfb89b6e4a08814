"""The kernels table in C, for the CPU. Weights are kept as they are, or quantised to int8 or int4.

Checks shapes, allocates results and calls the library. Activations are float32 or bfloat16.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stretto.kernels import (
    Activation,
    Attention,
    Batch,
    Cache,
    Geometry,
    Kernels,
    kv_width,
)
from stretto.kernels.cpu import native as c
from stretto.kernels.cpu.native import Native
from stretto.kernels.cpu.program import CpuPlan, CpuStack, LayerProgram, is_programmable
from stretto.kernels.cpu.weights import TYPES, PackedLinear, WeightFormat, exact_in_bfloat16, pack
from stretto.kernels.reference import mix_experts

CpuQuantise = Literal["int8", "int4"]
GROUP = {"int8": 128, "int4": 32}
# A router or another small matrix saves nothing when quantised, and its errors matter most.
SMALLEST_QUANTISED = 256
# A matrix with this many outputs is the vocabulary's. It is too sensitive for int4, unless an embedding is at
# hand to compute the largest logits again.
VOCABULARY = 30_000
RESCORED = 64
KV_TYPES = {**TYPES, torch.int8: c.I8}


@dataclass(frozen=True, slots=True)
class PackedExperts:
    gate_up: list[PackedLinear]
    down: list[PackedLinear]
    activation: Activation

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for packed in (*self.gate_up, *self.down))

    def shares(self, weight: Tensor) -> bool:
        """Never: packing copies."""
        return False


class CpuTable:
    """The functions of the table and what they share. Not thread-safe."""

    def __init__(self, native: Native, quantise: CpuQuantise | None = None) -> None:
        self._native = native
        self._quantise: CpuQuantise | None = quantise
        # By the id of a Python object, which is kept too, so that no other object gets its id: the C form of
        # an attention layer's constants, and the calls for all layers of a model (None: there is no such
        # list).
        self._kinds: dict[int, tuple[Attention, c.NativeAttention, int]] = {}
        self._programs: dict[int, tuple[CpuStack, LayerProgram | None]] = {}

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        n, k = weight.shape
        if self._quantise is None or n < SMALLEST_QUANTISED:
            exact = exact_in_bfloat16(weight)
            return pack(self._native, weight, bias, "bfloat16" if exact else "float32")
        quantise = "int8" if n >= VOCABULARY else self._quantise
        return pack(self._native, weight, bias, *fitting(quantise, k))

    def pack_tied(self, embedding: Tensor) -> PackedLinear:
        """The head that shares `embedding`, which is kept for `rescore_top_k`."""
        n, k = embedding.shape
        if self._quantise is None or n < VOCABULARY:
            return self.pack(embedding, None)
        return pack(self._native, embedding, None, *fitting(self._quantise, k))

    def rescore_top_k(self, logits: Tensor, x: Tensor, packed: PackedLinear, embedding: Tensor) -> None:
        if packed.format != "int4":
            return
        (m, n), (rows, k) = logits.shape, x.shape
        if rows != m or embedding.shape != (n, k) or logits.dtype != torch.float32:
            raise ValueError(f"logits {(m, n)} are not of x {(rows, k)} and {tuple(embedding.shape)}")
        x, types = x.contiguous(), (TYPES[x.dtype], TYPES[embedding.dtype])
        self._native.rescore_top_k(
            logits.data_ptr(), x.data_ptr(), embedding.data_ptr(), m, n, k, min(RESCORED, n), *types
        )

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        m, k = x.shape
        if k != packed.k or x.dtype not in TYPES:
            raise ValueError(
                f"x of shape {(m, k)}, {x.dtype}, does not fit weights of shape {(packed.n, packed.k)}"
            )
        x = x.contiguous()
        y = x.new_empty((m, packed.n))
        self._native.linear(packed.address, x.data_ptr(), y.data_ptr(), m, TYPES[x.dtype])
        return y

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, None, weight, eps)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(f"a residual of shape {tuple(residual.shape)} does not fit x {tuple(x.shape)}")
        residual = residual.contiguous()
        return self._norm(x, residual, weight, eps), residual

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        m, h = x.shape
        if weight.shape[0] != h or weight.dtype != x.dtype or x.dtype not in TYPES:
            raise ValueError(f"x of shape {(m, h)}, {x.dtype}, does not fit a norm of {tuple(weight.shape)}")
        x, y = x.contiguous(), torch.empty_like(x)
        other = 0 if residual is None else residual.data_ptr()
        self._native.norm(x.data_ptr(), other, weight.data_ptr(), y.data_ptr(), m, h, eps, TYPES[x.dtype])
        return y

    def act_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        m, both = gate_up.shape
        if both % 2 or gate_up.dtype not in TYPES:
            raise ValueError(f"{(m, both)}, {gate_up.dtype}: not as many gates as ups")
        gate_up = gate_up.contiguous()
        y = gate_up.new_empty((m, both // 2))
        code, type = c.ACTIVATIONS[activation], TYPES[gate_up.dtype]
        self._native.act_and_mul(gate_up.data_ptr(), y.data_ptr(), m, both // 2, code, type)
        return y

    def linear_act_and_mul(self, x: Tensor, packed: PackedLinear, activation: Activation) -> Tensor:
        return self.act_and_mul(self.linear(x, packed), activation)

    def prepare(self, batch: Batch, cache: Cache, geometry: Geometry) -> CpuPlan:
        layer = cache.layers[0]
        if layer.dtype not in KV_TYPES or not layer.is_contiguous():
            raise ValueError(
                f"a cache of {layer.dtype}, strides {layer.stride()}, is not contiguous float32, bfloat16"
                " or int8"
            )
        _, blocks, _, size, _ = layer.shape
        tokens, (sequences, width) = batch.tokens.shape[0], batch.tables.shape
        pointers = (batch.positions, batch.slots, batch.tables, batch.query_starts, batch.contexts)
        step = c.NativeStep(
            *(array.data_ptr() for array in pointers),
            *(tokens, sequences, width, blocks, size, c.F32, KV_TYPES[layer.dtype]),
        )
        address = ctypes.addressof(step)
        if not all(array.is_contiguous() for array in pointers) or self._native.check(address):
            raise ValueError(
                f"a step of {tokens} tokens in {sequences} sequences does not fit"
                f" tables {tuple(batch.tables.shape)} and a cache of {tuple(layer.shape)}"
            )
        rotations: list[tuple[Tensor, int, int]] = []
        for rotation in geometry.rotations:
            pairs = rotation.frequencies.shape[0]
            frequencies = rotation.frequencies.data_ptr()
            cos_sin = torch.empty(tokens, 2, pairs)
            self._native.cos_sin(address, frequencies, pairs, rotation.scale, cos_sin.data_ptr())
            rotations.append((cos_sin, cos_sin.data_ptr(), 2 * pairs))
        return CpuPlan(step, address, tokens, layer.dtype, blocks, tuple(rotations), batch)

    def rope_and_cache(
        self, qkv: Tensor, weights: Tensor | None, kind: Attention, layer: Tensor, plan: CpuPlan
    ) -> Tensor:
        lanes = kind.heads + 2 * kind.kv_heads
        self._fits(qkv, (plan.tokens, lanes * kind.head_dim), kind, layer, plan)
        qkv = qkv.contiguous()
        norms = 0 if weights is None else weights.data_ptr()
        _, cos_sin, dims = plan.rotations[kind.rotation]
        if dims > kind.head_dim:
            raise ValueError(f"rope_and_cache: heads of {kind.head_dim}, {dims} rotated: no kernel")
        self._native.rope_and_cache(
            plan.address, self._kind(kind), qkv.data_ptr(), norms, cos_sin, dims, layer.data_ptr()
        )
        return qkv.view(plan.tokens, lanes, kind.head_dim)[:, : kind.heads]

    def paged_attention(self, q: Tensor, kind: Attention, layer: Tensor, plan: CpuPlan) -> Tensor:
        self._fits(q, (plan.tokens, kind.heads, kind.head_dim), kind, layer, plan)
        out = q.new_empty((plan.tokens, kind.heads * kind.head_dim))
        self._native.paged_attention(
            plan.address, self._kind(kind), q.data_ptr(), q.stride(0), layer.data_ptr(), out.data_ptr()
        )
        return out

    def _fits(self, x: Tensor, shape: tuple[int, ...], kind: Attention, layer: Tensor, plan: CpuPlan) -> None:
        step = plan.step
        width = kv_width(kind.head_dim, layer.dtype)
        cache = (2, plan.blocks, kind.kv_heads, step.block_size, width)
        if x.shape != shape or layer.shape != cache:
            raise ValueError(
                f"{tuple(x.shape)} over a cache of {tuple(layer.shape)} is not {shape} over {cache}"
            )
        if x.dtype not in TYPES or layer.dtype != plan.kv_dtype:
            raise ValueError(
                f"{x.dtype} over a cache of {layer.dtype}: no kernel, in a step over {plan.kv_dtype}"
            )
        step.type = TYPES[x.dtype]

    def _kind(self, kind: Attention) -> int:
        """The address of the C form of an attention layer's constants."""
        known = self._kinds.get(id(kind))
        if known is None:
            struct = c.NativeAttention(
                *(kind.heads, kind.kv_heads, kind.head_dim, c.NORMS[kind.norm], kind.window),
                *(kind.scale, kind.softcap, kind.eps),
            )
            known = self._kinds[id(kind)] = kind, struct, ctypes.addressof(struct)
        return known[2]

    def layers(self, residual: Tensor, stack: CpuStack, cache: Cache, plan: CpuPlan) -> Tensor | None:
        """All layers in one call, where the hidden state of every row is wanted, as in a step of decodes."""
        outputs = plan.batch.outputs
        if outputs is not None and outputs.shape[0] != plan.tokens:
            return None
        known = self._programs.get(id(stack))
        if known is None:
            program = LayerProgram(self._native, stack, self._kind) if is_programmable(stack) else None
            known = self._programs[id(stack)] = stack, program
        return None if known[1] is None else known[1](residual, cache, plan)

    def pack_experts(self, gate_up: Tensor, down: Tensor, activation: Activation) -> PackedExperts:
        first = [self.pack(weight, None) for weight in gate_up]
        return PackedExperts(first, [self.pack(weight, None) for weight in down], activation)

    def experts(self, x: Tensor, logits: Tensor, packed: PackedExperts, k: int, normalise: bool) -> Tensor:
        def compute(rows: Tensor, expert: int) -> Tensor:
            hidden = self.act_and_mul(self.linear(rows, packed.gate_up[expert]), packed.activation)
            return self.linear(hidden, packed.down[expert])

        return mix_experts(x, logits, k, normalise, compute)


def fitting(quantise: CpuQuantise, k: int) -> tuple[WeightFormat, int]:
    """The format and the group size for rows of k weights. Falls back to int8 if no group size of int4
    divides k, and to one scale per row if no group size does."""
    group = next((size for size in (GROUP[quantise], 32, 16, 8) if k % size == 0), 0)
    if quantise == "int4" and group:
        return "int4", group
    return "int8", group


def table(
    native: Native, quantise: CpuQuantise | None = None
) -> Kernels[PackedLinear, PackedExperts, CpuPlan]:
    """The table. With `quantise`, `pack` rounds large weights: to the nearest level for int8, with the scale
    of least squared error for int4."""
    own = CpuTable(native, quantise)
    return Kernels(
        name=f"cpu-{native.level}" + (f"-{quantise}" if quantise else ""),
        pack=own.pack,
        linear=own.linear,
        norm=own.norm,
        add_norm=own.add_norm,
        act_and_mul=own.act_and_mul,
        linear_act_and_mul=own.linear_act_and_mul,
        prepare=own.prepare,
        rope_and_cache=own.rope_and_cache,
        paged_attention=own.paged_attention,
        pack_experts=own.pack_experts,
        experts=own.experts,
        layers=own.layers,
        kv_dtypes=frozenset(KV_TYPES),
        weight_dtypes=frozenset(TYPES),
        pack_tied=own.pack_tied,
        rescore_top_k=own.rescore_top_k,
    )
