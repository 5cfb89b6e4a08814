"""Draft tokens on the CUDA runner: each is a row of its own, and no answer changes."""

# torch's stubs do not type `tolist`, and pytest's patches take lambdas.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportArgumentType=false, reportPrivateUsage=false
from __future__ import annotations

from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file, save_file

from stretto.engine.core import EngineCore
from stretto.engine.runners.draft_model import DeviceDraftModel
from stretto.engine.runners.graphs import rows_for
from stretto.engine.runners.null import VirtualClock
from stretto.engine.runners.sampler import verified_on_device
from stretto.engine.scheduler.types import Plan, SchedulingContext
from stretto.engine.sequence import Sequence
from stretto.engine.speculative.policy import DraftCounts, Speculation, Verification
from stretto.engine.step_time import StepCost, StepLoad, StepTime
from tests.engine.runners.cuda_bench import BLOCK, LAYERS, PROMPTS, Bench, Counting, bench, events
from tests.kernels.cuda import GPU
from tests.models.checkpoints import VOCAB, make

__all__ = ["bench", "events"]
pytestmark = [pytest.mark.cuda] if GPU else []
LENGTH = 24 if GPU else 8
PERIOD = 7
DEVICE_RULES = Verification(verified_on_device, rows_for(6), pipelined=True)


class Frozen(StepTime):
    """Step times that learn nothing: in the interpreter a row takes as long as a step."""

    def observe(self, load: StepLoad, ms: float) -> None:
        """Ignore the step."""


TIMES = StepCost(base=10.0, per_decode=0.1, per_prefill=0.1)


def as_many_as_fit(plan: Plan, context: SchedulingContext, most: int) -> dict[Sequence, int]:
    """Up to `most` draft tokens for every decode that the device can verify, whatever they are worth."""
    tokens = sum(row.count for row in plan.rows)
    rows = min(rows_for(6) - len(plan.rows), context.limits.max_step_tokens - tokens)
    chosen: dict[Sequence, int] = {}
    for row in plan.rows:
        count = min(most, rows, row.seq.limit - row.start - 2)
        if row.decodes and verified_on_device(row.seq) and count > 0:
            chosen[row.seq] = count
            rows -= count
    return chosen


class AlwaysDrafting(Speculation):
    """Has a draft model propose three tokens in every step."""

    def choose(self, plan: Plan, context: SchedulingContext) -> DraftCounts:
        return DraftCounts(model=as_many_as_fit(plan, context, 3))


