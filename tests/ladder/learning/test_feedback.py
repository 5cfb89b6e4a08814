"""The store of choices and the learner: whose they are, what is forgotten, and that memory is bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stretto.ladder.estimate import features
from stretto.ladder.learning.bandit import context
from stretto.ladder.learning.feedback import (
    FeedbackLimits,
    FeedbackStore,
    KeptPrompt,
    KeptTurn,
    MadeChoice,
    NoPromptKept,
    NoSuchChoice,
    Reward,
)
from stretto.ladder.learning.learner import BANDITS, Learner, summary

CONTEXT = context(features("What is the sum of 4 8 15?"))
NAMES = ("full", "small", "tiny")
LATER = 10.0
PROMPT = KeptPrompt((KeptTurn("user", "What is the sum?"),))


def choice(variant: str = "full", user: str = "", prompt: KeptPrompt | None = None) -> MadeChoice:
    return MadeChoice("desk", variant, NAMES, (0.8, 0.1, 0.1), (0.9, 0.8, 0.6), CONTEXT, user, prompt)


def learner(limits: FeedbackLimits | None = None) -> Learner:
    store = FeedbackStore(limits or FeedbackLimits())
    return Learner(store, {"desk": NAMES, "single": ("only",)}, np.random.default_rng(0))


def vote(made: Learner, tenant: str, count: int, value: float = 0.0, **parts: str) -> None:
    for number in range(count):
        name = f"{tenant} {parts} {number}"
        made.remember(tenant, name, choice(**parts), 0.0)
        made.reward(tenant, name, Reward(value), 1.0)


def corrections(made: Learner, tenant: str, user: str = "") -> list[float]:
    bandit = made.bandit(tenant, "desk", LATER)
    return [0.0] * 3 if bandit is None else bandit.corrections(CONTEXT, user).mean


def test_a_reward_teaches_the_tenant_that_gave_it_and_no_other() -> None:
    made = learner()
    vote(made, "good", 20, 0.9)
    before = corrections(made, "good")
    vote(made, "poisoner", 500, 0.0)
    assert corrections(made, "poisoner")[0] < -0.5
    assert corrections(made, "good") == before
    assert made.bandit("newcomer", "desk", LATER) is None


def test_what_was_taught_is_shown_by_tenant_and_as_the_mean_of_all() -> None:
    made = learner()
    assert made.corrections() == {"desk": dict.fromkeys(NAMES, 0.0)}, "a single variant has nothing to choose"
    vote(made, "good", 20, 0.9)
    vote(made, "bad", 60, 0.0)
    good, bad = (made.taught(tenant, "desk", LATER) for tenant in ("good", "bad"))
    assert good["full"].mean == pytest.approx(0.0, abs=0.05)
    assert bad["full"].low <= bad["full"].mean < -0.5
    whole = made.corrections()["desk"]
    assert bad["full"].mean < whole["full"] < good["full"].mean - 0.3, "the one with more rewards counts more"
    assert whole["tiny"] == bad["tiny"].mean == 0.0
    made.erase("bad", lambda kept: True, LATER)
    assert made.corrections()["desk"]["full"] == pytest.approx(good["full"].mean)
    assert made.taught("bad", "desk", LATER * 2) == {}


def test_a_choice_is_found_only_by_its_tenant() -> None:
    made = learner()
    made.remember("ann", "1", choice(), 0.0)
    for tenant, request_id in (("bob", "1"), ("ann", "2"), ("", "")):
        with pytest.raises(NoSuchChoice):
            made.reward(tenant, request_id, Reward(1.0), 1.0)
    assert made.erase("bob", lambda kept: True, 2.0) == 0
    assert made.reward("ann", "1", Reward(1.0), 1.0).choice.variant == "full"


def test_the_same_id_of_two_tenants_is_two_choices() -> None:
    made = learner()
    made.remember("ann", "1", choice("full"), 0.0)
    made.remember("bob", "1", choice("tiny"), 0.0)
    assert made.reward("ann", "1", Reward(1.0), 1.0).choice.variant == "full"
    assert made.reward("bob", "1", Reward(1.0), 1.0).choice.variant == "tiny"


def test_a_name_stands_for_the_newest_choice_that_has_it() -> None:
    made = learner()
    for number, variant in enumerate(("full", "small")):
        made.remember("ann", str(number), choice(variant), 0.0, ("session", f"answer {number}"))
    assert made.reward("ann", "answer 0", Reward(0.1), 1.0).choice.variant == "full"
    assert made.reward("ann", "session", Reward(1.0), 1.0).choice.variant == "small"
    assert made.reward("ann", "0", Reward(0.2), 1.0).request_id == "0"
    assert sorted(kept.reward.value for kept in made.rewarded("ann") if kept.reward) == [0.2, 1.0]
    assert made.erase("ann", lambda kept: kept.answers_to(("session",)), 2.0) == 2
    with pytest.raises(NoSuchChoice):
        made.reward("ann", "answer 0", Reward(1.0), 3.0)


def test_a_second_reward_takes_the_place_of_the_first() -> None:
    changed, once = learner(), learner()
    vote(changed, "ann", 10, 0.0)
    vote(changed, "ann", 10, 1.0)  # a client that uses an id again
    vote(once, "ann", 10, 1.0)
    for number in range(5):
        changed.reward("ann", f"ann {{}} {number}", Reward(0.2), 1.0)
        once.reward("ann", f"ann {{}} {number}", Reward(0.2), 1.0)
    assert len(changed.rewarded("ann")) == 10
    assert corrections(changed, "ann") == pytest.approx(corrections(once, "ann"))


def test_rewards_that_change_again_and_again_rebuild_once_a_second() -> None:
    made = learner()
    vote(made, "ann", 10, 0.0)
    before = made.bandit("ann", "desk", 1.0)
    for _ in range(100):
        made.reward("ann", "ann {} 3", Reward(1.0), 1.0)
        assert made.bandit("ann", "desk", 1.5) is before
    assert made.bandit("ann", "desk", 2.1) is not before


def test_what_was_erased_has_no_part_in_the_next_choice() -> None:
    made = learner()
    vote(made, "ann", 10, 0.0)
    made.erase("ann", lambda kept: kept.request_id.endswith("3"), 2.0)
    assert made.bandit("ann", "desk", 2.0) is None
    vote(made, "ann", 1, 0.0, user="eve")
    assert made.bandit("ann", "desk", 2.5) is None
    rebuilt = made.bandit("ann", "desk", 3.1)
    assert rebuilt is not None and 9.5 < rebuilt.weight < 10.0


def test_what_a_tenant_erases_is_gone_from_what_was_learnt() -> None:
    made, never = learner(), learner()
    for each in (made, never):
        vote(each, "ann", 12, 0.3, user="eve")
    vote(made, "ann", 12, 0.0, user="bob", variant="small")
    assert corrections(made, "ann") != corrections(never, "ann")
    assert made.erase("ann", lambda kept: kept.choice.user == "bob", 2.0) == 12
    assert corrections(made, "ann", "bob") == pytest.approx(corrections(never, "ann", "bob"))
    assert made.erase("ann", lambda kept: True, 2.0) == 12
    assert made.bandit("ann", "desk", LATER) is None and made.rewarded("ann") == []


def test_a_choice_waits_only_so_long() -> None:
    made = learner(FeedbackLimits(wait_s=10.0, keep_s=100.0))
    made.remember("ann", "1", choice(), 0.0)
    made.remember("ann", "2", choice(), 5.0)
    with pytest.raises(NoSuchChoice):
        made.reward("ann", "1", Reward(1.0), 11.0)
    made.reward("ann", "2", Reward(1.0), 11.0)
    made.remember("ann", "3", choice(), 100.0)
    assert [kept.request_id for kept in made.rewarded("ann")] == ["2"]
    made.remember("ann", "4", choice(), 112.0)
    assert made.rewarded("ann") == []


def test_a_corrected_answer_needs_the_prompt_and_is_refused_whole_without_it() -> None:
    made = learner()
    made.remember("ann", "1", choice(), 0.0)
    with pytest.raises(NoPromptKept):
        made.reward("ann", "1", Reward(0.0, "27"), 1.0)
    assert made.rewarded("ann") == [] and made.waiting("ann") == 1
    made.remember("ann", "2", choice(prompt=PROMPT), 0.0)
    made.reward("ann", "2", Reward(0.0, "27"), 1.0)
    assert made.rewarded("ann")[0].reward == Reward(0.0, "27")


def test_of_too_many_texts_the_oldest_go_and_their_rewards_stay() -> None:
    made = learner(FeedbackLimits(texts=1000))
    for number in range(10):
        made.remember("ann", str(number), choice(prompt=KeptPrompt(text="x" * 150)), number)
        made.reward("ann", str(number), Reward(0.5, "y" * 50), number)
    kept = made.rewarded("ann")
    assert len(kept) == 10
    assert sum(each.text_size for each in kept) <= 1000
    assert kept[-1].choice.prompt is not None and kept[0].choice.prompt is None
    assert kept[0].reward == Reward(0.5)


def test_the_texts_of_all_tenants_together_are_bounded() -> None:
    made = learner(FeedbackLimits(texts=1000, all_texts=2000))
    for number in range(8):
        for tenant in ("ann", "bob", "eve"):
            made.remember(tenant, str(number), choice(prompt=KeptPrompt(text="x" * 120)), number)
            made.reward(tenant, str(number), Reward(0.5), number)
    kept = {tenant: sum(each.text_size for each in made.rewarded(tenant)) for tenant in ("ann", "bob", "eve")}
    assert 1200 < sum(kept.values()) <= 2000 and min(kept.values()) > 300
    assert all(len(made.rewarded(tenant)) == 8 for tenant in kept)


def test_a_tenant_with_many_choices_drives_out_its_own() -> None:
    made = learner(FeedbackLimits(choices=100, waiting=1000))
    made.remember("small", "1", choice(), 0.0)
    for number in range(500):
        made.remember("large", str(number), choice(), 1.0)
    assert made.waiting("small") == 1 and made.waiting("large") == 99


def test_a_model_without_variants_keeps_rewards_and_learns_nothing() -> None:
    made = learner()
    made.remember("ann", "1", MadeChoice("single", "only"), 0.0)
    made.reward("ann", "1", Reward(1.0), 1.0)
    assert made.bandit("ann", "single", LATER) is None
    assert summary(made.rewarded("ann"))["single"]["only"].mean == 1.0


def test_bandits_are_bounded() -> None:
    made = learner()
    for number in range(BANDITS + 5):
        vote(made, f"tenant {number}", 1)
    found = [made.bandit(f"tenant {number}", "desk", LATER) for number in range(BANDITS + 5)]
    assert found.count(None) == 5


def test_the_summary_counts_by_variant() -> None:
    made = learner()
    vote(made, "ann", 3, 1.0)
    vote(made, "ann", 1, 0.5, variant="tiny")
    found = summary(made.rewarded("ann"))["desk"]
    assert (found["full"].count, found["full"].mean, found["tiny"].mean) == (3, 1.0, 0.5)
    assert found["tiny"].expected == pytest.approx(0.6)


LIMITS = FeedbackLimits(choices=12, waiting=6, rewarded=4, texts=300, all_texts=500, wait_s=5.0, keep_s=20.0)
TENANTS = st.sampled_from(["ann", "bob", "eve"])
IDS = st.sampled_from(list("abcdefghij"))


class StoreMachine(RuleBasedStateMachine):
    """Any order of calls keeps within the limits, and each tenant's choices to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.made = FeedbackStore(LIMITS)
        self.now = 0.0
        self.known: set[tuple[str, str]] = set()

    @rule(tenant=TENANTS, request_id=IDS, size=st.integers(0, 120), passed=st.floats(0, 3))
    def remember(self, tenant: str, request_id: str, size: int, passed: float) -> None:
        self.now += passed
        prompt = KeptPrompt(text="x" * size) if size else None
        self.made.remember(tenant, request_id, choice(prompt=prompt, user=tenant), self.now)
        self.known.add((tenant, request_id))

    @rule(tenant=TENANTS, request_id=IDS, answer=st.sampled_from([None, "y" * 60]))
    def reward(self, tenant: str, request_id: str, answer: str | None) -> None:
        try:
            kept = self.made.reward(tenant, request_id, Reward(0.5, answer), self.now).kept
        except (NoSuchChoice, NoPromptKept):
            return
        assert kept.choice.user == tenant and (tenant, request_id) in self.known

    @rule(tenant=TENANTS, request_id=IDS)
    def erase(self, tenant: str, request_id: str) -> None:
        gone = self.made.erase(tenant, lambda kept: kept.request_id == request_id)
        assert len(gone) <= 2  # one waits, and an older one of the same id has a reward
        self.known.discard((tenant, request_id))
        with pytest.raises(NoSuchChoice):
            self.made.reward(tenant, request_id, Reward(1.0), self.now)

    @invariant()
    def within_limits(self) -> None:
        total = 0
        for tenant in ("ann", "bob", "eve"):
            rewarded = self.made.rewarded(tenant)
            total += len(rewarded) + self.made.waiting(tenant)
            assert len(rewarded) <= LIMITS.rewarded and self.made.waiting(tenant) <= LIMITS.waiting
            assert sum(kept.text_size for kept in rewarded) <= LIMITS.texts
        assert total == len(self.made) <= LIMITS.choices


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_order_of_calls = StoreMachine.TestCase
