"""Which kept answer a question in other words may get: the nearest question that the guard lets through.

The bound on wrong answers is learned from verified ones, as in vCache (arXiv 2502.03771): a similar question
goes to a worker until its like have been right often enough. The estimator is our own: Chernoff's upper bound
in place of a fitted curve. Clock and chance are arguments.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stretto.gateway.cache.embedding import DIMENSIONS, TextEmbedder, TextVector
from stretto.gateway.cache.guard import Likeness, Words, likeness, read

NEAREST = 0.6  # questions that are less alike are not compared
SWEEP_S = 60.0  # between two searches for what has expired
COMPARED = 8  # nearest questions that the guard looks at
MOST_ENTRIES = 4096  # questions of one tenant; the least recently used go
VERIFY_SHARE = 0.02  # of what could be served, to notice when answers change
DOUBTS = tuple(2.0**-power for power in range(1, 12))  # chances that the upper bound is too low
SAME_ANSWER = 0.9  # cosine of two answers that say the same
FEW_WORDS = 8  # in a shorter answer every word counts


class ErrorBound:
    """Counts verified answers, and bounds the chance that the next one is wrong."""

    __slots__ = ("_bound", "verified", "wrong")

    def __init__(self) -> None:
        self.verified = 0
        self.wrong = 0
        self._bound = 1.0

    def observe(self, *, right: bool) -> None:
        """One more answer was verified."""
        self.verified += 1
        self.wrong += not right
        self._bound = error_bound(self.verified, self.wrong)

    @property
    def bound(self) -> float:
        """The chance of a wrong answer is at most this."""
        return self._bound


def error_bound(verified: int, wrong: int) -> float:
    """An upper bound on the chance of an error after `wrong` of `verified` were errors: the doubt that the
    estimate is too low, and Chernoff's bound at that doubt, for the doubt at which their sum is smallest."""
    if not verified:
        return 1.0
    return min(1.0, *(doubt + (1 - doubt) * _upper(verified, wrong, doubt) for doubt in DOUBTS))


def _upper(count: int, wrong: int, doubt: float) -> float:
    """The largest rate that `wrong` of `count` leaves possible: count * KL(share, rate) = log(1 / doubt)."""
    share, limit = wrong / count, log(1 / doubt) / count
    if not wrong:
        return 1.0 - exp(-limit)
    low, high = share, 1.0
    for _ in range(20):
        rate = (low + high) / 2
        apart = share * log(share / rate)
        if share < 1:
            apart += (1 - share) * log((1 - share) / (1 - rate)) if rate < 1 else limit + 1
        low, high = (rate, high) if apart < limit else (low, rate)
    return high


class Question(NamedTuple):
    """A question, read for comparison."""

    words: Words
    vector: TextVector


@dataclass(slots=True, eq=False)
class SimilarEntry:
    """A question with a kept answer, whose key is `key`. `other_words`: how its answer did for questions in
    other words."""

    key: bytes
    conversation: bytes
    question: Question
    subjects: tuple[bytes, ...]
    expires: float
    other_words: ErrorBound = field(default_factory=ErrorBound)


class SimilarMatch(NamedTuple):
    """A kept answer that may do. `serve`: it may be given; else a worker is asked, to verify it."""

    entry: SimilarEntry
    likeness: Likeness
    similarity: float
    serve: bool


class SimilarQuestions:
    """The questions that were asked at one point of equal conversations."""

    def __init__(self) -> None:
        self.by_words: dict[tuple[str, tuple[str, ...]], SimilarEntry] = {}
        self._entries: list[SimilarEntry] = []
        self._vectors: NDArray[np.float32] = np.zeros((8, DIMENSIONS), np.float32)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: SimilarEntry) -> None:
        """Adds a question."""
        count = len(self._entries)
        if count == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.zeros_like(self._vectors)])
        self._vectors[count] = entry.question.vector
        self._entries.append(entry)
        self.by_words[entry.question.words.kind, entry.question.words.content] = entry

    def remove(self, entry: SimilarEntry) -> None:
        """Removes a question, and its vector."""
        at, last = self._entries.index(entry), len(self._entries) - 1
        self._entries[at], self._vectors[at] = self._entries[last], self._vectors[last]
        self._entries.pop()
        self._vectors[last] = 0.0
        words = entry.question.words
        if self.by_words.get((words.kind, words.content)) is entry:
            del self.by_words[words.kind, words.content]

    def nearest(self, question: Question) -> tuple[SimilarEntry, Likeness, float] | None:
        """The most similar question that the guard lets through."""
        words = question.words
        same = self.by_words.get((words.kind, words.content))
        if same is not None and likeness(same.question.words, words) == "same words":
            return same, "same words", float(same.question.vector @ question.vector)
        cosines = self._vectors[: len(self._entries)] @ question.vector
        order: list[int] = np.argsort(-cosines)[:COMPARED].tolist()
        for at in order:
            if cosines[at] < NEAREST:
                return None
            alike = likeness(self._entries[at].question.words, words)
            if alike is not None:
                return self._entries[at], alike, float(cosines[at])
        return None


