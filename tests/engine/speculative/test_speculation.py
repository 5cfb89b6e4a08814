"""Speculative decoding changes the speed of an answer and nothing else: no token, probability or end."""

from __future__ import annotations

import json
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import stretto
from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.draft_model import DraftModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits, Plan, SchedulingContext
from stretto.engine.sequence import Sequence
from stretto.engine.speculative.ngram import INDEXED_AT_ONCE, INDEXED_TOKENS, AcceptanceRate, NgramIndex
from stretto.engine.speculative.policy import DraftCounts, Speculation, Verification
from stretto.engine.step_time import StepCost, StepTime
from stretto.engine.structured.grammar import Grammars
from stretto.kernels.choice import choose_kernels
from stretto.models.decoder import Decoder
from stretto.models.load import load
from stretto.simulator.harness import World
from stretto.types import (
    Finish,
    Grammar,
    ModelInfo,
    Objective,
    Reason,
    Request,
    Sampling,
    StepStats,
    TokenEvent,
)

DESK = Path(stretto.__file__).parent / "desk"
BLOCK, SEED = 4, 5
COST = StepCost(base=10.0, per_decode=0.1, per_prefill=0.1)


def as_many_as_fit(plan: Plan, context: SchedulingContext, most: int) -> dict[Sequence, int]:
    """Up to `most` draft tokens for every decode, whatever they are worth."""
    queues, pool = context.queues, context.pool
    rows = context.limits.max_step_tokens - sum(row.count for row in plan.rows)
    blocks = pool.available - len(queues.running)
    chosen: dict[Sequence, int] = {}
    for row in plan.rows:
        count = min(most, rows, blocks * BLOCK, row.seq.limit - len(row.seq.tokens) - 1)
        if row.decodes and row.seq.request.task == "generate" and count > 0:
            chosen[row.seq] = count
            rows, blocks = rows - count, blocks - pool.blocks_for(count)
    return chosen


class AlwaysDrafting(Speculation):
    """Has a draft model propose three tokens in every step, whatever they are worth."""

    def choose(self, plan: Plan, context: SchedulingContext) -> DraftCounts:
        return DraftCounts(model=as_many_as_fit(plan, context, 3))


class KnownAnswers(Speculation):
    """Proposes the known answers with a wrong token now and then; always as many tokens as fit."""

    def __init__(self, answers: dict[int, list[int]]) -> None:
        super().__init__()
        self.answers = answers
        self.wrong = cycle((9, 2, 9, 0, 1, 9))

    def choose(self, plan: Plan, context: SchedulingContext) -> DraftCounts:
        return DraftCounts(ngram=as_many_as_fit(plan, context, 5))

    def propose(self, counts: DraftCounts) -> dict[Sequence, tuple[int, ...]]:
        return {seq: self._one(seq, count) for seq, count in counts.ngram.items()}

    def _one(self, seq: Sequence, count: int) -> tuple[int, ...]:
        known = self.answers[seq.request.id][seq.output_len :][:count]
        draft = [*known, *[3] * (count - len(known))]
        place = next(self.wrong)
        if place < count:
            draft[place] = (draft[place] + 1) % 2048
        return tuple(draft)


