"""The two halves of a decoder layer, by kind: attention, and an MLP or a mixture of them.

A block holds its packed weights and calls the kernels table; it keeps no state between calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from stretto.kernels import Activation, Attention, Experts, Kernels, Linear


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
        q = kernels.place(kernels.linear(x, self.qkv), self.norms, kind, layer, plan)
        mixed = kernels.attend(q, kind, layer, plan)
        return kernels.linear(mixed if rows is None else mixed[rows], self.out)


class Feed(Protocol):
    """What follows attention: [T, hidden] -> [T, hidden], each row by itself."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Mlp:
    kernels: Kernels
    activation: Activation
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        kernels = self.kernels
        return kernels.linear(kernels.gated(x, self.gate_up, self.activation), self.down)


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
