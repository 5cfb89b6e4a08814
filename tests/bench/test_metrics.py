"""Benchmark metrics, checked on cases small enough to compute by hand."""

from __future__ import annotations

import pytest

from stretto.bench.metrics import GoodputLimits, Sample, is_good, peak_concurrency, report

# Three tokens arrive 0.1, 0.2 and 0.4 s after sending. The last one comes with the finish event.
THREE = Sample(started=10.0, stamps=(10.1, 10.2, 10.4), ended=10.4, prompt_tokens=7, output_tokens=3)
ONE = Sample(started=11.0, stamps=(11.5,), ended=11.5, prompt_tokens=5, output_tokens=1)
FAILED = Sample(started=11.0, ended=11.0, error="HTTP 503", detail="the queue is full")


def test_ttft_itl_tpot_and_e2e_of_one_request() -> None:
    assert THREE.ttft == pytest.approx(0.1)
    assert THREE.e2e == pytest.approx(0.4)
    assert THREE.tpot == pytest.approx((0.4 - 0.1) / 2)
    assert THREE.itls == pytest.approx([0.1, 0.2])


def test_a_single_token_has_no_tpot_and_no_itl() -> None:
    assert (ONE.tpot, ONE.itls) == (None, [])


def test_tpot_counts_tokens_where_itl_counts_events() -> None:
    """The server reports four tokens, but the client receives only two events."""
    sample = Sample(started=0.0, stamps=(1.0, 1.6), ended=1.6, output_tokens=4)
    assert sample.tpot == pytest.approx(0.2)
    assert sample.itls == pytest.approx([0.6])


def test_a_report_has_totals_and_percentiles_of_all_requests() -> None:
    seen = report([THREE, ONE, FAILED, FAILED], duration_s=2.0)
    assert (seen.sent, seen.completed, seen.failed, seen.errors) == (4, 2, 2, {"HTTP 503": 2})
    assert (seen.input_tokens, seen.output_tokens) == (12, 4)
    assert (seen.requests_per_s, seen.output_tokens_per_s, seen.total_tokens_per_s) == (1.0, 2.0, 8.0)
    assert seen.ttft_ms is not None and seen.ttft_ms.mean == pytest.approx(300)
    assert seen.tpot_ms is not None and seen.tpot_ms.max == pytest.approx(150), "the single token is left out"
    assert seen.itl_ms is not None and seen.itl_ms.max == pytest.approx(200)
    assert seen.e2e_ms is not None and seen.e2e_ms.p50 == pytest.approx(450)
    assert (seen.goodput, seen.good_share) == (None, None)


def test_goodput_is_per_second_and_attainment_is_of_all_sent() -> None:
    seen = report([THREE, ONE, FAILED, FAILED], duration_s=2.0, limits=GoodputLimits(ttft_ms=200))
    assert (seen.goodput, seen.good_share) == (0.5, 0.25)


def test_goodput_needs_every_limit_and_includes_equality() -> None:
    sample = Sample(started=0.0, stamps=(0.25, 0.5), ended=0.75, output_tokens=2)
    assert is_good(sample, GoodputLimits(ttft_ms=250, tpot_ms=500, e2e_ms=750))
    assert not is_good(sample, GoodputLimits(ttft_ms=249))
    assert not is_good(sample, GoodputLimits(tpot_ms=499))
    assert not is_good(sample, GoodputLimits(e2e_ms=749))
    assert is_good(ONE, GoodputLimits(tpot_ms=0.001))


def test_a_run_without_any_answer_is_reported() -> None:
    seen = report([FAILED], duration_s=1.0, limits=GoodputLimits(e2e_ms=1))
    assert (seen.completed, seen.goodput, seen.good_share, seen.ttft_ms, seen.itl_ms) == (
        0,
        0.0,
        0.0,
        None,
        None,
    )


def test_peak_concurrency_is_the_maximum_of_open_requests() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)]
    samples = [Sample(started=start, stamps=(end,), ended=end) for start, end in spans]
    assert peak_concurrency(samples) == 2
    assert peak_concurrency([]) == 0
