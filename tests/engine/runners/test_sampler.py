"""The sampler: a naive float64 reference, statistics of its draws, and the independence of rows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.engine.runners import sampler as module
from stretto.engine.runners.sampler import Sampler, uniform
from stretto.engine.sequence import Drawn, Sequence
from stretto.types import Request, Sampling

VOCAB, EOS = 48, frozenset({0, 7})
idents = count()


def sequence(
    sampling: Sampling, prompt: list[int] | None = None, output: list[int] | None = None
) -> Sequence:
    request = Request(
        id=next(idents), model="m", prompt=tuple(prompt or [1, 2, 3]), arrival=0.0, sampling=sampling
    )
    seq = Sequence.of(request, 10_000)
    seq.tokens += output or []
    return seq


def sampler(vocab: int = VOCAB) -> Sampler:
    return Sampler(vocab, EOS, torch.device("cpu"))


def draw(logits: np.ndarray | list[float], seq: Sequence) -> Drawn:
    row = torch.tensor(np.asarray(logits, dtype=np.float32))[None]
    return sampler(row.shape[1])(row, [seq])[0]


def case_id(sampling: object) -> str:
    """A test id made of the fields that differ from their defaults."""
    plain = Sampling()
    fields = sampling.__struct_fields__ if isinstance(sampling, Sampling) else ()
    changed = [name for name in fields if getattr(sampling, name) != getattr(plain, name)]
    return ",".join(f"{name}={getattr(sampling, name)}" for name in changed) or str(sampling)[:8]


def reshaped(logits: np.ndarray, seq: Sequence) -> np.ndarray:
    """The logits after bias, min_tokens and penalties, computed token by token in float64: [vocab]."""
    sampling, final = seq.request.sampling, logits.astype(np.float64)
    output = Counter(seq.tokens[seq.prompt_len :])
    for token in range(len(final)):
        final[token] += sampling.logit_bias.get(token, 0.0)
        ends = token in sampling.stop_token_ids or (token in EOS and not sampling.ignore_eos)
        if ends and sum(output.values()) < sampling.min_tokens:
            final[token] = -math.inf
        if token in seq.tokens:
            penalty = sampling.repetition_penalty
            final[token] = final[token] / penalty if final[token] > 0 else final[token] * penalty
        final[token] -= sampling.frequency_penalty * output[token]
        final[token] -= sampling.presence_penalty * (output[token] > 0)
    return final


def probabilities(final: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution of one row after filtering, computed by sorting the whole vocabulary: [vocab]."""
    weights = np.exp((final - final.max()) / sampling.temperature)
    weights[weights < sampling.min_p] = 0.0
    order = np.argsort(-final, kind="stable")
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0.0
    before = np.concatenate([[0.0], np.cumsum(weights[order])[:-1]])
    weights[order[before >= sampling.top_p * weights.sum()]] = 0.0
    return weights / weights.sum()


