"""Decides for which sequences a step verifies draft tokens, and how many.

A step verifies a draft token by drawing at its position as it would without it, so answers are the same
tokens with and without speculation (Leviathan et al., arXiv 2211.17192, with exact matching in place of
their acceptance rule). Draft tokens come from a sequence's own text or from a draft model. This module knows
no tensor and changes no queue and no block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf, prod
from operator import attrgetter
from typing import Protocol

from stretto.engine.scheduler.types import Plan, Row, SchedulingContext
from stretto.engine.sequence import Sequence
from stretto.engine.speculative.ngram import INDEXED_AT_ONCE, AcceptanceRate, NgramIndex
from stretto.engine.step_time import StepCost, StepTime

MAX_DRAFT_TOKENS = 16  # of one sequence in a step
MAX_DRAFT_PASSES = 8  # of the draft model before a step
MIN_GAIN = 1.05  # a smaller predicted gain is within the error of the step-time model
REPAYMENT_TOKENS = 32  # output tokens over which the draft model's prefill should pay for itself


class Drafter(Protocol):
    """A draft model. `model`: its name; `times`: the step-time model of its passes."""

    model: str
    times: StepTime

    @property
    def nbytes(self) -> int:
        """The size of its KV memory in bytes."""
        ...

    def propose(self, counts: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """That many draft tokens for each sequence. Its blocks have room for them."""
        ...

    def read(self, seq: Sequence) -> int:
        """How many tokens of a sequence its KV cache holds."""
        ...

    def erase(self, blocks: list[int]) -> None:
        """Zero its KV memory of these blocks."""
        ...


def any_sequence(seq: Sequence) -> bool:
    """A device that verifies draft tokens of all sequences."""
    return True


@dataclass(frozen=True, slots=True)
class Verification:
    """How a device verifies draft tokens.

    able: of which sequences it can verify draft tokens
    rows: the most rows of a step, if each draft token is a row of its own; None: they share their sequence's
    pipelined: whether a step without draft tokens is launched before the result of the previous one is known
    """

    able: Callable[[Sequence], bool] = any_sequence
    rows: int | None = None
    pipelined: bool = False


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """How many draft tokens a step verifies for each sequence, by their source."""

    ngram: dict[Sequence, int] = field(default_factory=dict["Sequence", int])
    model: dict[Sequence, int] = field(default_factory=dict["Sequence", int])

    @property
    def by_sequence(self) -> dict[Sequence, int]:
        return self.model | self.ngram


Candidate = tuple[Row, NgramIndex]


class Speculation:
    """Speculative decoding for one model, and the acceptance rates of its sequences.

    Without a `drafter` all draft tokens come from n-gram lookup. With one, it drafts for those sequences for
    which lookup has the lower acceptance rate.
    """

    def __init__(self, drafter: Drafter | None = None, device: Verification | None = None) -> None:
        self._drafter = drafter
        self._device = device or Verification()
        self._copied, self._drafted = AcceptanceRate(), AcceptanceRate()
        self._model_counts: dict[Sequence, int] = {}
        self._indexes: dict[Sequence, NgramIndex] = {}

    @property
    def apart(self) -> bool:
        """Whether each draft token reads the keys by itself."""
        return self._device.rows is not None

    @property
    def kv_bytes(self) -> int:
        """The draft model's KV memory in bytes."""
        return 0 if self._drafter is None else self._drafter.nbytes

    def choose(self, plan: Plan, context: SchedulingContext) -> DraftCounts:
        """How many draft tokens the decodes of a plan should verify; the plan's blocks are allocated.

        It maximises the predicted tokens per millisecond of the step, within the limits and the slack of the
        running sequences. While a decode's own token is still being drawn, the answer is what is expected for
        the next plan if the steps in flight are waited for, and no block needs to be allocated.
        """
        decodes = [row for row in plan.rows if row.decodes and row.seq.request.task == "generate"]
        budget = _budget(plan, decodes, context, self._device)
        if not budget.could_gain(decodes):
            return DraftCounts()
        budget.slack_ms = _slack_ms(plan, context) - budget.lost_ms
        able = self._device.able
        rows = (row for row in decodes if _longest_draft(row) > 0 and able(row.seq))
        candidates = self._indexed(rows)
        by_model = {} if self._drafter is None else _from_model(candidates, budget, self._drafter)
        rest = [candidate for candidate in candidates if candidate[0].seq not in by_model]
        by_ngram = _from_ngrams(rest, budget)
        return DraftCounts(by_ngram, by_model) if budget.gains else DraftCounts()

    def propose(self, counts: DraftCounts) -> dict[Sequence, tuple[int, ...]]:
        """The draft tokens for the result of `choose`. Blocks for them must be allocated."""
        drafts = {seq: self._index(seq).propose(seq.tokens, count) for seq, count in counts.ngram.items()}
        self._model_counts = counts.model
        if counts.model and self._drafter is not None:
            drafts |= self._drafter.propose(counts.model)
        return drafts

    def observe(self, seq: Sequence, proposed: int, accepted: int) -> None:
        """Learn that the first `accepted` of `proposed` draft tokens were right.

        Only the draft model's rate is updated: an n-gram index measures its own rate as the text grows.
        """
        if seq in self._model_counts:
            for position in range(min(accepted + 1, proposed)):
                self._index(seq).drafted.observe(0, position < accepted)

    def erase(self, blocks: list[int]) -> None:
        """Zero the draft model's KV memory of these blocks."""
        if self._drafter is not None:
            self._drafter.erase(blocks)

    def forget(self, seq: Sequence) -> None:
        """Drop what is kept for a sequence that has ended."""
        self._indexes.pop(seq, None)

    def _indexed(self, rows: Iterable[Row]) -> list[Candidate]:
        """The rows whose sequences are indexed, once the indexes have read at most `INDEXED_AT_ONCE` tokens
        more. When many sequences get an index at once, it takes several steps."""
        left, indexed = INDEXED_AT_ONCE, list[Candidate]()
        for row in rows:
            index = self._index(row.seq)
            left -= index.update(row.seq.tokens, row.seq.prompt_len, left)
            if index.holds(row.seq.tokens):
                indexed.append((row, index))
        return indexed

    def _index(self, seq: Sequence) -> NgramIndex:
        index = self._indexes.get(seq)
        if index is None:
            index = self._indexes[seq] = NgramIndex(self._copied, self._drafted, seq.prompt_len)
        return index


