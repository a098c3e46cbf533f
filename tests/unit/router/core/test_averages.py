"""Averages that forget."""

import math

import pytest

from router.core.averages import Mean, Rate


def test_a_mean_follows_the_newest_values() -> None:
    mean = Mean(0.2)
    assert mean.value is None
    mean.add(1.0)
    assert mean.value == 1.0
    mean.add(2.0)
    assert mean.value == pytest.approx(1.2)


def test_a_rate_settles_at_the_truth_and_decays_when_nothing_comes() -> None:
    rate = Rate()
    for number in range(1000):
        rate.add(1, number * 0.01, span_s=0.25)
    assert rate.at(9.99, span_s=0.25) == pytest.approx(100, rel=0.03)
    assert rate.at(9.99 + 0.25, span_s=0.25) == pytest.approx(100 / math.e, rel=0.03)