def expected(logits: np.ndarray, seq: Sequence) -> int:
    """The token found by inverting the cumulative distribution in the order that the sampler documents."""
    sampling, final = seq.request.sampling, reshaped(logits, seq)
    if sampling.temperature < module.GREEDY_BELOW:
        return int(final.argmax())
    chances = probabilities(final, sampling)
    whole = sampling.top_k in (0, *range(len(final), 200)) and sampling.top_p == 1 and sampling.min_p == 0
    order = np.arange(len(final)) if whole else np.argsort(-final, kind="stable")
    cumulative = np.cumsum(chances[order])
    target = uniform(seq.seed, len(seq.tokens)) * cumulative[-1]
    return int(order[np.searchsorted(cumulative, target, side="right")])


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.05]),
    top_k=st.sampled_from([0, 1, 4, VOCAB, 100]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    seed=st.integers(-(2**63), 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.6, -0.4]),
    presence_penalty=st.sampled_from([0.0, 0.9, -1.0]),
    logit_bias=st.dictionaries(
        st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 3.0, 100.0]), max_size=3
    ),
    min_tokens=st.integers(0, 4),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (5,), (5, 9)]),
    logprobs=st.sampled_from([None, 0, 3]),
)
texts = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(samplings, texts, texts, st.integers(0, 2**32)), min_size=1, max_size=6))
def test_every_row_of_a_mixed_batch_equals_the_reference_and_the_row_alone(rows: list[Any]):
    sequences = [sequence(sampling, prompt, output) for sampling, prompt, output, _ in rows]
    logits = np.stack([np.random.default_rng(seed).normal(size=VOCAB) * 3 for *_, seed in rows])
    batch = torch.tensor(logits, dtype=torch.float32)
    before = batch.clone()
    together = sampler()(batch, sequences)
    assert torch.equal(batch, before)
    for row, seq in enumerate(sequences):
        assert together[row] == sampler()(batch[row : row + 1], [seq])[0]
        assert together[row].token == expected(batch[row].numpy(), seq)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(temperature=1.8),
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(min_p=0.08),
        Sampling(temperature=1.3, top_k=12, top_p=0.9, min_p=0.01),
    ],
    ids=case_id,
)
def test_draws_follow_the_distribution(sampling: Sampling):
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 1.5
    chances = probabilities(logits.astype(np.float64), sampling)
    runs, tokens = 20_000, Counter[int]()
    one, seq = torch.tensor(logits)[None].expand(500, -1).contiguous(), sequence(sampling)
    draws = sampler()
    for start in range(0, runs, 500):
        sequences = [sequence(sampling) for _ in range(500)]
        for seed, seq in enumerate(sequences, start):
            seq.seed = seed
        tokens.update(drawn.token for drawn in draws(one, sequences))
    assert all(chances[token] > 0 for token in tokens)
    common = chances * runs >= 5
    statistic = sum(
        (tokens[token] - chances[token] * runs) ** 2 / (chances[token] * runs)
        for token in common.nonzero()[0]
    )
    freedom = max(1, int(common.sum()) - 1)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_random_numbers_are_uniform_and_independent_of_seed_and_index():
    bins = np.array([[int(uniform(seed, index) * 16) for index in range(500)] for seed in range(40)])
    counts = np.bincount(bins.ravel(), minlength=16)
    assert ((counts - 1250) ** 2 / 1250).sum() < 15 + 4 * math.sqrt(30)
    for lag in (bins[1:] - bins[:-1], bins[:, 1:] - bins[:, :-1]):
        assert abs(float((lag == 0).mean()) - 1 / 16) < 0.01
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)
    assert 0 <= min(uniform(9, index) for index in range(1000)) < 0.01


def test_extreme_random_numbers_draw_an_allowed_token():
    weights = np.zeros(2000, dtype=np.float32)
    weights[[3, 700, 1500]] = [1.0, 1e-6, 3e-5]
    assert module.sample_all(weights, 0.0) == 3
    assert module.sample_all(weights, module.BELOW_ONE) == 1500
    logits = np.log(np.maximum(weights, 1e-30))
    for sampling in (Sampling(top_k=2), Sampling(min_p=1e-5), Sampling(top_p=0.999999)):
        assert module.sample_filtered(logits, 0.0, sampling, 0.0) == 3
        assert module.sample_filtered(logits, 0.0, sampling, module.BELOW_ONE) in (3, 1500)


def toy_logits(tokens: list[int]) -> np.ndarray:
    """A toy model: its logits depend only on the tokens so far."""
    return np.random.default_rng([len(tokens), *tokens[-3:]]).normal(size=VOCAB).astype(np.float32) * 2


def test_a_seeded_text_does_not_depend_on_its_batch_or_on_preemption():
    cases = [
        Sampling(seed=11, temperature=0.9),
        Sampling(seed=12, top_p=0.8, repetition_penalty=1.2),
        Sampling(seed=13, top_k=6, frequency_penalty=0.5, presence_penalty=0.2),
        Sampling(temperature=0.0, repetition_penalty=1.1),
    ]

    def write(chosen: list[int], rng: np.random.Generator) -> dict[int, list[int]]:
        """Generate 30 tokens for each sequence. Each step takes a random subset in a random order."""
        draws, texts = sampler(), {index: sequence(cases[index]) for index in chosen}
        while any(seq.output_len < 30 for seq in texts.values()):
            batch = [seq for seq in texts.values() if seq.output_len < 30 and rng.random() < 0.7]
            rng.shuffle(batch)  # type: ignore[arg-type]
            if batch:
                logits = torch.tensor(np.stack([toy_logits(seq.tokens) for seq in batch]))
                for seq, drawn in zip(batch, draws(logits, batch), strict=True):
                    seq.tokens.append(drawn.token)
        return {index: seq.tokens for index, seq in texts.items()}

    together = write([0, 1, 2, 3], np.random.default_rng(0))
    for index in range(len(cases)):
        assert write([index], np.random.default_rng(index)) == {index: together[index]}
    assert write([3, 1, 0], np.random.default_rng(9)) == {index: together[index] for index in (3, 1, 0)}


