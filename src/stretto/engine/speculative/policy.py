"""Guesses at what sequences say next: whose, and how many of them a step should check.

A step checks a guess by drawing at its place as it would have anyway, so answers are the same tokens with
and without: speculative decoding (Leviathan et al., arXiv 2211.17192) without its rule of acceptance. Guesses
copy a sequence's own text, or are a smaller model's. It knows no tensor, and changes no queue and no block.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Protocol

from stretto.engine.kv_cache import BlockPool
from stretto.engine.scheduler.types import Limits, Plan, Queues, Row, SchedulingContext
from stretto.engine.sequence import Sequence
from stretto.engine.speculative.ngram import NgramIndex, Odds
from stretto.engine.step_time import StepCost, StepTime

MOST = 16  # guesses of one sequence in a step
MOST_PASSES = 8  # of a smaller model before a step
WORTH = 1.05  # guesses must gain so much, or the error of the step-time model decides
REPAID = 32  # tokens over which a smaller model's reading of a prompt should repay itself


class Drafter(Protocol):
    """A smaller model that guesses. `model`: its name; `times`: those of its own steps."""

    model: str
    times: StepTime

    def propose(self, wanted: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """So many guesses for each sequence, whose blocks have room for them."""
        ...

    def erase(self, blocks: list[int]) -> None:
        """Zero its KV memory of these blocks."""
        ...


class Speculation:
    """Guesses for the sequences of one model, and what was learnt of their worth. Without a `drafter` all are
    copied from a sequence's own text; with one, those whose own text promises less are the drafter's."""

    def __init__(self, drafter: Drafter | None = None) -> None:
        self.drafter = drafter
        self._copied, self._drafted = Odds(), Odds()
        self._asked: dict[Sequence, int] = {}

    def choose(
        self, plan: Plan, queues: Queues, pool: BlockPool, limits: Limits, moment: SchedulingContext
    ) -> dict[Sequence, int]:
        """How many guesses the rows of a plan (already applied) should check, so that the step says the most
        tokens per millisecond, within the limits and the time of those with a due."""
        rows = [row for row in plan.rows if row.decodes and row.seq.request.task == "generate"]
        hopes = [(row, self._trail(row.seq)) for row in rows]
        step = _step(plan, queues, pool, limits, moment)
        self._asked = {} if self.drafter is None else self._ask(self.drafter, hopes, step)
        return self._asked | _copy([hope for hope in hopes if hope[0].seq not in self._asked], step)

    def guess(self, chosen: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """The guesses themselves, as many as `choose` has just said; there are blocks for them."""
        drafts = {seq: self._trail(seq).guesses(seq.tokens, count) for seq, count in chosen.items()}
        if self._asked and self.drafter is not None:
            drafts |= self.drafter.propose(self._asked)
        return drafts

    def learn(self, seq: Sequence, proposed: int, right: int) -> None:
        """Of so many guesses the first `right` were. (What own text promises is learnt as it grows.)"""
        if seq in self._asked:
            for place in range(min(right + 1, proposed)):
                self._trail(seq).drafter.saw(0, place < right)

    def _trail(self, seq: Sequence) -> NgramIndex:
        if seq.trail is None:
            seq.trail = NgramIndex(self._copied, self._drafted, seq.prompt_len)
        seq.trail.read(seq.tokens, seq.prompt_len)
        return seq.trail

    def _ask(self, drafter: Drafter, hopes: list[Hope], step: _Step) -> dict[Sequence, int]:
        """Whom the drafter should guess for, and how often: those whose own text promises less."""
        asking = [
            (row, trail)
            for row, trail in hopes
            if _limit(row) > 0 and row.seq.grammar is None and trail.chance(0) < trail.drafter.chance(0)
        ]
        passes = _passes(asking, step, drafter.times.cost) if asking else 0
        for row, trail in asking:
            if not passes:
                trail.drafter.fade()
            chance = trail.drafter.chance(0)
            for ahead in range(min(passes, _limit(row))):
                step.take(row, ahead, chance ** (ahead + 1))
        return {row.seq: min(passes, _limit(row)) for row, _ in asking} if passes else {}


Hope = tuple[Row, NgramIndex]


@dataclass(slots=True)
class _Step:
    """A step as guesses are added. `tokens` and `ms`: what its decodes say and take, prompts apart; `rows`,
    `blocks` (of `size` tokens), `spare` (ms): what guesses may still take."""

    cost: StepCost
    tokens: float
    ms: float
    rows: int
    blocks: int
    size: int
    spare: float

    def price(self, row: Row) -> float:
        """Milliseconds that a guess adds to the step."""
        return self.cost.row(1) + self.cost.per_pair * row.start

    def fits(self, row: Row, ahead: int) -> bool:
        """Whether there is a block for the guess after `ahead` others."""
        return (row.start + 1 + ahead) % self.size != 0 or self.blocks > 0

    def take(self, row: Row, ahead: int, hope: float) -> None:
        """Add the guess after `ahead` others, which is right with probability `hope`."""
        price = self.price(row)
        self.tokens += hope
        self.ms += price
        self.rows -= 1
        self.blocks -= (row.start + 1 + ahead) % self.size == 0
        self.spare -= price


def _step(plan: Plan, queues: Queues, pool: BlockPool, limits: Limits, moment: SchedulingContext) -> _Step:
    """What is left when the plan has its own: a block for every running sequence, so that no guess makes one
    give way, and the time until the first stream that can be on time must be."""
    cost, worst = moment.times.cost, moment.times.worst
    decodes = [row for row in plan.rows if row.decodes]
    ms = cost(plan.load) * worst
    over = moment.now + ms / 1e3
    soonest = min((seq.latest for seq in queues.running if not seq.late and seq.latest > over), default=inf)
    return _Step(
        cost=cost,
        tokens=float(len(decodes)),
        ms=cost.base + sum(cost.row(row.start + 1) for row in decodes),
        rows=limits.max_step_tokens - sum(row.count for row in plan.rows),
        blocks=pool.available - len(queues.running),
        size=pool.size,
        spare=((min(soonest, moment.until) - moment.now) * 1e3 - ms) / worst,
    )


def _copy(hopes: list[Hope], step: _Step) -> dict[Sequence, int]:
    """The guesses from own text to check: the likeliest first, as long as one adds more tokens per
    millisecond than the decodes of the step have without it."""
    chosen: dict[Sequence, int] = {}
    left = [(-trail.chance(0), place) for place, (row, trail) in enumerate(hopes) if _limit(row) > 0]
    heapify(left)
    while left and step.rows > 0:
        hope, place = heappop(left)
        row, trail = hopes[place]
        count, price = chosen.get(row.seq, 0), step.price(row)
        if -hope * step.ms <= step.tokens * price * WORTH or price > step.spare:
            break
        if not step.fits(row, count):
            continue
        chosen[row.seq] = count + 1
        step.take(row, count, -hope)
        if count + 1 < _limit(row):
            heappush(left, (hope * trail.chance(count + 1), place))
    return chosen


def _passes(asking: list[Hope], step: _Step, cost: StepCost) -> int:
    """How many guesses in a row a drafter of this cost should make for each; 0: none are worth it."""
    backlog = sum(cost.prefill(row.seq.drafted, row.start - row.seq.drafted) for row, _ in asking)
    each = cost.decodes(len(asking), sum(row.start for row, _ in asking))
    price = each + sum(step.price(row) for row, _ in asking)
    most = min(MOST_PASSES, step.rows // len(asking), (step.blocks // len(asking)) * step.size)
    tokens, ms = step.tokens, step.ms + backlog / REPAID
    best, rate = 0, WORTH * step.tokens / step.ms
    for count in range(1, most + 1):
        tokens += sum(trail.drafter.chance(0) ** count for row, trail in asking if count <= _limit(row))
        ms += price
        if backlog + count * price > step.spare:
            break
        if tokens / ms > rate:
            best, rate = count, tokens / ms
    return best


def _limit(row: Row) -> int:
    """The most guesses that could all be of use: the last token an answer may have needs none."""
    return min(MOST, row.seq.limit - len(row.seq.tokens) - 1)
