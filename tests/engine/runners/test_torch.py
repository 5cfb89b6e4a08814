"""The engine over real decoders: an answer depends only on its own request.

The greedy tokens of every family equal those of transformers: alone, in a mixed batch, with chunked prefill,
with prefix-cache hits and after preemption.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler.fcfs import fcfs
from stretto.engine.scheduler.types import Limits, Plan
from stretto.engine.sequence import Sequence
from stretto.kernels import AnyKernels
from stretto.kernels.choice import choose_kernels
from stretto.kernels.reference import REFERENCE
from stretto.models.load import load
from stretto.types import Logprobs, ModelInfo, Reason, Request, Sampling, StepStats, TokenEvent
from tests.models.checkpoints import FAMILIES, VOCAB, expected, make

BLOCK = 4
OUTPUT = 10
# The kernels table chosen for this machine, and the fallback. They are the same without the C library.
TABLES = list(
    {each.name: each for each in (REFERENCE, choose_kernels(torch.device("cpu"), torch.float32)[0])}.values()
)
PROMPTS = [
    [3 + (7 * i * k + k) % (VOCAB - 3) for i in range(length)]
    for k, length in enumerate((5, 23, 1, 40, 12), 1)
]


class Bench:
    """One decoder, and a new engine for each run."""

    def __init__(self, path: Path, kernels: AnyKernels = REFERENCE) -> None:
        self.decoder = load(path, dtype=torch.float32, device=torch.device("cpu"), kernels=kernels)
        self.steps: list[StepStats] = []

    def engine(self, *, blocks: int = 256, step_tokens: int = 512, share: bool = True) -> EngineCore:
        info = ModelInfo(
            name="m",
            path="",
            family=self.decoder.spec.family,
            dtype="float32",
            device="cpu",
            context=min(self.decoder.spec.context, blocks * BLOCK),
            vocab=self.decoder.spec.vocab,
            parameters=0,
            weight_bytes=0,
            kv_bytes=0,
            block_size=BLOCK,
            blocks=blocks,
            load_s=0.0,
        )
        self.events: list[TokenEvent] = []
        self.steps = []
        return EngineCore(
            [LoadedModel(TorchRunner(self.decoder, info, eos=frozenset(), max_running=8))],
            limits=Limits(8, step_tokens),
            schedule=fcfs,
            clock=time.monotonic,
            emit=self.on_events,
            share=share,
        )

    def on_events(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        self.events += events
        if stats is not None:
            self.steps.append(stats)

    def run(self, engine: EngineCore, prompts: list[list[int]], **sampling: object) -> list[list[int]]:
        """Send all prompts at once and return the output tokens of each."""
        self.events.clear()
        fields = {"max_tokens": OUTPUT, "temperature": 0.0, **sampling}
        for ident, prompt in enumerate(prompts):
            request = Request(
                id=ident,
                model="m",
                prompt=tuple(prompt),
                arrival=time.monotonic(),
                sampling=Sampling(**fields),  # type: ignore[arg-type]
            )
            engine.submit(Sequence.of(request, engine.models["m"].runner.info.context))
        while engine.step() or not engine.idle:
            engine.check()
        ends = [event.finish for event in self.events if event.finish is not None]
        assert [end.reason for end in ends] == [Reason.LENGTH] * len(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]
        for event in self.events:
            if event.token is not None:
                tokens[event.id].append(event.token)
        return tokens

    def alone(self, **sampling: object) -> list[list[int]]:
        return [self.run(self.engine(), [prompt], **sampling)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make("qwen3", path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", TABLES, ids=lambda table: table.name)
def test_greedy_tokens_equal_transformers_batched_chunked_cached_and_preempted(
    family: str, kernels: AnyKernels, tmp_path: Path
):
    model = make(family, tmp_path)
    bench = Bench(tmp_path, kernels)
    alone = bench.alone()
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        logits = expected(model, prompt + answer)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert bench.run(bench.engine(), PROMPTS) == alone
    assert bench.run(bench.engine(step_tokens=7), PROMPTS) == alone
    engine = bench.engine()
    assert bench.run(engine, PROMPTS) == bench.run(engine, PROMPTS) == alone
    cached = [event.finish.cached_tokens for event in bench.events if event.finish is not None]
    assert sum(cached) >= sum(len(prompt) - BLOCK for prompt in PROMPTS)
    assert bench.run(bench.engine(blocks=20, step_tokens=16), PROMPTS) == alone
    assert sum(step.preempted for step in bench.steps) > 0


def test_seeded_requests_draw_the_same_tokens_in_any_batch(checkpoint: Path):
    bench = Bench(checkpoint)
    sampling = {"temperature": 1.3, "top_p": 0.95, "top_k": 50, "seed": 11, "repetition_penalty": 1.1}
    alone = bench.alone(**sampling)
    assert len({tuple(answer) for answer in alone}) == len(alone)
    assert bench.run(bench.engine(), PROMPTS, **sampling) == alone
    assert bench.run(bench.engine(step_tokens=5), PROMPTS, **sampling) == alone
    assert bench.run(bench.engine(blocks=20, step_tokens=16), PROMPTS, **sampling) == alone


def scores_of(bench: Bench, ident: int) -> tuple[Logprobs, ...]:
    """The scores of a prompt, which come once: with the first token, or with the end."""
    (began,) = [event.began for event in bench.events if event.id == ident and event.began is not None]
    assert began.prompt_logprobs is not None
    return began.prompt_logprobs


@pytest.mark.parametrize("most", [0, OUTPUT])
@pytest.mark.parametrize("kernels", TABLES, ids=lambda table: table.name)
def test_the_tokens_of_a_prompt_are_scored_as_by_transformers(most: int, kernels: AnyKernels, tmp_path: Path):
    """Whole, in chunks, beside others, with the prompt in the prefix cache, and after preemption."""
    model, bench = make("qwen3", tmp_path), Bench(tmp_path, kernels)
    engine = bench.engine()
    engines = [engine, engine, bench.engine(step_tokens=7), bench.engine(blocks=20, step_tokens=16)]
    for each in engines:
        answers = bench.run(each, PROMPTS, max_tokens=most, prompt_logprobs=3)
        assert [len(answer) for answer in answers] == [most] * len(PROMPTS)
        for ident, prompt in enumerate(PROMPTS):
            truth = expected(model, prompt).log_softmax(-1)
            found = scores_of(bench, ident)
            assert len(found) == len(prompt) - 1
            for at, score in enumerate(found):
                row, token = truth[at], prompt[at + 1]
                assert score.chosen == pytest.approx(float(row[token]), abs=1e-4)
                assert score.rank is not None
                assert abs(score.rank - int((row >= row[token]).sum())) <= 1  # nearly equal ones may swap
                best = row.topk(3)
                assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert most == 0 or sum(step.preempted for step in bench.steps) > 0


def test_a_scored_prompt_reads_no_cached_block_and_fills_the_cache(checkpoint: Path):
    bench = Bench(checkpoint)
    engine = bench.engine()
    for _ in range(2):
        bench.run(engine, PROMPTS[3:4], prompt_logprobs=0)
        (end,) = [event.finish for event in bench.events if event.finish is not None]
        assert end.cached_tokens == 0 and len(scores_of(bench, 0)) == len(PROMPTS[3]) - 1
    bench.run(engine, PROMPTS[3:4])
    (end,) = [event.finish for event in bench.events if event.finish is not None]
    assert end.cached_tokens >= len(PROMPTS[3]) - BLOCK


def test_a_prompt_whose_scores_are_no_numbers_fails(tmp_path: Path):
    make("llama", tmp_path)
    bench = Bench(tmp_path)
    bench.decoder.weights.embedding[PROMPTS[1][3]] = torch.inf
    engine = bench.engine()
    sampling = Sampling(max_tokens=0, prompt_logprobs=1)
    request = Request(id=1, model="m", prompt=tuple(PROMPTS[1]), arrival=0.0, sampling=sampling)
    engine.submit(Sequence.of(request, 256))
    while not engine.idle:
        engine.step()
    (end,) = [event.finish for event in bench.events if event.finish is not None]
    assert end.reason is Reason.ERROR and "not a number" in str(end.error)


def test_an_embedding_is_a_unit_vector_and_does_not_depend_on_chunks(checkpoint: Path):
    bench = Bench(checkpoint)
    vectors: list[tuple[float, ...]] = []
    for step_tokens in (512, 6):
        engine = bench.engine(step_tokens=step_tokens)
        request = Request(id=1, model="m", prompt=tuple(PROMPTS[1]), arrival=0.0, task="embed")
        engine.submit(Sequence.of(request, 256))
        while not engine.idle:
            engine.step()
        (event,) = bench.events
        assert event.embedding is not None and event.finish is not None
        assert (event.finish.reason, event.finish.output_tokens) == (Reason.STOP, 0)
        vectors.append(event.embedding)
    whole, chunked = torch.tensor(vectors)
    assert whole.norm().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.dist(whole, chunked).item() < 1e-4


def test_a_sequence_with_nan_fails_alone(tmp_path: Path):
    """The embedding of one token is infinite. Others share its step, its prefix and later its blocks."""
    make("llama", tmp_path)
    bench = Bench(tmp_path)
    sound = [PROMPTS[3], PROMPTS[1]]
    alone = [bench.run(bench.engine(), [prompt])[0] for prompt in sound]
    poison = next(token for token in range(VOCAB) if not any(token in text for text in [*sound, *alone]))
    prompts = [sound[0], [*sound[0][:20], poison, *sound[0][21:]], sound[1]]
    bench.decoder.weights.embedding[poison] = torch.inf
    engine = bench.engine(blocks=24)
    for round_ in range(3):
        bench.events.clear()
        for ident, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=OUTPUT, temperature=0.0)
            request = Request(
                id=ident, model="m", prompt=tuple(prompt), arrival=float(round_), sampling=sampling
            )
            engine.submit(Sequence.of(request, 96))
        while engine.step() or not engine.idle:
            engine.check()
        ends = {event.id: event.finish.reason for event in bench.events if event.finish is not None}
        assert ends == {0: Reason.LENGTH, 1: Reason.ERROR, 2: Reason.LENGTH}
        for ident, answer in ((0, alone[0]), (2, alone[1])):
            assert [
                event.token for event in bench.events if event.id == ident and event.token is not None
            ] == answer


def test_steps_never_exceed_max_step_tokens(checkpoint: Path):
    bench = Bench(checkpoint)
    engine = bench.engine(step_tokens=9)
    bench.run(engine, PROMPTS)
    assert max(step.decode_tokens + step.prefill_tokens for step in bench.steps) <= 9
    assert isinstance(fcfs(engine.context("m")), Plan)


@pytest.mark.parametrize("kernels", TABLES, ids=lambda table: table.name)
def test_a_cancelled_prompt_with_nan_leaves_none_to_others(kernels: AnyKernels, tmp_path: Path):
    """No token was drawn for it, so nobody has noticed. Others in one step use its blocks."""
    make("llama", tmp_path)
    bench = Bench(tmp_path, kernels)
    prompts = [PROMPTS[1][:length] for length in (5, 6, 7, 9)]
    alone = [bench.run(bench.engine(), [prompt])[0] for prompt in prompts]
    poison = next(token for token in range(VOCAB) if not any(token in text for text in [*prompts, *alone]))
    bench.decoder.weights.embedding[poison] = torch.inf
    engine = bench.engine(step_tokens=10, share=False)
    prompt = (PROMPTS[3][0], poison, *PROMPTS[3][2:])
    engine.submit(Sequence.of(Request(id=9, model="m", prompt=prompt, arrival=0.0), 64))
    for _ in range(3):
        engine.step()
    engine.cancel(9)
    engine.step()
    assert [event.finish.reason for event in bench.events if event.finish] == [Reason.CANCELLED]
    assert bench.run(engine, prompts) == alone
