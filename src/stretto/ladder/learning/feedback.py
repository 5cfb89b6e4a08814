"""Remembers choices until their rewards come. In memory, and bounded.

A choice belongs to its tenant: nobody else finds, changes or erases it. Texts are kept only where the caller
hands them over. It knows no HTTP, and takes the time as an argument (seconds of any one clock).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from heapq import merge
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray


class KeptTurn(NamedTuple):
    """A message of a prompt."""

    role: str
    content: str


class KeptPrompt(NamedTuple):
    """A prompt as a chat or as a text."""

    messages: tuple[KeptTurn, ...] = ()
    text: str = ""


class MadeChoice(NamedTuple):
    """Which variant answers a request, and which others might have.

    `model`: the name that the client knows. `variants`: those that were compared. `expected`: the quality
    that was measured of each, with nothing learnt. `propensities`: the probability that each was chosen, 0
    for one that was not feasible; empty where the engine moved the request later. `context` describes the
    prompt. All are empty for a model without variants. `user` stands for whom the request was for.
    """

    model: str
    variant: str
    variants: tuple[str, ...] = ()
    propensities: tuple[float, ...] = ()
    expected: tuple[float, ...] = ()
    context: NDArray[np.float64] | None = None
    user: str = ""
    prompt: KeptPrompt | None = None


class Reward(NamedTuple):
    """What somebody thinks of an answer: from 0 to 1, and perhaps the answer that would have been right."""

    value: float
    corrected_answer: str | None = None


class KeptChoice(NamedTuple):
    """A choice, when it was made, and its reward if that has come. `names`: other ids of its answer."""

    request_id: str
    choice: MadeChoice
    at: float
    reward: Reward | None = None
    names: tuple[str, ...] = ()

    def answers_to(self, ids: Collection[str]) -> bool:
        """Whether one of these ids is its request's or its answer's."""
        return self.request_id in ids or any(name in ids for name in self.names)

    @property
    def text_size(self) -> int:
        """The characters of its texts."""
        prompt = self.choice.prompt or KeptPrompt()
        answer = None if self.reward is None else self.reward.corrected_answer
        return sum(len(turn.content) for turn in prompt.messages) + len(prompt.text) + len(answer or "")


class FeedbackLimits(Struct, frozen=True, kw_only=True):
    """How much is kept, and how long.

    `choices`: of all tenants together; `waiting` and `rewarded`: of one tenant, without and with a reward.
    `texts`: characters of one tenant's prompts and answers; `all_texts`: of those of all. `wait_s`: how long
    a choice waits for its reward; `keep_s`: how long it is kept with one.
    """

    choices: int = 32_768
    waiting: int = 8192
    rewarded: int = 2048
    texts: int = 8 * 2**20
    all_texts: int = 64 * 2**20
    wait_s: float = 86_400.0
    keep_s: float = 30 * 86_400.0


LIMITS = FeedbackLimits()


class KeptReward(NamedTuple):
    """A choice with its reward. `replaced`: an earlier reward of the same id is gone."""

    kept: KeptChoice
    replaced: bool


class NoSuchChoice(KeyError):
    """The tenant has no choice of that id: it never was, has been erased, or is too old."""


class NoPromptKept(ValueError):
    """A corrected answer for a choice whose prompt was not kept: nothing could be trained on it."""


@dataclass(slots=True)
class _TenantChoices:
    """One tenant's choices by request id, the oldest first; those with a reward by the time it came."""

    waiting: OrderedDict[str, KeptChoice] = field(default_factory=OrderedDict[str, KeptChoice])
    rewarded: OrderedDict[str, KeptChoice] = field(default_factory=OrderedDict[str, KeptChoice])
    names: dict[str, str] = field(default_factory=dict[str, str])  # other ids: the request id of the newest
    texts: int = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.rewarded)

    def put(self, kept: KeptChoice) -> None:
        (self.waiting if kept.reward is None else self.rewarded)[kept.request_id] = kept
        for name in kept.names:
            if kept.reward is None or name not in self.names:  # a reward makes no choice the newest
                self.names[name] = kept.request_id
        self.texts += kept.text_size

    def find(self, id: str) -> KeptChoice | None:
        """The newest choice of that request id, or whose answer has that id."""
        named = self.names.get(id, id)
        held = (each.get(key) for key in (id, named) for each in (self.waiting, self.rewarded))
        return next((kept for kept in held if kept is not None), None)

    def take(self, request_id: str, held: OrderedDict[str, KeptChoice]) -> KeptChoice | None:
        kept = held.pop(request_id, None)
        if kept is not None:
            self.texts -= kept.text_size
            for name in kept.names:
                if self.names.get(name) == request_id:
                    del self.names[name]
        return kept

    def take_oldest(self) -> None:
        held = self.waiting or self.rewarded
        self.take(next(iter(held)), held)

    def trim(self, limits: FeedbackLimits, now: float) -> None:
        """Drop what is too old and too much; of too many texts, the oldest."""
        for held, most, age in (
            (self.waiting, limits.waiting, limits.wait_s),
            (self.rewarded, limits.rewarded, limits.keep_s),
        ):
            while held:
                kept = next(iter(held.values()))
                if len(held) <= most and now - kept.at <= age:
                    break
                self.take(kept.request_id, held)
        if self.texts > limits.texts:
            self.drop_texts(limits.texts * 9 // 10)  # a tenth more, so that not every choice comes here

    def drop_texts(self, most: int) -> None:
        """Keep at most so many characters: the newest."""
        for kept in list(merge(self.waiting.values(), self.rewarded.values(), key=_at)):
            if self.texts <= most:
                return
            self.texts -= kept.text_size
            reward = None if kept.reward is None else Reward(kept.reward.value)
            held = self.waiting if reward is None else self.rewarded
            held[kept.request_id] = kept._replace(choice=kept.choice._replace(prompt=None), reward=reward)


class FeedbackStore:
    """The choices of all tenants. What is too much goes, of the tenant with the most first."""

    def __init__(self, limits: FeedbackLimits = LIMITS) -> None:
        self._limits = limits
        self._tenants: dict[str, _TenantChoices] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def remember(
        self, tenant: str, request_id: str, choice: MadeChoice, now: float, names: tuple[str, ...] = ()
    ) -> None:
        """Keep a choice in place of one of the same request that still waits. `names`: more ids of its
        answer, which stand for the newest choice that has them."""
        own = self._tenants.setdefault(tenant, _TenantChoices())
        before = len(own)
        own.take(request_id, own.waiting)
        own.put(KeptChoice(request_id, choice, now, names=names))
        own.trim(self._limits, now)
        self._counted(tenant, before)
        while self._count > self._limits.choices:
            largest = max(self._tenants, key=lambda name: len(self._tenants[name]))
            most = self._tenants[largest]
            before = len(most)
            most.take_oldest()
            self._counted(largest, before)
        if choice.prompt is not None:
            self._bound_texts()

    def reward(self, tenant: str, request_id: str, reward: Reward, now: float) -> KeptReward:
        """Keep a reward with the newest choice that has this id, in place of an earlier reward.

        Raises NoSuchChoice, and NoPromptKept for a corrected answer to a choice without a prompt.
        """
        own = self._tenants.get(tenant)
        if own is None:
            raise NoSuchChoice(request_id)
        before = len(own)
        own.trim(self._limits, now)
        self._counted(tenant, before)
        kept = own.find(request_id)
        if kept is None:
            raise NoSuchChoice(request_id)
        if reward.corrected_answer is not None and kept.choice.prompt is None:
            raise NoPromptKept(request_id)
        before = len(own)
        own.take(kept.request_id, own.waiting)
        replaced = own.take(kept.request_id, own.rewarded) is not None
        kept = kept._replace(at=now, reward=reward)
        own.put(kept)
        own.trim(self._limits, now)
        self._counted(tenant, before)
        if reward.corrected_answer is not None:
            self._bound_texts()
        return KeptReward(kept, replaced)

    def rewarded(self, tenant: str) -> list[KeptChoice]:
        """A tenant's choices that have a reward, in the order in which the rewards came."""
        own = self._tenants.get(tenant)
        return [] if own is None else list(own.rewarded.values())

    def waiting(self, tenant: str) -> int:
        """How many of a tenant's choices have no reward yet."""
        own = self._tenants.get(tenant)
        return 0 if own is None else len(own.waiting)

    def erase(self, tenant: str, wanted: Callable[[KeptChoice], bool]) -> list[KeptChoice]:
        """Drop a tenant's choices that are wanted, with their rewards; returns them."""
        own = self._tenants.get(tenant)
        if own is None:
            return []
        before = len(own)
        gone: list[KeptChoice] = []
        for held in (own.waiting, own.rewarded):
            unwanted = [kept for kept in held.values() if wanted(kept)]
            for kept in unwanted:
                own.take(kept.request_id, held)
            gone += unwanted
        self._counted(tenant, before)
        return gone

    def _bound_texts(self) -> None:
        """Of too many texts of all tenants, drop the oldest of the tenant with the most."""
        while sum(own.texts for own in self._tenants.values()) > self._limits.all_texts:
            largest = max(self._tenants.values(), key=_texts)
            largest.drop_texts(largest.texts * 9 // 10)

    def _counted(self, tenant: str, before: int) -> None:
        """Count the change of one tenant's choices, and forget a tenant that has none."""
        own = self._tenants.get(tenant)
        self._count += (0 if own is None else len(own)) - before
        if own is not None and not len(own):
            del self._tenants[tenant]


_at, _texts = attrgetter("at"), attrgetter("texts")
