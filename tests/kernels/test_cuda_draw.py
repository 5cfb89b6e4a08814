"""Sampling on the device: the same tokens with the same probabilities as the sampler on the host."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stretto.kernels import Batch
from tests.kernels.compiling import compiled
from tests.kernels.cuda import DEVICE, GPU

from stretto.kernels.cuda import draw  # isort: skip
from stretto.kernels.cuda import step_inputs as field  # isort: skip

pytestmark = [pytest.mark.cuda] if GPU else []
VOCAB, COUNT = (5000, 50) if GPU else (300, 10)
ROUNDING = 2e-6
"""What sums in float32 may be off, as a share of the whole."""

CODE = """
from stretto.kernels.cuda import draw
from stretto.kernels.cuda import step_inputs as field
for rows in (1, 64):
    inputs, drawn = torch.zeros(rows, field.ORDER, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    draw.draw(torch.zeros(rows, 5000), inputs, drawn, torch.zeros(rows, 5000, dtype=torch.int16))
"""


def test_two_kernels_compile_for_all_numbers_of_rows(tmp_path: Path) -> None:
    assert len(compiled(CODE, tmp_path)) == 2


def orders(*rows: dict[int, float]) -> Tensor:
    """Sampling parameters for each row, by field. Row i gets slot i."""
    made = np.zeros((len(rows), field.ORDER), dtype=np.int32)
    for index, row in enumerate(rows):
        made[index, field.SLOT] = made[index, field.SINK] = index
        for place, value in ({field.TOP_P: 1.0, field.REPETITION: 1.0} | row).items():
            if place >= field.TEMPERATURE:
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
    names = {
        "heat": field.TEMPERATURE,
        "top_p": field.TOP_P,
        "min_p": field.MIN_P,
        "top_k": field.TOP_K,
    }
    chosen = {names[name]: value for name, value in fields.items()}
    return [{field.TEMPERATURE: 1.0} | chosen | {field.FRACTION: (i + 0.5) / COUNT} for i in range(COUNT)]


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
    assert drawn(logits, {}, {field.TOP_K: 3}) == [best, best]
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
        {field.REPETITION: rep, field.FREQUENCY: often, field.PRESENCE: ever, **heat}
        for rep, often, ever in PENALTIES
        for heat in ({}, {field.TEMPERATURE: 0.7, field.FRACTION: 0.4, field.TOP_K: 5})
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
            met = prompt if row[field.REPETITION] != 1.0 else []
            for other in {*met, *text}:
                value, times = float(final[other]), text.count(other)
                value = value / row[field.REPETITION] if value > 0 else value * row[field.REPETITION]
                final[other] = value - row[field.FREQUENCY] * times - row[field.PRESENCE] * (times > 0)
            if row.get(field.TEMPERATURE, 0.0) == 0:
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
    draw.draw(logits[None].to(DEVICE), orders({field.FREQUENCY: -0.1}), known, seen)
    assert int(known[0]) == best and int(seen[0, best]) == 2**15 - 2


def test_rows_are_independent_and_a_row_of_nan_gives_minus_one(logits: Tensor) -> None:
    rows = torch.stack((logits, logits, logits, logits, logits.flip(0)))
    rows[1, 50], rows[2, 0], rows[3] = torch.nan, torch.inf, -torch.inf
    hot = {field.TEMPERATURE: 1.0, field.FRACTION: 0.3, field.TOP_P: 0.9}
    known = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    found = draw.draw(rows.to(DEVICE), orders(hot, hot, {}, {}, hot), known, unseen(5)).tolist()
    assert found[1:4] == [-1, -1, -1]
    assert found[0] == drawn(logits, hot)[0] and found[4] == drawn(logits.flip(0), hot)[0]


def test_extreme_random_numbers_draw_an_allowed_token(logits: Tensor) -> None:
    logits[100:] = -torch.inf
    ends = [{field.TEMPERATURE: 1.0, field.FRACTION: fraction} for fraction in (0.0, 1.0)]
    first, last = drawn(logits, *ends)
    assert first == 0 and 0 <= last < 100


def kept_chances(logits: Tensor, heat: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0) -> Tensor:
    """The probabilities that the host would draw from, in float64. Ties of the last one are kept."""
    chances = (logits.double() / heat).softmax(0)
    chances[chances < min_p * chances.max()] = 0.0
    if top_k:
        chances[chances < chances.topk(top_k).values[-1]] = 0.0
    if top_p < 1:
        ranked = (chances / chances.sum()).sort(descending=True)
        last = ranked.indices[int((ranked.values.cumsum(0) < top_p - 1e-9).sum())]
        chances[chances < chances[last]] = 0.0
    return chances / chances.sum()


def check_inverses(
    logits: Tensor, heat: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> None:
    """Draw from `logits` by many random numbers. Each token must be the one at which the cumulative sum, in
    float64, passes the random number, or a neighbour where rounding decides. It must have a probability."""
    middle = ((i + 0.5) / COUNT for i in range(COUNT))
    if not GPU and (top_k or top_p < 1 or min_p):
        middle = [0.4]
    goals = torch.tensor([0.0, 2**-24, *middle, 1 - 2**-24, 1.0])
    row = {
        field.TEMPERATURE: heat,
        field.TOP_K: top_k,
        field.TOP_P: top_p,
        field.MIN_P: min_p,
    }
    found = torch.tensor(drawn(logits, *(row | {field.FRACTION: goal} for goal in goals.tolist())))
    chances = kept_chances(logits, heat, top_k, top_p, min_p)
    until = chances.cumsum(0)[found]
    assert (chances[found] > 0).all() and logits[found].isfinite().all()
    assert (goals <= until + ROUNDING).all() and (goals >= until - chances[found] - ROUNDING).all()


@pytest.fixture
def long_row() -> Tensor:
    """Logits of four parts, of which the last is not whole."""
    return torch.randn(3 * draw.PART + 500, generator=torch.Generator().manual_seed(5)) * 2.5


@pytest.mark.parametrize("heat", [0.02, 0.3, 1.0, 40.0])
def test_a_token_is_found_in_one_of_several_parts(long_row: Tensor, heat: float) -> None:
    check_inverses(long_row, heat)
    long_row[2 * draw.PART + 7] += 12.0
    check_inverses(long_row, heat, top_k=len(long_row))


def test_logits_of_minus_infinity_are_never_drawn(long_row: Tensor) -> None:
    long_row[draw.PART : 2 * draw.PART] = -torch.inf
    long_row[::3] = -torch.inf
    long_row[:40], long_row[-40:] = -torch.inf, -torch.inf
    check_inverses(long_row, 1.0)
    long_row[: 3 * draw.PART] = -torch.inf
    check_inverses(long_row, 1.0)
    only = torch.full_like(long_row, -torch.inf)
    only[3000] = -5.0
    assert set(drawn(only, *spread())) == {3000}


def test_parts_that_are_far_below_the_largest_logit_are_not_drawn(long_row: Tensor) -> None:
    long_row[: draw.PART] -= 1e5
    long_row[-400:] -= 1e5
    check_inverses(long_row, 1.0)


@pytest.mark.parametrize("heat", [1e-5, 1e-39])
def test_the_lowest_temperatures_draw_the_largest_logit(long_row: Tensor, heat: float) -> None:
    assert set(drawn(long_row, *spread(heat=heat))) == {int(long_row.argmax())}


def test_probabilities_are_those_after_penalties(long_row: Tensor) -> None:
    generator, vocab = torch.Generator().manual_seed(6), len(long_row)
    times = torch.randint(0, 3, (vocab,), generator=generator) * torch.randint(
        0, 2, (vocab,), generator=generator
    )
    penalties = {field.REPETITION: 1.3, field.FREQUENCY: 0.4, field.PRESENCE: 0.7}
    rows = [each | penalties for each in spread()]
    seen = (draw.IN_OUTPUT * times).short().repeat(COUNT, 1).to(DEVICE)
    known = torch.zeros(COUNT, dtype=torch.int64, device=DEVICE)
    found = draw.draw(long_row.repeat(COUNT, 1).to(DEVICE), orders(*rows), known, seen).cpu()
    final = torch.where(long_row > 0, long_row / 1.3, long_row * 1.3) - 0.4 * times - 0.7
    chances = torch.where(times > 0, final, long_row).double().softmax(0)
    until, goals = chances.cumsum(0)[found], (torch.arange(COUNT) + 0.5) / COUNT
    assert (goals <= until + ROUNDING).all() and (goals >= until - chances[found] - ROUNDING).all()
    counted = seen.cpu()[torch.arange(COUNT), found] - draw.IN_OUTPUT * times[found]
    assert (counted == draw.IN_OUTPUT).all()


MANY: list[dict[str, Any]] = [
    {"top_p": 0.8},
    {"top_k": 400, "top_p": 0.6},
    {"top_k": 30, "min_p": 0.02, "top_p": 0.9},
]
LIMITS: list[dict[str, Any]] = [
    *MANY,
    {"top_p": 1e-6},
    {"top_k": 7},
    {"min_p": 0.02},
    {"min_p": 0.3, "top_p": 0.999},
]


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits of four parts of 256, of which the last is not whole. A lot is a part."""
    monkeypatch.setattr(draw, "PART", 256)
    monkeypatch.setattr(draw, "LOT", 256)
    return torch.randn(3 * 256 + 60, generator=torch.Generator().manual_seed(7)) * 0.3


@pytest.mark.parametrize("fits", [False, True])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_filters_keep_what_the_host_keeps(
    short_parts: Tensor, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], fits: bool
) -> None:
    """Of logits that fit a lot, and of more. What is likely is in the first and the third part."""
    if fits:
        monkeypatch.setattr(draw, "LOT", 1024)
    short_parts[256:512] -= 30.0
    short_parts[768:] -= 30.0
    check_inverses(short_parts, 1.0, **limits)


