"""What the scheduler reads and what it answers with: limits, queues, the context, and the plan of one step.

Plain values. The policies decide over them, and `stretto.engine.core` carries the plan out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from operator import attrgetter

from msgspec import Struct
from msgspec.structs import replace

from stretto.config import TIERS, Tier
from stretto.engine.kv_cache import BlockPool
from stretto.engine.scheduler.estimate import LEAST_PREFILL, Estimate, ends_of
from stretto.engine.scheduler.fairness import Fairness
from stretto.engine.scheduler.lengths import (
    DEFAULT_LENGTH,
    RECENT_S,
    AnswerLengths,
    ArrivalRate,
    IdleTime,
)
from stretto.engine.sequence import BEST_EFFORT, TIMED, Rank, Sequence
from stretto.engine.step_time import StepCost, StepLoad, StepTime, Window

ROOMY = 0.5  # of the blocks: while more are left, slots alone decide how many sequences may start
GROWN = 0.5  # of what running sequences still need is needed at once: some end while others grow
SAMPLE = 16  # sequences that tell what is usual
_rank = attrgetter("rank")
RECENT = 0.5  # of the longest TTFT objective is how long what has come counts as what comes now


def tier_weight(tiers: Mapping[str, Tier], name: str) -> float:
    """How much an on-time request of a tier is worth; 0 for an unknown tier."""
    tier = tiers.get(name)
    return tier.weight if tier else 0.0


def longest_ttft_s(tiers: Mapping[str, Tier]) -> float:
    """The longest TTFT objective of the tiers; 0 without one."""
    return max((tier.objective.ttft_ms or 0.0 for tier in tiers.values()), default=0.0) / 1e3


@dataclass(frozen=True)
class Limits:
    """What the engine may do at once, and what each tier asks for."""

    max_running: int  # sequences that hold blocks
    max_step_tokens: int
    tiers: Mapping[str, Tier] = field(default_factory=lambda: TIERS)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """The weights of the tiers, and 0, in falling order."""
        return tuple(sorted({0.0, *(tier.weight for tier in self.tiers.values())}, reverse=True))

    @cached_property
    def longest_ttft_s(self) -> float:
        """The longest TTFT objective of the tiers; 0 without one."""
        return longest_ttft_s(self.tiers)


@dataclass(slots=True)
class Queues:
    """One model's sequences. A preempted sequence waits again at its old rank."""

    waiting: list[Sequence] = field(default_factory=list[Sequence])  # by rank
    running: list[Sequence] = field(default_factory=list[Sequence])  # by rank
    # A heap of those whose whole answer has a deadline: that deadline, the request's id, the sequence.
    ends: list[tuple[float, int, Sequence]] = field(default_factory=list[tuple[float, int, Sequence]])

    def latest_start(self, cost: StepCost) -> float:
        """When the next step must start for all streams and the first prompt to be on time; inf: any time."""
        streams = [seq for seq in self.running if seq.rank.group == TIMED and not seq.deadline.late]
        tightest = min((seq.deadline.latest for seq in streams), default=inf)
        context = sum(seq.kv.computed for seq in streams)
        start = tightest - cost.decodes(len(streams), context) / 1e3
        first = bisect_left(self.waiting, (TIMED,), key=_rank)
        if first < len(self.waiting) and self.waiting[first].rank.group == TIMED:
            seq = self.waiting[first]
            prompt_ms = cost.base + cost.prefill(seq.done, seq.length - seq.done)
            start = min(start, seq.rank.order - prompt_ms / 1e3)
        return start

    def pressure(self, cost: StepCost, without: Sequence | None = None) -> float:
        """The share of the time that streams with a deadline take at their slowest pace; `without` one."""
        load, itl_s = 0.0, inf
        for seq in self.running:
            deadline = seq.deadline
            if seq.rank.group == TIMED and deadline.emitted and not deadline.late and seq is not without:
                load += cost.row(seq.length) / deadline.target_itl_s
                itl_s = min(itl_s, deadline.target_itl_s)
        return (load + cost.base / itl_s) / 1e3


