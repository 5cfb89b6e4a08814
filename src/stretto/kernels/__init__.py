"""The interface between the decoder and a device: a table of functions, and the data that they are given.

Everything is flat: T token rows of S sequences. No function reads a value back from the device, so a table
may be C, Triton or a captured graph. Knows no model family, no scheduler and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy
import torch
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class Packed(Protocol):
    """Weights in the layout that a table chose for them."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        ...

    def shares(self, weight: Tensor) -> bool:
        """Whether `weight` itself is held, so that its memory must not be counted twice."""
        ...


W = TypeVar("W", bound=Packed)  # a table's weights of one linear layer
E = TypeVar("E", bound=Packed)  # a table's weights of all experts of a layer
P = TypeVar("P")  # a table's plan of a step


@dataclass(slots=True)
class Batch:
    """One step: T tokens of S sequences. The tokens of a sequence are adjacent and end at its newest one.

    `tokens`, `positions`: int64 [T].
    `slots`: int64 [T], where a token's key and value go: block * block_size + offset.
    `query_starts`: int32 [S + 1], the first row of each sequence, and T.
    `contexts`: int32 [S], how many keys the last query of a sequence sees, its own included.
    `tables`: int32 [S, blocks], the blocks of each sequence, padded with 0.
    `outputs`: int64 [R], the rows whose hidden state is wanted. None: all of them.
    `query_lens`, `context_lens`: rows and contexts of each sequence, on the host. Empty where the device
    alone knows them; then T and S are the most that there can be.
    `written`: int32 [S], how many keys of each sequence earlier steps have written. None: all but those of
    its own rows. They are fewer where several of the S sequences are one, whose rows follow each other.
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
    written: Tensor | None = None


@dataclass(slots=True)
class Cache:
    """Paged keys and values. A layer is [2, blocks, kv_heads, block_size, head_dim]: keys, then values.

    In int8, a row of quantised values is followed by its scale, a float32 (see `kv_width`). Slots that are
    not written yet must hold finite numbers, because attention may read them with weight zero. A new cache is
    therefore all zeros, and `erase` resets blocks that received NaN. `scratch` belongs to the kernels.
    """

    layers: list[Tensor]
    scratch: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def zeros(
        cls, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """An empty cache. `shape` is (blocks, kv_heads, block_size, head_dim). On the CPU, memory is only
        taken from the system when a block is first used."""
        whole = 2, *shape[:3], kv_width(shape[3], dtype)
        return cls([_zeros(whole, dtype, device) for _ in range(layers)])

    @property
    def block_size(self) -> int:
        return self.layers[0].shape[3]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def erase(self, blocks: list[int]) -> None:
        """Set these blocks to zero in every layer."""
        for layer in self.layers:
            layer[:, blocks] = 0


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotary position embedding. At position p, the dimensions i and i + dims / 2 of a head are rotated
    by the angle p * frequencies[i]. `frequencies` is float32 [dims / 2]; cosine and sine are multiplied
    by `scale`."""

    frequencies: Tensor
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Attention:
    """The constants of an attention layer.

    `scale`: what scores are multiplied by.
    `window`: how many keys a query sees, its own included (0: all).
    `softcap`: scores become softcap * tanh(score / softcap) (0: unchanged).
    `rotation`: the index of its rotary embedding in the model's `Geometry`.
    `norm`: RMS norm of queries and keys: none, over each head, or over all heads of the row.
    """

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
    """What all steps of a model have in common: its rotary embeddings, and the windows of its layers."""

    rotations: tuple[Rotation, ...]
    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mlp(Generic[W]):
    """A gated feed-forward block: down(activation(gate) * up). `gate_up` computes gate, then up."""

    gate_up: W
    activation: Activation
    down: W


@dataclass(frozen=True, slots=True)
class MixtureOfExperts(Generic[W, E]):
    """A feed-forward block in which each token takes the `top_k` experts that its router prefers.
    `normalise`: whether the weights of those experts are made to sum to 1."""

    router: W
    experts: E
    top_k: int
    normalise: bool


@dataclass(frozen=True, slots=True)
class DecoderLayer(Generic[W, E]):
    """Attention, then a feed-forward block. Each reads the residual sum and adds to it.

    `pre_*_norm` is applied to what a block reads, `post_*_norm` to what it adds; None: there is no such norm.
    All are RMS norms [H] with `eps`. `query_key_norm`: see `Kernels.rope_and_cache`.
    """

    attention: Attention
    eps: float
    pre_attention_norm: Tensor | None
    qkv: W
    query_key_norm: Tensor | None
    out: W
    post_attention_norm: Tensor | None
    pre_mlp_norm: Tensor | None
    feed_forward: Mlp[W] | MixtureOfExperts[W, E]
    post_mlp_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerStack(Generic[W, E]):
    """All layers of a model, and the RMS norm [H] of the last hidden states."""

    layers: Sequence[DecoderLayer[W, E]]
    final_norm: Tensor
    eps: float

    def norm_after(self, number: int) -> Tensor | None:
        """The norm of the residual sum after layer `number`: that of the next layer, or the final one."""
        following = number + 1
        return self.layers[following].pre_attention_norm if following < len(self.layers) else self.final_norm


