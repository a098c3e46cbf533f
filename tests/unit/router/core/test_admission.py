"""Whom the router turns away on arrival, and what it tells him."""

import math

import pytest

from router.core.admission import (
    DEFAULT_RETRY_AFTER_S,
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    REFUSED_PER_TRIAL,
    Admission,
)
from router.core.service_time import MIN_CALLS, ServiceTimes
from router.errors import DeadlineExceeded, ResourceExhausted

FREE_SLOT = [0.0]


def admission_after(calls: int, service_s: float = 5.0, *, batch_rows: int = 64, slots: int = 4) -> Admission:
    times = ServiceTimes()
    for _ in range(calls):
        times.observe("replica:1", batch_rows, service_s)
    admission = Admission()
    admission.update(times, batch_rows=batch_rows, slots=slots, keys=1)
    return admission


def test_nobody_is_turned_away_before_twenty_calls() -> None:
    admission = admission_after(MIN_CALLS - 1)
    admission.check(100_000, 0.001, FREE_SLOT, 1)
    settled = admission_after(MIN_CALLS)
    with pytest.raises(DeadlineExceeded, match=r"^0\.001 s are left to the deadline, and a call takes at least 5 s$"):
        settled.check(100_000, 0.001, FREE_SLOT, 1)


def test_the_shortest_call_just_fits_or_just_does_not() -> None:
    admission = admission_after(MIN_CALLS)
    admission.check(0, 5.0, FREE_SLOT, 1)
    with pytest.raises(DeadlineExceeded):
        admission.check(0, 4.999, FREE_SLOT, 1)


def test_of_rows_that_have_no_hope_one_in_twenty_is_tried() -> None:
    """Bug: after a slow hour callers with less patience than that were refused for ever; no call told of its end."""
    admission = admission_after(MIN_CALLS, 50.0)
    for _ in range(2):
        for _ in range(REFUSED_PER_TRIAL - 1):
            with pytest.raises(DeadlineExceeded):
                admission.check(0, 10.0, FREE_SLOT, 1)
        admission.check(0, 10.0, FREE_SLOT, 1)
    times = ServiceTimes()
    for _ in range(MIN_CALLS):
        times.observe("replica:1", 64, 5.0)
    admission.update(times, batch_rows=64, slots=4, keys=1)
    admission.check(0, 10.0, FREE_SLOT, 1)


def test_nothing_is_tried_while_the_model_answers_or_without_any_time() -> None:
    times = ServiceTimes()
    for _ in range(MIN_CALLS):
        times.observe("replica:1", 64, 50.0)
    admission = Admission()
    for _ in range(3 * REFUSED_PER_TRIAL):
        admission.update(times, batch_rows=64, slots=4, keys=1)
        with pytest.raises(DeadlineExceeded):
            admission.check(0, 10.0, FREE_SLOT, 1)
    for _ in range(3 * REFUSED_PER_TRIAL):
        with pytest.raises(DeadlineExceeded):
            admission.check(0, 0.0, FREE_SLOT, 1)


def test_with_nothing_ahead_a_row_is_taken_though_it_will_hardly_be_in_time() -> None:
    times = ServiceTimes()
    for number in range(100):
        times.observe("replica:1", 64, 5.0 if number < 50 else 7.0)
    admission = Admission()
    admission.update(times, batch_rows=64, slots=1, keys=1)
    assert admission.p90_s > 6
    admission.check(0, 5.5, [4.0], 1)
    with pytest.raises(ResourceExhausted):
        admission.check(1, 5.5, [4.0], 1)


@pytest.mark.parametrize(
    ("rows_ahead", "wait_s"),
    [(63, 1.0), (64, 2.0), (130, 3.0), (255, 4.0), (256, 6.0), (512, 11.0)],
)
def test_the_wait_is_until_the_slot_of_its_batch_comes_back(rows_ahead: int, wait_s: float) -> None:
    admission = admission_after(MIN_CALLS)
    returns_s = [1.0, 2.0, 3.0, 4.0]
    admission.check(rows_ahead, wait_s + 5.0 + 1e-9, returns_s, 1)
    with pytest.raises(ResourceExhausted, match=f"{rows_ahead} rows wait ahead") as refusal:
        admission.check(rows_ahead, wait_s + 5.0 - 0.5, returns_s, 1)
    assert refusal.value.reason == "estimated_wait"
    assert refusal.value.retry_after_s == pytest.approx(0.5)


def test_keys_of_one_model_share_its_slots() -> None:
    admission = admission_after(MIN_CALLS)
    admission.check(64, 7.1, [1.0, 2.0, 3.0, 4.0], 1)
    with pytest.raises(ResourceExhausted):
        admission.check(64, 7.1, [1.0, 2.0, 3.0, 4.0], 3)  # the fourth batch of the model
    admission.check(64, 9.1, [1.0, 2.0, 3.0, 4.0], 3)


def test_whoever_is_surely_in_time_would_be_taken_by_the_closer_look() -> None:
    admission = admission_after(MIN_CALLS)
    for rows in (1, 63, 64, 65, 500, 5000):
        left_s = next(left / 10 for left in range(10_000) if rows * admission.row_s + admission.own_s <= left / 10)
        admission.check(rows - 1, left_s, [5.0] * 4, 1)


def test_without_a_limit_or_a_replica_nothing_is_estimated() -> None:
    admission = admission_after(MIN_CALLS, slots=0)
    assert 10**6 * admission.row_s + admission.own_s <= 10.0
    admission.check(10**6, 6.0, [], 1)
    assert admission.retry_after_s(64) == DEFAULT_RETRY_AFTER_S


def test_a_retry_is_told_by_the_drain_rate_within_bounds() -> None:
    assert Admission().retry_after_s(64) == DEFAULT_RETRY_AFTER_S
    admission = admission_after(MIN_CALLS)  # 4 slots of 64 rows in 5 s: 51.2 rows a second
    assert admission.retry_after_s(512) == pytest.approx(10.0)
    assert admission.retry_after_s(10**6) == MAX_RETRY_AFTER_S
    assert admission_after(MIN_CALLS, 0.001).retry_after_s(1) == MIN_RETRY_AFTER_S


def test_a_row_that_could_never_be_in_time_is_told_when_the_queue_will_be_gone() -> None:
    admission = admission_after(MIN_CALLS)
    with pytest.raises(ResourceExhausted) as refusal:
        admission.check(64, 5.0, [2.0, 2.0], 1)
    assert refusal.value.retry_after_s == pytest.approx(2.0)
    assert math.isfinite(refusal.value.retry_after_s or math.nan)