def test_some_of_these_filters_keep_more_than_a_lot(short_parts: Tensor) -> None:
    short_parts[256:512] -= 30.0
    short_parts[768:] -= 30.0
    kept = [int((kept_chances(short_parts, 1.0, **limits) > 0).sum()) for limits in LIMITS]
    assert sum(count > 256 for count in kept) >= 3 and sum(count < 256 for count in kept) >= 3


@pytest.mark.parametrize("limits", MANY, ids=str)
@pytest.mark.parametrize(
    ("heat", "scale", "shift"), [(0.3, 1.0, 0.0), (30.0, 1.0, 90.0), (1.0, 0.01, -7.0), (1.0, 1.0, 3e6)]
)
def test_filters_keep_the_same_of_flat_steep_and_large_logits(
    short_parts: Tensor, limits: dict[str, Any], heat: float, scale: float, shift: float
) -> None:
    """Levels of a part lie above or below all its logits. Those of the largest logits are not used."""
    row = short_parts * scale + shift
    row[:256] -= 9.0
    check_inverses(row, heat, **limits)


def test_a_floor_may_be_above_the_level_that_is_known_to_hold_enough(
    short_parts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second part, 50 logits lie below its lowest level, which is counted from its peak. So the level
    above which 51 are known is one of the first part, all but one of whose logits are smaller."""
    monkeypatch.setattr(draw, "LOT", 64)
    half = float(np.log(2))
    short_parts[:] = -300.0
    short_parts[0] = -10.3 * half
    short_parts[1:81] = -torch.linspace(20.0, 24.0, 80) * half
    short_parts[256] = 0.0
    short_parts[257:307] = -torch.linspace(17.0, 17.9, 50) * half
    last = {field.TEMPERATURE: 1.0, field.FRACTION: 1.0}
    assert drawn(short_parts, last | {field.TOP_K: 51}, last | {field.TOP_K: 52}) == [305, 306]


@pytest.mark.parametrize("larger", [0, 1])
def test_equal_logits_are_all_kept(short_parts: Tensor, larger: int) -> None:
    """More than fit a lot: no floor separates them. They are the largest ones, or one is larger."""
    short_parts[:] = torch.where(torch.arange(len(short_parts)) % 2 == 0, 4.0, -50.0)
    short_parts[300 : 300 + larger] = 5.0
    for limits in ({"top_k": 5}, *([] if larger else [{"top_p": 0.3}, {"min_p": 0.5}])):
        check_inverses(short_parts, 1.0, **limits)


def test_the_smallest_top_p_keeps_the_largest_logit(short_parts: Tensor) -> None:
    """In float32 it is 0. A level is not above the peak, though its product may be rounded up beyond it."""
    half = np.float32(1.0) / np.float32(1.4426950408889634)
    levels = np.arange(1, 4000, dtype=np.float32) * half
    below = np.nextafter(levels, np.float32(0))
    peaks = below[np.floor(below / half) * half > below]
    assert len(peaks) > 5
    short_parts[:] = -5.0
    for peak in peaks[:3].tolist():
        short_parts[400] = peak
        assert drawn(short_parts, {field.TEMPERATURE: 1.0, field.TOP_P: 1e-50}) == [400]


def test_rows_of_all_kinds_are_drawn_together(long_row: Tensor) -> None:
    """Greedy, plain and filtered rows, and rows that are not finite in one part."""
    hot = {field.TEMPERATURE: 1.0, field.FRACTION: 0.6}
    kinds = [
        hot,
        {},
        hot | {field.TOP_P: 0.8},
        hot | {field.TOP_K: 20},
        hot | {field.MIN_P: 0.05},
        hot,
        hot,
        {},
    ]
    logits = long_row.repeat(len(kinds), 1)
    logits[5, 5000], logits[6, 3], logits[7, 2100] = torch.nan, torch.inf, torch.nan
    known = torch.zeros(len(kinds), dtype=torch.int64, device=DEVICE)
    found = draw.draw(logits.to(DEVICE), orders(*kinds), known, unseen(len(kinds))).tolist()
    chances = long_row.double().softmax(0)
    ranked = chances.sort(descending=True).values
    for index, least in (
        (0, 0.0),
        (2, ranked[int((ranked.cumsum(0) < 0.8).sum())]),
        (3, ranked[19]),
        (4, 0.05 * ranked[0]),
    ):
        until = torch.where(chances >= least, chances, 0.0).cumsum(0)
        assert found[index] == int((until <= 0.6 * until[-1]).sum())
    assert found[1] == int(long_row.argmax()) and found[5:] == [-1, -1, -1]


def test_the_device_fills_a_batch_from_its_inputs() -> None:
    def zeros(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=DEVICE)

    tables = zeros(4, 600, kind=torch.int32)
    tables[:, :550] = torch.arange(4 * 550).view(4, 550)
    known = torch.tensor([40, 41, 42, -1], device=DEVICE)
    rows = [(2, 9, -1, 77), (0, 2195, 5, 88), (3, 0, -1, 99)]
    made = np.zeros((3, field.ORDER), dtype=np.int32)
    made[:, :4] = rows
    made[:, field.AHEAD] = 0, 3, 0
    batch = Batch(
        zeros(3), zeros(3), zeros(3), zeros(4), zeros(3, kind=torch.int32), zeros(3, 600, kind=torch.int32),
        zeros(3), [1] * 3, [0] * 3, zeros(3, kind=torch.int32),
    )  # fmt: skip
    before = tables.clone()
    field.read(torch.from_numpy(made).to(DEVICE), known, tables, batch, 4)
    assert batch.tokens.tolist() == [42, 5, 0], "a token that is no number must not be looked up"
    assert batch.positions.tolist() == [9, 2195, 0] and batch.contexts.tolist() == [10, 2196, 1]
    assert batch.written is not None and batch.written.tolist() == [9, 2192, 0]
    assert batch.slots.tolist() == [77 * 4 + 1, 88 * 4 + 3, 99 * 4]
    for row, (slot, position, _, block) in enumerate(rows):
        assert batch.tables[row, : position // 4].tolist() == before[slot, : position // 4].tolist()
        assert batch.tables[row, position // 4] == tables[slot, position // 4] == block
