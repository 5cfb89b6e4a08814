"""The two halves of a decoder layer, by kind: attention, and an MLP or a mixture of them.

A block holds its packed weights and calls the kernels table; it keeps no state between calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from stretto.kernels import Activation, Attention, Experts, Kernels, Linear, Op


@dataclass(frozen=True, slots=True)
class Mixer:
    """Attention: [T, hidden] -> [T, hidden]. `norms`: weights for queries and keys, one vector, or None."""

    kernels: Kernels
    kind: Attention
    qkv: Linear
    out: Linear
    norms: Tensor | None

    def __call__(self, x: Tensor, layer: Tensor, plan: Any, rows: Tensor | None = None) -> Tensor:
        """With `rows` only those token rows are finished and returned: [R, hidden]."""
        kernels, kind = self.kernels, self.kind
        q = kernels.rope_and_cache(kernels.linear(x, self.qkv), self.norms, kind, layer, plan)
        mixed = kernels.paged_attention(q, kind, layer, plan)
        return kernels.linear(mixed if rows is None else mixed[rows], self.out)

    def ops(self, layer: int, hidden: int) -> list[Op]:
        """The same as data, over "x"."""
        kind, queries = self.kind, self.kind.heads * self.kind.head_dim
        lanes = queries + 2 * kind.kv_heads * kind.head_dim
        return [
            Op("linear", "x", "qkv", lanes, self.qkv),
            Op("place", "qkv", "qkv", lanes, self.norms, kind, layer),
            Op("attend", "qkv", "mixed", queries, None, kind, layer),
            Op("linear", "mixed", "x", hidden, self.out),
        ]


class Feed(Protocol):
    """What follows attention: [T, hidden] -> [T, hidden], each row by itself."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def ops(self, hidden: int) -> list[Op] | None:
        """The same as data, over "x"; None where what is called depends on the numbers."""
        ...


@dataclass(frozen=True, slots=True)
class Mlp:
    kernels: Kernels
    activation: Activation
    inner: int
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        kernels = self.kernels
        return kernels.linear(kernels.linear_act_and_mul(x, self.gate_up, self.activation), self.down)

    def ops(self, hidden: int) -> list[Op]:
        return [
            Op("linear", "x", "both", 2 * self.inner, self.gate_up),
            Op("gate", "both", "gated", self.inner, activation=self.activation),
            Op("linear", "gated", "x", hidden, self.down),
        ]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Each token goes to the `chosen` experts its router likes best."""

    kernels: Kernels
    router: Linear
    experts: Experts
    chosen: int
    normalise: bool

    def __call__(self, x: Tensor) -> Tensor:
        scores = self.kernels.linear(x, self.router)
        return self.kernels.experts(x, scores, self.experts, self.chosen, self.normalise)

    def ops(self, hidden: int) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Join:
    """What stands between two blocks: the norm of what one made, the residual sum, the norm the next one
    reads."""

    kernels: Kernels
    eps: float
    after: Tensor | None
    before: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self.after is not None:
            x = self.kernels.norm(x, self.after, self.eps)
        if self.before is not None:
            return self.kernels.add_norm(x, residual, self.before, self.eps)
        residual = residual + x
        return residual, residual

    def ops(self, hidden: int) -> list[Op] | None:
        """The same as data; None where the sum is read as it is."""
        if self.before is None:
            return None
        after = [] if self.after is None else [Op("norm", "x", "x", hidden, self.after, eps=self.eps)]
        return [*after, Op("add_norm", "x", "x", hidden, self.before, eps=self.eps)]
