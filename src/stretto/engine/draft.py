"""A plan in the making: what is left of a step's time, tokens, blocks and places, and how sequences take it.

It knows what fits, not who comes first: that is `stretto.engine.deadline`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from stretto.engine.blocks import BlockPool
from stretto.engine.schedule import Limits, Plan, Queues, Row
from stretto.engine.sequence import SPARE, TIMED, Sequence
from stretto.engine.steptime import Cost


@dataclass(slots=True)
class Draft:
    """A plan in the making. `ms`: predicted so far; `tokens`, `free`, `room`: tokens, blocks and places that
    are left; `end`: when the step must be over; `full`: one without a due was not let in."""

    plan: Plan
    queues: Queues
    pool: BlockPool
    limits: Limits
    now: float
    cost: Cost
    margin: float
    ms: float
    tokens: int
    free: int
    room: int
    end: float = inf
    full: bool = False
    claimed: set[bytes] = field(default_factory=set[bytes])

    def left(self) -> float:
        """Milliseconds that can still be filled."""
        return (self.end - self.now) * 1e3 / self.margin - self.ms


def run(draft: Draft, seq: Sequence, ms: float) -> None:
    """Read as much of a sequence as fits in `ms`, taking it in first when it waits."""
    if seq.slot < 0:
        _admit(draft, seq, ms)
    elif seq.remaining == 1:
        if draft.cost.row(seq.computed + 1) <= ms:
            go_on(draft, seq, 1)
    else:
        go_on(draft, seq, _chunk(draft, seq.computed, seq.remaining, ms))


def _chunk(draft: Draft, start: int, wanted: int, ms: float) -> int:
    """Tokens of a prompt that fit; a step that has nothing else takes one, whatever it costs."""
    count = min(wanted, draft.tokens, draft.cost.chunk(start, ms))
    return count if draft.plan.rows else max(count, 1)


def go_on(draft: Draft, seq: Sequence, count: int) -> None:
    """The next `count` tokens of a running sequence, if it may still run and there are blocks for them."""
    if seq in draft.plan.preempt:
        return
    need = draft.pool.blocks_for(seq.computed + count) - len(seq.blocks)
    if count <= 0 or not _make_room(draft, seq, need):
        return
    draft.free -= need
    _append(draft, Row(seq, seq.computed, count, count == seq.remaining))


def _admit(draft: Draft, seq: Sequence, ms: float) -> None:
    """Take a waiting sequence in. One whose next block is being computed by another waits for it. In a
    step in which another gives way it begins anew: what the two share is not room."""
    pool = draft.pool
    if _chunk(draft, 0, seq.length, ms) <= 0:
        return
    if draft.room <= 0 and not _make_place(draft, seq):
        return
    anew = bool(draft.plan.preempt)
    matched, idle = ([], 0) if anew else pool.match(seq)
    key = pool.next_key(seq, len(matched))
    if key is not None and not anew and (key in draft.claimed or pool.expects(key)):
        return
    growth = len(draft.queues.running) - len(draft.plan.preempt)
    start = len(matched) * pool.size
    count = _chunk(draft, start, seq.length - start, ms)
    need = pool.blocks_for(start + count) - len(matched) + idle
    if need + growth > draft.free:
        matched, start = [], 0
        count = _chunk(draft, 0, seq.length, ms)
        need = pool.blocks_for(count)
        if seq.rank[0] != TIMED or not _make_room(draft, seq, need + growth, among=SPARE):
            draft.full = True
            return
    if count <= 0:
        return
    draft.free -= need
    draft.room -= 1
    if key is not None:
        draft.claimed.add(key)
    draft.plan.admit.append((seq, matched))
    _append(draft, Row(seq, start, count, start + count == seq.length))


def _append(draft: Draft, row: Row) -> None:
    draft.plan.rows.append(row)
    draft.tokens -= row.count
    if row.draw and row.count == 1:
        draft.ms += draft.cost.row(row.start + 1)
    else:
        draft.ms += draft.cost.prefill(row.start, row.count)


def _make_room(draft: Draft, seq: Sequence, need: int, among: int = TIMED) -> bool:
    """Whether `need` blocks are there, if looser sequences (of class `among` or beyond) give way, loosest
    first. A tighter one never does."""
    victims: list[Sequence] = []
    free = draft.free
    looser = _looser(draft, seq, among) if need > free else []
    while need > free and looser:
        victims.append(looser.pop())
        free += draft.pool.freed_by(victims[-1])
    if need > free:
        return False
    draft.free = free
    _preempt(draft, victims)
    return True


def _make_place(draft: Draft, seq: Sequence) -> bool:
    """Whether one without a due could make place for this one, which has one."""
    draft.full = True
    looser = _looser(draft, seq, SPARE) if seq.rank[0] == TIMED else []
    if looser:
        draft.free += draft.pool.freed_by(looser[-1])
        _preempt(draft, looser[-1:])
    return draft.room > 0


def _looser(draft: Draft, seq: Sequence, among: int) -> list[Sequence]:
    """The running sequences that may give way to this one, the loosest last. None in a step that has let
    one in on the blocks of another: what they share would not be room."""
    plan, tightness = draft.plan, _tightness(seq)
    if any(matched for _, matched in plan.admit):
        return []
    kept = {id(other) for other in (*(row.seq for row in plan.rows), *plan.preempt, *plan.end)}
    looser = [
        other
        for other in draft.queues.running
        if other.rank[0] >= among and _tightness(other) > tightness and id(other) not in kept
    ]
    return sorted(looser, key=_tightness)


def _preempt(draft: Draft, victims: list[Sequence]) -> None:
    draft.room += len(victims)
    draft.plan.preempt += victims
    timed = [seq for seq in victims if seq.rank[0] == TIMED and not seq.late]
    draft.plan.place += [(seq, (TIMED, seq.rank[1], seq.due, seq.request.id)) for seq in timed]


def _tightness(seq: Sequence) -> tuple[int, float, int]:
    """Who comes first when not all can: those with a due by the next one, then the others by place."""
    ident = seq.request.id
    timed = seq.rank[0] != SPARE and not seq.late
    return (TIMED, seq.due, ident) if timed else (SPARE, seq.rank[2], ident)
