"""A recorded load through the real engine and schedule in virtual time: hours in seconds, the same each time.

Only the model is not there: a step costs what a cost model says (and some noise, so that the scheduler's own
model is not exactly right). Answers end where the trace's did, and the scheduler does not know where.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from math import inf
from random import Random

import msgspec
from msgspec import Struct

from stretto.config import Tier
from stretto.deadlines import Deadline
from stretto.engine.core import EngineCore, LoadedModel
from stretto.engine.runners.null import Finished, NullRunner, VirtualClock, null_info
from stretto.engine.scheduler import SCHEDULES
from stretto.engine.scheduler.types import Limits, Plan
from stretto.engine.sequence import Sequence as Running
from stretto.engine.step_time import StepCost, StepLoad, StepTime
from stretto.errors import InvalidRequest, StartError
from stretto.simulator.upper_bound import Work, most_on_time, with_base
from stretto.statistics import Spread, spread
from stretto.types import PREFIX_BLOCK, Arrival, Objective, Reason, Request, Sampling, StepStats, TokenEvent

# A Qwen3-0.6B shape on two cores of a server CPU, int8, in round figures. What was measured on one machine
# is in `benchmarks/times`, for `benchmarks/objectives.py --times`.
SMALL_CPU = StepCost(base=38.0, per_decode=1.5, per_prefill=2.9, per_key=0.0022, per_pair=2e-6)
LONGEST_USUAL = 4100  # tokens of a prompt; nearly all of the Azure conversations are shorter


def tiers_for(cost: StepCost) -> dict[str, Tier]:
    """What a machine of this cost can promise: a first token within three and six times the reading of the
    longest usual prompt, and five and ten times the pace of a stream that is alone."""
    read = (cost.base + cost.prefill(0, LONGEST_USUAL)) * 3
    pace = cost.decodes(1, LONGEST_USUAL // 4) * 5
    return {
        "priority": Tier(objective=Objective(ttft_ms=read, itl_ms=pace), weight=4.0),
        "default": Tier(objective=Objective(ttft_ms=read * 2, itl_ms=pace * 2), weight=2.0),
        "flex": Tier(objective=Objective(), weight=1.0),
    }


CPU_TIERS = tiers_for(SMALL_CPU)
ANSWERED = (Reason.STOP, Reason.LENGTH)
MIX = {"priority": 0.2, "default": 0.6, "flex": 0.2}


class Setting(Struct, frozen=True, kw_only=True):
    """What to replay on. `noise`: the spread of a step's time about its cost (log-normal sigma). `known`:
    what the scheduler believes at first; None: the truth. `load` 1.0 is `capacity`'s rate."""

    schedule: str = "deadline"
    load: float = 1.0
    cost: StepCost = SMALL_CPU
    known: StepCost | None = None
    noise: float = 0.0
    tiers: dict[str, Tier] = msgspec.field(default_factory=lambda: CPU_TIERS)
    mix: dict[str, float] = msgspec.field(default_factory=lambda: MIX)
    seed: int = 0
    context: int = 16384
    blocks: int = 16384
    max_running: int = 256
    max_step_tokens: int = 512

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise StartError(f"--schedule is one of {', '.join(SCHEDULES)}, not {self.schedule}")
        if not 0.01 <= self.load <= 100:
            raise StartError(f"--load must be from 0.01 to 100, not {self.load}")


class TierReport(Struct, frozen=True, kw_only=True):
    """What became of a tier's requests. `on_time` counts those without an objective that were answered.
    `goodput`: on-time answers per second that were over within the time of the arrivals, so what is only
    done once the load has gone does not count; `completed` and `tokens` (per second) likewise.
    `longest_gap_ms`: the longest pause between two tokens of a request that was on time."""

    sent: int
    on_time: int
    attainment: float
    goodput: float
    completed: float
    tokens: float
    refused: int
    overdue: int
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    longest_gap_ms: float