def test_unseeded_sequences_draw_different_tokens():
    flat = torch.zeros(8, 4096)
    cases = [sequence(Sampling()) for _ in range(8)]
    assert len({drawn.token for drawn in sampler(4096)(flat, cases)}) > 4


def test_a_token_in_flight_advances_the_random_number():
    seq = sequence(Sampling(seed=3))
    flat = np.zeros(VOCAB)
    first = draw(flat, seq).token
    seq.tokens.append(first)
    second = draw(flat, seq).token
    seq.tokens.pop()
    seq.in_flight = 1
    assert draw(flat, seq).token == second != first


def test_penalties_apply_only_to_seen_tokens():
    logits = np.full(VOCAB, -9.0, dtype=np.float32)
    logits[[10, 11, 12]] = [4.0, 3.0, 2.0]
    greedy = {"temperature": 0.0}
    assert draw(logits, sequence(Sampling(**greedy), [10], [])).token == 10
    assert draw(logits, sequence(Sampling(repetition_penalty=1.5, **greedy), [10], [])).token == 11
    assert draw(logits, sequence(Sampling(repetition_penalty=1.5, **greedy), [9], [10])).token == 11
    assert draw(logits, sequence(Sampling(presence_penalty=1.5, **greedy), [10], [])).token == 10
    assert draw(logits, sequence(Sampling(presence_penalty=1.5, **greedy), [9], [10])).token == 11
    assert draw(logits, sequence(Sampling(frequency_penalty=0.4, **greedy), [9], [10] * 2)).token == 10
    assert draw(logits, sequence(Sampling(frequency_penalty=0.4, **greedy), [9], [10] * 3)).token == 11
    negative = np.full(VOCAB, -1.0, dtype=np.float32)
    negative[20] = -0.9
    assert draw(negative, sequence(Sampling(repetition_penalty=2.0, **greedy), [20], [])).token == 0


def test_token_histories_follow_their_sequences_and_are_dropped_at_the_end():
    draws, seq = sampler(), sequence(Sampling(temperature=0.0, frequency_penalty=0.3, repetition_penalty=1.1))
    for step in range(25):
        logits = torch.tensor(toy_logits(seq.tokens))[None]
        drawn = draws(logits, [seq])[0]
        assert drawn == sampler()(logits, [seq])[0], f"step {step}"
        seq.tokens.append(drawn.token)
    assert draws.tracked == [seq.request.id]
    draws(torch.zeros(1, VOCAB), [sequence(Sampling())])
    assert draws.tracked == []


def test_logprobs_are_those_of_the_unmodified_logits():
    logits = np.random.default_rng(5).normal(size=VOCAB).astype(np.float32) * 4
    truth = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    bare = Sampling(logprobs=4, seed=1)
    bent = Sampling(
        logprobs=4, seed=1, temperature=0.2, top_k=2, repetition_penalty=2.0, logit_bias={30: 50.0}
    )
    for sampling in (bare, bent):
        drawn = draw(logits, sequence(sampling, output=[4, 4]))
        assert drawn.logprobs is not None
        assert drawn.logprobs.chosen == pytest.approx(truth[drawn.token], abs=1e-5)
        assert [token for token, _ in drawn.logprobs.top] == np.argsort(-truth)[:4].tolist()
        assert [value for _, value in drawn.logprobs.top] == pytest.approx(np.sort(truth)[::-1][:4], abs=1e-5)
    assert draw(logits, sequence(bent)).token == 30
    alone = draw(logits, sequence(Sampling(temperature=0.0, logprobs=0))).logprobs
    assert alone is not None and alone.top == () and alone.chosen == pytest.approx(truth.max(), abs=1e-5)


def test_equal_logprobs_are_ordered_by_id_and_impossible_tokens_left_out():
    logits = np.full(VOCAB, -np.inf)
    logits[[9, 4, 30]] = [1.0, 1.0, 1.0]
    drawn = draw(logits, sequence(Sampling(temperature=0.0, logprobs=20)))
    assert drawn.token == 4 and drawn.logprobs is not None
    assert [token for token, _ in drawn.logprobs.top] == [4, 9, 30]
    assert all(value == pytest.approx(-math.log(3)) for _, value in drawn.logprobs.top)


