"""A plan in the making: what is left of a step's time, tokens, blocks and places, and how sequences take it.

It knows what fits, not who comes first: that is `stretto.engine.scheduler.deadline`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from stretto.engine.kv_cache import BlockPool
from stretto.engine.scheduler.types import Limits, Plan, Queues, Row
from stretto.engine.sequence import SPARE, TIMED, Sequence
from stretto.engine.step_time import StepCost


@dataclass(slots=True)
class PlanBuilder:
    """A plan in the making. `ms`: predicted so far; `tokens`, `free`, `room`: tokens, blocks and places that
    are left; `end`: when the step must be over; `streams`: rows of streams with a due, which stand first;
    `full`: one without a due was not let in; `held`: all places are, by sequences that do not give way.
    Predictions times `margin` hold for most steps, times `worst` for nearly all."""

    plan: Plan
    queues: Queues
    pool: BlockPool
    limits: Limits
    now: float
    cost: StepCost
    margin: float
    worst: float
    ms: float
    tokens_left: int
    free: int
    room: int
    end: float = inf
    streams: int = 0
    full: bool = False
    held: bool = False
    claimed: set[bytes] = field(default_factory=set[bytes])

    def left(self) -> float:
        """Milliseconds that can still be filled without the step being late for what it ends for."""
        return (self.end - self.now) * 1e3 / self.worst - self.ms


def run(budget: PlanBuilder, seq: Sequence, ms: float) -> None:
    """Read as much of a sequence as fits in `ms`, taking it in first when it waits."""
    if seq.slot < 0:
        _admit(budget, seq, ms)
    elif seq.remaining == 1:
        if budget.cost.row(seq.kv.computed + 1) <= ms or not budget.plan.rows:
            go_on(budget, seq, 1)
    else:
        go_on(budget, seq, _chunk(budget, seq.kv.computed, seq.remaining, ms))


def _chunk(budget: PlanBuilder, start: int, wanted: int, ms: float) -> int:
    """Tokens of a prompt that fit; a step that has nothing else takes one, whatever it costs."""
    count = min(wanted, budget.tokens_left, budget.cost.chunk(start, ms))
    return count if budget.plan.rows else max(count, 1)


def go_on(budget: PlanBuilder, seq: Sequence, count: int) -> None:
    """The next `count` tokens of a running sequence, if it may still run and there are blocks for them."""
    if seq in budget.plan.preempt:
        return
    need = budget.pool.blocks_for(seq.kv.computed + count) - len(seq.kv.blocks)
    if count <= 0 or not _make_room(budget, seq, need):
        return
    budget.free -= need
    _append(budget, Row(seq, seq.kv.computed, count, count == seq.remaining))


def _admit(budget: PlanBuilder, seq: Sequence, ms: float) -> None:
    """Take a waiting sequence in. One whose next block is being computed by another waits for it. In a
    step in which another gives way it begins anew: what the two share is not room."""
    pool = budget.pool
    if _chunk(budget, 0, seq.length, ms) <= 0:
        return
    if budget.room <= 0 and not _make_place(budget, seq):
        return
    anew = bool(budget.plan.preempt)
    matched, idle = ([], 0) if anew else pool.match(seq.kv)
    key = pool.next_key(seq.kv, len(matched))
    if key is not None and not anew and (key in budget.claimed or pool.expects(key)):
        return
    growth = len(budget.queues.running) - len(budget.plan.preempt)
    start = len(matched) * pool.size
    count = _chunk(budget, start, seq.length - start, ms)
    need = pool.blocks_for(start + count) - len(matched) + idle
    if need + growth > budget.free:
        matched, start = [], 0
        count = _chunk(budget, 0, seq.length, ms)
        need = pool.blocks_for(count)
        if seq.rank[0] != TIMED or not _make_room(budget, seq, need + growth, among=SPARE):
            budget.full = True
            return
    if count <= 0:
        return
    budget.free -= need
    budget.room -= 1
    if key is not None:
        budget.claimed.add(key)
    budget.plan.admit.append((seq, matched))
    _append(budget, Row(seq, start, count, start + count == seq.length))


def _append(budget: PlanBuilder, row: Row) -> None:
    budget.plan.rows.append(row)
    budget.tokens_left -= row.count
    if row.draw and row.count == 1:
        budget.ms += budget.cost.row(row.start + 1)
    else:
        budget.ms += budget.cost.prefill(row.start, row.count)


def _make_room(budget: PlanBuilder, seq: Sequence, need: int, among: int = TIMED) -> bool:
    """Whether `need` blocks are there, if looser sequences (of class `among` or beyond) give way, loosest
    first. A tighter one never does."""
    victims: list[Sequence] = []
    free = budget.free
    looser = _looser(budget, seq, among) if need > free else []
    while need > free and looser:
        victims.append(looser.pop())
        free += budget.pool.freed_by(victims[-1].kv)
    if need > free:
        return False
    budget.free = free
    _preempt(budget, victims)
    return True


def _make_place(budget: PlanBuilder, seq: Sequence) -> bool:
    """Whether one without a due could make place for this one, which has one."""
    budget.full = True
    if budget.held or seq.rank[0] != TIMED:
        return False
    looser = _looser(budget, seq, SPARE)
    budget.held = not looser and not seq.deadline.late
    if looser:
        budget.free += budget.pool.freed_by(looser[-1].kv)
        _preempt(budget, looser[-1:])
    return budget.room > 0


def _looser(budget: PlanBuilder, seq: Sequence, among: int) -> list[Sequence]:
    """The running sequences that may give way to this one, the loosest last. None in a step that has let
    one in on the blocks of another: what they share would not be room."""
    plan, tightness = budget.plan, _tightness(seq)
    if any(matched for _, matched in plan.admit):
        return []
    kept = {id(other) for other in (*(row.seq for row in plan.rows), *plan.preempt, *plan.end)}
    looser = [
        other
        for other in budget.queues.running
        if other.rank[0] >= among and _tightness(other) > tightness and id(other) not in kept
    ]
    return sorted(looser, key=_tightness)


def _preempt(budget: PlanBuilder, victims: list[Sequence]) -> None:
    budget.room += len(victims)
    budget.plan.preempt += victims
    timed = [seq for seq in victims if seq.rank[0] == TIMED and not seq.deadline.late]
    budget.plan.place += [(seq, (TIMED, seq.rank[1], seq.deadline.next, seq.request.id)) for seq in timed]


def _tightness(seq: Sequence) -> tuple[int, float, int]:
    """Who comes first when not all can: those with a due by the next one, then the others by place."""
    ident = seq.request.id
    timed = seq.rank[0] != SPARE and not seq.deadline.late
    return (TIMED, seq.deadline.next, ident) if timed else (SPARE, seq.rank[2], ident)