class ReplayReport(Struct, frozen=True, kw_only=True):
    """A replay. `rate`: arrivals per second; `capacity`: what load 1.0 is; `duration_s` to the last arrival,
    `drained_s` to the last end. `wasted`: share of all tokens computed for requests that had an objective and
    were late or never answered. `weighted_goodput`: each on-time answer counts as much as its tier weighs.
    `best_goodput`: no schedule could have more (see `engine.oracle`); prefixes that requests share are not in
    that reckoning. `timed` are all tiers with an objective. Of a real server `server` is the address,
    `errors` counts failures by kind, and what it does not tell is None."""

    schedule: str
    load: float
    rate: float
    capacity: float
    duration_s: float
    drained_s: float
    tokens: int
    wasted: float
    weighted_goodput: float
    tiers: dict[str, TierReport]
    steps: int | None = None
    preemptions: int | None = None
    model_error: float | None = None
    best_goodput: dict[str, float] = {}
    server: str | None = None
    errors: dict[str, int] = {}


@dataclass(slots=True)
class RequestOutcome:
    """What a client of one request would have seen, with a deadline of its own beside the engine's."""

    request: Request
    deadline: Deadline
    first: float = inf
    last: float = inf
    reason: Reason | None = None
    gaps: array[float] = field(default_factory=lambda: array("f"))
    processed: int = 0

    @property
    def good(self) -> bool:
        """Answered, and no token of it late."""
        return not self.deadline.late and self.reason in ANSWERED

    @classmethod
    def of(cls, request: Request) -> RequestOutcome:
        """Nothing has been seen of this request yet."""
        return cls(request, Deadline.of(request.arrival, request.objective))

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self.deadline.emitted

    def on_token(self, now: float) -> None:
        """One more token was seen."""
        if self.count:
            self.gaps.append((now - self.last) * 1e3)
        else:
            self.first = now
        self.last = now
        self.deadline.emit(now)


class TraceRunner(NullRunner):
    """The null model under a cost with noise; notes what it computes for whom."""

    def __init__(self, setting: Setting, clock: VirtualClock, outcomes: Mapping[int, RequestOutcome]) -> None:
        info = null_info(context=setting.context, blocks=setting.blocks)
        super().__init__(info, cost=setting.cost, sleep=clock.sleep)
        self._setting = setting
        self._outcomes = outcomes
        self._rng = Random(f"noise {setting.seed}")

    def step_ms(self, load: StepLoad) -> float:
        noise = self._setting.noise
        return self.cost(load) * (self._rng.lognormvariate(0.0, noise) if noise else 1.0)

    def launch(self, plan: Plan) -> Finished:
        for row in plan.rows:
            self._outcomes[row.seq.request.id].processed += row.count
        return super().launch(plan)


def replay(arrivals: Sequence[Arrival], setting: Setting, *, rate: float | None = None) -> ReplayReport:
    """Run a trace: what `replayed` reports."""
    return replayed(arrivals, setting, rate=rate)[0]


def replayed(
    arrivals: Sequence[Arrival], setting: Setting, *, rate: float | None = None
) -> tuple[ReplayReport, list[RequestOutcome]]:
    """Run a trace, and say of each request what its client would have seen.

    `rate`: requests per second at load 1.0; None: `capacity` is measured first.

    The trace's own time is stretched so that its mean rate is `rate * load`; its bursts stay. Prompts longer
    than the context allows are cut to it. Deterministic by `setting.seed`.
    """
    usable = [within(arrival, setting) for arrival in arrivals]
    full = capacity(usable, setting) if rate is None else rate
    requests = planned(usable, setting, full)
    outputs = [arrival.output_tokens for arrival in usable]
    world = World(setting, share=any(arrival.prefix for arrival in usable))
    report = world.run(requests, outputs, full)
    best = _bounds(requests, outputs, setting)
    return msgspec.structs.replace(report, best_goodput=best), list(world.outcomes.values())


def planned(arrivals: Sequence[Arrival], setting: Setting, rate: float) -> list[Request]:
    """The trace's requests at the setting's load, where load 1.0 is `rate`, each of a tier that is drawn."""
    span = max(arrivals[-1].at - arrivals[0].at, 1e-9)
    stretch = (len(arrivals) / (rate * setting.load)) / span
    rng = Random(f"tiers {setting.seed}")
    names = rng.choices(list(setting.mix), list(setting.mix.values()), k=len(arrivals))
    return [
        _request(
            ident, msgspec.structs.replace(arrival, at=arrival.at * stretch), (name, setting.tiers[name])
        )
        for ident, (arrival, name) in enumerate(zip(arrivals, names, strict=True), 1)
    ]


