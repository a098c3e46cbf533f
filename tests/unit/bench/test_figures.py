"""Percentiles, rates and medians of the benchmark."""

import pytest

from bench.figures import Figures, median_of, percentile_ms, ratio, us_per_vector


def test_percentiles_are_in_milliseconds_and_lie_between_the_two_nearest() -> None:
    latencies_us = [1000, 2000, 3000, 4000, 5000]
    assert percentile_ms(latencies_us, 50) == 3.0
    assert percentile_ms(latencies_us, 99) == pytest.approx(4.96)
    assert percentile_ms([700], 99) == 0.7


def test_without_an_answer_there_is_no_percentile_no_cost_and_no_ratio() -> None:
    assert percentile_ms([], 50) is None
    assert us_per_vector(0.5, 0.0) is None
    assert ratio(100.0, 0.0) is None


def test_half_a_core_for_10_000_vectors_a_second_is_50_us_each() -> None:
    assert us_per_vector(0.5, 10_000) == 50.0
    assert us_per_vector(None, 10_000) is None


def test_the_median_is_taken_figure_by_figure_over_the_rounds_that_know_it() -> None:
    rounds = [
        Figures(100, 1600, p50_ms=9.0, batch_rows=None),
        Figures(300, 4800, p50_ms=1.0, batch_rows=64.0),
        Figures(200, 3200, p50_ms=2.0, batch_rows=32.0),
    ]
    assert median_of(rounds) == Figures(200, 3200, p50_ms=2.0, batch_rows=48.0)


def test_failures_add_up_and_the_first_one_speaks() -> None:
    rounds = [Figures(1, 1), Figures(1, 1, failed=2, failure="first"), Figures(1, 1, failed=3, failure="second")]
    assert median_of(rounds) == Figures(1, 1, failed=5, failure="first")