@dataclass(slots=True)
class History:
    """What a model's past requests and steps have taught.

    `turnarounds`: the milliseconds from the result of a step until the next launched one was on its way. A
    step that is launched only when the last result is known leaves the device idle for as long.
    """

    times: StepTime
    turnarounds: Window = field(default_factory=lambda: Window(64))
    fairness: Fairness = field(default_factory=Fairness)
    lengths: AnswerLengths = field(default_factory=AnswerLengths)
    arrivals: ArrivalRate = field(default_factory=ArrivalRate)
    idle: IdleTime = field(default_factory=IdleTime)  # of the device: all its models share it

    @classmethod
    def of(
        cls,
        times: StepTime,
        usual_tokens: int,
        tiers: Mapping[str, Tier] = TIERS,
        idle: IdleTime | None = None,
    ) -> History:
        """Before any request. `usual_tokens`: of a long answer; 0: unknown. `idle`: that of the device."""
        arrivals = ArrivalRate(max(RECENT * longest_ttft_s(tiers), RECENT_S))
        lengths = AnswerLengths(usual_tokens or DEFAULT_LENGTH)
        return cls(times, lengths=lengths, arrivals=arrivals, idle=idle or IdleTime())

    def observe(self, load: StepLoad, ms: float, now: float) -> None:
        """Record a step that took `ms` and has ended now, and let the past count less."""
        self.times.observe(load, ms)
        self.idle.observe(ms, now)
        self.fairness.fade(now)
        self.arrivals.fade(now)

    def record(self, plan: Plan, tiers: Mapping[str, Tier], now: float) -> None:
        """Record the work of a plan's newcomers, of which the refused ones have ended, and its promises."""
        for seq in plan.newcomers:
            ms = self.times.cost.prefill(seq.done, seq.prompt_len - seq.done)
            weight = tier_weight(tiers, seq.request.tier)
            if seq.ended:
                self.arrivals.turn_away(weight, ms, now)
            else:
                self.arrivals.offer(weight, ms)
                self.arrivals.observe(-seq.rank.negated_weight, ms)
        self.fairness.promise(plan.tags, plan.owed)