def _bounds(requests: Sequence[Request], outputs: Sequence[int], setting: Setting) -> dict[str, float]:
    best = {
        "all": bound(requests, outputs, setting),
        "weighted": bound(requests, outputs, setting, weighted=True),
    }
    timed = [pair for pair in zip(requests, outputs, strict=True) if pair[0].objective.timed]
    if timed:
        best["timed"] = bound([one for one, _ in timed], [tokens for _, tokens in timed], setting)
    return best


def capacity(arrivals: Sequence[Arrival], setting: Setting, most: int = 2000) -> float:
    """Requests per second that `fcfs` completes when all of them (the first `most`) wait from the start: it
    then never idles and batches best, so load 1.0 is where it saturates."""
    nobody = ("flex", Tier(objective=Objective(), weight=1.0))
    waiting = [msgspec.structs.replace(within(arrival, setting), at=0.0) for arrival in arrivals[:most]]
    backlog = [_request(ident, arrival, nobody) for ident, arrival in enumerate(waiting, 1)]
    quiet = msgspec.structs.replace(setting, schedule="fcfs", noise=0.0)
    world = World(quiet, share=any(arrival.prefix for arrival in arrivals[:most]))
    report = world.run(backlog, [arrival.output_tokens for arrival in arrivals[:most]], 0.0)
    return len(backlog) / report.drained_s


class World:
    """One engine of one null model, its virtual clock, and all that it said."""

    def __init__(self, setting: Setting, *, share: bool) -> None:
        self._setting = setting
        self._clock = VirtualClock()
        self.outcomes: dict[int, RequestOutcome] = {}
        self._steps = self._tokens = self._preemptions = 0
        self._runner = TraceRunner(setting, self._clock, self.outcomes)
        self.engine = EngineCore(
            [LoadedModel(self._runner, StepTime(setting.known or setting.cost, [setting.noise] * 16))],
            limits=Limits(setting.max_running, setting.max_step_tokens, setting.tiers),
            schedule=SCHEDULES[setting.schedule],
            clock=self._clock,
            emit=self._emitted,
            share=share,
        )
        (lane,) = self.engine.models.values()
        self._lane = lane

    def run(self, requests: Sequence[Request], outputs: Sequence[int], full: float) -> ReplayReport:
        """Send each request when it arrives, and jump over the time when there is nothing to do."""
        coming = 0
        while coming < len(requests) or not self.engine.idle:
            now = self._clock()
            while coming < len(requests) and requests[coming].arrival <= now:
                self._submit(requests[coming], outputs[coming])
                coming += 1
            if self.engine.step():
                continue
            if coming < len(requests):
                self._clock.sleep(max(requests[coming].arrival - self._clock(), 0.0))
            elif not self.engine.idle:
                raise RuntimeError("the schedule runs nothing, and requests are left")
        return self._report(requests, full)

    def _submit(self, request: Request, output_tokens: int) -> None:
        """The answer's length is in the sequence's limit, where the runner's end would be; the request asks
        for no limit, which is all that a schedule looks at."""
        limit = min(len(request.prompt) + output_tokens, self._setting.context)
        seq = Running.of(request, limit)
        self.outcomes[request.id] = RequestOutcome.of(request)
        self.engine.submit(seq)

    def _emitted(self, events: list[TokenEvent], stats: StepStats | None) -> None:
        now = self._clock()
        for event in events:
            outcome = self.outcomes[event.id]
            if event.token is not None:
                outcome.on_token(now)
            if event.finish is not None:
                outcome.reason = event.finish.reason
                outcome.last = now
        if stats is not None:
            self._steps += 1
            self._preemptions += stats.preempted

    def _report(self, requests: Sequence[Request], full: float) -> ReplayReport:
        outcomes, end = list(self.outcomes.values()), requests[-1].arrival
        tiers = by_tier(outcomes, self._setting.tiers, end)
        return ReplayReport(
            schedule=self._setting.schedule,
            load=self._setting.load,
            rate=len(outcomes) / end if end else 0.0,
            capacity=full,
            duration_s=end,
            drained_s=self._clock(),
            steps=self._steps,
            tokens=sum(one.processed for one in outcomes),
            wasted=wasted(outcomes),
            preemptions=self._preemptions,
            model_error=self._lane.history.times.error,
            weighted_goodput=weighted(tiers, self._setting.tiers),
            tiers=tiers,
        )


