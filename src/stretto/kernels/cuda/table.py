"""The kernels table for NVIDIA devices: which kernel serves which step.

Nothing here reads a value back or asks the device anything, so that a step of decodes can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from stretto.kernels import Activation, Attention, Batch, Cache, Geometry, Kernels, Linear
from stretto.kernels.cuda import attend, rows
from stretto.kernels.cuda.experts import experts
from stretto.kernels.cuda.linear import FEW, MANY, SOME, WIDE, Fp8, Held, product, stream, tiled, to_fp8
from stretto.kernels.reference import Dense, DenseExperts

Quantise = Literal["fp8"]
MOST_TILES = 2**16
# A router or another small matrix costs nothing to keep and much to get wrong.
SMALLEST_QUANTISED = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """What the layers of a step share: the step, its turns by rotation, and room for its decodes to meet."""

    batch: Batch
    turns: list[Tensor]
    rooms: dict[int, attend.Room]


class Table:
    """The functions of a table and what they share: the tiles' counts of arrivals, zero between kernels."""

    def __init__(self, device: torch.device, quantise: Quantise | None) -> None:
        self._quantise = quantise
        self._arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Held:
        if self._quantise is None or weight.shape[0] < SMALLEST_QUANTISED:
            return Dense(weight, bias)
        return Fp8(*to_fp8(weight), bias)

    def linear(self, x: Tensor, packed: Linear) -> Tensor:
        held, count = cast(Held, packed), x.shape[0]
        if 0 < count <= FEW:
            return stream(x.contiguous(), held)
        if isinstance(held, Fp8):
            worth = count <= MANY
        else:
            worth = count <= SOME and held.weight.shape[0] < WIDE and x.dtype != torch.float32
        if 0 < count and worth:
            return tiled(x.contiguous(), held, self._arrived)
        return product(x, held)

    def gated(self, x: Tensor, packed: Linear, activation: Activation) -> Tensor:
        if 0 < x.shape[0] <= FEW:
            return stream(x.contiguous(), cast(Held, packed), activation)
        return rows.gate(self.linear(x, packed), activation)

    def prepare(self, batch: Batch, cache: Cache, geometry: Geometry) -> Plan:
        return Plan(batch, [rows.turn(batch, rotation) for rotation in geometry.rotations], {})

    def place(
        self, qkv: Tensor, weights: Tensor | None, kind: Attention, layer: Tensor, plan: Plan
    ) -> Tensor:
        return rows.place(qkv, weights, kind, layer, plan.turns[kind.rotation], plan.batch.slots)

    def attend(self, q: Tensor, kind: Attention, layer: Tensor, plan: Plan) -> Tensor:
        out = q.new_empty(q.shape[0], kind.heads * kind.head_dim)
        counts = plan.batch.query_lens
        if min(counts) == 1:
            room = plan.rooms.get(kind.heads)
            if room is None:
                room = plan.rooms[kind.heads] = attend.Room.of(len(counts), kind.heads, layer)
            attend.decode(q, kind, layer, plan.batch, room, out)
        if max(counts) > 1:
            attend.chunk(q, kind, layer, plan.batch, out)
        return out


def table(device: torch.device, quantise: Quantise | None = None) -> Kernels:
    """The table for `device`. `quantise` says how `pack` holds weights."""
    own = Table(device, quantise)
    return Kernels(
        name="cuda" if quantise is None else f"cuda {quantise}",
        pack=own.pack,
        linear=own.linear,
        norm=rows.norm,
        add_norm=rows.add_norm,
        gate=rows.gate,
        gated=own.gated,
        prepare=own.prepare,
        place=own.place,
        attend=own.attend,
        pack_experts=DenseExperts,
        experts=experts,
    )
