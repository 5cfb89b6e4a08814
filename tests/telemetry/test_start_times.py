"""Where the time of a start goes."""

from __future__ import annotations

from stretto.telemetry.start_times import StartTimes, told


def test_each_second_belongs_to_the_innermost_part() -> None:
    now = [0.0]
    times = StartTimes(lambda: now[0])

    def pass_s(seconds: float) -> None:
        now[0] += seconds

    pass_s(1.0)
    with times.part("weights"):
        pass_s(2.0)
        with times.part("imports"):
            pass_s(3.0)
        pass_s(4.0)
    pass_s(5.0)
    with times.part("imports"):
        pass_s(6.0)
    assert times.seconds == {"weights": 6.0, "imports": 9.0}
    assert list(times.seconds) == ["weights", "imports"]


def test_a_part_that_fails_is_counted_and_closed() -> None:
    now = [0.0]
    times = StartTimes(lambda: now[0])
    try:
        with times.part("weights"):
            now[0] += 2.0
            raise RuntimeError
    except RuntimeError:
        now[0] += 1.0
    with times.part("graphs"):
        now[0] += 3.0
    assert times.seconds == {"weights": 2.0, "graphs": 3.0}


def test_the_parts_and_the_rest_add_up_and_short_parts_are_left_out() -> None:
    line = told(11.5, {"imports": 3.1, "device": 0.04, "graphs": 3.3})
    assert line == "11.5 s: imports 3.1, graphs 3.3, rest 5.1"
    assert told(1.0, {}) == "1.0 s: rest 1.0"
