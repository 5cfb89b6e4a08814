"""The description of a decoder: everything that `stretto.models.decoder` needs besides the weights.

Made from config.json by `stretto.models.families`. Knows neither files nor tensors.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from stretto.kernels import Activation

StoredDtype = Literal["float32", "bfloat16", "float16"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


class Rope(Struct, frozen=True, kw_only=True):
    """A rotary embedding of the first `dims` dimensions of a head.

    `original`: the context length before it was extended. `short`: longrope's factors up to that length.
    `attention`: what cosine and sine are multiplied by (None: by yarn's own rule).
    """

    kind: RopeKind
    theta: float
    dims: int
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention: float | None = None
    mscale: float | None = None
    mscale_all: float | None = None
    short: tuple[float, ...] = ()


class Layer(Struct, frozen=True):
    """One decoder layer. `window`: how many keys a query sees (0: all). `rope`: the index of its rotary
    embedding in `ModelSpec.ropes`. `experts`: whether it is a mixture of experts."""

    window: int = 0
    rope: int = 0
    experts: bool = False


class Routing(Struct, frozen=True):
    """A mixture of experts: each token takes the `top_k` likeliest of `count` experts. `normalise`: whether
    their weights are made to sum to 1. `intermediate`: the width of one expert."""

    count: int
    top_k: int
    normalise: bool
    intermediate: int


class ModelSpec(Struct, frozen=True, kw_only=True):
    """A decoder-only transformer.

    `context`: the longest sequence, in tokens, that the model was trained for.
    `scale`: what attention scores are multiplied by.
    `dtype`: the dtype in which the weights are stored, by config.json; None: it does not say so.
    `tied`: whether the head shares the embedding.
    `unit_offset`: whether norm weights are stored minus one.
    `query_norm`: the norm of queries and keys: none, over each head, or over all heads of the row.
    `eos`: the tokens that end an answer.
    """

    family: str
    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    context: int
    eps: float
    scale: float
    activation: Activation
    dtype: StoredDtype | None
    tied: bool
    unit_offset: bool = False
    query_norm: Literal["none", "head", "row"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    attention_cap: float = 0.0
    final_cap: float = 0.0
    routing: Routing | None = None
    eos: tuple[int, ...] = ()
