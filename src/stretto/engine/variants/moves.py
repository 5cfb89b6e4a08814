"""Decides which sequences another model should go on with.

One that would be late moves to a lighter model on which it is on time: a request that waits, or a stream
between two tokens. One with a cascade moves to the better model if that is on time too. Pure: it looks at
scheduling contexts and answers with a request. `stretto.engine.core` moves the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import chain, islice
from math import inf

from msgspec.structs import replace

from stretto.engine.scheduler.admission import predict, snapshot
from stretto.engine.scheduler.types import Plan, SchedulingContext, tier_weight
from stretto.engine.sequence import TIMED, Sequence
from stretto.types import Request

MOST_MOVES = 2  # of one request
LOOK_S = 0.02  # between two looks at the requests that would be late
AT_ONCE = 8  # requests that a look moves at most; the next one sees what has become of them
DEPTH = 64  # prompts of each model that count, and streams that are looked at
LEAST_SHARE = 0.1  # of the time that the streams of one model are counted on to get
Contexts = Mapping[str, Callable[[], SchedulingContext]]


def movable(plan: Plan, *, look: bool) -> list[Sequence]:
    """The late sequences of a plan that may move: newcomers, those that it refuses or puts behind all that
    can be on time, and with `look` all."""
    pressing = {*plan.newcomers, *(seq for seq, _ in plan.refuse), *(seq for seq, _ in plan.place)}
    return [seq for seq in plan.to_move if look or seq in pressing][:AT_ONCE]


def behind(context: SchedulingContext) -> list[Sequence]:
    """The streams with lighter models that are predicted to miss a deadline, the latest first."""
    running = [seq for seq in context.queues.running if seq.rank.group == TIMED and not seq.deadline.late]
    streams = [seq for seq in running[:DEPTH] if seq.deadline.emitted and seq.request.lighter]
    if not streams:
        return []
    keys = sum(seq.length for seq in running)
    share = max(1.0 - context.elsewhere, LEAST_SHARE)
    step_s = context.history.times.cost.decodes(len(running), keys) / 1e3 / share
    late = [(_excess_s(seq, context, step_s), seq) for seq in streams if seq.moves < MOST_MOVES]
    late.sort(key=_excess, reverse=True)
    return [seq for excess, seq in late if excess > 0.0]


def lighter_request(seq: Sequence, late: Collection[Sequence], contexts: Contexts) -> Request | None:
    """The request of a sequence for the first of its lighter models on which the rest of it would be on time;
    None if there is none. `late` sequences take no time from it. `contexts`: of the engine's models."""
    asked = seq.request
    for place, name in enumerate(asked.lighter, 1):
        if name in contexts and _on_time(seq, name, late, contexts):
            rest = () if seq.moves + 1 >= MOST_MOVES else asked.lighter[place:]
            return replace(asked, model=name, lighter=rest, cascade=None)
    return None


def heavier_request(seq: Sequence, contexts: Contexts) -> Request | None:
    """The request of a sequence for the better model of its cascade; None if the rest would be late there.
    Should that turn out to be so later, the sequence may come back."""
    asked = seq.request
    cascade = asked.cascade
    if cascade is None or cascade.model not in contexts or not _on_time(seq, cascade.model, (), contexts):
        return None
    back = (asked.model,) if asked.objective.timed and seq.moves + 1 < MOST_MOVES else ()
    return replace(asked, model=cascade.model, lighter=back, cascade=None)


def _on_time(seq: Sequence, name: str, late: Collection[Sequence], contexts: Contexts) -> bool:
    """Whether the rest of a sequence would be on time on a model, which computes all its tokens first."""
    context = contexts[name]()
    request = _rest(seq, context)
    if request is None:
        return False
    if seq.slot >= 0:  # it will leave the streams of its model
        own = contexts[seq.request.model]()
        cost = own.history.times.cost
        change = own.queues.pressure(cost, seq) - own.queues.pressure(cost)
        context = replace(context, elsewhere=max(context.elsewhere + change, 0.0))
    seen, weight = snapshot(context, 0), tier_weight(context.limits.tiers, request.tier)
    # Models take turns, so the prompts of the others that are due before this one come first.
    others = sum(_due_ms(of(), seq, late) for other, of in contexts.items() if other != name)
    forecast = predict(request, seen, weight, context.now + others / 1e3 / seen.estimate.rate())
    return forecast.feasible and forecast.refusal(request) <= 0


def _rest(seq: Sequence, context: SchedulingContext) -> Request | None:
    """What is left of a sequence as a request that comes now; None if its next token is overdue."""
    asked, deadline, now = seq.request, seq.deadline, context.now
    if not deadline.emitted:
        return asked
    due = min(deadline.next, deadline.whole)
    if due <= now:
        return None
    return replace(
        asked,
        prompt=tuple(seq.tokens),
        arrival=now,
        objective=replace(
            asked.objective,
            ttft_ms=None if due == inf else (due - now) * 1e3,
            total_ms=None if deadline.whole == inf else (deadline.whole - now) * 1e3,
        ),
        sampling=replace(asked.sampling, max_tokens=_left(seq, context), min_tokens=0),
        expected_tokens=_left(seq, context),
        cached=0,
    )


def _left(seq: Sequence, context: SchedulingContext) -> int:
    """How many tokens a stream is predicted to have yet. An answer that is longer than a long one may be
    longer by a quarter of what it has."""
    done, asked = seq.output_len, seq.request
    whole = context.history.lengths.of(asked)
    return max(min(max(whole - done, done // 4), seq.limit - len(seq.tokens)), 1)


def _excess_s(seq: Sequence, context: SchedulingContext, step_s: float) -> float:
    """By how much a stream would be late if each of its tokens took `step_s`."""
    deadline, left = seq.deadline, _left(seq, context)
    end = context.now + left * step_s
    last = deadline.next + (left - 1) * deadline.itl_s if deadline.itl_s < inf else inf
    return max(context.now + step_s - deadline.next, end - min(last, deadline.whole))


def _due_ms(context: SchedulingContext, asking: Sequence, late: Collection[Sequence]) -> float:
    """The work of a model's prompts that are due before another one's, ms."""
    cost, due = context.history.times.cost, asking.deadline.next
    prompts = islice(chain(context.queues.running, context.queues.waiting), DEPTH)
    return sum(
        cost.prefill(seq.kv.computed, len(seq.tokens) - seq.kv.computed)
        for seq in prompts
        if _computes(seq) and seq.deadline.next <= due and seq not in late and seq is not asking
    )


def _computes(seq: Sequence) -> bool:
    """Whether it has tokens to compute before it can go on."""
    return not seq.deadline.emitted or len(seq.tokens) - seq.kv.computed > 1


def _excess(late: tuple[float, Sequence]) -> float:
    return late[0]
