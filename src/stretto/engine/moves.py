"""Moves a request that would be late, and has not started, to a lighter variant on which it is on time.

Pure: it looks at scheduling contexts and answers with a request for another model. `stretto.engine.core`
moves the sequence. Nothing was computed for it yet, so no work is done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import chain, islice

from msgspec.structs import replace

from stretto.engine.scheduler.admission import predict, snapshot
from stretto.engine.scheduler.types import Plan, SchedulingContext, tier_weight
from stretto.engine.sequence import Sequence
from stretto.types import Request

MOST_MOVES = 2  # of one request
LOOK_S = 0.02  # between two looks at the requests that wait and would be late
AT_ONCE = 8  # requests that a look moves at most; the next one sees what has become of them
DEPTH = 64  # prompts of each model that count


def movable(plan: Plan, *, look: bool) -> list[Sequence]:
    """The late sequences of a plan that may move: newcomers, those that it refuses, and with `look` all."""
    pressing = {*plan.newcomers, *(seq for seq, _ in plan.refuse)}
    return [seq for seq in plan.to_move if look or seq in pressing][:AT_ONCE]


def lighter_request(
    seq: Sequence, late: Collection[Sequence], contexts: Mapping[str, Callable[[], SchedulingContext]]
) -> Request | None:
    """The request of a sequence for the first of its lighter models on which all of it would be on time; None
    if there is none. `late` sequences take no time from it. `contexts`: of the engine's models."""
    asked = seq.request
    for place, name in enumerate(asked.lighter, 1):
        if name not in contexts:
            continue
        context = contexts[name]()
        rest = () if seq.moves + 1 >= MOST_MOVES else asked.lighter[place:]
        request = replace(asked, model=name, lighter=rest)
        seen, weight = snapshot(context, 0), tier_weight(context.limits.tiers, request.tier)
        # Models take turns, so the prompts of the others that are due before this one come first.
        others = sum(_due_ms(of(), seq, late) for other, of in contexts.items() if other != name)
        forecast = predict(request, seen, weight, context.now + others / 1e3 / seen.estimate.rate())
        if forecast.feasible and forecast.refusal(request) <= 0:
            return request
    return None


def _due_ms(context: SchedulingContext, asking: Sequence, late: Collection[Sequence]) -> float:
    """The work of a model's prompts that are due before another one's, ms."""
    cost, due = context.history.times.cost, asking.deadline.next
    prompts = islice(chain(context.queues.running, context.queues.waiting), DEPTH)
    return sum(
        cost.prefill(seq.kv.computed, len(seq.tokens) - seq.kv.computed)
        for seq in prompts
        if not seq.deadline.emitted and seq.deadline.next <= due and seq not in late
    )
