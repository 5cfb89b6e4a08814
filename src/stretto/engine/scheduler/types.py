"""What the scheduler reads and what it answers with: limits, queues, the moment, and the plan of one step.

Plain values; the two schedules decide over them and `stretto.engine.core` carries the plan out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf

from msgspec import Struct

from stretto.config import TIERS, Tier
from stretto.engine.kv_cache import BlockPool
from stretto.engine.scheduler.fairness import Ledger
from stretto.engine.sequence import Rank, Sequence
from stretto.engine.step_time import StepCost, StepLoad, StepTime


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
class SchedulingContext:
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

    def with_draft(self, draft: tuple[int, ...]) -> Row:
        """The row with draft tokens after its own."""
        return Row(self.seq, self.start, self.count + len(draft), self.draw, draft) if draft else self


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

    def add_drafts(self, drafts: Mapping[Sequence, tuple[int, ...]], cost: StepCost) -> None:
        """Let rows verify draft tokens too, and predict the step anew."""
        self.rows = [row.with_draft(drafts.get(row.seq, ())) for row in self.rows]
        if self.predicted is not None:
            self.predicted = cost(self.load)

    @property
    def load(self) -> StepLoad:
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
        return StepLoad(decode, prefill, context, reading)


SchedulePolicy = Callable[[str, Queues, BlockPool, Limits, SchedulingContext], Plan]
