"""Work that no other request may wait for: prompts that are computed before anybody asks for an answer.

It runs alone in short steps, or beside streams in at most `UNNOTICED` of a step. A step with a prompt of
another request has none of it.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

from stretto.engine.scheduler.plan_builder import PlanBuilder
from stretto.engine.scheduler.types import SchedulingContext
from stretto.engine.sequence import SPARE_TIME, Sequence

UNNOTICED = 0.02  # the largest share by which a step with streams becomes longer
STEP_BASES = 5  # the longest step of its own, in base times of a step: a newcomer waits for its end
SHORTEST_MS = 5.0  # but a step of its own may always take this long


def waits(context: SchedulingContext) -> bool:
    """Whether a prompt waits for spare time, and the queues show that there is some."""
    waiting, running = context.queues.waiting, context.queues.running
    some = any(queue and queue[-1].rank.group == SPARE_TIME for queue in (waiting, running))
    return some and context.spare_time and (not waiting or waiting[0].rank.group == SPARE_TIME)


def fill(builder: PlanBuilder) -> None:
    """Add prompts that run in spare time to a plan that holds all other work of its step."""
    others = [seq for seq in builder.context.queues.running if seq.rank.group != SPARE_TIME]
    if any(seq.remaining > 1 for seq in others):
        return
    alone = not builder.plan.rows
    own = max(STEP_BASES * builder.cost.base, SHORTEST_MS)
    before, most = builder.ms, own if alone else UNNOTICED * builder.ms
    for seq in _sequences(builder.context):
        left = min(most - (builder.ms - before), builder.left_ms)
        if left <= 0 or builder.full or builder.tokens_left <= 0:
            return
        builder.run(seq, left)


def _sequences(context: SchedulingContext) -> list[Sequence]:
    """Those with tokens to compute: first those that run, then those that wait, each by arrival."""
    queues = (context.queues.running, context.queues.waiting)
    spare = [seq for queue in queues for seq in queue[bisect_left(queue, (SPARE_TIME,), key=_rank) :]]
    return [seq for seq in spare if seq.remaining]


_rank = attrgetter("rank")