@dataclass(slots=True)
class _StepBudget:
    """A step while draft tokens are added to it.

    tokens, ms: the expected output tokens of its decodes, and their milliseconds without prefill
    lost_ms: of `ms`, what is lost because no step is launched before the results of this one are known
    plain: tokens per millisecond without draft tokens
    rows, blocks, slack_ms: what draft tokens may still use
    block_size: tokens in a block
    apart: whether each draft token reads the keys by itself
    """

    cost: StepCost
    tokens: float
    ms: float
    lost_ms: float
    plain: float
    rows: int
    blocks: int
    block_size: int
    slack_ms: float
    apart: bool

    @property
    def gains(self) -> bool:
        """Whether draft tokens as they are now make up for what is lost."""
        return self.lost_ms == 0 or self.tokens > MIN_GAIN * self.plain * self.ms

    def could_gain(self, decodes: list[Row]) -> bool:
        """Whether draft tokens for these rows would pay off if all were right."""
        most = min(self.rows, MAX_DRAFT_TOKENS * len(decodes))
        if most <= 0:
            return False
        ms = self.ms + most * self.price(min(decodes, key=_start))
        return self.tokens + most > MIN_GAIN * self.plain * ms

    def price(self, row: Row) -> float:
        """The milliseconds that one more draft token adds to the step."""
        if self.apart:
            return self.cost.row(row.start + 1)
        return self.cost.row(1) + self.cost.per_pair * row.start

    def has_block(self, row: Row, ahead: int) -> bool:
        """Whether there is a block for the draft token after `ahead` others."""
        return (row.start + 1 + ahead) % self.block_size != 0 or self.blocks > 0

    def add(self, row: Row, ahead: int, probability: float) -> None:
        """Add the draft token after `ahead` others. `probability`: that it and all before it are right."""
        price = self.price(row)
        self.tokens += probability
        self.ms += price
        self.rows -= 1
        self.blocks -= (row.start + 1 + ahead) % self.block_size == 0
        self.slack_ms -= price


_start = attrgetter("start")


def _budget(plan: Plan, decodes: list[Row], context: SchedulingContext, device: Verification) -> _StepBudget:
    """What the plan leaves over, without the slack. `decodes`: its rows that may get draft tokens.

    One block is kept for every running sequence, so that no draft token causes a preemption.
    """
    cost, pool = context.history.times.cost, context.pool
    lost = _lost_ms(decodes, context) if device.pipelined else 0.0
    alone = cost.decodes(len(decodes), sum(map(_start, decodes)) + len(decodes))
    rows = context.limits.max_step_tokens - sum(row.count for row in plan.rows)
    return _StepBudget(
        cost=cost,
        tokens=float(len(decodes)),
        ms=alone + lost,
        lost_ms=lost,
        plain=len(decodes) / alone if alone > 0 else inf,
        rows=rows if device.rows is None else min(rows, device.rows - len(plan.rows)),
        blocks=pool.available - len(context.queues.running),
        block_size=pool.size,
        slack_ms=0.0,
        apart=device.rows is not None,
    )