def test_min_tokens_masks_eos_and_stop_tokens():
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[0, 7, 5, 20]] = [9.0, 8.0, 7.0, 1.0]
    sampling = Sampling(temperature=0.0, min_tokens=2, stop_token_ids=(5, VOCAB + 3))
    assert draw(logits, sequence(sampling)).token == 20
    assert draw(logits, sequence(sampling, output=[9])).token == 20
    assert draw(logits, sequence(sampling, output=[9, 9])).token == 0
    careless = Sampling(temperature=0.0, min_tokens=2, ignore_eos=True)
    assert draw(logits, sequence(careless)).token == 0


def test_token_ids_beyond_the_vocabulary_are_ignored():
    sampling = Sampling(
        temperature=0.0, min_tokens=3, logit_bias={VOCAB: 100.0, 10**9: 5.0, 6: 2.0}, stop_token_ids=(10**9,)
    )
    assert draw(np.zeros(VOCAB), sequence(sampling)).token == 6


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(),
        Sampling(top_p=0.9),
        Sampling(logprobs=2),
        Sampling(frequency_penalty=1.0),
        Sampling(temperature=0.0, logit_bias={11: 3.0}),
    ],
    ids=case_id,
)
def test_a_row_with_nan_or_infinity_fails_alone(sampling: Sampling, poison: float):
    logits = torch.tensor(np.random.default_rng(2).normal(size=(3, VOCAB)), dtype=torch.float32)
    cases = [
        sequence(Sampling(seed=4, top_p=0.7, logprobs=1)),
        sequence(sampling),
        sequence(Sampling(seed=5)),
    ]
    sound = sampler()(logits, cases)
    logits[1, 13] = poison
    poisoned = sampler()(logits, cases)
    assert poisoned == [sound[0], Drawn(-1), sound[2]]


def test_a_row_fails_only_when_no_token_is_allowed():
    nothing = np.full(VOCAB, -np.inf)
    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(top_k=3)):
        assert draw(nothing, sequence(sampling)) == Drawn(-1)
        for floor in (-np.inf, np.finfo(np.float32).min):
            masked = np.full(VOCAB, floor)
            masked[17] = -3.0
            assert draw(masked, sequence(sampling)).token == 17


def test_extreme_sampling_settings_give_valid_tokens():
    logits = np.random.default_rng(3).normal(size=VOCAB).astype(np.float32)
    assert draw(logits, sequence(Sampling(temperature=1e-5))).token == int(logits.argmax())
    assert draw(logits, sequence(Sampling(temperature=1e-300))).token == int(logits.argmax())
    assert draw(logits, sequence(Sampling(top_p=1e-300))).token == int(logits.argmax())
    assert draw(logits, sequence(Sampling(min_p=1.0))).token == int(logits.argmax())
    assert draw(logits, sequence(Sampling(temperature=100.0, top_p=0.999))).token in range(VOCAB)
    strongest = sequence(Sampling(repetition_penalty=0.01), output=[int(logits.argmax())])
    assert draw(100 * logits, strongest).token == int(logits.argmax())
    with pytest.raises(ValueError, match=r"repetition_penalty must be from 0\.01"):
        Sampling(repetition_penalty=1e-38)


def big_rows() -> list[np.ndarray]:
    rng = np.random.default_rng(8)
    flat = rng.normal(size=50_001) * 2
    peaked = flat.copy()
    peaked[rng.integers(0, 50_001, 20)] += 25
    coarse = np.round(flat * 2) / 2
    constant = np.zeros(50_001)
    return [row.astype(np.float32) for row in (flat, peaked, coarse, constant)]


@pytest.mark.parametrize("row", range(4))
def test_a_filtered_draw_from_a_large_vocabulary_equals_sorting_it(row: int):
    logits = big_rows()[row]
    order = np.argsort(-logits, kind="stable")
    for sampling in (
        Sampling(top_p=0.9),
        Sampling(top_p=0.3),
        Sampling(top_k=50),
        Sampling(top_k=3000, top_p=0.95),
        Sampling(min_p=0.01),
        Sampling(temperature=0.5, min_p=1e-4, top_p=0.99),
    ):
        cumulative = np.cumsum(probabilities(logits.astype(np.float64), sampling)[order])
        for fraction in (0.0, 0.123, 0.5, 0.877, 0.999):
            token = module.sample_filtered(logits, float(logits.max()), sampling, fraction)
            rank = int(np.flatnonzero(order == token)[0])
            below = cumulative[rank - 1] if rank else 0.0
            # The total mass is summed in float32, so the nucleus may end one token sooner or later.
            assert below - 1e-6 <= fraction * cumulative[-1] <= cumulative[rank] + 1e-6


