"""The price of machine time: nothing while all fits, and then just enough."""

from __future__ import annotations

from random import Random
from time import process_time

from stretto.ladder.price import (
    EVERY_S,
    FULL,
    HALF_LIFE_S,
    HORIZON_S,
    KEPT,
    LONGEST_S,
    TimePrice,
    WorkOption,
)

TOP, LIGHT = (1000.0, 0.9), (100.0, 0.6)


def taken(price: float, options: tuple[WorkOption, ...]) -> WorkOption:
    return max(options, key=lambda option: option[1] - price * option[0])


def at_rate(per_second: float, options: tuple[WorkOption, ...] = (TOP, LIGHT)) -> TimePrice:
    price = TimePrice()
    for number in range(int(30 * per_second)):
        price.offer(number / per_second, options)
    return price


def seen(price: TimePrice, now: float) -> float:
    price.update(now)
    return price.value()


def test_time_is_free_while_the_best_variants_fit() -> None:
    assert seen(at_rate(0.5), 30.0) == 0.0
    assert seen(TimePrice(), 5.0) == 0.0


def test_of_equal_requests_as_many_take_the_better_variant_as_fit() -> None:
    price = at_rate(2.0)
    chosen = [taken(seen(price, 30.0), (TOP, LIGHT)) for _ in range(100)]
    work_ms = sum(work_ms for work_ms, _ in chosen)
    assert abs(work_ms / (100 / 2.0 * 1e3) - FULL) < 0.03
    assert chosen[:50].count(TOP) in range(chosen.count(TOP) // 2 - 1, chosen.count(TOP) // 2 + 2)


def test_of_different_requests_those_gain_most_that_need_the_better_variant() -> None:
    rng, price = Random(0), TimePrice()
    asked = [((1000.0, rng.random()), (100.0, 0.1)) for _ in range(60)]
    for number, options in enumerate(asked):
        price.offer(10.0 + number / 3, options)  # 3 requests a second: 3 s of work for the top in each second
    value = seen(price, 30.0)
    chosen = [taken(value, options) for options in asked]
    assert taken(seen(price, 30.0), asked[0]) == chosen[0]
    work_s = sum(work_ms for work_ms, _ in chosen) / 1e3
    assert 0.6 * FULL * HORIZON_S < work_s < 1.1 * FULL * HORIZON_S
    gains = [options[0][1] for options in asked]
    heavy = {gain for gain, option in zip(gains, chosen, strict=True) if option[0] == 1000.0}
    assert min(heavy) > max(gain for gain in gains if gain not in heavy), "the largest gains get the time"


def test_an_overload_beyond_all_variants_takes_the_lightest() -> None:
    assert taken(seen(at_rate(100.0), 30.0), (TOP, LIGHT)) == LIGHT


def test_old_requests_are_forgotten_and_memory_is_bounded() -> None:
    price = at_rate(50.0)
    assert seen(price, 30.0) > 0.0
    assert seen(price, 30.0 + EVERY_S / 2) > 0.0, "kept until the next look"
    assert seen(price, 31.0 + LONGEST_S) == 0.0
    assert len(price._recent) <= KEPT  # pyright: ignore[reportPrivateUsage]


def bursting(patience_ms: float) -> TimePrice:
    """A request every 4 s, and then 16 within 0.4 s."""
    price = TimePrice()
    for number in range(20):
        price.offer(4.0 * number, (TOP, LIGHT), patience_ms)
    for number in range(16):
        price.offer(80.0 + number / 40, (TOP, LIGHT), patience_ms)
    return price


def test_a_peak_has_a_price_at_once_if_its_requests_cannot_wait_for_it() -> None:
    assert taken(seen(bursting(2e3), 80.4), (TOP, LIGHT)) == LIGHT


def test_work_that_waits_has_a_price_without_more_requests() -> None:
    price = TimePrice()
    for number in range(20):  # half of the time
        price.offer(2.0 * number, (TOP, LIGHT), 2e3)
    price.update(40.0)
    assert price.value() == 0.0
    price.update(41.0, backlog_ms=20e3)
    assert taken(price.value(), (TOP, LIGHT)) == LIGHT


def test_a_price_falls_by_half_at_the_fastest() -> None:
    price = TimePrice()
    for number in range(20):
        price.offer(2.0 * number, (TOP, LIGHT), 2e3)
    price.update(40.0, backlog_ms=20e3)
    high = price.value()
    price.update(40.0 + HALF_LIFE_S)
    assert 0.49 * high < price.value() < 0.51 * high
    price.update(41.0 + HALF_LIFE_S + HORIZON_S)
    assert price.value() == 0.0


def test_a_new_price_takes_little_time() -> None:
    price = at_rate(100.0, tuple((100.0 * (k + 1), 0.5 + k / 20) for k in range(5)))
    best = 1.0
    for round_ in range(10):
        started = process_time()
        seen(price, 30.0 + round_)
        best = min(best, process_time() - started)
    assert best < 5e-3
