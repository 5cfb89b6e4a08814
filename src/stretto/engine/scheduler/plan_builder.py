"""A plan in the making: what is left of a step's time, tokens, blocks and slots, and how sequences take it.

It knows what fits. Who comes first is the policy's decision (`fcfs`, `deadline`).
"""

from __future__ import annotations

from math import inf

from msgspec import Struct

from stretto.engine.scheduler.types import Plan, Row, SchedulingContext
from stretto.engine.sequence import BEST_EFFORT, SPARE_TIME, TIMED, Rank, Sequence
from stretto.engine.step_time import StepCost

UNLIMITED_MS = 1e9
# Prompts are read soon if that takes at most this time, and this share of the time until their deadlines.
SOON_MS, SOON = 2000.0, 0.4
SAMPLE = 16  # sequences that tell what is usual
SIZES_APART = 64  # tokens between two sizes of short steps


def nearest_size(tokens: float) -> int:
    """The nearest of the sizes that are not padded: multiples of `SIZES_APART`, and in longer steps of an
    eighth of a power of two."""
    unit = max(SIZES_APART, (1 << int(tokens).bit_length()) // 16)
    return max(round(tokens / unit), 1) * unit


class PlanBuilder(Struct, eq=False):
    """A plan and what is left for it.

    A prediction times `margin` holds for most steps, times `worst` for nearly all.
    """

    context: SchedulingContext
    plan: Plan
    cost: StepCost
    margin: float
    worst: float
    ms: float  # predicted so far
    tokens_left: int
    free: int  # blocks that are left
    slots_left: int  # sequences that may still be admitted
    end: float = inf  # when the step must be over
    timed_rows: int = 0  # rows of streams with a deadline, which stand first
    waiting: int = 0  # sequences that wait for a slot, without those that wait for spare time
    behind: int = 0  # those of them without a deadline
    full: bool = False  # whether a sequence without a deadline was turned away
    held: bool = False  # whether all slots are taken by sequences that cannot be preempted
    place_waits: tuple[
        float, ...
    ] = ()  # after how many seconds the next places become free; empty: enough are
    queued: int = 0  # prompts that wait for one
    claimed: set[bytes] = set()  # keys of blocks that admitted ones will compute

    @classmethod
    def of(cls, context: SchedulingContext, *, timed: bool) -> PlanBuilder:
        """An empty plan. `timed`: whether its rows take time by the step-time model, or none."""
        times, limits = context.history.times, context.limits
        cost = times.cost if timed else StepCost()
        return cls(
            context=context,
            plan=Plan(context.model),
            cost=cost,
            margin=times.margin,
            worst=times.worst,
            ms=cost.base,
            tokens_left=limits.max_step_tokens,
            free=context.pool.available,
            slots_left=limits.max_running - len(context.queues.running),
        )

    @property
    def left_ms(self) -> float:
        """Milliseconds that can still be filled before the step would be over too late."""
        return (self.end - self.context.now) * 1e3 / self.worst - self.ms

    def spread(
        self, streams: list[Sequence], prompts: list[Sequence], jobs: list[tuple[float, float]]
    ) -> None:
        """Take no more tokens of prompts than keep up with the answers that end, if prompts are read soon.

        A step reads all weights for its decodes, and a prompt's tokens cost less beside them. So steps of
        equal length take less time than some that read whole prompts and some that read none. `jobs`: the
        deadline of each prompt, or inf, and its milliseconds; the most urgent first.
        """
        limits, times = self.context.limits, self.context.history.times
        if not streams and len(prompts) < 2:
            return
        hurry, work = 0.0, 0.0  # the share of the time that prompts need
        for deadline, ms in jobs:
            work += ms
            soon = min(SOON_MS, SOON * (deadline - self.context.now) * 1e3)
            if work >= soon:
                return
            hurry = max(hurry, work / soon)
        begun = sum([seq.slot >= 0 for seq in prompts])
        sequences = min(len(streams) + begun + self.waiting, limits.max_running)
        tokens = sequences * self._prompt_share(streams or prompts)
        tokens += self.ms * hurry / (1.0 - hurry) / max(self.cost.per_prefill, 1e-9)
        total = nearest_size(max(len(streams) + tokens, times.saturating))
        rows = limits.max_step_tokens - self.tokens_left
        self.tokens_left = min(self.tokens_left, total - rows if total > rows else SIZES_APART)

    def _prompt_share(self, sequences: list[Sequence]) -> float:
        """The tokens of prompts for each token of an answer, by some of these sequences."""
        some = sequences[:: max(len(sequences) // SAMPLE, 1)]
        answer_tokens = self.context.history.lengths.of
        shares = [seq.prompt_len / answer_tokens(seq.request) for seq in some]
        return sum(shares) / max(len(shares), 1)

    def run(self, seq: Sequence, ms: float) -> None:
        """Compute as much of a sequence as fits in `ms`; admit it first if it waits."""
        if seq.slot < 0:
            self.admit(seq, ms)
        elif seq.remaining == 1:
            if self.cost.row(seq.kv.computed + 1) <= ms or not self.plan.rows:
                self.proceed(seq, 1)
        else:
            self.proceed(seq, self._chunk(seq.kv.computed, seq.remaining, ms))

    def fill(self, sequences: list[Sequence], ms: float) -> float:
        """Run sequences, in order, for at most `ms` of the step; returns the milliseconds they take."""
        before = self.ms
        # A step that has nothing else runs its first token whatever it costs.
        token = self.cost.per_prefill if self.plan.rows else 0.0
        least = min(token, self.cost.per_decode)
        if not sequences or min(self.left_ms, ms) < least:
            return 0.0
        ran = {id(row.seq) for row in self.plan.rows[self.timed_rows :]}
        for seq in sequences:
            left = min(self.left_ms, ms - (self.ms - before))
            if left <= 0 or left < least or self.tokens_left <= 0:
                break
            if seq.slot < 0 and (self.full or left < token):
                break
            if id(seq) not in ran:
                self.run(seq, left)
        return self.ms - before

    def proceed(self, seq: Sequence, count: int) -> None:
        """Compute the next `count` tokens of a running sequence, if there are blocks for them."""
        if seq in self.plan.preempt:
            return
        need = self.blocks_needed(seq, count)
        if count <= 0 or (need > self.free and not self._free_blocks(seq, need)):
            return
        self.free -= need
        self.append(Row.of(seq, seq.kv.computed, count))

    def decode(self, seq: Sequence, start: int, ms: float) -> None:
        """`proceed` in short, for the next token of a stream with `start` tokens: its row takes `ms`."""
        need = -(-(start + 1) // self.context.pool.size) - len(seq.kv.blocks)
        if self.plan.preempt or need > self.free:
            self.proceed(seq, 1)
            return
        self.free -= need
        self.plan.rows.append(Row(seq, start, 1, True))
        self.tokens_left -= 1
        self.ms += ms

    def admit(self, seq: Sequence, ms: float = UNLIMITED_MS) -> None:
        """Admit a waiting sequence and compute as much of its prompt as fits in `ms`.

        A prompt whose next block another sequence is computing waits for that block. In a step that preempts
        a sequence no cached blocks are adopted: the two might share them, and then fewer would become free.
        Nor are they by a sequence whose prompt is scored: all of it has to be computed.
        """
        pool, context = self.context.pool, self.context
        if self._chunk(0, seq.length, ms) <= 0:
            return
        if self.slots_left <= 0 and not self._free_slot(seq):
            return
        anew = bool(self.plan.preempt) or seq.scores is not None
        matched, idle = ([], 0) if anew else pool.match(seq.kv)
        key = pool.next_key(seq.kv, len(matched))
        if key is not None and not anew and (key in self.claimed or pool.expects(key)):
            return
        growth = len(context.queues.running) - len(
            self.plan.preempt
        )  # each may need a block for its next token
        start = len(matched) * pool.size
        count = self._chunk(start, seq.length - start, ms)
        need = pool.blocks_for(start + count) - len(matched) + idle
        if need + growth > self.free:
            matched, start = [], 0
            count = self._chunk(0, seq.length, ms)
            need = pool.blocks_for(count)
            if self._can_wait(seq) or not self._free_blocks(seq, need + growth, among=_after(seq)):
                self.full = True
                return
        if count <= 0:
            return
        self.free -= need
        self.slots_left -= 1
        if key is not None:
            self.claimed.add(key)
        self.plan.admit.append((seq, matched))
        self.append(Row.of(seq, start, count))

    def append(self, row: Row) -> None:
        """Add a row whose blocks are accounted for."""
        self.plan.rows.append(row)
        self.tokens_left -= row.count
        if row.draw and row.count == 1:
            self.ms += self.cost.row(row.start + 1)
        else:
            self.ms += self.cost.prefill(row.start, row.count)

    def blocks_needed(self, seq: Sequence, count: int) -> int:
        """Blocks that a running sequence needs beyond its own for `count` more tokens."""
        return self.context.pool.blocks_for(seq.kv.computed + count) - len(seq.kv.blocks)

    def _chunk(self, start: int, wanted: int, ms: float) -> int:
        """Tokens of a prompt that fit in `ms`. A step that has nothing else takes one, whatever it costs."""
        count = min(wanted, self.tokens_left, self.cost.chunk(start, ms))
        return count if self.plan.rows else max(count, 1)

    def _free_blocks(self, seq: Sequence, need: int, among: int = TIMED) -> bool:
        """Whether `need` blocks are free, after preempting looser sequences of this group and beyond."""
        preempted: list[Sequence] = []
        free = self.free
        looser = self._looser(seq, among) if need > free else []
        while need > free and looser:
            preempted.append(looser.pop())
            free += self.context.pool.freed_by(preempted[-1].kv)
        if need > free:
            return False
        self.free = free
        self._preempt(preempted)
        return True

    def _free_slot(self, seq: Sequence) -> bool:
        """Whether a slot is free for a sequence, after preempting one that has a later group."""
        self.full = True
        if self.held or seq.rank.group == SPARE_TIME:
            return False
        if self._can_wait(seq):
            return False
        looser = self._looser(seq, _after(seq))
        self.held = seq.rank.group == TIMED and not looser and not seq.deadline.late
        if looser:
            self.free += self.context.pool.freed_by(looser[-1].kv)
            self._preempt(looser[-1:])
        return self.slots_left > 0

    def _can_wait(self, seq: Sequence) -> bool:
        """Whether a prompt that waits for a place will still be on time: then no sequence is preempted."""
        if not self.place_waits or seq.rank.group != TIMED:
            return False
        wait_s = self.place_waits[min(self.queued, len(self.place_waits) - 1)]
        alone_s = self.cost.prefill(seq.done, seq.length - seq.done) / 1e3
        self.queued += 1
        return self.context.now + wait_s + alone_s < seq.rank.order

    def _looser(self, seq: Sequence, among: int) -> list[Sequence]:
        """The running sequences that may be preempted for this one, the loosest last.

        None in a step that has admitted a sequence with cached blocks: it may share them with these.
        """
        plan, tightness = self.plan, _tightness(seq)
        if any(matched for _, matched in plan.admit):
            return []
        kept = {id(other) for other in (*(row.seq for row in plan.rows), *plan.preempt, *plan.end)}
        looser = [
            other
            for other in self.context.queues.running
            if other.rank.group >= among and _tightness(other) > tightness and id(other) not in kept
        ]
        return sorted(looser, key=_tightness)

    def _preempt(self, sequences: list[Sequence]) -> None:
        self.slots_left += len(sequences)
        self.plan.preempt += sequences
        for seq in sequences:
            if seq.rank.group == TIMED and not seq.deadline.late:
                rank = Rank(TIMED, seq.rank.negated_weight, seq.deadline.next, seq.request.id)
                self.plan.place.append((seq, rank))


def _after(seq: Sequence) -> int:
    """The first group of those that a waiting sequence may preempt."""
    group = seq.rank.group
    return BEST_EFFORT if group == TIMED else group + 1 if group == SPARE_TIME else SPARE_TIME


def _tightness(seq: Sequence) -> tuple[int, float, int]:
    """Who comes first when not all can: those with a deadline by the next one, then the others by rank."""
    ident, group = seq.request.id, seq.rank.group
    if group < BEST_EFFORT and not seq.deadline.late:
        return TIMED, seq.deadline.next, ident
    return max(group, BEST_EFFORT), seq.rank.order, ident
