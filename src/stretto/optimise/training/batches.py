"""Training batches: padded rows of token ids, in an order that depends on the seed and the step alone.

So an interrupted run goes on with the very batches it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
from torch import Tensor

from stretto.optimise.answers import Encoded


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A sequence to learn. `weight`: of its loss. `certain`: whether its reply is known to be right, so that
    cross-entropy may be applied to it."""

    text: Encoded
    weight: float = 1.0
    certain: bool = True


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rows padded on the right: `ids` int64 [B, T], `mask` int64 [B, T].

    The N places whose next token is learnt: `rows` and `columns` int64 [N], `targets` int64 [N], their
    `weights` float32 [N], and `certain` float32 [N], 1 where cross-entropy applies.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    weights: Tensor
    certain: Tensor


def shortened(rows: Sequence[TrainingRow], most: int) -> list[TrainingRow]:
    """The rows cut to `most` tokens. Those without a token of the reply left are dropped."""
    kept: list[TrainingRow] = []
    for row in rows:
        if row.text.start < min(len(row.text.ids), most) and row.weight > 0:
            kept.append(TrainingRow(Encoded(row.text.ids[:most], row.text.start), row.weight, row.certain))
    return kept


def chosen(count: int, size: int, step: int, seed: int) -> list[int]:
    """Which of `count` rows are in the batch of a step: every row once in each epoch, in a new order."""
    places: list[int] = []
    while len(places) < size:
        epoch, at = divmod(step * size + len(places), count)
        places += _order(count, seed, epoch)[at : at + size - len(places)]
    return places


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)


def batch_of(rows: Sequence[TrainingRow], device: torch.device) -> TrainingBatch:
    """The batch of some rows. Longer replies weigh more in sum, but each by the root of its length only:
    otherwise long workings would drown short answers."""
    # A GPU's allocator is slow while it meets new shapes, so there are few of them.
    step = 64 if device.type == "cuda" else 1
    width = -(-max(len(row.text.ids) for row in rows) // step) * step
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    places: list[tuple[int, int, int]] = []
    weights: list[float] = []
    certain: list[float] = []
    for number, row in enumerate(rows):
        held, start = row.text.ids, row.text.start
        ids[number, : len(held)] = torch.tensor(held)
        mask[number, : len(held)] = 1
        places += [(number, at - 1, held[at]) for at in range(start, len(held))]
        learnt = len(held) - start
        weights += [row.weight * learnt**-0.5] * learnt
        certain += [float(row.certain)] * learnt
    where = torch.tensor(places).T.to(device)
    return TrainingBatch(
        ids=ids.to(device),
        mask=mask.to(device),
        rows=where[0],
        columns=where[1],
        targets=where[2],
        weights=torch.tensor(weights, device=device),
        certain=torch.tensor(certain, device=device),
    )
