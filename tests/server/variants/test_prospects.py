"""What a newcomer finds at a variant: the quick answers are those of the scheduler's own estimate."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from stretto.deadlines import Deadline, first_due
from stretto.engine.scheduler.admission import Snapshot
from stretto.engine.scheduler.moore_hodgson import Job
from stretto.server.variants.prospects import MOST_ROOMS, PreparedSnapshot, Prospects
from stretto.types import Objective
from tests.server.variants.snapshots import FULL, INT8, WEIGHTS, outlook

NOW = 1000.0
MS = st.one_of(st.none(), st.floats(0.5, 5000))
JOBS = st.lists(st.tuples(st.floats(NOW - 0.1, NOW + 3), st.floats(0.1, 400), st.just(1.0)), max_size=5)


def seen(jobs: dict[float, list[Job]], shares: dict[float, float], streams: int) -> Snapshot:
    made = outlook(
        FULL, jobs=jobs, streams=streams, itl_ms=60.0 if streams else inf, load=0.05 * streams
    ).seen
    assert made is not None
    return structs.replace(made, inflow=shares)


@given(
    st.dictionaries(st.sampled_from(WEIGHTS), JOBS.map(sorted)),
    st.dictionaries(st.sampled_from(WEIGHTS), st.floats(0, 0.9)),
    st.integers(0, 4),
)
def test_those_wait_that_the_scheduler_would_not_defer(
    jobs: dict[float, list[Job]], shares: dict[float, float], streams: int
) -> None:
    snapshot = seen(jobs, shares, streams)
    late = snapshot.estimate.defer(snapshot.prompts, lambda weight: shares.get(weight, 0.0), NOW).late_by
    every = [(weight, job) for weight, group in snapshot.prompts.items() for job in group]
    kept = [each for index, each in enumerate(every) if index not in late]
    found = PreparedSnapshot.of(snapshot).waiting
    assert [(weight, due) for weight, dues, _ in found for due in dues] == [(w, job[0]) for w, job in kept]


@given(MS, MS, MS, st.floats(0, 1e6))
def test_the_first_deadline_is_that_of_all_deadlines(
    ttft_ms: float | None, itl_ms: float | None, total_ms: float | None, arrival: float
) -> None:
    objective = Objective(ttft_ms=ttft_ms, itl_ms=itl_ms, total_ms=total_ms)
    assert first_due(arrival, objective) == Deadline.of(arrival, objective).of_token(0)


def test_what_is_remembered_is_forgotten_with_a_new_snapshot_and_is_bounded() -> None:
    outlooks = {"full": outlook(FULL), "int8": outlook(INT8)}
    prospects = Prospects(lambda: outlooks)

    def pace(itl_ms: float | None) -> float:
        return prospects.standings(outlooks, Objective(itl_ms=itl_ms), 1.0, NOW, 50, {})["full"].pace

    idle = pace(200.0)
    assert pace(200.0) == idle > pace(50.0), "a shorter target leaves less for prompts"
    outlooks["full"].see(seen({}, {1.0: 0.3}, 2))
    assert pace(200.0) < idle - 0.3
    for number in range(3 * MOST_ROOMS):
        assert pace(100.0 + number) <= pace(101.0 + number)
    assert len(prospects._rooms) <= MOST_ROOMS  # pyright: ignore[reportPrivateUsage]
