"""When to ask again, to the boundary."""

from math import inf

import pytest

from router_client.retry import MAX_PUSHBACK_S, RetryPolicy, backoff_s, left_s


def test_a_push_back_time_is_a_minimum_and_chance_adds_up_to_half() -> None:
    policy = RetryPolicy(retries=2)
    assert policy.delay_s(1, 4.0, inf, 0.0) == 4.0
    assert policy.delay_s(1, 4.0, inf, 0.5) == 5.0


def test_without_a_time_the_waits_double_up_to_five_seconds() -> None:
    assert [backoff_s(sent) for sent in (1, 2, 3, 4, 5, 6, 1000)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert RetryPolicy(retries=2).delay_s(2, None, inf, 0.0) == 0.4


@pytest.mark.parametrize(("retries", "sent", "may"), [(2, 2, True), (2, 3, False), (0, 1, False), (1, 1, True)])
def test_a_request_is_asked_again_as_often_as_allowed(retries: int, sent: int, *, may: bool) -> None:
    assert (RetryPolicy(retries).delay_s(sent, 1.0, inf, 0.0) is not None) is may


def test_nobody_waits_to_the_deadline_or_past_it() -> None:
    assert RetryPolicy().delay_s(1, 1.0, 1.001, 0.0) == 1.0
    assert RetryPolicy().delay_s(1, 1.0, 1.0, 0.0) is None


def test_nobody_waits_for_longer_than_a_minute() -> None:
    assert RetryPolicy().delay_s(1, MAX_PUSHBACK_S, inf, 0.0) == MAX_PUSHBACK_S
    assert RetryPolicy().delay_s(1, MAX_PUSHBACK_S + 0.001, inf, 0.0) is None


def test_no_deadline_leaves_all_the_time() -> None:
    assert left_s(None, 5.0) == inf
    assert left_s(7.5, 5.0) == 2.5
