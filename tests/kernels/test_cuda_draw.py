"""Sampling on the device: the same tokens with the same probabilities as the sampler on the host."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from stretto.kernels import Batch
from tests.kernels.cuda import DEVICE, GPU

from stretto.kernels.cuda import draw  # isort: skip

pytestmark = [pytest.mark.cuda] if GPU else []
VOCAB, COUNT = (5000, 50) if GPU else (300, 10)


def orders(*rows: dict[int, float]) -> Tensor:
    """Sampling parameters for each row, by field. Row i gets slot i."""
    made = np.zeros((len(rows), draw.ORDER), dtype=np.int32)
    for index, row in enumerate(rows):
        made[index, draw.SLOT] = made[index, draw.SINK] = index
        for place, value in ({draw.TOP_P: 1.0, draw.REPETITION: 1.0} | row).items():
            if place >= draw.TEMPERATURE:
                made[index, place : place + 1].view(np.float32)[:] = value
            else:
                made[index, place] = int(value)
    return torch.from_numpy(made).to(DEVICE)


def unseen(rows: int) -> Tensor:
    return torch.zeros(rows, VOCAB, dtype=torch.int16, device=DEVICE)


def drawn(logits: Tensor, *rows: dict[int, float]) -> list[int]:
    """Draw one token from the same logits for each row of parameters."""
    known = torch.full((len(rows),), -7, device=DEVICE)
    rows_of_it = logits.repeat(len(rows), 1).to(DEVICE)
    found = draw.draw(rows_of_it, orders(*rows), known, unseen(len(rows)))
    assert torch.equal(found, known)
    return found.tolist()


def spread(**fields: float) -> list[dict[int, float]]:
    """Rows of parameters whose random numbers are evenly spaced in (0, 1)."""
    names = {"heat": draw.TEMPERATURE, "top_p": draw.TOP_P, "min_p": draw.MIN_P, "top_k": draw.TOP_K}
    chosen = {names[name]: value for name, value in fields.items()}
    return [{draw.TEMPERATURE: 1.0} | chosen | {draw.FRACTION: (i + 0.5) / COUNT} for i in range(COUNT)]


def wanted(probabilities: Tensor) -> list[int]:
    """The tokens that inverting the cumulative sum gives for the random numbers of `spread`."""
    cumulative = list(accumulate(probabilities.double().tolist()))
    goals = [cumulative[-1] * (i + 0.5) / COUNT for i in range(COUNT)]
    return [next(place for place, until in enumerate(cumulative) if until > goal) for goal in goals]


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2.5


def test_greedy_picks_the_first_of_equal_largest_logits(logits: Tensor) -> None:
    best = int(logits.argmax())
    assert drawn(logits, {}, {draw.TOP_K: 3}) == [best, best]
    logits[[17, 250]] = 99.0
    assert drawn(logits, {}) == [17]


@pytest.mark.parametrize("heat", [0.5, 1.0, 3.0])
def test_temperature_scales_the_logits(logits: Tensor, heat: float) -> None:
    assert drawn(logits, *spread(heat=heat)) == wanted((logits / heat).softmax(0))


def test_top_k_keeps_the_k_most_likely_tokens(logits: Tensor) -> None:
    for k in (1, 2, 40, VOCAB):
        kept = torch.where(logits >= logits.topk(k).values[-1], logits.softmax(0), 0.0)
        assert drawn(logits, *spread(top_k=k)) == wanted(kept)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p_keeps_the_smallest_sufficient_set(logits: Tensor, top_p: float) -> None:
    ranked = logits.softmax(0).double().sort(descending=True).values
    count = int((ranked.cumsum(0) < top_p).sum()) + 1
    kept = torch.where(logits >= logits.topk(count).values[-1], logits.softmax(0), 0.0)
    assert drawn(logits, *spread(top_p=top_p)) == wanted(kept)


def test_min_p_drops_unlikely_tokens(logits: Tensor) -> None:
    for min_p in (0.02, 0.3, 1.0):
        weights = (logits - logits.max()).exp()
        assert drawn(logits, *spread(min_p=min_p)) == wanted(torch.where(weights >= min_p, weights, 0.0))


def test_top_p_applies_to_what_top_k_and_min_p_keep(logits: Tensor) -> None:
    """The filters apply in the order of the host: min_p, top_k, then top_p of the remaining mass."""
    weights = (logits - logits.max()).exp().double()
    weights[weights < 0.01] = 0
    weights[logits < logits.topk(30).values[-1]] = 0
    ranked = (weights / weights.sum()).sort(descending=True)
    count = int((ranked.values.cumsum(0) < 0.8).sum()) + 1
    kept = torch.zeros(VOCAB, dtype=torch.float64)
    kept[ranked.indices[:count]] = weights[ranked.indices[:count]]
    assert drawn(logits, *spread(top_k=30, min_p=0.01, top_p=0.8)) == wanted(kept)


PENALTIES = [(1.7, 0.0, 0.0), (1.0, 0.6, 0.0), (1.0, 0.0, 0.9), (0.8, -0.4, 0.3)]


def test_penalties_equal_those_of_the_host_sampler(logits: Tensor) -> None:
    """Each step counts the token of the previous step. Greedy and sampled rows are tested."""
    rows = [
        {draw.REPETITION: rep, draw.FREQUENCY: often, draw.PRESENCE: ever, **heat}
        for rep, often, ever in PENALTIES
        for heat in ({}, {draw.TEMPERATURE: 0.7, draw.FRACTION: 0.4, draw.TOP_K: 5})
    ]
    likely = logits.argsort(descending=True).tolist()
    prompt, output = [*likely[:3], likely[50], likely[-1]], [likely[0], likely[0], likely[4]]
    seen, known = unseen(len(rows)), torch.zeros(len(rows), dtype=torch.int64, device=DEVICE)
    seen[:, prompt] = draw.IN_PROMPT
    seen[:, likely[0]] += 2 * draw.IN_OUTPUT
    seen[:, likely[4]] += draw.IN_OUTPUT
    texts = [list(output) for _ in rows]
    for _ in range(6):
        found = draw.draw(logits.repeat(len(rows), 1).to(DEVICE), orders(*rows), known, seen).tolist()
        for row, text, token in zip(rows, texts, found, strict=True):
            final = logits.clone()
            met = prompt if row[draw.REPETITION] != 1.0 else []
            for other in {*met, *text}:
                value, times = float(final[other]), text.count(other)
                value = value / row[draw.REPETITION] if value > 0 else value * row[draw.REPETITION]
                final[other] = value - row[draw.FREQUENCY] * times - row[draw.PRESENCE] * (times > 0)
            if row.get(draw.TEMPERATURE, 0.0) == 0:
                assert token == int(final.argmax())
            else:
                kept = torch.where(final >= final.topk(5).values[-1], (final / 0.7).softmax(0), 0.0)
                cumulative = kept.double().cumsum(0)
                assert token == int((cumulative <= cumulative[-1] * 0.4).sum())
            text.append(token)


def test_token_counts_do_not_overflow(logits: Tensor) -> None:
    seen, known = unseen(1), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    best = int(logits.argmax())
    seen[0, best] = 2**15 - 2
    draw.draw(logits[None].to(DEVICE), orders({draw.FREQUENCY: -0.1}), known, seen)
    assert int(known[0]) == best and int(seen[0, best]) == 2**15 - 2


def test_rows_are_independent_and_a_row_of_nan_gives_minus_one(logits: Tensor) -> None:
    rows = torch.stack((logits, logits, logits, logits, logits.flip(0)))
    rows[1, 50], rows[2, 0], rows[3] = torch.nan, torch.inf, -torch.inf
    hot = {draw.TEMPERATURE: 1.0, draw.FRACTION: 0.3, draw.TOP_P: 0.9}
    known = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    found = draw.draw(rows.to(DEVICE), orders(hot, hot, {}, {}, hot), known, unseen(5)).tolist()
    assert found[1:4] == [-1, -1, -1]
    assert found[0] == drawn(logits, hot)[0] and found[4] == drawn(logits.flip(0), hot)[0]


def test_extreme_random_numbers_draw_an_allowed_token(logits: Tensor) -> None:
    logits[100:] = -torch.inf
    ends = [{draw.TEMPERATURE: 1.0, draw.FRACTION: fraction} for fraction in (0.0, 1.0)]
    first, last = drawn(logits, *ends)
    assert first == 0 and 0 <= last < 100


def test_the_device_fills_a_batch_from_its_inputs() -> None:
    def zeros(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=DEVICE)

    tables = zeros(4, 600, kind=torch.int32)
    tables[:, :550] = torch.arange(4 * 550).view(4, 550)
    known = torch.tensor([40, 41, 42, -1], device=DEVICE)
    rows = [(2, 9, -1, 77), (0, 2195, 5, 88), (3, 0, -1, 99)]
    made = np.zeros((3, draw.ORDER), dtype=np.int32)
    made[:, :4] = rows
    made[:, draw.AHEAD] = 0, 3, 0
    batch = Batch(
        zeros(3), zeros(3), zeros(3), zeros(4), zeros(3, kind=torch.int32), zeros(3, 600, kind=torch.int32),
        zeros(3), [1] * 3, [0] * 3, zeros(3, kind=torch.int32),
    )  # fmt: skip
    before = tables.clone()
    draw.read(torch.from_numpy(made).to(DEVICE), known, tables, batch, 4)
    assert batch.tokens.tolist() == [42, 5, 0], "a token that is no number must not be looked up"
    assert batch.positions.tolist() == [9, 2195, 0] and batch.contexts.tolist() == [10, 2196, 1]
    assert batch.written is not None and batch.written.tolist() == [9, 2192, 0]
    assert batch.slots.tolist() == [77 * 4 + 1, 88 * 4 + 3, 99 * 4]
    for row, (slot, position, _, block) in enumerate(rows):
        assert batch.tables[row, : position // 4].tolist() == before[slot, : position // 4].tolist()
        assert batch.tables[row, position // 4] == tables[slot, position // 4] == block
