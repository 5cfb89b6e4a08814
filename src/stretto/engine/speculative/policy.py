"""Decides for which sequences a step verifies draft tokens, and how many.

A step verifies a draft token by drawing at its position as it would without it, so answers are the same
tokens with and without speculation (Leviathan et al., arXiv 2211.17192, with exact matching in place of
their acceptance rule). Draft tokens come from a sequence's own text or from a draft model. This module knows
no tensor and changes no queue and no block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf
from typing import Protocol

from stretto.engine.scheduler.types import Plan, Row, SchedulingContext
from stretto.engine.sequence import Sequence
from stretto.engine.speculative.ngram import AcceptanceRate, NgramIndex
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


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """How many draft tokens a step verifies for each sequence, by their source."""

    ngram: dict[Sequence, int] = field(default_factory=dict["Sequence", int])
    model: dict[Sequence, int] = field(default_factory=dict["Sequence", int])

    @property
    def by_sequence(self) -> dict[Sequence, int]:
        return self.model | self.ngram


class Speculation:
    """Speculative decoding for one model, and the acceptance rates of its sequences.

    Without a `drafter` all draft tokens come from n-gram lookup. With one, it drafts for those sequences for
    which lookup has the lower acceptance rate.
    """

    def __init__(self, drafter: Drafter | None = None) -> None:
        self._drafter = drafter
        self._copied, self._drafted = AcceptanceRate(), AcceptanceRate()
        self._model_counts: dict[Sequence, int] = {}
        self._indexes: dict[Sequence, NgramIndex] = {}

    @property
    def kv_bytes(self) -> int:
        """The draft model's KV memory in bytes."""
        return 0 if self._drafter is None else self._drafter.nbytes

    def choose(self, plan: Plan, context: SchedulingContext) -> DraftCounts:
        """How many draft tokens the decodes of a plan (already applied) should verify.

        It maximises the predicted tokens per millisecond of the step, within the limits and the slack of the
        running sequences.
        """
        rows = [row for row in plan.rows if row.decodes and row.seq.request.task == "generate"]
        candidates = [(row, self._index(row.seq)) for row in rows]
        budget = _budget(plan, context)
        by_model = {} if self._drafter is None else _from_model(candidates, budget, self._drafter)
        rest = [candidate for candidate in candidates if candidate[0].seq not in by_model]
        return DraftCounts(ngram=_from_ngrams(rest, budget), model=by_model)

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

    def _index(self, seq: Sequence) -> NgramIndex:
        index = self._indexes.get(seq)
        if index is None:
            index = self._indexes[seq] = NgramIndex(self._copied, self._drafted, seq.prompt_len)
        index.update(seq.tokens, seq.prompt_len)
        return index


Candidate = tuple[Row, NgramIndex]


@dataclass(slots=True)
class _StepBudget:
    """A step while draft tokens are added to it.

    tokens, ms: the expected output tokens of its decodes, and their milliseconds without prefill
    rows, blocks, slack_ms: what draft tokens may still use
    block_size: tokens in a block
    """

    cost: StepCost
    tokens: float
    ms: float
    rows: int
    blocks: int
    block_size: int
    slack_ms: float

    def price(self, row: Row) -> float:
        """The milliseconds that one more draft token adds to the step."""
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


def _budget(plan: Plan, context: SchedulingContext) -> _StepBudget:
    """What the plan leaves over.

    One block is kept for every running sequence, so that no draft token causes a preemption. The slack is
    that of the first sequence that can still be on time.
    """
    times, running, pool = context.history.times, context.queues.running, context.pool
    cost, worst = times.cost, times.worst
    decodes = [row for row in plan.rows if row.decodes]
    ms = cost(plan.load) * worst
    end = context.now + ms / 1e3
    soonest = min(
        (seq.deadline.latest for seq in running if not seq.deadline.late and seq.deadline.latest > end),
        default=inf,
    )
    return _StepBudget(
        cost=cost,
        tokens=float(len(decodes)),
        ms=cost.base + sum(cost.row(row.start + 1) for row in decodes),
        rows=context.limits.max_step_tokens - sum(row.count for row in plan.rows),
        blocks=pool.available - len(running),
        block_size=pool.size,
        slack_ms=((min(soonest, context.until) - context.now) * 1e3 - ms) / worst,
    )


def _from_model(candidates: list[Candidate], budget: _StepBudget, drafter: Drafter) -> dict[Sequence, int]:
    """The draft tokens that a draft model should propose, taken from the budget."""
    drafting = [
        (row, index)
        for row, index in candidates
        if _longest_draft(row) > 0
        and row.seq.grammar is None
        and index.acceptance(0) < index.drafted.estimate(0)
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
    heap = [
        (-index.acceptance(0), place)
        for place, (row, index) in enumerate(candidates)
        if _longest_draft(row) > 0
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
            heappush(heap, (negated * index.acceptance(count + 1), place))
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
    best, rate = 0, MIN_GAIN * budget.tokens / budget.ms
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
    return min(MAX_DRAFT_TOKENS, row.seq.limit - len(row.seq.tokens) - 1)