@dataclass(slots=True)
class TenantQuestions:
    """What one tenant has asked. `same_words`: how answers did for the same words, put otherwise."""

    conversations: dict[bytes, SimilarQuestions] = field(default_factory=dict[bytes, SimilarQuestions])
    recent: OrderedDict[bytes, SimilarEntry] = field(default_factory=OrderedDict[bytes, SimilarEntry])
    same_words: ErrorBound = field(default_factory=ErrorBound)


class SemanticIndex:
    """The questions of all tenants. `draw()` returns a random number from 0 to 1."""

    def __init__(self, embed: TextEmbedder, draw: Callable[[], float], clock: Callable[[], float]) -> None:
        self._embed = embed
        self._draw = draw
        self._clock = clock
        self._tenants: dict[bytes, TenantQuestions] = {}
        self._sweep = 0.0

    def read(self, text: str) -> Question | None:
        """A question to compare; None for a text that is too long or has no words."""
        words = read(text)
        return None if words is None else Question(words, self._embed(text))

    def find(
        self, tenant: bytes, conversation: bytes, question: Question, most: float
    ) -> SimilarMatch | None:
        """The kept answer that may do. It may be served once verified answers bound the share of wrong ones
        by `most`."""
        asked = self._tenants.get(tenant)
        place = None if asked is None else asked.conversations.get(conversation)
        found = None if place is None else place.nearest(question)
        if asked is None or found is None:
            return None
        entry, alike, similarity = found
        if entry.expires <= self._clock():
            self.remove(tenant, entry)
            return None
        asked.recent.move_to_end(entry.key)
        errors = asked.same_words if alike == "same words" else entry.other_words
        serve = errors.bound <= most and self._draw() >= VERIFY_SHARE
        return SimilarMatch(entry, alike, similarity, serve)

    def observe(self, tenant: bytes, match: SimilarMatch, *, right: bool) -> None:
        """A match was verified. A question whose answer was wrong for the same words is forgotten."""
        asked = self._tenants.get(tenant)
        if asked is None:
            return
        if match.likeness == "other words":
            match.entry.other_words.observe(right=right)
            return
        asked.same_words.observe(right=right)
        if not right:
            self.remove(tenant, match.entry)

    def tenant(self, tenant: bytes) -> TenantQuestions:
        """What a tenant has asked."""
        return self._tenants.setdefault(tenant, TenantQuestions())

    def add(self, tenant: bytes, entry: SimilarEntry) -> None:
        """A question has a kept answer."""
        if self._clock() >= self._sweep:
            self.expire()
        asked = self.tenant(tenant)
        if (known := asked.recent.get(entry.key)) is not None:
            self.remove(tenant, known)
        asked.conversations.setdefault(entry.conversation, SimilarQuestions()).add(entry)
        asked.recent[entry.key] = entry
        while len(asked.recent) > MOST_ENTRIES:
            self.remove(tenant, next(iter(asked.recent.values())))

    def remove(self, tenant: bytes, entry: SimilarEntry) -> None:
        """Forgets a question. Calling it again does nothing."""
        asked = self._tenants.get(tenant)
        if asked is None or asked.recent.pop(entry.key, None) is None:
            return
        place = asked.conversations[entry.conversation]
        place.remove(entry)
        if not len(place):
            del asked.conversations[entry.conversation]

    def erase(self, tenant: bytes, subject: bytes | None) -> int:
        """Forgets a tenant's questions about a subject, or all; returns how many there were."""
        asked = self._tenants.get(tenant, TenantQuestions())
        about = [entry for entry in asked.recent.values() if subject is None or subject in entry.subjects]
        for entry in about:
            self.remove(tenant, entry)
        if subject is None:
            self._tenants.pop(tenant, None)
        return len(about)

    def expire(self) -> None:
        """Forgets the questions whose answers have expired."""
        now = self._clock()
        self._sweep = now + SWEEP_S
        for tenant, asked in self._tenants.items():
            for entry in [entry for entry in asked.recent.values() if entry.expires <= now]:
                self.remove(tenant, entry)

    def same_answer(self, one: str, other: str) -> bool:
        """Whether two answers say the same: equal but for case and spacing, or with the same hard words and
        vectors that are SAME_ANSWER alike."""
        if one.casefold().split() == other.casefold().split():
            return True
        first, second = read(one), read(other)
        if first is None or second is None or first.hard != second.hard or len(first.content) < FEW_WORDS:
            return False
        return float(self._embed(one) @ self._embed(other)) >= SAME_ANSWER