class SchedulingContext(Struct, frozen=True):
    """All that a policy looks at to plan one step of one model."""

    model: str
    queues: Queues
    pool: BlockPool
    limits: Limits
    history: History
    now: float
    until: float = inf  # when the step should be over, because other models on the device need it
    due: tuple[Sequence, ...] = ()  # those that go before all others from now on
    elsewhere: float = 0.0  # the share of the time that the streams of other models take
    spare_time: bool = True  # whether the other models on the device leave some

    @property
    def places_left(self) -> int:
        """The sequences that may start before a running one ends: by slots, and by blocks once few are left.

        A sequence is expected to need as many blocks as the running ones, which need some more themselves.
        """
        running, pool = self.queues.running, self.pool
        slots = self.limits.max_running - len(running)
        if not running or pool.available > ROOMY * pool.total:
            return slots
        left = self.history.lengths.left(running[:: max(len(running) // SAMPLE, 1)])
        growth = sum(left) / (len(left) * pool.size)
        each = (pool.total - pool.available) / len(running) + growth
        return max(min(slots, int((pool.available - GROWN * growth * len(running)) / each)), 0)

    @property
    def places_for_prompts(self) -> int:
        """The same for prompts with a deadline, which may take those of sequences that have never had one."""
        running = self.queues.running
        first = bisect_left(running, (BEST_EFFORT,), key=_rank)
        return self.places_left + sum(seq.deadline.next == inf for seq in running[first:])

    def place_waits(self, waiting: int) -> tuple[float, ...]:
        """After how many seconds the next places become free; empty if enough are free for `waiting`."""
        running = self.queues.running
        if not running or waiting <= self.places_left:
            return ()
        keys, others = sum(seq.length for seq in running), max(1.0 - self.elsewhere, LEAST_PREFILL)
        step_ms = self.history.times.cost.decodes(len(running), keys) / others
        return ends_of(self.history.lengths.left(running), step_ms)

    def with_places(self, estimate: Estimate, started: int, waits: tuple[float, ...]) -> Estimate:
        """The estimate with what places allow. `started`: prompts that have one. `waits`: `place_waits`."""
        if not waits:
            return estimate
        each_s, prompt_ms = waits[-1] / len(waits), self.history.arrivals.mean_ms
        return replace(
            estimate,
            places=self.places_for_prompts + started,
            place_s=max(waits[0] - each_s, 0.0),
            place_pace=prompt_ms / each_s if each_s and prompt_ms else inf,
        )


class Row(Struct, frozen=True, gc=False):
    """A part of a sequence in a step: the tokens from `start` to `start + count`."""

    seq: Sequence
    start: int
    count: int
    draw: bool  # whether these are its last tokens, so that the next one is drawn
    draft: tuple[int, ...] = ()  # draft tokens among `count`, at the end: a token is drawn after each of them
    scored: int = 0  # positions whose next token, one of the prompt's, is scored

    @classmethod
    def of(cls, seq: Sequence, start: int, count: int) -> Row:
        """The row that computes these tokens of a sequence, and draws or scores what follows from them."""
        end = start + count
        return cls(seq, start, count, seq.draws_at(end), (), seq.scored_at(start, end))

    @property
    def positions_scored(self) -> range:
        """The positions whose next token is scored."""
        end = min(self.start + self.count, self.seq.prompt_len - 1)
        return range(end - self.scored, end)

    @property
    def has_result(self) -> bool:
        """Whether its step draws or scores a token for it."""
        return self.draw or self.scored > 0

    @property
    def decodes(self) -> bool:
        """Whether it continues an answer, rather than computing a prompt."""
        return self.draw and self.count == 1 + len(self.draft)

    def with_draft(self, draft: tuple[int, ...]) -> Row:
        """The row with draft tokens after its own."""
        return Row(self.seq, self.start, self.count + len(draft), self.draw, draft) if draft else self


class Plan(Struct, eq=False):
    """What a step does, in the order of the fields."""

    model: str
    end: list[Sequence] = []  # their time has run out
    to_move: list[Sequence] = []  # late here, not started; if others can
    # Refused, with the seconds after which a client may try again.
    refuse: list[tuple[Sequence, float]] = []
    place: list[tuple[Sequence, Rank]] = []  # at a new rank
    newcomers: list[Sequence] = []  # of `place`, those that have just come
    first: list[tuple[float, Sequence]] = []  # late ones, with when they go before all others
    preempt: list[Sequence] = []
    # Admitted, with the cached blocks that each one adopts.
    admit: list[tuple[Sequence, list[int]]] = []
    rows: list[Row] = []
    tags: dict[str, float] = {}  # for `Fairness.promise`
    owed: float = 0.0  # for `Fairness.promise`
    predicted: float | None = None  # milliseconds
    apart: bool = False  # whether each draft token reads the keys by itself, rather than with its row

    def add_drafts(
        self, drafts: Mapping[Sequence, tuple[int, ...]], cost: StepCost, *, apart: bool = False
    ) -> None:
        """Let rows verify draft tokens too, and predict the step anew."""
        self.rows = [row.with_draft(drafts.get(row.seq, ())) for row in self.rows]
        self.apart = apart
        if self.predicted is not None:
            self.predicted = cost(self.load)

    @property
    def load(self) -> StepLoad:
        """What the step-time model needs to know.

        A draft token costs what a decode does, except for the keys: unless they are `apart`, all tokens of a
        row read them together.
        """
        decode = prefill = context = 0
        reading = 0.0
        for row in self.rows:
            count, draft = row.count, len(row.draft)
            if row.draw and count == 1 + draft:
                decode += count
                if self.apart:
                    context += count * row.start + count * (count + 1) // 2
                else:
                    context += row.start + count
                    reading += draft * (row.start + count / 2)
            else:
                prefill += count
                reading += count * (row.start + count / 2)
        return StepLoad(decode, prefill, context, reading)


SchedulePolicy = Callable[[SchedulingContext], Plan]
