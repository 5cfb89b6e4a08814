"""What the next step runs: a pure decision over one model's queues, its block pool and the limits.

Nothing here changes a sequence or the pool; `stretto.engine.loop` carries the plan out. `fcfs` is plain
continuous batching with chunked prefill (Orca, OSDI 2022; Sarathi-Serve, arXiv 2403.02310): first come, first
served, decodes before prompts, the latest arrival gives way when blocks run out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf

from msgspec import Struct

from stretto.config import TIERS, Tier
from stretto.engine.blocks import BlockPool
from stretto.engine.ledger import Ledger
from stretto.engine.sequence import Rank, Sequence
from stretto.engine.steptime import Load, StepTime


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_running` sequences hold blocks at once; a step reads at most `max_step_tokens` tokens."""

    max_running: int
    max_step_tokens: int
    tiers: Mapping[str, Tier] = field(default_factory=lambda: TIERS)


@dataclass(slots=True)
class Queues:
    """One model's sequences, each list by rank: in order of arrival, unless the schedule placed them
    otherwise. A preempted sequence waits at its old place. `ends` is a heap of those with a last due."""

    waiting: list[Sequence] = field(default_factory=list[Sequence])
    running: list[Sequence] = field(default_factory=list[Sequence])
    ends: list[tuple[float, int, Sequence]] = field(default_factory=list[tuple[float, int, Sequence]])


@dataclass(frozen=True, slots=True)
class Moment:
    """What a schedule that knows time looks at beside the queues. `until`: when other models on the device
    need it, so the step should be over."""

    now: float
    times: StepTime
    ledger: Ledger
    until: float = inf


class Row(Struct, frozen=True, gc=False):
    """Tokens `start` to `start + count` of a sequence; `draw`: they are its last, so the next one is
    drawn. The last of them may be a `draft`, guesses at what follows its tokens: then one is drawn after each
    of these too, and counts as far as the guesses were right.
    """

    seq: Sequence
    start: int
    count: int
    draw: bool
    draft: tuple[int, ...] = ()

    @property
    def decodes(self) -> bool:
        """Whether it goes on with an answer, rather than reading a prompt."""
        return self.draw and self.count == 1 + len(self.draft)


@dataclass(slots=True)
class Plan:
    """What the step does, in this order: `end` those whose time has run out, `refuse` (with the seconds after
    which to try again), `place` (at a new rank), `preempt`, `admit` (with the blocks each can share), run
    `rows`. `predicted`: the milliseconds it should take. `tags` and `owed` are the
    ledger's, from now on."""

    model: str
    rows: list[Row] = field(default_factory=list[Row])
    preempt: list[Sequence] = field(default_factory=list[Sequence])
    admit: list[tuple[Sequence, list[int]]] = field(default_factory=list[tuple[Sequence, list[int]]])
    end: list[Sequence] = field(default_factory=list[Sequence])
    refuse: list[tuple[Sequence, float]] = field(default_factory=list[tuple[Sequence, float]])
    place: list[tuple[Sequence, Rank]] = field(default_factory=list[tuple[Sequence, Rank]])
    tags: dict[str, float] = field(default_factory=dict[str, float])
    owed: float = 0.0
    predicted: float | None = None

    @property
    def decode_tokens(self) -> int:
        return self.load.decode

    @property
    def prefill_tokens(self) -> int:
        return self.load.prefill

    @property
    def load(self) -> Load:
        """What the step-time model needs to know of it. A guess costs what a decode does, its logits and draw
        included, but for the keys: one reading of them serves the whole row."""
        decode = prefill = context = 0
        reading = 0.0
        for row in self.rows:
            if row.decodes:
                decode += row.count
                context += row.start + row.count
                reading += len(row.draft) * (row.start + row.count / 2)
            else:
                prefill += row.count
                reading += row.count * (row.start + row.count / 2)
        return Load(decode, prefill, context, reading)


Schedule = Callable[[str, Queues, BlockPool, Limits, Moment], Plan]


def fcfs(model: str, queues: Queues, pool: BlockPool, limits: Limits, moment: Moment | None = None) -> Plan:
    """First come, first served, whatever the time. An empty plan means there is nothing to run now."""
    plan = Plan(model)
    budget, free = _continue_running(plan, queues, pool, limits.max_step_tokens)
    room = limits.max_running - len(queues.running) + len(plan.preempt)
    if not plan.preempt:
        _admit_waiting(plan, queues, pool, (budget, free, room))
    return plan


def _continue_running(plan: Plan, queues: Queues, pool: BlockPool, budget: int) -> tuple[int, int]:
    """Add the running sequences, decodes first; returns the tokens and the blocks that are left."""
    free = pool.available
    ready = [seq for seq in queues.running if seq.remaining > 0]
    order = [seq for seq in ready if seq.remaining == 1] + [seq for seq in ready if seq.remaining > 1]
    victims = list(queues.running)
    for seq in order:
        count = min(seq.remaining, budget)
        if count == 0 or seq in plan.preempt:
            continue
        need = _growth(seq, count, pool)
        while need > free and seq not in plan.preempt:
            victim = victims.pop()
            plan.preempt.append(victim)
            free += pool.freed_by(victim)
            for row in [row for row in plan.rows if row.seq is victim]:
                plan.rows.remove(row)
                budget += row.count
                free += _growth(victim, row.count, pool)
        if seq not in plan.preempt:
            free -= need
            budget -= count
            plan.rows.append(Row(seq, seq.computed, count, count == seq.remaining))
    return budget, free


def _admit_waiting(plan: Plan, queues: Queues, pool: BlockPool, left: tuple[int, int, int]) -> None:
    """Add waiting sequences in order while tokens, blocks and places last. A prompt whose next block is being
    computed by another waits for it (not for its turn: those behind it may pass)."""
    budget, free, room = left
    growth = len(queues.running)
    claimed: set[bytes] = set()
    for seq in queues.waiting:
        if budget <= 0 or room <= 0:
            break
        matched, idle = pool.match(seq)
        key = pool.next_key(seq, len(matched))
        if key is not None and (key in claimed or pool.expects(key)):
            continue
        start = len(matched) * pool.size
        count = min(seq.length - start, budget)
        need = pool.blocks_for(start + count) - len(matched)
        if need + idle + growth > free:
            break
        free -= need + idle
        budget -= count
        room -= 1
        if key is not None:
            claimed.add(key)
        plan.admit.append((seq, matched))
        plan.rows.append(Row(seq, start, count, start + count == seq.length))


def _growth(seq: Sequence, count: int, pool: BlockPool) -> int:
    """Blocks a running sequence needs beyond its own to read `count` more tokens."""
    return pool.blocks_for(seq.computed + count) - len(seq.blocks)