@pytest.mark.parametrize("row", range(4))
def test_a_draw_from_a_large_vocabulary_inverts_the_cumulative_distribution(row: int):
    logits = big_rows()[row]
    weights = np.exp(logits - logits.max())
    cumulative = weights.cumsum(dtype=np.float64) / weights.sum(dtype=np.float64)
    for fraction in (0.0, 0.0123, 0.25, 0.5, 0.77, 0.9999):
        token = module.sample(logits, float(logits.max()), Sampling(), fraction)
        below = cumulative[token - 1] if token else 0.0
        assert below - 1e-6 <= fraction <= cumulative[token] + 1e-6


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("size", [1, 20, 64, 1024, 16384, 50_001])
def test_top_tokens_are_a_prefix_of_the_sorted_vocabulary(row: int, size: int):
    logits = big_rows()[row]
    found = module.top_tokens(logits, size)
    assert len(found) >= size
    assert np.array_equal(found, np.argsort(-logits, kind="stable")[: len(found)])


def test_common_settings_sort_few_tokens(monkeypatch: pytest.MonkeyPatch):
    logits = big_rows()[1]
    sizes: list[int] = []
    full = module.top_tokens

    def counted(row: np.ndarray, size: int) -> np.ndarray:
        found = full(row, size)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(module, "top_tokens", counted)
    for sampling in (
        Sampling(top_p=0.95),
        Sampling(top_k=40),
        Sampling(min_p=0.05),
        Sampling(top_k=40, top_p=0.9),
    ):
        sizes.clear()
        assert draw(logits, sequence(sampling)).token >= 0
        assert len(sizes) == 1 and sizes[0] < 200


def test_greedy_rows_without_options_cost_one_argmax(monkeypatch: pytest.MonkeyPatch):
    looked: list[int] = []
    draw_row = Sampler.draw_row

    def counted(self: Sampler, logits: np.ndarray, best: int, position: module.Position) -> Drawn:
        looked.append(position.seq.request.id)
        return draw_row(self, logits, best, position)

    monkeypatch.setattr(Sampler, "draw_row", counted)
    greedy = [sequence(Sampling(temperature=0.0)) for _ in range(5)]
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    assert [drawn.token for drawn in sampler()(logits[:5], greedy)] == logits[:5].argmax(-1).tolist()
    assert looked == []
    curious = sequence(Sampling(temperature=0.0, logprobs=3))
    sampler()(logits, [*greedy, curious])
    assert looked == [curious.request.id]


def test_the_argmax_on_a_device_equals_that_on_the_host():
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(6))
    logits[1, 70] = math.nan
    logits[2, [8, 9]] = 50.0
    for here, there in zip(module.argmax_on_host(logits), module.argmax_on_device(logits), strict=True):
        assert np.array_equal(here, there, equal_nan=True)


class Allowing:
    """A fake grammar matcher that allows a fixed set of tokens."""

    words = -(-VOCAB // 32) + 1

    def __init__(self, *tokens: int) -> None:
        self._tokens = tokens

    def mask_into(self, bits: np.ndarray) -> None:
        assert bits.shape == (self.words,) and not bits.any()
        for token in self._tokens:
            bits[token // 32] |= np.int32(1 << token % 32)


def guided(sampling: Sampling, *tokens: int) -> Sequence:
    return replace(sequence(sampling), grammar=Allowing(*tokens))  # type: ignore[arg-type]


def test_only_tokens_that_the_grammar_allows_are_drawn():
    logits = np.random.default_rng(4).normal(size=VOCAB).astype(np.float32)
    for sampling in (
        Sampling(temperature=0.0),
        Sampling(temperature=2.0),
        Sampling(top_k=1),
        Sampling(min_p=0.1),
    ):
        assert draw(logits, guided(sampling, 3, 30)).token in (3, 30)
        assert draw(logits, guided(sampling)) == Drawn(-1)
    free = sequence(Sampling(temperature=0.0))
    batch = torch.tensor(np.stack([logits, logits]))
    assert sampler()(batch, [guided(Sampling(), 12), free])[1].token == int(logits.argmax())


def test_min_tokens_yields_to_a_grammar_that_allows_only_the_end():
    sampling = Sampling(temperature=0.0, min_tokens=5)
    logits = np.zeros(VOCAB)
    logits[7] = 5.0
    assert draw(logits, guided(sampling, 7, 20)).token == 20
    assert draw(logits, guided(sampling, 7)).token == 7