def bound(
    requests: Sequence[Request], outputs: Sequence[int], setting: Setting, *, weighted: bool = False
) -> float:
    """Goodput that no schedule exceeds, by `engine.oracle`: each request's own work and its part of the steps
    it needs, due with its last token or with the last arrival, whichever is first. `weighted`: each counts as
    much as its tier weighs."""
    cost, end = setting.cost, requests[-1].arrival
    works: list[Work] = []
    for request, tokens in zip(requests, outputs, strict=True):
        prompt = len(request.prompt)
        due = min(Deadline.of(request.arrival, request.objective).of_token(tokens - 1), end)
        spoken = (tokens - 1) * cost.row(prompt + tokens // 2)
        seconds = (cost.prefill(0, prompt) + spoken) / 1e3
        if due - request.arrival >= seconds:
            worth = setting.tiers[request.tier].weight if weighted else 1.0
            works.append(Work(request.arrival, due, seconds, tokens, worth))
    return most_on_time(with_base(works, cost.base / 1e3)) / end


def _request(ident: int, arrival: Arrival, tier: tuple[str, Tier]) -> Request:
    """A trace's request: its prompt has equal tokens where the trace's prompts have equal beginnings."""
    tokens = (0,) * arrival.prompt_tokens
    if arrival.prefix:
        ids = (block * PREFIX_BLOCK + offset for block in arrival.prefix for offset in range(PREFIX_BLOCK))
        tokens = tuple(islice(chain(ids, repeat(-ident)), arrival.prompt_tokens))
    name, row = tier
    return Request(
        id=ident,
        model="null",
        prompt=tokens,
        arrival=arrival.at,
        sampling=Sampling(seed=ident),
        tenant=arrival.tenant,
        objective=row.objective,
        tier=name,
    )


def within(arrival: Arrival, setting: Setting) -> Arrival:
    """Its prompt cut to what the context leaves. Raises InvalidRequest when the answer alone exceeds it."""
    room = setting.context - arrival.output_tokens
    if room < 1:
        raise InvalidRequest(
            f"an answer of {arrival.output_tokens} tokens exceeds a context of {setting.context}"
        )
    return msgspec.structs.replace(arrival, prompt_tokens=min(arrival.prompt_tokens, room))


def by_tier(outcomes: Sequence[RequestOutcome], tiers: Iterable[str], end: float) -> dict[str, TierReport]:
    """Each tier's report, that of all with an objective, and that of all; arrivals ended at `end`."""
    groups = {name: [one for one in outcomes if one.request.tier == name] for name in tiers}
    groups |= {"timed": [one for one in outcomes if one.request.objective.timed], "all": list(outcomes)}
    return {name: _tier_report(group, end) for name, group in groups.items()}


def weighted(reports: Mapping[str, TierReport], tiers: Mapping[str, Tier]) -> float:
    """Goodput in which each answer counts as much as its tier weighs."""
    return sum(tier.weight * reports[name].goodput for name, tier in tiers.items())


def wasted(outcomes: Sequence[RequestOutcome]) -> float:
    """The share of all tokens computed that went to those with an objective who were late or got nothing."""
    total = sum(one.processed for one in outcomes)
    lost = sum(one.processed for one in outcomes if one.request.objective.timed and not one.good)
    return lost / total if total else 0.0


def _tier_report(group: Sequence[RequestOutcome], end: float) -> TierReport:
    good = [one for one in group if one.good]
    spoke = [one for one in group if one.count]
    in_time = [one for one in group if one.last <= end and one.reason in ANSWERED]
    span = end or 1.0
    return TierReport(
        sent=len(group),
        on_time=len(good),
        attainment=len(good) / len(group) if group else 1.0,
        goodput=sum(1 for one in good if one.last <= end) / span,
        completed=len(in_time) / span,
        tokens=sum(one.count for one in in_time) / span,
        refused=sum(1 for one in group if one.reason is Reason.REFUSED),
        overdue=sum(1 for one in group if one.reason is Reason.DEADLINE),
        ttft_ms=spread((one.first - one.request.arrival) * 1e3 for one in spoke),
        tpot_ms=spread(sum(one.gaps) / len(one.gaps) for one in spoke if one.gaps),
        itl_ms=spread(gap for one in spoke for gap in one.gaps),
        longest_gap_ms=max((max(one.gaps, default=0.0) for one in good), default=0.0),
    )
