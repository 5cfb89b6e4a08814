"""The one decoder: it runs whatever a ModelSpec describes, through a kernels table.

Owns the weights. Holds nothing between steps: the cache and the batch are passed in, and only the table
reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stretto.kernels import Batch, Cache, Geometry, Kernels, Linear, Op, PlainLayer, Run, kv_width
from stretto.models.blocks import Feed, Join, Mixer, Mlp
from stretto.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """`to_feed` leads from attention to the MLP; `onward` from the MLP to the next layer, or to the end."""

    mixer: Mixer
    to_feed: Join
    feed: Feed
    onward: Join


@dataclass(frozen=True, slots=True)
class Weights:
    """A loaded model, computed in `dtype`; the embedding may be stored in less. `first`: the norm the first
    layer reads through. `nbytes` counts what is held once."""

    embedding: Tensor
    dtype: torch.dtype
    first: Tensor | None
    layers: Sequence[DecoderLayer]
    head: Linear
    geometry: Geometry
    nbytes: int
    parameters: int


class Decoder:
    """A model ready to run. Not thread-safe: one loop drives it. Its caches are made in `kv_dtype`."""

    def __init__(self, spec: ModelSpec, kernels: Kernels, weights: Weights) -> None:
        self.spec = spec
        self.kernels = kernels
        self.kv_dtype = weights.dtype
        self.weights = weights
        self._embedding = weights.embedding
        self._last = len(weights.layers) - 1
        self._run = _compiled(weights.layers, spec.hidden, kernels)
        self._plain = _plain(weights)
        # The scale is rounded as the checkpoint's own framework rounds it.
        self._scale = torch.tensor(spec.embed_scale, dtype=self.dtype).item()

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding.device

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
        """Run the step and write its keys and values into the cache: the normed last hidden states of the
        token rows `batch.outputs`, [R, hidden]."""
        weights = self.weights
        plan = self.kernels.prepare(batch, cache, weights.geometry)
        residual = F.embedding(batch.tokens, self._embedding).to(self.dtype)
        if self._scale != 1.0:
            residual = residual * self._scale
        ended = self._at_once(residual, batch, cache, plan)
        if ended is not None:
            return ended
        x = residual
        if weights.first is not None:
            x = self.kernels.norm(residual, weights.first, self.spec.eps)
        if self._run is not None and weights.first is not None and _all_rows(batch):
            return self._run(x, residual, cache, plan)
        for number, layer in enumerate(weights.layers):
            # Of the last layer only the keys, the values and the rows asked for are of use to anybody.
            rows = batch.outputs if number == self._last else None
            x = layer.mixer(x, cache.layers[number], plan, rows)
            x, residual = layer.to_feed(x, residual if rows is None else residual[rows])
            x, residual = layer.onward(layer.feed(x), residual)
        return x

    def _at_once(self, residual: Tensor, batch: Batch, cache: Cache, plan: Any) -> Tensor | None:
        """What `forward` returns, where the table runs all layers in a way of its own."""
        final = self.weights.layers[-1].onward.before
        if self.kernels.layers is None or self._plain is None or final is None:
            return None
        sums = self.kernels.layers(residual, self._plain, cache, plan)
        if sums is None:
            return None
        chosen = sums if batch.outputs is None else sums[batch.outputs]
        return self.kernels.norm(chosen, final, self.spec.eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden] -> logits over the vocabulary, float32 [R, vocab]."""
        logits = (self.kernels.logits or self.kernels.linear)(hidden, self.weights.head).float()
        if self.spec.tied and self.kernels.rescore_top_k is not None:
            self.kernels.rescore_top_k(logits, hidden, self.weights.head, self._embedding)
        cap = self.spec.final_cap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def _all_rows(batch: Batch) -> bool:
    """Whether the hidden state of every row is wanted, as in a step that only decodes."""
    return batch.outputs is None or batch.outputs.shape[0] == batch.tokens.shape[0]


def _compiled(layers: Sequence[DecoderLayer], hidden: int, kernels: Kernels) -> Run | None:
    """All layers in one call, where the table offers it and each layer can be said as data."""
    if kernels.compile is None:
        return None
    ops: list[Op] = []
    for number, layer in enumerate(layers):
        halves = layer.to_feed.ops(hidden), layer.feed.ops(hidden), layer.onward.ops(hidden)
        ops += layer.mixer.ops(number, hidden)
        for half in halves:
            if half is None:
                return None
            ops += half
    return kernels.compile(ops)


def _plain(weights: Weights) -> list[PlainLayer] | None:
    """The layers as a table may run them at once: None if any of them is not plain."""
    layers: list[PlainLayer] = []
    first = weights.first
    for layer in weights.layers:
        mixer, second, feed, onward = layer.mixer, layer.to_feed.before, layer.feed, layer.onward
        joined = layer.to_feed.after is None and onward.after is None
        if first is None or second is None or not joined or not isinstance(feed, Mlp):
            return None
        layers.append(
            PlainLayer(
                kind=mixer.kind,
                eps=onward.eps,
                first=first,
                qkv=mixer.qkv,
                norms=mixer.norms,
                out=mixer.out,
                second=second,
                gate_up=feed.gate_up,
                activation=feed.activation,
                down=feed.down,
            )
        )
        first = onward.before
    return layers
