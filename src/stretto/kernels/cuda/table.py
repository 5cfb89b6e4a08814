"""The kernels table for NVIDIA devices: which kernel serves which step.

Nothing here reads a value back or asks the device anything, so that a step of decodes can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stretto.errors import StartError
from stretto.kernels import (
    Activation,
    Attention,
    Batch,
    Cache,
    DecoderLayer,
    Geometry,
    Kernels,
    LayerStack,
    Mlp,
)
from stretto.kernels.cuda import attention, rows
from stretto.kernels.cuda.experts import experts
from stretto.kernels.cuda.int4 import Int4, tiled_int4, to_int4
from stretto.kernels.cuda.linear import (
    FEW,
    MANY,
    SOME,
    WIDE,
    Fp8,
    Held,
    Norm,
    placed,
    product,
    stream,
    tiled,
    to_fp8,
)
from stretto.kernels.reference import Dense, DenseExperts

CudaQuantise = Literal["fp8", "int4"]
Weights = Held | Int4
_Layer = DecoderLayer[Weights, DenseExperts]
MOST_MEETINGS = 2**18
# A router or another small matrix costs nothing to keep and much to get wrong.
SMALLEST_QUANTISED = 256
# A vocabulary says which of its many rows is greatest: it keeps eight bits beside layers of four.
VOCABULARY = 32768


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """What the layers of a step share: the step, its turns by rotation, and room for its decodes to meet.
    `arrived`: the table's."""

    batch: Batch
    turns: list[Tensor]
    arrived: Tensor
    rooms: dict[int, attention.Room]

    def room(self, kind: Attention, layer: Tensor) -> attention.Room:
        """Where the programs of its decodes meet in layers of this kind."""
        room = self.rooms.get(kind.heads)
        if room is None:
            sequences = len(self.batch.query_lens)
            room = self.rooms[kind.heads] = attention.Room.of(sequences, kind.heads, layer, self.arrived)
        return room