@dataclass(frozen=True, slots=True)
class Kernels(Generic[W, E, P]):
    """A table: the functions that compute a decoder on one device.

    Activations are [T, ...] in the model's dtype. So are results, unless a function says otherwise. An
    argument that is "consumed" may be overwritten or returned.
    """

    name: str
    pack: Callable[[Tensor, Tensor | None], W]
    """(weight [N, K] consumed, bias [N] consumed or None) -> weights in the table's layout."""
    linear: Callable[[Tensor, W], Tensor]
    """(x [T, K], weights) -> x @ weight.T + bias, [T, N]."""
    norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [T, H], weight [H], eps) -> RMS norm of x, times the weight."""
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(x, residual consumed, weight, eps) -> (norm of x + residual, x + residual)."""
    act_and_mul: Callable[[Tensor, Activation], Tensor]
    """(gate and up [T, 2F], activation) -> activation(gate) * up, [T, F]."""
    linear_act_and_mul: Callable[[Tensor, W, Activation], Tensor]
    """(x [T, H], weights of gate and up, activation) -> `act_and_mul` of their `linear`, [T, F]."""
    prepare: Callable[[Batch, Cache, Geometry], P]
    """What all layers of a step share, such as cosines, indices and masks: the plan."""
    rope_and_cache: Callable[[Tensor, Tensor | None, Attention, Tensor, P], Tensor]
    """(queries, keys and values [T, (heads + 2 kv_heads) * head_dim] consumed, norm weights of queries and
    keys [(heads + kv_heads) * head_dim] or None, attention, cache layer, plan): apply the norm and the rotary
    embedding to queries and keys, write keys and values to their slots -> queries [T, heads, head_dim]."""
    paged_attention: Callable[[Tensor, Attention, Tensor, P], Tensor]
    """(queries [T, heads, head_dim], attention, cache layer, plan) -> [T, heads * head_dim]; causal."""
    pack_experts: Callable[[Tensor, Tensor, Activation], E]
    """(gate and up [E, 2F, H] consumed, down [E, H, F] consumed, activation) -> weights of all experts."""
    experts: Callable[[Tensor, Tensor, E, int, bool], Tensor]
    """(x [T, H], router logits [T, E], experts, k, normalise) -> [T, H]: each token's k likeliest experts,
    weighted by the softmax over all experts; with `normalise` the k weights are made to sum to 1."""
    layers: Callable[[Tensor, LayerStack[W, E], Cache, P], Tensor | None] | None = None
    """(residual sum [T, H] consumed, layers, cache, plan) -> hidden states [R, H] after all layers and the
    final norm, of the rows `Batch.outputs`. None, with nothing consumed: call the other functions instead."""
    logits: Callable[[Tensor, W], Tensor] | None = None
    """(x [R, K], head [N, K]) -> float32 [R, N], if possible not rounded to x's dtype. None: as `linear`."""
    pack_tied: Callable[[Tensor], W] | None = None
    """(embedding [N, K], which stays) -> the head that shares it. None: as `pack`."""
    rescore_top_k: Callable[[Tensor, Tensor, W, Tensor], None] | None = None
    """(logits [R, N] float32, x [R, K], tied head, its embedding): if the head is coarsely quantised, compute
    the largest logits again from the embedding, in place. None: no head needs it."""
    kv_dtypes: frozenset[torch.dtype] = frozenset()
    """Dtypes that a cache may have besides the one in which the model computes."""
    weight_dtypes: frozenset[torch.dtype] = frozenset()
    """Dtypes in which weights may be packed and an embedding kept, whatever the model computes in."""


AnyKernels = Kernels[Any, Any, Any]
"""A table whose types are its own business: the decoder passes them from one function to another."""


def kv_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that one head's key or value takes in a cache of `dtype`."""
    return head_dim + 4 if dtype == torch.int8 else head_dim


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages; torch would write every one of them now.
    words = {1: numpy.int8, 2: numpy.int16, 4: numpy.int32}[dtype.itemsize]
    return torch.as_tensor(numpy.zeros(shape, words)).view(dtype)
