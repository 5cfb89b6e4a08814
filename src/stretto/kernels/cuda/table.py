"""The kernels table for NVIDIA devices: which kernel serves which step.

No function reads a value back or waits for the device, so that a step of decodes can be captured in a graph.
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
from stretto.kernels.cuda.linear import GEMV_ROWS, Norm, gemv, gemv_rope_and_cache, skinny_gemm
from stretto.kernels.cuda.weights import CudaWeights, Fp8, Int4, Unquantised
from stretto.kernels.reference import DenseExperts

CudaQuantise = Literal["fp8", "int4"]
CudaLayer = DecoderLayer[CudaWeights, DenseExperts]
MAX_COUNTERS = 2**18
# A router or another small matrix saves nothing when quantised, and its errors matter most.
SMALLEST_QUANTISED = 256
# The vocabulary's matrix keeps eight bits beside layers of four: its largest output decides the next token.
VOCABULARY = 32768


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """What the layers of a step share: the batch, a cos/sin table [T, 2, pairs] for each rotary embedding,
    and the workspaces of decode attention by number of heads. `arrived` belongs to the table."""

    batch: Batch
    cos_sin: list[Tensor]
    arrived: Tensor
    workspaces: dict[int, attention.DecodeWorkspace]

    def workspace(self, kind: Attention, layer: Tensor) -> attention.DecodeWorkspace:
        """The workspace of decode attention in layers of this kind."""
        workspace = self.workspaces.get(kind.heads)
        if workspace is None:
            sequences = len(self.batch.query_lens)
            workspace = attention.DecodeWorkspace.of(sequences, kind.heads, layer, self.arrived)
            self.workspaces[kind.heads] = workspace
        return workspace


class CudaTable:
    """The functions of a table and what they share: counters of the programs that have finished a tile or a
    head, which are zero between kernels."""

    def __init__(self, device: torch.device, quantise: CudaQuantise | None) -> None:
        self._quantise = quantise
        self._has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        self._arrived = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)

    def pack(self, weight: Tensor, bias: Tensor | None) -> CudaWeights:
        outputs = weight.shape[0]
        if self._quantise is None or outputs < SMALLEST_QUANTISED:
            return Unquantised.pack(weight, bias)
        if self._quantise == "int4" and (outputs < VOCABULARY or not self._has_fp8):
            return Int4.pack(weight, bias)
        return Fp8.pack(weight, bias)

    def pack_experts(self, gate_up: Tensor, down: Tensor, activation: Activation) -> DenseExperts:
        """Raises StartError where they are to be quantised."""
        if self._quantise is not None:
            raise StartError(
                f"--quantise {self._quantise}: a mixture of experts cannot be quantised on a CUDA device; "
                "leave --quantise out"
            )
        return DenseExperts(gate_up, down, activation)

    def linear(self, x: Tensor, packed: CudaWeights) -> Tensor:
        count = x.shape[0]
        if packed.has_gemv and 0 < count <= GEMV_ROWS:
            return gemv(x.contiguous(), packed)
        if 0 < count <= packed.skinny_rows(x.dtype):
            return skinny_gemm(x.contiguous(), packed, self._arrived)
        return packed.gemm(x)

    def logits(self, x: Tensor, packed: CudaWeights) -> Tensor:
        if packed.has_gemv and 0 < x.shape[0] <= GEMV_ROWS:
            return gemv(x.contiguous(), packed, dtype=torch.float32)
        return self.linear(x, packed).float()

    def linear_act_and_mul(self, x: Tensor, packed: CudaWeights, activation: Activation) -> Tensor:
        if packed.has_gemv and 0 < x.shape[0] <= GEMV_ROWS:
            return gemv(x.contiguous(), packed, activation)
        return rows.act_and_mul(self.linear(x, packed), activation)

    def prepare(self, batch: Batch, cache: Cache, geometry: Geometry) -> CudaPlan:
        cos_sin = [rows.cos_sin_table(batch, rotation) for rotation in geometry.rotations]
        return CudaPlan(batch, cos_sin, self._arrived, {})

    def rope_and_cache(
        self, qkv: Tensor, weights: Tensor | None, kind: Attention, layer: Tensor, plan: CudaPlan
    ) -> Tensor:
        return rows.rope_and_cache(qkv, weights, kind, layer, plan.cos_sin[kind.rotation], plan.batch.slots)

    def paged_attention(self, q: Tensor, kind: Attention, layer: Tensor, plan: CudaPlan) -> Tensor:
        counts = plan.batch.query_lens
        if min(counts) > 1:
            return attention.chunk(q, kind, layer, plan.batch)
        out = attention.decode(q, kind, layer, plan.batch, plan.workspace(kind, layer))
        return out if max(counts) == 1 else attention.chunk(q, kind, layer, plan.batch, out)

    def layers(
        self, residual: Tensor, stack: LayerStack[CudaWeights, DenseExperts], cache: Cache, plan: CudaPlan
    ) -> Tensor | None:
        """Five or six kernels a layer, for a step of one row over weights that `gemv` reads."""
        if residual.shape[0] > GEMV_ROWS or plan.batch.query_lens[0] > 1:
            return None
        if not all(_has_gemv(layer) for layer in stack.layers):
            return None
        for layer, keys in zip(stack.layers, cache.layers, strict=True):
            residual = self._layer(residual, layer, keys, plan)
        outputs = plan.batch.outputs
        return rows.norm(residual if outputs is None else residual[outputs], stack.final_norm, stack.eps)

    def _layer(self, residual: Tensor, layer: CudaLayer, keys: Tensor, plan: CudaPlan) -> Tensor:
        kind, eps, mlp = layer.attention, layer.eps, layer.feed_forward
        first, second = layer.pre_attention_norm, layer.pre_mlp_norm
        assert isinstance(mlp, Mlp) and first is not None and second is not None, "see _has_gemv"
        norm = Norm(first, eps)
        if layer.query_key_norm is None:
            cos_sin, slots = plan.cos_sin[kind.rotation], plan.batch.slots
            q = gemv_rope_and_cache(residual, layer.qkv, norm, kind, keys, cos_sin, slots)
        else:
            qkv = gemv(residual, layer.qkv, norm=norm)
            q = self.rope_and_cache(qkv, layer.query_key_norm, kind, keys, plan)
        attended = attention.decode(q, kind, keys, plan.batch, plan.workspace(kind, keys))
        residual = gemv(attended, layer.out, residual=residual)
        hidden = gemv(residual, mlp.gate_up, mlp.activation, Norm(second, eps))
        return gemv(hidden, mlp.down, residual=residual)


def _has_gemv(layer: CudaLayer) -> bool:
    """Whether one row can pass through this layer by `gemv` alone: it applies the norm of what a block reads,
    not of what a block adds."""
    mlp = layer.feed_forward
    return (
        isinstance(mlp, Mlp)
        and layer.pre_attention_norm is not None
        and layer.pre_mlp_norm is not None
        and layer.post_attention_norm is None
        and layer.post_mlp_norm is None
        and all(weights.has_gemv for weights in (layer.qkv, layer.out, mlp.gate_up, mlp.down))
    )


def table(
    device: torch.device, quantise: CudaQuantise | None = None
) -> Kernels[CudaWeights, DenseExperts, CudaPlan]:
    """The table for `device`. `quantise` is the format that `pack` rounds large weights to."""
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