def _slack_ms(plan: Plan, context: SchedulingContext) -> float:
    """By how much a plan may take longer: the slack of the first sequence that can still be on time."""
    times, running = context.history.times, context.queues.running
    ms = times.cost(plan.load) * times.worst
    end = context.now + ms / 1e3
    soonest = min(
        (seq.deadline.latest for seq in running if not seq.deadline.late and seq.deadline.latest > end),
        default=inf,
    )
    return ((min(soonest, context.until) - context.now) * 1e3 - ms) / times.worst


def _lost_ms(decodes: list[Row], context: SchedulingContext) -> float:
    """How long a device is idle after a step with draft tokens, and before it too if steps are in flight now;
    inf before it was ever measured."""
    idle = context.history.turnarounds.quantile(0.5, inf)
    return idle * 2 if any(_unknown(row) for row in decodes) else idle


def _unknown(row: Row) -> int:
    """The tokens of a decode that are still being drawn: 1, or 0 when all results are known."""
    return row.start + 1 - len(row.seq.tokens)


def _from_model(candidates: list[Candidate], budget: _StepBudget, drafter: Drafter) -> dict[Sequence, int]:
    """The draft tokens that a draft model should propose, taken from the budget."""
    drafting = [
        (row, index)
        for row, index in candidates
        if row.seq.grammar is None and index.acceptance(0) < index.drafted.estimate(0)
    ]
    passes = _passes(drafting, budget, drafter) if drafting else 0
    for row, index in drafting:
        if not passes:
            index.drafted.decay()
        rate = index.drafted.estimate(0)
        for ahead in range(min(passes, _longest_draft(row))):
            budget.add(row, ahead, rate ** (ahead + 1))
    return {row.seq: min(passes, _longest_draft(row)) for row, _ in drafting} if passes else {}


def _from_ngrams(candidates: list[Candidate], budget: _StepBudget) -> dict[Sequence, int]:
    """The draft tokens from n-gram lookup, the likeliest first.

    Tokens are added as long as one raises the step's tokens per millisecond by `MIN_GAIN`.
    """
    counts: dict[Sequence, int] = {}
    # A draft token after one that is being drawn is right only if that one is as expected too.
    heap = [
        (-prod(index.acceptance(ahead) for ahead in range(_unknown(row) + 1)), place)
        for place, (row, index) in enumerate(candidates)
    ]
    heapify(heap)
    while heap and budget.rows > 0:
        negated, place = heappop(heap)
        row, index = candidates[place]
        count, price = counts.get(row.seq, 0), budget.price(row)
        if -negated * budget.ms <= budget.tokens * price * MIN_GAIN or price > budget.slack_ms:
            break
        if not budget.has_block(row, count):
            continue
        counts[row.seq] = count + 1
        budget.add(row, count, -negated)
        if count + 1 < _longest_draft(row):
            heappush(heap, (negated * index.acceptance(_unknown(row) + count + 1), place))
    return counts


def _passes(drafting: list[Candidate], budget: _StepBudget, drafter: Drafter) -> int:
    """How many passes of a draft model maximise tokens per millisecond; 0: none pays off."""
    cost = drafter.times.cost
    reads = [(row, drafter.read(row.seq)) for row, _ in drafting]
    backlog = sum(cost.prefill(read, row.start - read) for row, read in reads)
    each = cost.decodes(len(drafting), sum(row.start for row, _ in drafting))
    price = each + sum(budget.price(row) for row, _ in drafting)
    most = min(
        MAX_DRAFT_PASSES,
        budget.rows // len(drafting),
        (budget.blocks // len(drafting)) * budget.block_size,
    )
    tokens, ms = budget.tokens, budget.ms + backlog / REPAYMENT_TOKENS
    best, rate = 0, MIN_GAIN * budget.plain
    for count in range(1, most + 1):
        tokens += sum(
            index.drafted.estimate(0) ** count for row, index in drafting if count <= _longest_draft(row)
        )
        ms += price
        if backlog + count * price > budget.slack_ms:
            break
        if tokens / ms > rate:
            best, rate = count, tokens / ms
    return best


def _longest_draft(row: Row) -> int:
    """The most draft tokens that can be useful: the last token of an answer needs none after it."""
    return min(MAX_DRAFT_TOKENS, row.seq.limit - row.start - 2)
