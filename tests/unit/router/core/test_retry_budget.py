"""How much may be tried again."""

import pytest

from router.core.averages import RecentSum
from router.core.retry_budget import MIN_BATCHES, SPAN_S, RetryBudget


def test_a_few_batches_are_always_allowed() -> None:
    budget = RetryBudget()
    assert [budget.may_spend(64, 0.0) for _ in range(MIN_BATCHES + 1)] == [True] * MIN_BATCHES + [False]


def test_beyond_these_a_tenth_of_the_keys_rows_is() -> None:
    budget = RetryBudget()
    for _ in range(MIN_BATCHES):
        assert budget.may_spend(10, 0.0)
    budget.sent(399, 0.0)
    assert not budget.may_spend(10, 1.0)
    budget.sent(1, 1.0)
    assert budget.may_spend(10, 1.0)
    assert not budget.may_spend(1, 1.0)


def test_a_refusal_is_not_charged() -> None:
    budget = RetryBudget()
    for _ in range(MIN_BATCHES):
        budget.may_spend(1, 0.0)
    budget.sent(100, 0.0)
    assert not budget.may_spend(8, 0.0)
    assert budget.may_spend(7, 0.0)


def test_what_was_spent_is_forgiven_after_the_span_and_what_was_sent_forgotten() -> None:
    budget = RetryBudget()
    budget.sent(1000, 0.0)
    assert [budget.may_spend(50, 0.0) for _ in range(3)] == [True] * 3
    assert not budget.may_spend(1, SPAN_S)
    later = 1.1 * SPAN_S + 0.001
    assert [budget.may_spend(50, later) for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(("now", "total"), [(3.5, 3), (29.9, 3), (32.9, 3), (33.0, 2), (36.4, 2), (36.5, 0)])
def test_a_recent_sum_forgets_by_tenths_of_its_span(now: float, total: int) -> None:
    recent = RecentSum(30.0)
    recent.add(1, 0.0)
    recent.add(2, 3.5)
    assert recent.at(now) == total


def test_a_recent_sum_takes_few_numbers_however_much_is_added() -> None:
    recent = RecentSum(30.0)
    for second in range(100):
        recent.add(1, float(second))
        assert recent.at(float(second)) <= 34
    assert 30 <= recent.at(99.0) <= 34
