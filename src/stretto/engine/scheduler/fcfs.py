"""First come, first served: continuous batching with chunked prefill, the readable baseline.

Decodes before prompts; the latest arrival gives way when blocks run out (Orca, OSDI 2022; Sarathi-Serve,
arXiv 2403.02310). A pure decision: nothing here changes a sequence or the pool.
"""

from __future__ import annotations

from stretto.engine.kv_cache import BlockPool
from stretto.engine.scheduler.types import Limits, Plan, Queues, Row, SchedulingContext
from stretto.engine.sequence import Sequence


def fcfs(
    model: str, queues: Queues, pool: BlockPool, limits: Limits, moment: SchedulingContext | None = None
) -> Plan:
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
            free += pool.freed_by(victim.kv)
            for row in [row for row in plan.rows if row.seq is victim]:
                plan.rows.remove(row)
                budget += row.count
                free += _growth(victim, row.count, pool)
        if seq not in plan.preempt:
            free -= need
            budget -= count
            plan.rows.append(Row(seq, seq.kv.computed, count, count == seq.remaining))
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
        matched, idle = pool.match(seq.kv)
        key = pool.next_key(seq.kv, len(matched))
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
    return pool.blocks_for(seq.kv.computed + count) - len(seq.kv.blocks)
