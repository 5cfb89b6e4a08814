"""First come, first served: continuous batching with chunked prefill, the readable baseline.

Decodes come before prompts. When blocks run out the latest arrival is preempted. (Orca, OSDI 2022;
Sarathi-Serve, arXiv 2403.02310.)
"""

from __future__ import annotations

from stretto.engine.scheduler import spare_time
from stretto.engine.scheduler.plan_builder import PlanBuilder
from stretto.engine.scheduler.types import Plan, Row, SchedulingContext
from stretto.engine.sequence import SPARE_TIME


def fcfs(context: SchedulingContext) -> Plan:
    """Plan a step in order of arrival, whatever the deadlines. An empty plan: there is nothing to run."""
    builder = PlanBuilder.of(context, timed=False)
    _continue_running(builder)
    if not builder.plan.preempt:
        for seq in context.queues.waiting:
            if builder.tokens_left <= 0 or builder.full or seq.rank.group == SPARE_TIME:
                break
            builder.admit(seq)
    if not builder.plan.rows and spare_time.waits(context):
        builder = PlanBuilder.of(context, timed=True)
        spare_time.fill(builder)
    return builder.plan


def _continue_running(builder: PlanBuilder) -> None:
    """Add the running sequences, decodes first."""
    plan, running = builder.plan, builder.context.queues.running
    ready = [(left, seq) for seq in running if seq.rank.group != SPARE_TIME and (left := seq.remaining) > 0]
    latest = list(running)
    for left, seq in [one for one in ready if one[0] == 1] + [one for one in ready if one[0] > 1]:
        count = min(left, builder.tokens_left)
        if count == 0 or seq in plan.preempt:
            continue
        need = builder.blocks_needed(seq, count)
        while need > builder.free and seq not in plan.preempt:
            preempted = latest.pop()
            plan.preempt.append(preempted)
            builder.free += builder.context.pool.freed_by(preempted.kv)
            for row in [row for row in plan.rows if row.seq is preempted]:
                plan.rows.remove(row)
                builder.tokens_left += row.count
                builder.free += builder.blocks_needed(preempted, row.count)
        if seq not in plan.preempt:
            builder.free -= need
            builder.tokens_left -= count
            plan.rows.append(Row.of(seq, seq.kv.computed, count))
