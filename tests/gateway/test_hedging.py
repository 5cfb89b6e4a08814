"""Second attempts in virtual time, with one of several workers slowed ten times now and then."""

from __future__ import annotations

from benchmarks import hedging


def test_second_attempts_halve_the_slowest_first_tokens_for_little_extra_work():
    without = hedging.run(800, load=0.5, slow=10.0, share=0.0)
    hedged = hedging.run(800, load=0.5, slow=10.0, share=0.05)
    assert hedged.ttft_p99_ms <= 0.5 * without.ttft_p99_ms
    assert hedged.tokens <= 1.05 * without.tokens
    assert hedged.on_time >= without.on_time and hedged.won > 0


def test_there_are_no_second_attempts_in_an_overload():
    calm = hedging.run(800, load=0.5, slow=10.0, share=1.0)
    overloaded = hedging.run(800, load=3.0, slow=10.0, share=1.0)
    assert calm.seconds >= 10
    assert overloaded.seconds <= min(calm.seconds / 2, 0.01 * 800)  # those before the overload shows
