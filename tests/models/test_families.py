"""Every family against transformers: equal logits and greedy tokens in any chunks and batches."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stretto.kernels.reference import REFERENCE
from stretto.models.decoder import Decoder
from stretto.models.load import load
from tests.models.checkpoints import FAMILIES, VOCAB, expected, make
from tests.models.stepping import Driver

CPU = torch.device("cpu")
TOLERANCE = 1e-4
NEW = 12

Pair = tuple[PreTrainedModel, Decoder]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed + i * 7919).randrange(3, VOCAB) for i in range(length)]


def close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    error = (found - wanted).norm() / wanted.norm()
    worst = (found - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance and worst <= tolerance, (float(error), float(worst))


def greedy(model: PreTrainedModel, tokens: list[int], found: list[int]) -> None:
    """Check that each token of `found` is the most likely one of the reference after those before it."""
    logits = expected(model, [*tokens, *found])
    assert found == logits[len(tokens) - 1 : -1].argmax(-1).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("checkpoint")
    model = make(request.param, path)
    return model, load(path, dtype=torch.float32, device=CPU, kernels=REFERENCE)


def test_reference_logits_depend_on_the_text_and_are_not_uniform(pair: Pair) -> None:
    """Logits that hardly depend on the text, or are nearly uniform, would hide errors of the decoder."""
    model, _ = pair
    logits = expected(model, prompt(40))
    assert logits.std() > 0.3
    assert len(set(logits.argmax(-1).tolist())) > 10
    other = expected(model, [*prompt(20), *prompt(20, seed=5)])
    assert (logits[-1] - other[-1]).norm() / logits[-1].norm() > 0.01


def test_logits_of_one_step_equal_those_of_transformers(pair: Pair) -> None:
    model, decoder = pair
    tokens = prompt(50)
    close(Driver(decoder).read(tokens, len(tokens)), expected(model, tokens))


@pytest.mark.parametrize("chunk", [1, 3, 4, 17, 49])
def test_logits_are_the_same_in_chunks(pair: Pair, chunk: int) -> None:
    model, decoder = pair
    tokens = prompt(50)
    close(Driver(decoder).read(tokens, chunk), expected(model, tokens))


@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_logits_are_the_same_at_block_boundaries(pair: Pair, block_size: int) -> None:
    model, decoder = pair
    tokens = prompt(33)
    driver = Driver(decoder, block_size=block_size)
    close(driver.read(tokens, 16), expected(model, tokens))


def test_greedy_tokens_equal_those_of_transformers(pair: Pair) -> None:
    model, decoder = pair
    tokens = prompt(19)
    driver = Driver(decoder)
    (found,) = driver.greedy([driver.text(tokens)], NEW)
    assert len(found) == NEW
    greedy(model, tokens, found)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_greedy_tokens_are_the_same_in_a_mixed_batch(pair: Pair, chunk: int) -> None:
    """Short and long texts are prefilled in chunks beside texts that already decode."""
    model, decoder = pair
    driver = Driver(decoder, blocks=200)
    prompts = [prompt(length, seed=length) for length in (1, 5, 23, 24, 90)]
    found = driver.greedy([driver.text(tokens) for tokens in prompts], NEW, chunk)
    for tokens, each in zip(prompts, found, strict=True):
        greedy(model, tokens, each)


def test_logits_are_the_same_in_a_mixed_batch(pair: Pair) -> None:
    """One step holds a continued prefill, a new prefill and decodes of different lengths, in any order."""
    model, decoder = pair
    driver = Driver(decoder, blocks=200)
    tokens = [prompt(length, seed=length) for length in (60, 8, 21, 22, 120)]
    texts = [driver.text(t) for t in tokens]
    driver.step([(texts[0], 37), (texts[2], 20), (texts[4], 119)])
    driver.step([(texts[3], 21)])
    work = [(texts[2], 1), (texts[0], 23), (texts[4], 1), (texts[3], 1), (texts[1], 8)]
    found = driver.step(work, [33, 0, 24, 25, 23])
    close(found, torch.stack([expected(model, tokens[i])[-1] for i in (1, 2, 4, 3, 0)]))


def test_a_step_without_outputs_still_writes_the_cache(pair: Pair) -> None:
    """A chunk that does not end its prompt only writes keys and values."""
    model, decoder = pair
    driver = Driver(decoder)
    text = driver.text(prompt(20))
    assert driver.step([(text, 13)], []).shape == (0, VOCAB)
    close(driver.step([(text, 7)]), expected(model, text.tokens)[-1:])


def test_a_reused_prefix_gives_the_same_logits(pair: Pair) -> None:
    """A second text shares the blocks of the first. The first continues unchanged."""
    model, decoder = pair
    driver = Driver(decoder)
    shared = prompt(24)
    first = driver.text([*shared, *prompt(5, seed=1)])
    driver.step([(first, 29)])
    second = driver.text([*shared[:20], *prompt(9, seed=2)], shared=first, reuse=20)
    found = driver.step([(second, 9)], list(range(9)))
    close(found, expected(model, second.tokens)[20:])
    first.tokens.append(9)
    found = driver.step([(first, 1), (driver.text([4, 5, 6]), 3)])
    close(found[:1], expected(model, first.tokens)[-1:])


def test_recomputing_after_preemption_gives_the_same_logits(pair: Pair) -> None:
    """Preemption frees the blocks of a text. Later its prompt and output tokens are prefilled again."""
    model, decoder = pair
    driver = Driver(decoder)
    text = driver.text(prompt(11))
    driver.greedy([text], 6)
    (found,) = driver.greedy([driver.text(text.tokens)], 6, chunk=5)
    greedy(model, text.tokens, found)
