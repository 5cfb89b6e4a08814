"""The one decoder: it computes whatever a ModelSpec describes, with a device's table of kernels.

Owns the weights. Keeps nothing between steps: cache and batch are arguments, and only the kernels read them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.kernels import (
    AnyKernels,
    Batch,
    Cache,
    DecoderLayer,
    Geometry,
    LayerStack,
    Mlp,
    Packed,
    kv_width,
)
from stretto.models.spec import ModelSpec

ALIGNED = 16  # bytes: Triton compiles a kernel anew for a pointer that is aligned less


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A loaded model that computes in `dtype`; the embedding may be stored in a narrower one. `nbytes` counts
    memory that two weights share once."""

    embedding: Tensor
    dtype: torch.dtype
    stack: LayerStack[Any, Any]
    head: Packed
    geometry: Geometry
    nbytes: int
    parameters: int


class Decoder:
    """A model ready to run; its caches are made in `kv_dtype` (None: that of the weights). Not thread-safe:
    one loop drives it."""

    def __init__(
        self, spec: ModelSpec, kernels: AnyKernels, weights: ModelWeights, kv_dtype: torch.dtype | None = None
    ) -> None:
        self.spec = spec
        self.kernels = kernels
        self.weights = weights
        self.kv_dtype = kv_dtype or weights.dtype
        # The checkpoint's own framework rounds the scale to the model's dtype, and so must we.
        self._scale = torch.tensor(spec.embed_scale, dtype=weights.dtype).item()

    def with_kv_dtype(self, dtype: torch.dtype) -> Decoder:
        """The same model with caches of `dtype`."""
        return Decoder(self.spec, self.kernels, self.weights, dtype)

    def abridged(self, cache: Cache) -> tuple[Decoder, Cache]:
        """The same model with the first layer of each kind and the last layer, and their part of `cache`.

        A step of it calls the same kernels with arguments of the same shapes as a step of the whole model. It
        loads and compiles them in a fraction of the time. What it computes means nothing.
        """
        layers = self.weights.stack.layers
        kinds = [_kind(layer) for layer in layers]
        chosen = sorted({*(kinds.index(kind) for kind in kinds), len(layers) - 1})
        stack = replace(self.weights.stack, layers=[layers[number] for number in chosen])
        decoder = Decoder(self.spec, self.kernels, replace(self.weights, stack=stack), self.kv_dtype)
        return decoder, replace(cache, layers=[cache.layers[number] for number in chosen])

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def weight_bytes(self) -> int:
        return self.weights.nbytes

    @property
    def parameters(self) -> int:
        return self.weights.parameters

    def cache_bytes_per_block(self, block_size: int) -> int:
        """Bytes of keys and values that `block_size` tokens take in all layers."""
        spec = self.spec
        row = kv_width(spec.head_dim, self.kv_dtype) * self.kv_dtype.itemsize
        return 2 * len(spec.layers) * spec.kv_heads * block_size * row

    def new_cache(self, blocks: int, block_size: int) -> Cache:
        """An empty cache of `blocks * block_size` tokens."""
        shape = (blocks, self.spec.kv_heads, block_size, self.spec.head_dim)
        return Cache.zeros(len(self.spec.layers), shape, self.kv_dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """Run a step and write its keys and values to the cache -> the last hidden states of the rows
        `batch.outputs`, after the final norm, [R, hidden]."""
        weights, kernels = self.weights, self.kernels
        plan = kernels.prepare(batch, cache, weights.geometry)
        residual = F.embedding(batch.tokens, weights.embedding).to(weights.dtype)
        if self._scale != 1.0:
            residual = residual * self._scale
        if kernels.layers is not None:
            hidden = kernels.layers(residual, weights.stack, cache, plan)
            if hidden is not None:
                return hidden
        return self._layer_by_layer(residual, batch, cache, plan)

    def _layer_by_layer(self, residual: Tensor, batch: Batch, cache: Cache, plan: Any) -> Tensor:
        """The same with one call of the table for each operation."""
        stack, last = self.weights.stack, len(self.weights.stack.layers) - 1
        first = stack.layers[0]
        x = residual
        if first.pre_attention_norm is not None:
            x = self.kernels.norm(residual, first.pre_attention_norm, first.eps)
        for number, layer in enumerate(stack.layers):
            # In the last layer all keys and values are needed, but only the wanted rows go further.
            rows = batch.outputs if number == last else None
            x = self._attention(layer, x, cache.layers[number], plan, rows)
            if rows is not None:
                residual = residual[rows]
            x, residual = self._add(x, residual, layer.post_attention_norm, layer.pre_mlp_norm)
            x = self._feed_forward(layer, x)
            x, residual = self._add(x, residual, layer.post_mlp_norm, stack.norm_after(number))
        return x

    def _attention(
        self, layer: DecoderLayer[Any, Any], x: Tensor, keys: Tensor, plan: Any, rows: Tensor | None
    ) -> Tensor:
        """`x` [T, hidden] -> [T, hidden]. With `rows`, only those: [R, hidden]."""
        kernels, kind = self.kernels, layer.attention
        qkv = kernels.linear(x, layer.qkv)
        queries = kernels.rope_and_cache(qkv, layer.query_key_norm, kind, keys, plan)
        attended = kernels.paged_attention(queries, kind, keys, plan)
        return kernels.linear(attended if rows is None else attended[rows], layer.out)

    def _feed_forward(self, layer: DecoderLayer[Any, Any], x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden], each row by itself."""
        kernels, block = self.kernels, layer.feed_forward
        if isinstance(block, Mlp):
            hidden = kernels.linear_act_and_mul(x, block.gate_up, block.activation)
            return kernels.linear(hidden, block.down)
        scores = kernels.linear(x, block.router)
        return kernels.experts(x, scores, block.experts, block.top_k, block.normalise)

    def _add(
        self, x: Tensor, residual: Tensor, post_norm: Tensor | None, next_norm: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add what a block made to the residual sum -> (what the next block reads, the sum)."""
        kernels, eps = self.kernels, self.spec.eps
        if post_norm is not None:
            x = kernels.norm(x, post_norm, eps)
        if next_norm is not None:
            return kernels.add_norm(x, residual, next_norm, eps)
        residual = residual + x
        return residual, residual

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden] -> logits over the vocabulary, float32 [R, vocab]."""
        kernels, weights = self.kernels, self.weights
        logits = (kernels.logits or kernels.linear)(hidden, weights.head).float()
        if self.spec.tied and kernels.rescore_top_k is not None:
            kernels.rescore_top_k(logits, hidden, weights.head, weights.embedding)
        cap = self.spec.final_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def _kind(value: Any) -> Any:
    """What the choice of a kernel may depend on: all of a layer but the values in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.data_ptr() % ALIGNED
    if is_dataclass(value):
        return type(value), [_kind(getattr(value, field.name)) for field in fields(value)]
    return value
