"""The seam between the decoder and the machine: one table of functions per device, and what they are handed.

Everything is flat (T token rows of S sequences) and nothing here reads a value back from the device, so a
table may be C, Triton or a captured graph. Knows no family of models, no scheduler and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy
import torch
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class Packed(Protocol):
    """Weights in whatever layout a table likes best. `shares`: is this the tensor it was made from, still
    held?"""

    @property
    def nbytes(self) -> int: ...

    def shares(self, weight: Tensor) -> bool: ...


Linear = Packed
Experts = Packed


@dataclass(slots=True)
class Batch:
    """One step: T tokens of S sequences, those of a sequence in a row and ending at its newest position.

    `tokens`, `positions`: int64 [T]. `slots`: int64 [T], block * block_size + offset of each token's own
    key. `query_starts`: int32 [S + 1]. `contexts`: int32 [S], keys the last query of a sequence sees, itself
    included. `tables`: int32 [S, blocks], padded with 0. `outputs`: int64 [R], the token rows whose hidden
    state is wanted; None: all. `query_lens` and `context_lens` are the same numbers on the host.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    contexts: Tensor
    tables: Tensor
    outputs: Tensor | None
    query_lens: list[int]
    context_lens: list[int]


@dataclass(slots=True)
class Cache:
    """Paged keys and values. A layer is [2, blocks, kv_heads, block_size, head_dim]: keys, then values. In
    int8 the levels of a row are followed by their scale, a float32: see `kv_width`.

    Values of tokens not written yet must be finite, because attention may read them with weight zero: hence
    zeros at the start, and `erase` for the blocks of a sequence whose numbers went wrong. `scratch` is the
    kernels' own.
    """

    layers: list[Tensor]
    scratch: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def zeros(
        cls, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """`shape` is (blocks, kv_heads, block_size, head_dim). On the CPU the pages are not touched before
        use."""
        whole = 2, *shape[:3], kv_width(shape[3], dtype)
        return cls([_zeros(whole, dtype, device) for _ in range(layers)])

    @property
    def block_size(self) -> int:
        return self.layers[0].shape[3]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def erase(self, blocks: list[int]) -> None:
        """Zero these blocks in every layer."""
        for layer in self.layers:
            layer[:, blocks] = 0


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary embedding: pair i is the dimensions i and i + dims / 2 of a head, turned at position p by the
    angle p * frequencies[i] (float32 [dims / 2]); cosine and sine are multiplied by `scale`."""

    frequencies: Tensor
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Attention:
    """What is fixed about one kind of attention layer. `window`: keys a query sees, itself included (0:
    all). `softcap`: scores become softcap * tanh(score / softcap) (0: none). `rotation`: which of the step's
    rotations. `norm`: RMS norm of queries and keys: none, over each head, or over the whole row of heads."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    rotation: int = 0
    norm: Literal["none", "head", "row"] = "none"
    eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class Geometry:
    """What every step of a model has in common: its rotations, and the distinct windows of its layers."""

    rotations: tuple[Rotation, ...]
    windows: tuple[int, ...]


Buffer = Literal["x", "residual", "qkv", "mixed", "both", "gated"]


@dataclass(frozen=True, slots=True)
class Op:
    """A call of a table's function, as data: `source` and `target` are what it reads and writes, T rows of
    `width` elements. `of`: its weights. `layer`: whose keys and values."""

    call: Literal["linear", "norm", "add_norm", "gate", "place", "attend"]
    source: Buffer
    target: Buffer
    width: int
    of: Linear | Tensor | None = None
    kind: Attention | None = None
    layer: int = 0
    activation: Activation = "silu"
    eps: float = 0.0


Run = Callable[[Tensor, Tensor, "Cache", Any], Tensor]
"""(x consumed, residual consumed, both [T, H], cache, plan) -> what a list of calls leaves in x."""


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """A decoder layer of the commonest kind. Attention, then an MLP, each reads the sum so far through an RMS
    norm (`first`, `second`) and adds to it. `norms`: as `Kernels.place` takes them."""

    kind: Attention
    eps: float
    first: Tensor
    qkv: Linear
    norms: Tensor | None
    out: Linear
    second: Tensor
    gate_up: Linear
    activation: Activation
    down: Linear


@dataclass(frozen=True, slots=True)
class Kernels:
    """A table. Activations are [T, ...] in the model's dtype; every function returns a tensor of that dtype.

    Arguments marked consumed may be overwritten or returned.
    """

    name: str
    pack: Callable[[Tensor, Tensor | None], Linear]
    """(weight [N, K], bias [N] or None), consumed -> Linear."""
    linear: Callable[[Tensor, Linear], Tensor]
    """(x [T, K], Linear) -> x @ weight.T + bias, [T, N]."""
    norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [T, H], weight [H], eps) -> RMS norm, times the weight."""
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(x, residual consumed, weight, eps) -> (norm of the sum, the sum)."""
    act_and_mul: Callable[[Tensor, Activation], Tensor]
    """(gate and up [T, 2F], activation) -> activation(gate) * up, [T, F]."""
    linear_act_and_mul: Callable[[Tensor, Linear, Activation], Tensor]
    """(x [T, H], Linear of gates and ups, activation) -> the gate of its linear, [T, F]."""
    prepare: Callable[[Batch, Cache, Geometry], Any]
    """What all layers of a step share (cosines, indices, masks): the plan, opaque to the decoder."""
    rope_and_cache: Callable[[Tensor, Tensor | None, Attention, Tensor, Any], Tensor]
    """(queries, keys, values [T, (heads + 2 kv_heads) * head_dim] consumed, norm weights of queries and keys
    [(heads + kv_heads) * head_dim] or None, kind, cache layer, plan): normalise and rotate queries and keys,
    write keys and values into their slots -> queries [T, heads, head_dim]."""
    paged_attention: Callable[[Tensor, Attention, Tensor, Any], Tensor]
    """(queries [T, heads, head_dim], kind, cache layer, plan) -> [T, heads * head_dim]; causal."""
    pack_experts: Callable[[Tensor, Tensor, Activation], Experts]
    """(gate and up [E, 2F, H], down [E, H, F], activation), consumed -> Experts."""
    experts: Callable[[Tensor, Tensor, Experts, int, bool], Tensor]
    """(x [T, H], router logits [T, E], Experts, k, normalise): softmax over all experts, the k likeliest,
    their weights made to sum to 1 if `normalise`, the weighted sum of those experts -> [T, H]."""
    compile: Callable[[list[Op]], Run] | None = None
    """(calls) -> all of them at once, from "x" and "residual" on. None: each is to be called."""
    caches: frozenset[torch.dtype] = frozenset()
    """Dtypes a cache may have beside the one the model computes in."""
    takes: frozenset[torch.dtype] = frozenset()
    """Dtypes in which weights to pack may come, and an embedding stay, whatever the model computes in."""
    pack_tied: Callable[[Tensor], Linear] | None = None
    """(embedding [N, K], which stays) -> the head that shares it; None: as `pack`."""
    rescore_top_k: Callable[[Tensor, Tensor, Linear, Tensor], None] | None = None
    """(logits [R, N] float32, x [R, K], a tied head, its embedding): the likeliest logits computed anew from
    the embedding, in place, where the head is too rough for them. None: no head is."""
    logits: Callable[[Tensor, Linear], Tensor] | None = None
    """(x [R, K], head [N, K]) -> float32 [R, N], never rounded to x's dtype where a table can help it. None:
    as `linear`."""
    layers: Callable[[Tensor, Sequence[PlainLayer], Cache, Any], Tensor | None] | None = None
    """(sums [T, H] consumed, all layers of a model that has only plain ones, cache, plan) -> the sums after
    them, or None (nothing consumed) where the table has no way shorter than its other functions."""


def kv_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that a row of keys or values takes in a cache of `dtype`."""
    return head_dim + 4 if dtype == torch.int8 else head_dim


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages; torch would write every one of them now.
    words = {1: numpy.int8, 2: numpy.int16, 4: numpy.int32}[dtype.itemsize]
    return torch.from_numpy(numpy.zeros(shape, words)).view(dtype)