class Desk:
    """The bundled model behind engines of its own."""

    def __init__(self) -> None:
        device = torch.device("cpu")
        kernels, _ = choose_kernels(device, torch.float32)
        self.decoder = load(DESK, dtype=torch.float32, device=device, kernels=kernels)
        self.eos = frozenset(self.decoder.spec.eos)
        self.grammars = Grammars(DESK, self.eos, self.decoder.spec.vocab)
        self.tokenizer = Tokenizer.from_file(str(DESK / "tokenizer.json"))
        self.steps: list[StepStats] = []
        self.events: list[TokenEvent] = []

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def runner(self, decoder: Decoder, blocks: int) -> TorchRunner:
        info = ModelInfo(
            name="desk",
            path="",
            family="llama",
            dtype="float32",
            device="cpu",
            context=min(2048, blocks * BLOCK),
            vocab=decoder.spec.vocab,
            parameters=0,
            weight_bytes=0,
            kv_bytes=0,
            block_size=BLOCK,
            blocks=blocks,
            load_s=0.0,
        )
        return TorchRunner(decoder, info, eos=self.eos, max_running=8)

    def engine(
        self,
        speculation: Speculation | type[Speculation] | None,
        *,
        blocks: int = 256,
        step_tokens: int = 512,
        small: Decoder | None = None,
    ) -> EngineCore:
        """An engine with this speculation, or with one of this class and the draft model `small`."""
        runner = self.runner(self.decoder, blocks)
        if isinstance(speculation, type):
            assert small is not None
            speculation = speculation(DraftModel(self.runner(small, 1), runner, StepTime()))
        self.steps, self.events = [], []
        limits = Limits(8, step_tokens)
        return EngineCore(
            [LoadedModel(runner, speculation=speculation)],
            limits=limits,
            schedule=SCHEDULES["fcfs"],
            clock=time.monotonic,
            emit=self._heard,
        )

    def _heard(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        self.events += events
        self.steps += [] if stats is None else [stats]

    def submit(self, engine: EngineCore, ident: int, question: str, sampling: Sampling) -> None:
        text = f"<|user|>{question}<|end|><|assistant|>"
        prompt = tuple(self.encode(text))
        request = Request(id=ident, model="desk", prompt=prompt, arrival=0.0, sampling=sampling)
        grammar = None if sampling.grammar is None else self.grammars.compile(sampling.grammar)
        engine.submit(Sequence.of(request, engine.models["desk"].runner.info.context, grammar))

    def answers(
        self, engine: EngineCore, asks: list[tuple[str, Sampling]], first: int = 0
    ) -> dict[int, list[TokenEvent]]:
        """The events of each ask, by its place from `first` on: an id is used once in an engine."""
        for ident, (question, sampling) in enumerate(asks, first):
            self.submit(engine, ident, question, sampling)
        while engine.step() or not engine.idle:
            engine.check()
        idents = range(first, first + len(asks))
        return {ident: [event for event in self.events if event.id == ident] for ident in idents}


@pytest.fixture(scope="module")
def desk() -> Desk:
    return Desk()


QUESTIONS = [
    "Order 4711: 3 x lamp at 12.50, 2 x chair at 40.00, 2 x lamp at 12.50. What is the total?",
    "What is 22.53 + 32.62?",
    "Say: the red door and the red door and the red door and the red",
    "Translate to German: thank you",
]
REGEX = Grammar("regex", r"(ab|cd){3,9} [0-9]{2,4}( x){5}")
ASKS = {
    "greedy": Sampling(temperature=0.0, max_tokens=40),
    "sampled": Sampling(seed=SEED, max_tokens=40),
    "shaped": Sampling(seed=SEED, max_tokens=40, temperature=1.4, top_p=0.9, top_k=40, min_p=0.01),
    "penalties": Sampling(
        seed=SEED,
        max_tokens=40,
        ignore_eos=True,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.2,
    ),
    "greedy penalties": Sampling(
        temperature=0.0, max_tokens=40, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.4
    ),
    "logprobs": Sampling(seed=SEED, max_tokens=30, logprobs=3),
    "minimum and bias": Sampling(seed=SEED, max_tokens=40, min_tokens=25, logit_bias={70: 4.0, 80: -5.0}),
    "cut short": Sampling(temperature=0.0, max_tokens=7, ignore_eos=True),
    "one token": Sampling(temperature=0.0, max_tokens=1, ignore_eos=True),
    "a stop token": Sampling(temperature=0.0, max_tokens=40, stop_token_ids=tuple(range(300, 420))),
    "grammar": Sampling(seed=SEED, max_tokens=60, grammar=REGEX),
    "grammar cut short": Sampling(seed=SEED, max_tokens=9, grammar=REGEX, temperature=1.3),
}


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def same(left: dict[int, list[TokenEvent]], right: dict[int, list[TokenEvent]]) -> None:
    """Token by token, event by event, with equal ends and, but for rounding, equal probabilities."""
    for ident, events in left.items():
        assert tokens(events) == tokens(right[ident])
        assert len(events) == len(right[ident])
        for one, other in zip(events, right[ident], strict=True):
            if one.logprobs is not None and other.logprobs is not None:
                assert one.logprobs.chosen == pytest.approx(other.logprobs.chosen, abs=1e-3)
                assert [token for token, _ in one.logprobs.top] == [token for token, _ in other.logprobs.top]
            else:
                assert one.logprobs is other.logprobs
        ends = [_end(events), _end(right[ident])]
        assert len({(end.reason, end.output_tokens, end.stop_token, end.error) for end in ends}) == 1


def _as(events: list[TokenEvent], ident: int) -> list[TokenEvent]:
    return [msgspec.structs.replace(event, id=ident) for event in events]


def _end(events: list[TokenEvent]) -> Finish:
    assert events[-1].finish is not None
    return events[-1].finish


@pytest.mark.parametrize("name", ASKS)
def test_every_answer_is_the_unspeculated_one(desk: Desk, name: str):
    asks = [(question, ASKS[name]) for question in QUESTIONS]
    plain = desk.answers(desk.engine(None), asks)
    assert not any(step.proposed for step in desk.steps)
    known = KnownAnswers({ident: tokens(events) for ident, events in plain.items()})
    same(plain, desk.answers(desk.engine(known), asks))
    if ASKS[name].max_tokens != 1:
        proposed, accepted = sum(s.proposed for s in desk.steps), sum(s.accepted for s in desk.steps)
        assert 0 < accepted < proposed
    same(plain, desk.answers(desk.engine(Speculation()), asks))


def test_requests_of_all_kinds_share_a_step_with_draft_tokens(desk: Desk):
    asks = [(QUESTIONS[place % 4], sampling) for place, sampling in enumerate(ASKS.values())]
    plain = desk.answers(desk.engine(None), asks)
    known = KnownAnswers({ident: tokens(events) for ident, events in plain.items()})
    same(plain, desk.answers(desk.engine(known), asks))
    spoken = sum(len(tokens(events)) for events in plain.values())
    assert sum(step.decode_tokens for step in desk.steps) in range(spoken - len(asks), spoken + len(asks) + 1)
    known = KnownAnswers(known.answers)
    same(plain, desk.answers(desk.engine(known, step_tokens=11), asks))
    assert max(step.decode_tokens + step.prefill_tokens for step in desk.steps) <= 11


def test_preempted_and_resumed_sequences_answer_the_same(desk: Desk):
    asks = [(question, ASKS["sampled"]) for question in QUESTIONS * 2]
    plain = desk.answers(desk.engine(None), asks)
    known = KnownAnswers({ident: tokens(events) for ident, events in plain.items()})
    same(plain, desk.answers(desk.engine(known, blocks=40), asks))
    assert sum(step.preempted for step in desk.steps) > 0 and sum(step.accepted for step in desk.steps) > 0


def test_a_shared_prefix_never_holds_a_wrong_draft_token(desk: Desk):
    """The second round reads the first one's blocks, up to the last whole one of its answers."""
    first = [(QUESTIONS[2], ASKS["greedy"])]
    plain = desk.answers(desk.engine(None), first)
    answer = tokens(plain[0])
    engine = desk.engine(KnownAnswers({0: answer, 1: []}))
    same(plain, desk.answers(engine, first))
    prompt = engine.models["desk"]
    request = Request(
        id=1,
        model="desk",
        prompt=(
            *desk.encode(f"<|user|>{QUESTIONS[2]}<|end|><|assistant|>"),
            *answer,
        ),
        arrival=0.0,
        sampling=Sampling(temperature=0.0, max_tokens=20, ignore_eos=True),
    )
    outputs: list[list[int]] = []
    for each in (engine, desk.engine(None)):
        desk.events.clear()
        each.submit(Sequence.of(request, 1024))
        while each.step() or not each.idle:
            each.check()
        outputs.append(tokens(desk.events))
    assert outputs[0] == outputs[1] and len(outputs[0]) == 20
    assert prompt.pool.available == prompt.pool.total


def test_a_cancel_between_steps_leaves_nothing_behind(desk: Desk):
    plain = desk.answers(desk.engine(None), [(question, ASKS["greedy"]) for question in QUESTIONS])
    engine = desk.engine(KnownAnswers({ident: tokens(events) for ident, events in plain.items()}))
    for ident, question in enumerate(QUESTIONS):
        desk.submit(engine, ident, question, ASKS["greedy"])
    for _ in range(3):
        engine.step()
    longest = max(plain, key=lambda ident: len(tokens(plain[ident])))
    engine.cancel(longest)
    engine.check()
    while engine.step() or not engine.idle:
        engine.check()
    seen = {ident: [event for event in desk.events if event.id == ident] for ident in range(4)}
    assert _end(seen[longest]).reason is Reason.CANCELLED
    assert tokens(seen[longest]) == tokens(plain[longest])[: len(tokens(seen[longest]))]
    same({ident: events for ident, events in plain.items() if ident != longest}, seen)
    lane = engine.models["desk"]
    assert lane.pool.available == lane.pool.total


@pytest.fixture(scope="module")
def worse(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The desk model without its last layer: it often draws the same token, and often not."""
    folder = tmp_path_factory.mktemp("worse")
    config = json.loads((DESK / "config.json").read_text())
    last = config["num_hidden_layers"] - 1
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": last}))
    weights = load_file(DESK / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if f"layers.{last}." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    kernels = desk.decoder.kernels
    return load(folder, dtype=torch.float32, device=torch.device("cpu"), kernels=kernels)


@pytest.mark.parametrize("name", ["greedy", "sampled", "shaped", "penalties", "logprobs", "grammar"])
def test_answers_with_a_draft_model_are_the_unspeculated_ones(desk: Desk, worse: Decoder, name: str):
    asks = [(question, ASKS[name]) for question in QUESTIONS]
    plain = desk.answers(desk.engine(None), asks)
    same(plain, desk.answers(desk.engine(AlwaysDrafting, small=worse), asks))
    assert 0 < sum(step.accepted for step in desk.steps) < sum(step.proposed for step in desk.steps)


def rejected(desk: Desk) -> int:
    """Draft tokens that were not accepted. Of an equal model they are those behind an answer's end."""
    return sum(step.proposed - step.accepted for step in desk.steps)


@pytest.mark.parametrize("name", ["greedy", "shaped", "penalties"])
def test_an_equal_draft_model_is_right_at_any_temperature(desk: Desk, name: str):
    """Both draw with the same random numbers, and its KV cache survives rejected and shared tokens."""
    asks = [(question, ASKS[name]) for question in QUESTIONS]
    plain = desk.answers(desk.engine(None), asks)
    engine = desk.engine(AlwaysDrafting, small=desk.decoder)
    same(plain, desk.answers(engine, asks))
    twice = plain | {ident + 4: _as(events, ident + 4) for ident, events in plain.items()}
    same(desk.answers(engine, asks, first=4), twice)
    assert rejected(desk) <= 3 * 2 * len(asks) < sum(step.accepted for step in desk.steps)
    same(twice, desk.answers(desk.engine(AlwaysDrafting, small=desk.decoder, blocks=24), asks * 2))
    assert sum(step.preempted for step in desk.steps) > 0
    assert rejected(desk) <= 3 * 2 * len(asks) < sum(step.accepted for step in desk.steps)


class Repeating(World):
    """A null model whose answers repeat every `span` tokens."""

    def __init__(
        self,
        speculation: Speculation | None,
        *,
        span: int,
        cost: StepCost = COST,
        blocks: int = 64,
        clock: VirtualClock | None = None,
    ) -> None:
        clock = clock or VirtualClock()
        info = null_info(name="a", context=blocks * 16, blocks=blocks)
        runner = NullRunner(info, cost=cost, sleep=clock.sleep, span=span)
        models = [LoadedModel(runner, StepTime(cost), speculation)]
        super().__init__(clock, models, Limits(8, 64), SCHEDULES["deadline"])

    def send(self, ident: int, prompt: int, max_tokens: int, objective: Objective | None = None) -> None:
        request = Request(
            id=ident,
            model="a",
            prompt=tuple(range(100, 100 + prompt)),
            arrival=self.clock(),
            sampling=Sampling(max_tokens=max_tokens, seed=ident),
            objective=objective or Objective(),
        )
        self.submit(request)

    def finish(self) -> dict[int, list[int]]:
        self.run()
        return {ident: self.tokens(ident) for ident in self.events}

    def total(self, name: str) -> int:
        return sum(getattr(step, name) for step in self.steps)


def test_a_text_that_repeats_itself_takes_fewer_steps():
    plain, quick = Repeating(None, span=5), Repeating(Speculation(), span=5)
    for world in (plain, quick):
        world.send(1, 20, 200)
    assert plain.finish() == quick.finish()
    assert quick.total("accepted") > 150 and len(quick.steps) < len(plain.steps) / 3
    assert quick.clock() < plain.clock() / 3


def test_a_text_that_never_repeats_is_left_alone():
    world = Repeating(Speculation(), span=4093)
    world.send(1, 20, 200)
    world.finish()
    assert world.total("proposed") == 0


@pytest.mark.parametrize(("base", "proposes"), [(10.0, True), (0.2, False)])
def test_draft_tokens_are_verified_only_where_they_raise_tokens_per_millisecond(base: float, proposes: bool):
    """Where rows are the whole cost, a draft token costs as much as it can gain, and is not always right."""
    world = Repeating(Speculation(), span=5, cost=StepCost(base=base, per_decode=10.0, per_prefill=10.0))
    world.send(1, 20, 400)
    world.finish()
    late = world.steps[len(world.steps) // 2 :]
    assert any(step.proposed for step in late) is proposes


def test_draft_tokens_keep_to_the_slack_of_other_sequences():
    """Both texts repeat. The objective of one leaves 1.5 ms beyond a plain step, for few draft tokens."""
    gaps: dict[bool, float] = {}
    for bound in (False, True):
        world = Repeating(Speculation(), span=5, cost=StepCost(base=10.0, per_decode=0.5, per_prefill=0.5))
        world.send(1, 20, 300, Objective(ttft_ms=1000, itl_ms=14.0) if bound else None)
        world.send(2, 20, 300)
        world.finish()
        both = [step for step in world.steps if step.running == 2 and not step.prefill_tokens]
        gaps[bound] = max(step.ms for step in both)
        assert world.total("accepted") > 0
    assert gaps[True] < 14.001 < gaps[False]


class NullDrafter:
    """A draft model in virtual time. It knows the null model's answers, or gets every token wrong."""

    model = "small"
    nbytes = 0

    def __init__(self, clock: VirtualClock, ms: float, right: bool = True) -> None:
        self.times = StepTime(StepCost(base=ms))
        self.clock = clock
        self.right = right

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        self.clock.sleep(max(counts.values()) * self.times.cost.base / 1e3)
        wrong = 0 if self.right else 1
        return {
            seq: tuple((seq.seed * 31 + (seq.length + n) * 7 + wrong) % 4093 for n in range(count))
            for seq, count in counts.items()
        }

    def read(self, seq: Sequence) -> int:
        """It has read whatever there is."""
        return len(seq.tokens)

    def erase(self, blocks: list[int]) -> None:
        """There is no memory to erase."""


@pytest.mark.parametrize(
    ("ms", "right", "worth"), [(1.0, True, True), (9.0, True, False), (1.0, False, False)]
)
def test_a_draft_model_is_used_where_it_pays_off(ms: float, right: bool, worth: bool):
    """Texts never repeat. The draft model saves steps of 10 ms unless it is as slow or always wrong."""
    clock = VirtualClock()
    plain = Repeating(None, span=4093)
    quick = Repeating(Speculation(NullDrafter(clock, ms, right)), span=4093, clock=clock)
    for world in (plain, quick):
        for ident in (1, 2, 3):
            world.send(ident, 20, 200)
    assert plain.finish() == quick.finish()
    late = quick.steps[len(quick.steps) // 2 :]
    assert any(step.proposed for step in late) is worth
    assert quick.clock() < plain.clock() * (0.6 if worth else 1.05)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_block_is_lost_and_no_token_changed_whatever_happens(data: st.DataObject):
    """Random pools, lengths, repetition and cancels."""
    span, blocks = data.draw(st.integers(1, 7)), data.draw(st.integers(8, 24))
    plain, quick = (Repeating(each, span=span, blocks=blocks) for each in (None, Speculation()))
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6))
    for ident, (prompt, wanted) in enumerate(sizes):
        plain.send(ident, prompt, wanted)
        quick.send(ident, prompt, wanted)
        for _ in range(data.draw(st.integers(0, 3))):
            quick.step()
    gone = data.draw(st.integers(0, 8))
    quick.cancel(gone)
    expected, seen = plain.finish(), quick.finish()
    for ident, answer in expected.items():
        assert seen[ident] == (answer[: len(seen[ident])] if ident == gone else answer)
    pool = quick.engine.models["a"].pool
    assert pool.available == pool.total


def index_of(tokens: list[int], prompt_len: int | None = None) -> NgramIndex:
    prompt_len = len(tokens) if prompt_len is None else prompt_len
    index = NgramIndex(AcceptanceRate(), AcceptanceRate(), prompt_len)
    index.update(tokens, prompt_len)
    return index


def test_the_longest_passage_that_agrees_is_copied_and_of_equal_ones_the_latest():
    text = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 3, 4, 70, 7, 1, 2, 3, 4]
    assert index_of(text).propose(text, 2) == (50, 9)
    text = [5, 3, 4, 60, 6, 3, 4, 70, 7, 3, 4]
    assert index_of(text).propose(text, 3) == (70, 7, 3)
    assert index_of([1, 2, 3, 4]).match == -1
    assert index_of([1, 1, 1]).propose([1, 1, 1], 4) == (1, 1, 1, 1)


TEXTS = {
    "one token": [7],
    "a pair": [1, 2] * 40,
    "squares": [(n * n) % 23 for n in range(200)],
    "counting": [*range(50), *range(30), 99, *range(10)],
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_an_index_grown_token_by_token_is_that_of_the_whole(text: list[int]):
    """And it proposes what a search of the whole text finds."""
    whole, grown = index_of(text), NgramIndex(AcceptanceRate(), AcceptanceRate(), len(text))
    for until in range(1, len(text) + 1):
        grown.update(text[:until], len(text))
    assert (whole.match, whole.match_length) == (grown.match, grown.match_length)
    best = max(
        (
            (length, place + 1)
            for place in range(1, len(text) - 1)
            for length in range(2, place + 2)
            if text[place - length + 1 : place + 1] == text[len(text) - length :]
        ),
        default=(0, -1),
    )
    assert whole.match == best[1]


def test_the_acceptance_rate_is_learnt_from_every_token_whether_verified_or_not():
    same = [1, 2, 3, 4, 5] * 30
    always, never = (
        index_of(same, 10),
        index_of([*range(40), *[x for n in range(38) for x in (n, n + 1)]], 40),
    )
    assert always.acceptance(0) > 0.9 > 0.2 > never.acceptance(0)


def test_only_the_end_of_a_long_prompt_is_indexed_and_not_at_once():
    text = list(range(3 * INDEXED_TOKENS)) + [0, 1] * 3
    index = index_of(text)
    assert len(index) == INDEXED_AT_ONCE and not index.holds(text) and index.match == -1
    for _ in range(INDEXED_TOKENS // INDEXED_AT_ONCE - 1):
        index.update(text, len(text))
    assert len(index) == INDEXED_TOKENS and index.holds(text) and index.propose(text, 2) == (0, 1)


def test_many_sequences_are_indexed_in_several_steps(monkeypatch: pytest.MonkeyPatch):
    """Draft tokens begin to pay off when few enough streams are left. No step waits for all their indexes."""
    read, update = [0], NgramIndex.update

    def counted(self: NgramIndex, *arguments: Any) -> int:
        count = update(self, *arguments)
        read[0] += count
        return count

    monkeypatch.setattr(NgramIndex, "update", counted)
    pays_off = [False]
    device = Verification(lambda seq: pays_off[0])
    world = Repeating(Speculation(device=device), span=5, blocks=512)
    for ident in range(1, 8):
        world.send(ident, 600, 100)
    while len(world.engine.models["a"].queues.running) < 7 or world.total("decode_tokens") < 20:
        world.step()
    assert read == [0]
    pays_off[0] = True
    each: list[int] = []
    while not world.engine.idle:
        world.step()
        each.append(read[0])
        read[0] = 0
    assert max(each) <= INDEXED_AT_ONCE < sum(each) - len(each)
    assert sum(each) > 7 * 600 and world.total("accepted") > 7 * 50
