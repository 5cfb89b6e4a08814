"""Another model goes on with a sequence between two tokens: nothing is repeated, left out or taken back."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

import stretto
from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.null import NullRunner, VirtualClock, null_info
from stretto.engine.runners.torch import TorchRunner
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits
from stretto.engine.sequence import Drawn, Sequence
from stretto.engine.step_time import StepCost, StepLoad, StepTime
from stretto.engine.variants.moves import MOST_MOVES
from stretto.kernels.choice import choose_kernels
from stretto.models.load import load
from stretto.simulator.harness import World
from stretto.types import Cascade, Moved, Objective, Reason, Request, Sampling, TokenEvent

DESK = Path(stretto.__file__).parent / "desk"
COSTS = {
    "top": StepCost(20.0, 1.0, 1.0, 0.0, 0.0),
    "mid": StepCost(8.0, 0.4, 0.4, 0.0, 0.0),
    "low": StepCost(2.0, 0.1, 0.1, 0.0, 0.0),
}
LIGHTER = ("mid", "low")
TIMED = Objective(ttft_ms=400, total_ms=1800)


class UnsureRunner(NullRunner):
    """A null model that is not sure of some tokens. `unsure`: their indexes in an answer, by request."""

    def __init__(self, name: str, clock: VirtualClock, unsure: dict[int, set[int]], depth: int) -> None:
        info = null_info(name=name, context=4096, blocks=1024)
        super().__init__(info, cost=COSTS[name], sleep=clock.sleep, depth=depth)
        self._unsure = unsure
        self.slow = 1.0

    def step_ms(self, load: StepLoad) -> float:
        return super().step_ms(load) * self.slow

    def draw(self, seq: Sequence, ahead: int) -> Drawn:
        drawn, index = super().draw(seq, ahead), seq.length + ahead - seq.prompt_len
        sure = index not in self._unsure.get(seq.request.id, ())
        return Drawn(drawn.token, drawn.logprobs, drawn.embedding, sureness=0.0 if sure else -1.0)


class Ladders(World):
    """A ladder of three null models in virtual time."""

    def __init__(self, unsure: dict[int, set[int]] | None = None, depth: int = 0) -> None:
        clock = VirtualClock()
        self.runners = [UnsureRunner(name, clock, unsure or {}, depth) for name in COSTS]
        models = [LoadedModel(runner, StepTime(runner.cost)) for runner in self.runners]
        super().__init__(clock, models, Limits(64, 512), SCHEDULES["deadline"], share=False)

    def moves(self, ident: int) -> list[Moved]:
        begun = [event.began for event in self.events.get(ident, []) if event.began is not None]
        return [began.moved for began in begun if began.moved is not None]

    def late(self, ident: int) -> bool:
        return self.ends[ident].late


def asked(ident: int, **fields: Any) -> Request:
    usual: dict[str, Any] = {
        "model": "top",
        "prompt": (1,) * 100,
        "arrival": 0.0,
        "sampling": Sampling(max_tokens=40, seed=ident),
        "objective": TIMED,
        "lighter": LIGHTER,
    }
    return Request(id=ident, **(usual | fields))


def expected(request: Request) -> list[int]:
    """The tokens of a null model, which depend on the seed and the place alone."""
    world = Ladders()
    world.submit(structs.replace(request, arrival=0.0, objective=Objective(on_miss="late"), lighter=()))
    world.run()
    return world.tokens(request.id)


def slowed(world: Ladders, requests: Iterable[Request]) -> Ladders:
    """Requests that have begun when the steps of the top become slower."""
    for request in requests:
        world.submit(request)
    while not all(world.tokens(ident) for ident in world.requests):
        world.step()
    world.runners[0].slow = 2.5
    world.run()
    return world


@pytest.mark.parametrize("depth", [0, 1])
def test_a_stream_that_would_be_late_goes_on_with_a_lighter_model(depth: int) -> None:
    world = slowed(Ladders(depth=depth), [asked(1)])
    (move,) = world.moves(1)
    assert move.model in LIGHTER and move.why == "moved" and 0 < move.after < 40
    assert not world.late(1) and world.ends[1].output_tokens == 40
    assert world.tokens(1) == expected(asked(1)), "nothing is repeated or left out"
    stays = slowed(Ladders(depth=depth), [asked(1, lighter=())])
    assert stays.late(1), "it would have been late"


def test_the_client_is_told_of_the_move_with_the_first_token_after_it() -> None:
    world = slowed(Ladders(), [asked(1)])
    events = [event for event in world.events[1] if event.token is not None]
    told = [place for place, event in enumerate(events) if event.began and event.began.moved]
    assert told == [world.moves(1)[0].after]
    assert events[0].began is not None and events[0].began.moved is None


def test_a_stream_stays_where_no_lighter_cache_can_be_filled_in_time() -> None:
    tight = Objective(ttft_ms=1300, itl_ms=40)  # the first token comes 0.26 s before it is due
    long = (1,) * 1000  # takes 0.4 s on `mid`, and 0.1 on `low`
    world = slowed(Ladders(), [asked(1, prompt=long, objective=tight, lighter=("mid",))])
    assert world.moves(1) == [] and world.late(1)
    light = slowed(Ladders(), [asked(1, prompt=long, objective=tight)])
    assert [move.model for move in light.moves(1)] == ["low"] and not light.late(1)


def test_one_stream_moves_at_a_time_and_the_others_may_stay() -> None:
    world = slowed(Ladders(), [asked(ident) for ident in range(1, 4)])
    assert any(world.moves(ident) for ident in range(1, 4))
    assert not any(world.late(ident) for ident in range(1, 4))


def cascade(ident: int, **fields: Any) -> Request:
    return asked(ident, **({"model": "low", "cascade": Cascade("top", -0.5), "lighter": ()} | fields))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 17, 39])
def test_the_better_model_goes_on_from_the_first_token_that_is_unsure(at: int, depth: int) -> None:
    world = Ladders({1: {at, at + 3}}, depth)
    world.submit(cascade(1))
    world.run()
    assert world.moves(1) == [Moved("top", at, "unsure")]
    assert world.tokens(1) == expected(cascade(1))
    assert world.ends[1].reason is Reason.LENGTH and not world.late(1)


def test_an_answer_that_is_sure_stays() -> None:
    world = Ladders({2: {3}})
    for ident in (1, 2):
        world.submit(cascade(ident))
    world.submit(cascade(3, cascade=None))
    world.run()
    assert [world.moves(ident) for ident in (1, 2, 3)] == [[], [Moved("top", 3, "unsure")], []]


def test_without_time_for_the_better_model_the_answer_goes_on() -> None:
    world = Ladders({1: {30}})
    world.submit(cascade(1, objective=Objective(ttft_ms=400, total_ms=250)))
    world.run()
    assert world.moves(1) == [] and not world.late(1)
    assert len(world.tokens(1)) == 40


def test_one_that_got_a_better_model_may_return() -> None:
    world = slowed(Ladders({1: {2}}), [cascade(1, objective=Objective(ttft_ms=400, total_ms=1500))])
    assert [move.model for move in world.moves(1)] == ["top", "low"]
    assert world.tokens(1) == expected(cascade(1)) and not world.late(1)


def test_a_cancelled_answer_ends_where_it_is() -> None:
    world = Ladders({1: {5}})
    world.submit(cascade(1))
    while len(world.tokens(1)) < 8:
        world.step()
    world.cancel(1)
    world.run()
    assert world.ends[1].reason is Reason.CANCELLED and world.engine.idle
    assert all(not model.queues.running for model in world.engine.models.values())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1.5),
            st.integers(1, 300),
            st.integers(1, 40),
            st.sampled_from((50.0, 300.0, None)),
            st.sampled_from((30.0, 100.0, None)),
            st.sampled_from((500.0, 1500.0, None)),
            st.sampled_from(("degrade", "late")),
            st.sets(st.integers(0, 40), max_size=3),
            st.booleans(),
        ),
        max_size=25,
    ),
    st.integers(0, 1),
)
def test_random_loads_emit_each_token_once(rows: list[Any], depth: int) -> None:
    rows.sort(key=lambda row: row[0])
    world = Ladders({ident: row[7] for ident, row in enumerate(rows, 1)}, depth)
    for ident, (at, prompt, tokens, ttft, itl, total, on_miss, _, small) in enumerate(rows, 1):
        world.run(until=at)
        fields: dict[str, Any] = {
            "prompt": (1,) * prompt,
            "arrival": world.clock(),
            "sampling": Sampling(max_tokens=tokens, seed=ident),
            "objective": Objective(ttft_ms=ttft, itl_ms=itl, total_ms=total, on_miss=on_miss),
        }
        world.submit(cascade(ident, **fields) if small else asked(ident, **fields))
    world.run()
    assert set(world.ends) == set(world.requests)
    for ident, request in world.requests.items():
        emitted = world.tokens(ident)
        assert emitted == expected(request)[: len(emitted)]
        assert world.ends[ident].output_tokens == len(emitted)
        assert len(world.moves(ident)) <= MOST_MOVES
        if world.ends[ident].reason is Reason.LENGTH:
            assert len(emitted) == request.sampling.max_tokens
    assert all(
        len(model.slots) == 64 and model.pool.available == 1024 for model in world.engine.models.values()
    )


class DeskPair:
    """The bundled model and its smallest variant in one engine."""

    def __init__(self) -> None:
        device = torch.device("cpu")
        kernels, _ = choose_kernels(device, torch.float32)
        self.decoders = {
            "small": load(DESK / "tiny", dtype=torch.float32, device=device, kernels=kernels),
            "large": load(DESK, dtype=torch.float32, device=device, kernels=kernels),
        }

    def answers(self, *requests: Request) -> dict[int, list[TokenEvent]]:
        events: dict[int, list[TokenEvent]] = {request.id: [] for request in requests}

        def heard(found: list[TokenEvent], _: object) -> None:
            for event in found:
                events[event.id].append(event)

        models = [LoadedModel(self._runner(name)) for name in self.decoders]
        schedule = SCHEDULES["deadline"]
        engine = EngineCore(
            models, limits=Limits(8, 512), schedule=schedule, clock=time.monotonic, emit=heard
        )
        for request in requests:
            engine.submit(Sequence.of(structs.replace(request, arrival=time.monotonic()), 2048))
        while engine.step() or not engine.idle:
            engine.check()
        return events

    def _runner(self, name: str) -> TorchRunner:
        decoder = self.decoders[name]
        info = structs.replace(
            null_info(name=name, context=2048, vocab=decoder.spec.vocab, blocks=256),
            dtype="float32",
            device="cpu",
        )
        return TorchRunner(decoder, info, eos=frozenset(decoder.spec.eos), max_running=8)


@pytest.fixture(scope="module")
def pair() -> DeskPair:
    return DeskPair()


def ids(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_real_models_share_one_answer(pair: DeskPair, temperature: float) -> None:
    """The small model's tokens up to the first one that it is not sure of, then what the large one adds."""
    prompts = {
        number: tuple(3 + (11 * place * number + place) % 1500 for place in range(12 + number))
        for number in range(1, 7)
    }
    sampling = {
        number: Sampling(max_tokens=24, temperature=temperature, seed=number, logprobs=1, ignore_eos=True)
        for number in prompts
    }
    base = [
        Request(id=number, model="small", prompt=prompt, arrival=0.0, sampling=sampling[number])
        for number, prompt in prompts.items()
    ]
    alone = pair.answers(*base)
    moved = pair.answers(*(structs.replace(each, cascade=Cascade("large", -1.0)) for each in base))
    handed = 0
    for request in base:
        sureness = [event.logprobs.top[0][1] for event in alone[request.id] if event.logprobs]
        at = next((place for place, value in enumerate(sureness) if value < -1.0), None)
        found = ids(moved[request.id])
        if at is None:
            assert found == ids(alone[request.id])
            continue
        handed += 1
        kept = ids(alone[request.id])[:at]
        assert found[:at] == kept
        rest = structs.replace(request, model="large", emitted=tuple(kept))
        assert found[at:] == ids(pair.answers(rest)[request.id])
        told = [event.began.moved for event in moved[request.id] if event.began and event.began.moved]
        assert told == [Moved("large", at, "unsure")]
    assert handed, "the small model is not sure of noise"
