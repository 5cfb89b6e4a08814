"""The kernels table for NVIDIA devices: which kernel serves which step.

No function reads a value back or waits for the device, except to measure products while kernels are loaded.
So a step can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stretto.kernels import (
    Activation,
    Attention,
    Batch,
    Cache,
    DecoderLayer,
    Geometry,
    Kernels,
    LayerStack,
    MixtureOfExperts,
    Mlp,
)
from stretto.kernels.cuda import attention, routing, rows
from stretto.kernels.cuda.experts import experts
from stretto.kernels.cuda.hopper import gated
from stretto.kernels.cuda.linear import (
    GEMV_ROWS,
    Norm,
    PaddedRows,
    gemv,
    gemv_rope_and_cache,
    product_us,
    rotates,
    skinny_gemm,
)
from stretto.kernels.cuda.streaming import stream
from stretto.kernels.cuda.weights import (
    SKINNY_ROWS,
    CudaExperts,
    CudaWeights,
    Fp8,
    Fp8Experts,
    Int4,
    Int4Experts,
    Unquantised,
)
from stretto.kernels.reference import DenseExperts

CudaQuantise = Literal["fp8", "int4"]
CudaLayer = DecoderLayer[CudaWeights, CudaExperts]
CudaBlock = Mlp[CudaWeights] | MixtureOfExperts[CudaWeights, CudaExperts]
MAX_COUNTERS = 2**18
# A router or another small matrix saves nothing when quantised, and its errors matter most.
SMALLEST_QUANTISED = 256
# The vocabulary's matrix keeps eight bits beside layers of four: its largest output decides the next token.
VOCABULARY = 32768


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """What the layers of a step share: the batch, a cos/sin table [T, 2, pairs] for each rotary embedding,
    the workspaces of decode attention by number of heads, and the tiles of chunk attention by their tokens.
    `arrived` belongs to the table."""

    batch: Batch
    cos_sin: list[Tensor]
    arrived: Tensor
    workspaces: dict[int, attention.DecodeWorkspace]
    tiles: dict[tuple[int, int], Tensor]

    def workspace(self, kind: Attention, layer: Tensor) -> attention.DecodeWorkspace:
        """The workspace of decode attention in layers of this kind."""
        workspace = self.workspaces.get(kind.heads)
        if workspace is None:
            sequences = self.batch.contexts.shape[0]
            workspace = attention.DecodeWorkspace.of(sequences, kind.heads, layer, self.arrived)
            self.workspaces[kind.heads] = workspace
        return workspace

    def tiles_of(self, kind: Attention, itemsize: int, least: int) -> Tensor:
        """The tiles of chunk attention in layers of this kind, for sequences of `least` queries or more."""
        key = tokens, _ = attention.tile_tokens(kind, itemsize), least
        if key not in self.tiles:
            self.tiles[key] = attention.number_tiles(self.batch, tokens, least)
        return self.tiles[key]


class CudaTable:
    """The functions of a table and what they share: counters of the programs that have finished a tile or a
    head, which are zero between kernels."""

    def __init__(self, device: torch.device, quantise: CudaQuantise | None) -> None:
        self._quantise = quantise
        self._has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        self._padded = PaddedRows(product_us) if device.type == "cuda" else None
        self._arrived = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)

    def pack(self, weight: Tensor, bias: Tensor | None) -> CudaWeights:
        outputs = weight.shape[0]
        if self._quantise is None or outputs < SMALLEST_QUANTISED:
            return Unquantised.pack(weight, bias)
        if self._quantise == "int4" and (outputs < VOCABULARY or not self._has_fp8):
            return Int4.pack(weight, bias, self._has_fp8)
        return Fp8.pack(weight, bias)

    def pack_experts(self, gate_up: Tensor, down: Tensor, activation: Activation) -> CudaExperts:
        if self._quantise is None:
            return DenseExperts(gate_up, down, activation)
        if self._quantise == "int4":
            return Int4Experts.pack(gate_up, down, activation, self._has_fp8)
        return Fp8Experts.pack(gate_up, down, activation)

    def linear(self, x: Tensor, packed: CudaWeights) -> Tensor:
        return self._linear(x, packed, x.dtype)

    def logits(self, x: Tensor, packed: CudaWeights) -> Tensor:
        return self._linear(x, packed, torch.float32)

    def _linear(self, x: Tensor, packed: CudaWeights, dtype: torch.dtype) -> Tensor:
        count = x.shape[0]
        if packed.has_gemv and 0 < count <= GEMV_ROWS:
            return gemv(x.contiguous(), packed, dtype=dtype)
        if 0 < count <= packed.skinny_rows(x.dtype):
            return skinny_gemm(x.contiguous(), packed, self._arrived, dtype=dtype)
        if self._padded and isinstance(packed, Unquantised) and count in rows.PADDED and dtype == x.dtype:
            padded = self._padded.pad(x.contiguous(), packed.weight, packed.bias)
            return packed.gemm(padded, dtype)[:count]
        return packed.gemm(x, dtype)

    def linear_act_and_mul(self, x: Tensor, packed: CudaWeights, activation: Activation) -> Tensor:
        if packed.has_gemv and 0 < x.shape[0] <= GEMV_ROWS:
            return gemv(x.contiguous(), packed, activation)
        if isinstance(packed, Unquantised) and gated.supported(x, packed.weight):
            return gated.linear_act_and_mul(x, packed.weight, packed.bias, activation)
        return rows.act_and_mul(self.linear(x, packed), activation)

    def prepare(self, batch: Batch, cache: Cache, geometry: Geometry) -> CudaPlan:
        cos_sin = [rows.cos_sin_table(batch, rotation) for rotation in geometry.rotations]
        return CudaPlan(batch, cos_sin, self._arrived, {}, {})

    def rope_and_cache(
        self, qkv: Tensor, weights: Tensor | None, kind: Attention, layer: Tensor, plan: CudaPlan
    ) -> Tensor:
        return rows.rope_and_cache(qkv, weights, kind, layer, plan.cos_sin[kind.rotation], plan.batch.slots)

    def paged_attention(self, q: Tensor, kind: Attention, layer: Tensor, plan: CudaPlan) -> Tensor:
        counts, sequences = plan.batch.query_lens, plan.batch.contexts.shape[0]
        if attention.in_one_launch(kind, layer, sequences):
            return attention.chunk(q, kind, layer, plan.batch, plan.tiles_of(kind, q.itemsize, 1))
        if counts and max(counts) == 1:
            return attention.decode(q, kind, layer, plan.batch, plan.workspace(kind, layer))
        tiles, out = plan.tiles_of(kind, q.itemsize, 2), None
        if not counts or min(counts) == 1:
            out = attention.decode(q, kind, layer, plan.batch, plan.workspace(kind, layer))
        return attention.chunk(q, kind, layer, plan.batch, tiles, out)

    def layers(
        self, residual: Tensor, stack: LayerStack[CudaWeights, CudaExperts], cache: Cache, plan: CudaPlan
    ) -> Tensor | None:
        """Five to eight kernels a layer, for a step of one row over weights that `gemv` reads. In a step of
        many rows over fp8 weights, the kernels in front of a product quantise its rows."""
        if residual.shape[0] > SKINNY_ROWS and all(
            _has_products(each, residual.dtype) for each in stack.layers
        ):
            return self._fp8_layers(residual, stack, cache, plan)
        if residual.shape[0] > GEMV_ROWS or plan.batch.query_lens != [1]:
            return None
        if not all(_has_gemv(layer) for layer in stack.layers):
            return None
        for layer, keys in zip(stack.layers, cache.layers, strict=True):
            residual = self._layer(residual, layer, keys, plan)
        outputs = plan.batch.outputs
        return rows.norm(residual if outputs is None else residual[outputs], stack.final_norm, stack.eps)

    def _fp8_layers(
        self, residual: Tensor, stack: LayerStack[CudaWeights, CudaExperts], cache: Cache, plan: CudaPlan
    ) -> Tensor:
        dtype, first, outputs = residual.dtype, stack.layers[0], plan.batch.outputs
        assert first.pre_attention_norm is not None, "see _has_products"
        x, scales, residual = rows.quantised_norm(residual, None, first.pre_attention_norm, first.eps)
        for number, (layer, keys) in enumerate(zip(stack.layers, cache.layers, strict=True)):
            kind, norm = layer.attention, layer.pre_mlp_norm
            assert norm is not None, "see _has_products"
            qkv = _product(layer.qkv, x, scales, dtype)
            q = self.rope_and_cache(qkv, layer.query_key_norm, kind, keys, plan)
            attended = self.paged_attention(q, kind, keys, plan)
            last = number == len(stack.layers) - 1
            if last and outputs is not None:
                attended, residual = attended[outputs], residual[outputs]
            x = _product(layer.out, *rows.quantise_rows(attended), dtype)
            x, residual = self._fp8_feed_forward(layer.feed_forward, x, residual, Norm(norm, layer.eps))
            following = stack.norm_after(number)
            assert following is not None, "see _has_products"
            if last:
                return rows.add_norm(x, residual, following, stack.eps)[0]
            x, scales, residual = rows.quantised_norm(x, residual, following, layer.eps)
        raise AssertionError("a model has layers")

    def _fp8_feed_forward(
        self, block: CudaBlock, x: Tensor, residual: Tensor, norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """-> (what the block makes of the norm of x + residual, x + residual)."""
        dtype = x.dtype
        if isinstance(block, MixtureOfExperts):
            x, residual = rows.add_norm(x, residual, norm.gains, norm.eps)
            logits = self.linear(x, block.router)
            return experts(x, logits, block.experts, block.top_k, block.normalise), residual
        x, scales, residual = rows.quantised_norm(x, residual, norm.gains, norm.eps)
        x, scales = rows.quantised_act_and_mul(_product(block.gate_up, x, scales, dtype), block.activation)
        return _product(block.down, x, scales, dtype), residual

    def _layer(self, residual: Tensor, layer: CudaLayer, keys: Tensor, plan: CudaPlan) -> Tensor:
        kind, eps, block = layer.attention, layer.eps, layer.feed_forward
        first, second = layer.pre_attention_norm, layer.pre_mlp_norm
        assert first is not None and second is not None, "see _has_gemv"
        norm = Norm(first, eps)
        if layer.query_key_norm is None and rotates(layer.qkv, kind):
            cos_sin, slots = plan.cos_sin[kind.rotation], plan.batch.slots
            q = gemv_rope_and_cache(residual, layer.qkv, norm, kind, keys, cos_sin, slots)
        else:
            qkv = gemv(residual, layer.qkv, norm=norm)
            q = self.rope_and_cache(qkv, layer.query_key_norm, kind, keys, plan)
        attended = attention.decode(q, kind, keys, plan.batch, plan.workspace(kind, keys))
        residual = gemv(attended, layer.out, residual=residual)
        norm = Norm(second, eps)
        if isinstance(block, MixtureOfExperts):
            logits = gemv(residual, block.router, norm=norm, dtype=torch.float32)
            choice = routing.choose(logits, block.top_k, block.normalise)
            return stream(residual, choice, block.experts, norm, residual)
        hidden = gemv(residual, block.gate_up, block.activation, norm)
        return gemv(hidden, block.down, residual=residual)


def _linears(layer: CudaLayer) -> tuple[CudaWeights, ...] | None:
    """The linear layers of a layer that norms what its blocks read, not what they add, without the router;
    None: it is another kind of layer."""
    block = layer.feed_forward
    if layer.pre_attention_norm is None or layer.pre_mlp_norm is None:
        return None
    if layer.post_attention_norm is not None or layer.post_mlp_norm is not None:
        return None
    own = (block.gate_up, block.down) if isinstance(block, Mlp) else ()
    return layer.qkv, layer.out, *own


def _has_gemv(layer: CudaLayer) -> bool:
    """Whether one row can pass through this layer by `gemv` and `stream` alone."""
    linears, block = _linears(layer), layer.feed_forward
    routers: tuple[CudaWeights, ...] = ()
    if isinstance(block, MixtureOfExperts):
        routers = (block.router,)
    return linears is not None and all(weights.has_gemv for weights in (*linears, *routers))


def _has_products(layer: CudaLayer, dtype: torch.dtype) -> bool:
    """Whether rows of `dtype` can pass through this layer by `Fp8.product` and a router alone."""
    linears = _linears(layer)
    return linears is not None and all(
        isinstance(weights, Fp8) and weights.has_product(dtype) for weights in linears
    )


def _product(weights: CudaWeights, x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    assert isinstance(weights, Fp8), "see _has_products"
    return weights.product(x, scales, dtype)


def table(
    device: torch.device, quantise: CudaQuantise | None = None
) -> Kernels[CudaWeights, CudaExperts, CudaPlan]:
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
