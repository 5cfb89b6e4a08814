"""Guesses at what a sequence says next, and how many of them a step should check.

A step checks a guess by drawing at its place as it would have anyway, so answers are the same tokens with and
without: speculation (Leviathan et al., arXiv 2211.17192) without a rule of acceptance. Guesses copy what
followed an equal passage of the sequence's own text (prompt lookup; LLMA, arXiv 2304.04487).
Of tensors and queues it knows nothing.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple

from stretto.engine.blocks import BlockPool
from stretto.engine.schedule import Limits, Moment, Plan, Queues, Row
from stretto.engine.sequence import Sequence
from stretto.engine.steptime import Cost

MOST = 16  # guesses of one sequence in a step
GRAM = 2  # tokens of the shortest passage that is looked up
LOOKS = 16  # passages compared, the latest first
LOOKED_BACK = 32
WORTH = 1.05  # a guess must gain so much, or the error of the step-time model decides
HORIZON = 8192  # tokens of a prompt that are indexed, the last ones: the first step must not wait for more
LONGEST_CLASS = 5
FIRST_CHANCE = 0.5
PRIOR_TRIALS = 4.0  # what others have seen counts as so many trials of one's own
MEMORY = 32.0  # trials that are remembered, about


class Odds:
    """How often a guess is right, by class: a beta estimate that forgets (`MEMORY` trials). Without trials of
    its own it says what `prior` says."""

    __slots__ = ("_hits", "_prior", "_trials")

    def __init__(self, prior: Odds | None = None) -> None:
        self._hits = [0.0] * (LONGEST_CLASS + 1)
        self._trials = [0.0] * (LONGEST_CLASS + 1)
        self._prior = prior

    def chance(self, kind: int) -> float:
        prior = FIRST_CHANCE if self._prior is None else self._prior.chance(kind)
        return (self._hits[kind] + PRIOR_TRIALS * prior) / (self._trials[kind] + PRIOR_TRIALS)

    def saw(self, kind: int, hit: bool) -> None:
        fade = 1.0 - 1.0 / MEMORY
        self._hits[kind] = self._hits[kind] * fade + hit
        self._trials[kind] = self._trials[kind] * fade + 1.0
        if self._prior is not None:
            self._prior.saw(kind, hit)


class Trail:
    """One sequence's text, and where in it the present passage stood before.

    An index of chains, as in Deflate (RFC 1951): the latest place of each `GRAM` tokens, and for every place
    the one before it with the same tokens. `at` is the token that would come next if the passage repeated,
    -1: there is none; `length`: tokens that are known to agree before it.
    """

    __slots__ = ("_before", "_head", "_read", "_start", "at", "length", "odds")

    def __init__(self, odds: Odds, prompt_len: int) -> None:
        self.odds = Odds(odds)
        self.at = -1
        self.length = 0
        self._head: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []
        self._start = self._read = max(0, prompt_len - HORIZON)

    def chance(self, ahead: int) -> float:
        """That the next guess is right, once `ahead` were; 0 without any."""
        return self.odds.chance(_class_of(self.length + ahead)) if self.at >= 0 else 0.0

    def read(self, tokens: list[int], prompt_len: int) -> None:
        """Take in the tokens that are new: index them, and see for each of an answer whether the guess would
        have been right, checked or not."""
        for index in range(self._read, len(tokens)):
            if self.at >= 0 and index >= prompt_len:
                hit = tokens[self.at] == tokens[index]
                self.odds.saw(_class_of(self.length), hit)
                self.at, self.length = (self.at + 1, self.length + 1) if hit else (-1, 0)
            self._index(tokens, index)
            if self.at < 0 and index >= prompt_len - 1:
                self._look(tokens, index)
        self._read = len(tokens)

    def guesses(self, tokens: list[int], count: int) -> tuple[int, ...]:
        """The next `count` tokens, if the passage repeats; at the end of the text it goes round."""
        period = len(tokens) - self.at
        return tuple(tokens[self.at + place % period] for place in range(count))

    def _index(self, tokens: list[int], index: int) -> None:
        gram = tuple(tokens[max(index + 1 - GRAM, 0) : index + 1])
        self._before.append(self._head.get(gram, -1))
        self._head[gram] = index

    def _look(self, tokens: list[int], last: int) -> None:
        """Find the longest passage that ended before as the text ends now; of equal ones the latest."""
        place, looks = self._before[last - self._start], LOOKS
        while place >= 0 and looks:
            length = _agreement(tokens, place, last)
            if length > self.length:
                self.at, self.length = place + 1, length
            place, looks = self._before[place - self._start], looks - 1


class Speculation:
    """Guesses for the sequences of one model, and what was learnt of their worth."""

    def __init__(self) -> None:
        self.odds = Odds()

    def choose(
        self, plan: Plan, queues: Queues, pool: BlockPool, limits: Limits, moment: Moment
    ) -> dict[Sequence, int]:
        """How many guesses the rows of a plan (already applied) should check, so that the step says the
        most tokens per millisecond, within the limits and the time of those with a due."""
        rows = [row for row in plan.rows if row.decodes and row.seq.request.task == "generate"]
        room = _room(plan, queues, pool, limits, moment)
        return _worth([(row, self._trail(row.seq)) for row in rows], room, moment.times.cost)

    def guess(self, row: Row, count: int) -> Row:
        """The row with `count` guesses to check."""
        trail = self._trail(row.seq)
        draft = trail.guesses(row.seq.tokens, count)
        return Row(row.seq, row.start, row.count + count, row.draw, draft)

    def _trail(self, seq: Sequence) -> Trail:
        if seq.trail is None:
            seq.trail = Trail(self.odds, seq.prompt_len)
        seq.trail.read(seq.tokens, seq.prompt_len)
        return seq.trail


class _Room(NamedTuple):
    """What guesses may take beside a plan: tokens, blocks (of `size` tokens), milliseconds."""

    tokens: int
    blocks: int
    size: int
    ms: float


def _room(plan: Plan, queues: Queues, pool: BlockPool, limits: Limits, moment: Moment) -> _Room:
    """What is left when the plan has its own: a block for every running sequence, so that no guess makes one
    give way, and the time until the first stream that can be on time must be."""
    ms = moment.times.cost(plan.load) * moment.times.margin
    over = moment.now + ms / 1e3
    soonest = min((seq.latest for seq in queues.running if not seq.late and seq.latest > over), default=inf)
    return _Room(
        tokens=limits.max_step_tokens - sum(row.count for row in plan.rows),
        blocks=pool.available - len(queues.running),
        size=pool.size,
        ms=((min(soonest, moment.until) - moment.now) * 1e3 - ms) / moment.times.margin,
    )


def _worth(hopes: list[tuple[Row, Trail]], room: _Room, cost: Cost) -> dict[Sequence, int]:
    """The guesses to check: the likeliest for its milliseconds first, as long as one adds more tokens per
    millisecond than the decodes of the step have without it."""
    ms = cost.c0 + sum(cost.row(row.start + 1) for row, _ in hopes)
    tokens, taken, free, spent = float(len(hopes)), 0, room.blocks, 0.0
    chosen: dict[Sequence, int] = {}
    left = [(-trail.chance(0), place) for place, (row, trail) in enumerate(hopes) if _limit(row)]
    heapify(left)
    while left and taken < room.tokens:
        hope, place = heappop(left)
        row, trail = hopes[place]
        count = chosen.get(row.seq, 0)
        block = (row.start + 1 + count) % room.size == 0
        price = cost.row(1) + cost.c4 * row.start
        if -hope * ms <= tokens * price * WORTH or spent + price > room.ms:
            break
        if block > free:
            continue
        chosen[row.seq] = count + 1
        tokens, ms, taken, free, spent = tokens - hope, ms + price, taken + 1, free - block, spent + price
        if count + 1 < _limit(row):
            heappush(left, (hope * trail.chance(count + 1), place))
    return chosen


def _limit(row: Row) -> int:
    """The most guesses that could all be of use: the last token an answer may have needs none."""
    return min(MOST, row.seq.limit - len(row.seq.tokens) - 1)


def _class_of(length: int) -> int:
    return min(length.bit_length(), LONGEST_CLASS)


def _agreement(tokens: list[int], place: int, last: int) -> int:
    """How many tokens that end at `place` are those that end at `last`; `LOOKED_BACK` at most."""
    length = 0
    while length < min(LOOKED_BACK, place + 1) and tokens[place - length] == tokens[last - length]:
        length += 1
    return length