class CudaTable:
    """The functions of a table and what they share: counts of arrivals, at tiles or at heads, which are zero
    between kernels."""

    def __init__(self, device: torch.device, quantise: CudaQuantise | None) -> None:
        self._quantise = quantise
        self._fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        self._arrived = torch.zeros(MOST_MEETINGS, dtype=torch.int32, device=device)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Weights:
        if self._quantise is None or weight.shape[0] < SMALLEST_QUANTISED:
            return Dense(weight, bias)
        if self._quantise == "int4" and (weight.shape[0] < VOCABULARY or not self._fp8):
            return to_int4(weight, bias)
        return Fp8(*to_fp8(weight), bias)

    def pack_experts(self, gate_up: Tensor, down: Tensor, activation: Activation) -> DenseExperts:
        """Raises StartError where they are to be quantised."""
        if self._quantise is not None:
            raise StartError(
                f"--quantise {self._quantise}: mixtures of experts are held as they are on a CUDA device; "
                "leave --quantise out"
            )
        return DenseExperts(gate_up, down, activation)

    def linear(self, x: Tensor, packed: Weights) -> Tensor:
        held, count = packed, x.shape[0]
        if isinstance(held, Int4):
            if 0 < count <= SOME:
                return tiled_int4(x.contiguous(), held, self._arrived)
            return product(x, Dense(held.widened(x.dtype), held.bias))
        if 0 < count <= FEW:
            return stream(x.contiguous(), held)
        if isinstance(held, Fp8):
            worth = count <= MANY
        else:
            worth = count <= SOME and held.weight.shape[0] < WIDE and x.dtype != torch.float32
        if 0 < count and worth:
            return tiled(x.contiguous(), held, self._arrived)
        return product(x, held)

    def logits(self, x: Tensor, packed: Weights) -> Tensor:
        if 0 < x.shape[0] <= FEW and not isinstance(packed, Int4):
            return stream(x.contiguous(), packed, dtype=torch.float32)
        return self.linear(x, packed).float()

    def linear_act_and_mul(self, x: Tensor, packed: Weights, activation: Activation) -> Tensor:
        if 0 < x.shape[0] <= FEW and not isinstance(packed, Int4):
            return stream(x.contiguous(), packed, activation)
        return rows.act_and_mul(self.linear(x, packed), activation)

    def prepare(self, batch: Batch, cache: Cache, geometry: Geometry) -> CudaPlan:
        turns = [rows.turn(batch, rotation) for rotation in geometry.rotations]
        return CudaPlan(batch, turns, self._arrived, {})

    def rope_and_cache(
        self, qkv: Tensor, weights: Tensor | None, kind: Attention, layer: Tensor, plan: CudaPlan
    ) -> Tensor:
        return rows.rope_and_cache(qkv, weights, kind, layer, plan.turns[kind.rotation], plan.batch.slots)

    def paged_attention(self, q: Tensor, kind: Attention, layer: Tensor, plan: CudaPlan) -> Tensor:
        counts = plan.batch.query_lens
        if max(counts) == 1:
            return attention.decode(q, kind, layer, plan.batch, plan.room(kind, layer))
        if min(counts) > 1:
            return attention.chunk(q, kind, layer, plan.batch)
        out = attention.decode(q, kind, layer, plan.batch, plan.room(kind, layer))
        return attention.chunk(q, kind, layer, plan.batch, out)

    def layers(
        self, residual: Tensor, stack: LayerStack[Weights, DenseExperts], cache: Cache, plan: CudaPlan
    ) -> Tensor | None:
        """Five or six kernels a layer, for a step of one row over weights that are streamed."""
        if (
            residual.shape[0] > FEW
            or plan.batch.query_lens[0] > 1
            or not all(map(_is_streamed, stack.layers))
        ):
            return None
        for layer, keys in zip(stack.layers, cache.layers, strict=True):
            residual = self._layer(residual, layer, keys, plan)
        outputs = plan.batch.outputs
        return rows.norm(residual if outputs is None else residual[outputs], stack.final_norm, stack.eps)

    def _layer(self, residual: Tensor, layer: _Layer, keys: Tensor, plan: CudaPlan) -> Tensor:
        kind, eps, mlp = layer.attention, layer.eps, layer.feed_forward
        before, between = layer.pre_attention_norm, layer.pre_mlp_norm
        qkv, out = layer.qkv, layer.out
        assert isinstance(mlp, Mlp) and before is not None and between is not None
        assert not isinstance(qkv, Int4) and not isinstance(out, Int4)
        assert not isinstance(mlp.gate_up, Int4) and not isinstance(mlp.down, Int4)
        first = Norm(before, eps)
        if layer.query_key_norm is None:
            q = placed(residual, qkv, first, kind, keys, plan.turns[kind.rotation], plan.batch.slots)
        else:
            q = self.rope_and_cache(stream(residual, qkv, norm=first), layer.query_key_norm, kind, keys, plan)
        attended = attention.decode(q, kind, keys, plan.batch, plan.room(kind, keys))
        residual = stream(attended, out, residual=residual)
        hidden = stream(residual, mlp.gate_up, mlp.activation, Norm(between, eps))
        return stream(hidden, mlp.down, residual=residual)


def _is_streamed(layer: _Layer) -> bool:
    """Whether one row can pass through this layer by kernels that stream its weights."""
    mlp, norms = layer.feed_forward, (layer.pre_attention_norm, layer.pre_mlp_norm)
    others = (layer.post_attention_norm, layer.post_mlp_norm)
    return (
        isinstance(mlp, Mlp)
        and all(norm is not None for norm in norms)
        and all(norm is None for norm in others)
        and not any(isinstance(each, Int4) for each in (layer.qkv, layer.out, mlp.gate_up, mlp.down))
    )


def table(
    device: torch.device, quantise: CudaQuantise | None = None
) -> Kernels[Weights, DenseExperts, CudaPlan]:
    """The table for `device`. `quantise` says how `pack` holds weights."""
    own = CudaTable(device, quantise)
    return Kernels(
        name="cuda" if quantise is None else f"cuda {quantise}",
        pack=own.pack,
        linear=own.linear,
        norm=rows.norm,
        add_norm=rows.add_norm,
        act_and_mul=rows.act_and_mul,
        linear_act_and_mul=own.linear_act_and_mul,
        prepare=own.prepare,
        rope_and_cache=own.rope_and_cache,
        paged_attention=own.paged_attention,
        pack_experts=own.pack_experts,
        experts=experts,
        layers=own.layers,
        logits=own.logits,
    )