class KnownAnswers(Speculation):
    """Proposes the known answers, with a wrong token now and then: up to `most` for each sequence."""

    def __init__(self, answers: list[list[int]], most: int = 5) -> None:
        super().__init__(device=DEVICE_RULES)
        self.answers = answers
        self.most = most
        self.wrong = cycle((9, 2, 9, 0, 1, 9))

    def choose(self, plan: Plan, context: SchedulingContext) -> DraftCounts:
        return DraftCounts(ngram=as_many_as_fit(plan, context, self.most))

    def propose(self, counts: DraftCounts) -> dict[Sequence, tuple[int, ...]]:
        return {seq: self._one(seq, count) for seq, count in counts.ngram.items()}

    def _one(self, seq: Sequence, count: int) -> tuple[int, ...]:
        draft = self.answers[seq.request.id][seq.output_len :][:count]
        place = next(self.wrong)
        return tuple((token + (at == place)) % VOCAB for at, token in enumerate(draft))


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A model that mostly repeats a cycle of tokens: the head's row of a token is the embedding of the token
    before it in the cycle, and the layers change little."""
    path = tmp_path_factory.mktemp("copying")
    make("llama", path, **LAYERS)
    file = path / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= 0.01
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    for token in range(VOCAB):
        head[following(token)] = torch.nn.functional.normalize(embedding[token], dim=0)
    save_file(weights, file, {"format": "pt"})
    return Bench(path)


def following(token: int) -> int:
    """The token after `token` in its cycle of PERIOD tokens. The last cycle is shorter."""
    first = token // PERIOD * PERIOD
    return first + (token + 1 - first) % min(PERIOD, VOCAB - first)


def repeating(first: int, length: int) -> list[int]:
    text = [first]
    while len(text) < length:
        text.append(following(text[-1]))
    return text


def engine(bench: Bench, speculation: Speculation | None, **others: int) -> EngineCore:
    """An engine whose clock stands still, so that steps take what TIMES says and the host takes nothing."""
    return bench.engine(speculation=speculation, times=Frozen(TIMES), clock=VirtualClock(), **others)  # type: ignore[arg-type]


SHAPED: dict[str, object] = {"top_p": 0.95, "top_k": 40} if GPU else {}  # slow in the interpreter
ASKS: list[dict[str, object]] = [
    {"max_tokens": LENGTH},
    {"max_tokens": LENGTH, "temperature": 0.8, "seed": 5},
    {"max_tokens": LENGTH, "temperature": 1.3, "seed": 6, **SHAPED},
    {"max_tokens": LENGTH, "frequency_penalty": 0.2},
    {"max_tokens": LENGTH, "logprobs": 1},
]


def test_a_text_that_repeats_itself_takes_fewer_steps_and_no_other_tokens(copying: Bench) -> None:
    """Greedy and sampled requests, together and alone, in prompts of different lengths."""
    prompts = [repeating(10, 17), repeating(24, 22), repeating(50, 15)]
    plain = copying.run(engine(copying, None), prompts, *ASKS[:3])
    steps = len(copying.steps)
    assert copying.run(engine(copying, Speculation(device=DEVICE_RULES)), prompts, *ASKS[:3]) == plain
    assert sum(step.accepted for step in copying.steps) >= LENGTH
    alone = engine(copying, Speculation(device=DEVICE_RULES))
    assert copying.run(alone, prompts[1:2], ASKS[1]) == plain[1:2]
    assert len(copying.steps) <= steps * (2 / 3 if GPU else 1 / 2), "on a GPU the sampled answer repeats less"


def test_known_drafts_with_wrong_tokens_change_no_answer(bench: Bench) -> None:
    """All kinds of requests in a step, prompts read in chunks beside them, and drafts across blocks."""
    prompts = [*PROMPTS[:3], PROMPTS[0], PROMPTS[1][:6]]
    plain = bench.run(engine(bench, None), prompts, *ASKS)
    for options in ({}, {"step_tokens": 16}):
        made = engine(bench, KnownAnswers(plain), **options)
        assert bench.run(made, prompts, *ASKS) == plain
        proposed, accepted = (
            sum(getattr(step, name) for step in bench.steps) for name in ("proposed", "accepted")
        )
        assert 0 < accepted < proposed
        pool = made.models["m"].pool
        assert pool.available == pool.total


def test_requests_that_the_device_cannot_verify_get_no_draft_tokens(bench: Bench) -> None:
    plain = bench.run(engine(bench, None), PROMPTS[:2], *ASKS[3:])
    assert bench.run(engine(bench, KnownAnswers(plain)), PROMPTS[:2], *ASKS[3:]) == plain
    assert not any(step.proposed for step in bench.steps)


def test_rejected_draft_tokens_leave_no_trace(bench: Bench) -> None:
    """After each step the tables on the device name the blocks that sequences hold, and nobody reads a token
    that was drawn after a draft token."""
    prompts, longer = [PROMPTS[0]], {"max_tokens": 14}
    plain = bench.run(engine(bench, None), prompts, longer)
    speculation = KnownAnswers(plain, most=2 * BLOCK + 1)
    speculation.wrong = cycle((2, 0, 9, 1))
    made = engine(bench, speculation)
    runner = made.models["m"].runner
    assert isinstance(runner, Counting)
    launch, poison = runner.launch, (plain[0][0] + 1) % VOCAB

    def checked(plan: Plan) -> object:
        if runner.depth == 0:
            runner._drawn.fill_(poison)
        launched = launch(plan)
        for row in plan.rows:
            held = -(-(row.start + row.count) // BLOCK)
            assert runner._tables[row.seq.slot, :held].tolist() == row.seq.kv.blocks[:held]
        return launched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "launch", checked)
        assert bench.run(made, prompts, longer) == plain
    rejected = sum(step.proposed - step.accepted for step in bench.steps)
    assert rejected > BLOCK


def test_steps_without_draft_tokens_are_launched_ahead_again(copying: Bench) -> None:
    """Only those with draft tokens are waited for."""
    made = engine(copying, Speculation(device=DEVICE_RULES))
    depths: list[tuple[bool, int]] = []
    runner = made.models["m"].runner
    launch = runner.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runner,
            "launch",
            lambda plan: (launch(plan), depths.append((any(r.draft for r in plan.rows), runner.depth)))[0],
        )
        copying.run(made, [repeating(10, 17)], {"max_tokens": LENGTH})
    assert {depth for drafts, depth in depths if drafts} == {0}
    assert {depth for drafts, depth in depths if not drafts} == {1}


def drafting(bench: Bench, small: Bench) -> EngineCore:
    model = DeviceDraftModel(small.runner(), StepTime(StepCost(base=1.0)))
    return engine(bench, AlwaysDrafting(model, DEVICE_RULES))


def test_an_equal_draft_model_is_always_right(bench: Bench) -> None:
    """Both draw with the same random numbers. What is rejected lies behind the end of an answer: nothing."""
    plain = bench.run(engine(bench, None), PROMPTS[:2], *ASKS[:2])
    made = drafting(bench, bench)
    assert bench.run(made, PROMPTS[:2], *ASKS[:2]) == plain
    proposed, accepted = (
        sum(getattr(step, name) for step in bench.steps) for name in ("proposed", "accepted")
    )
    assert proposed == accepted >= LENGTH
    assert bench.run(made, PROMPTS[:2], *ASKS[:2]) == plain, "with the prompts in the prefix cache"


def test_a_draft_model_that_is_often_wrong_changes_no_answer(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its passes end in other blocks than those that the sequence gets after a rejection."""
    path = tmp_path_factory.mktemp("other")
    make("llama", path, **LAYERS)
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("down_proj.weight"):
            weight *= 0.8
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    plain = bench.run(engine(bench, None), PROMPTS[:2], *ASKS[:2])
    assert bench.run(drafting(bench, Bench(path)), PROMPTS[:2], *ASKS[:2]) == plain
    proposed, accepted = (
        sum(getattr(step, name) for step in bench.steps) for name in ("proposed", "accepted")
    )
    assert 0 < accepted < proposed
