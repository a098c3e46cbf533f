"""Which batches may be sent twice, and when they have stalled."""

import pytest

from router.core.hedge import BATCHES_PER_HEDGE, MAX_SAVED_HEDGES, Hedging
from router.core.service_time import FAST_S, MIN_CALLS, ServiceTimes

ROWS = 8


def hedging(*service_s: float, is_allowed: bool = True, budget: bool = True, sent: int = BATCHES_PER_HEDGE) -> Hedging:
    times = ServiceTimes()
    for one in service_s:
        times.observe("r:1", ROWS, one)
    found = Hedging(times, lambda _rows, _now: budget, is_allowed=is_allowed)
    for _ in range(sent - 1):
        found.sent(ROWS)
    return found


def test_a_batch_has_stalled_when_it_is_out_for_longer_than_p99_and_the_least_time() -> None:
    constant = hedging(*[1.0] * 50)
    assert constant.sent(ROWS) == pytest.approx(2.0)
    scattered = hedging(*[1.0] * 98, 3.0, 3.0)
    line = scattered.times.overall
    assert scattered.sent(ROWS) == pytest.approx(line.predict_p99(ROWS) + 1.0)
    assert line.predict_p99(ROWS) == pytest.approx(3.0, abs=0.2)


def test_before_20_calls_nobody_knows_what_a_stall_is() -> None:
    assert hedging(*[1.0] * (MIN_CALLS - 1)).sent(ROWS) is None
    assert hedging(*[1.0] * MIN_CALLS).sent(ROWS) is not None


def test_calls_that_are_fast_are_not_worth_a_timer() -> None:
    assert hedging(*[FAST_S * 0.99] * 50).sent(ROWS) is None
    assert hedging(*[FAST_S] * 50).sent(ROWS) is not None


def test_models_with_side_effects_are_never_sent_twice() -> None:
    assert hedging(*[1.0] * 50, is_allowed=False).sent(ROWS) is None


def test_a_model_that_has_side_effects_from_now_on_is_not_sent_twice_either() -> None:
    key = hedging(*[1.0] * 50)
    assert key.sent(ROWS) is not None
    key.is_allowed = False
    assert not key.may_hedge(ROWS, 0.0)


def test_at_most_one_batch_in_a_hundred_is_sent_twice() -> None:
    key = hedging(*[1.0] * 50, sent=BATCHES_PER_HEDGE)
    assert not key.may_hedge(ROWS, 0.0)  # 99 were sent
    assert key.sent(ROWS)
    assert key.may_hedge(ROWS, 0.0)
    assert not key.may_hedge(ROWS, 0.0)
    assert [key.sent(ROWS) is None for _ in range(BATCHES_PER_HEDGE)] == [True] * (BATCHES_PER_HEDGE - 1) + [False]


def test_what_is_saved_has_a_bound() -> None:
    key = hedging(*[1.0] * 50, sent=100_000)
    assert [key.may_hedge(ROWS, 0.0) for _ in range(MAX_SAVED_HEDGES + 1)] == [True] * MAX_SAVED_HEDGES + [False]


def test_the_keys_retry_budget_has_a_say() -> None:
    key = hedging(*[1.0] * 50, budget=False)
    assert key.sent(ROWS)
    assert not key.may_hedge(ROWS, 0.0)
