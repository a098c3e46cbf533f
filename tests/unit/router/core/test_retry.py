"""What becomes of the rows of a failed batch, and the choice of a replica."""

import pytest

from router.core.balance import Load, choose
from router.core.retry import PAUSE_MAX_S, judge, pause_s
from router.core.types import Part
from router.errors import BackendError, BackendExhausted, BatchTimeout, Malformed, Refused, StreamLost
from tests.builders import Listener, make_block


@pytest.mark.parametrize("error", [StreamLost("x"), BatchTimeout("x"), BackendExhausted("x")])
def test_losses_and_back_pressure_are_tried_again_up_to_three_attempts(error: BackendError) -> None:
    part = make_block(1).whole()
    for attempts in (1, 2):
        (part,) = judge([part], error, retries=2).again
        assert part.attempts == attempts
    verdict = judge([part], error, retries=2)
    assert (verdict.again, verdict.failed) == ((), (part,))


@pytest.mark.parametrize("error", [Refused("x"), Malformed("x")])
def test_refusals_and_nonsense_fail_at_once(error: BackendError) -> None:
    part = make_block(1).whole()
    assert judge([part], error, retries=2).failed == (part,)


def test_without_retries_nothing_is_tried_again() -> None:
    part = make_block(1).whole()
    assert judge([part], StreamLost("x"), retries=0).failed == (part,)


def test_rows_of_one_batch_have_their_own_attempts() -> None:
    fresh = make_block(1).whole()
    old = Part(make_block(2), 0, 1, attempts=2)
    verdict = judge([fresh, old], StreamLost("x"), retries=2)
    assert [part.block for part in verdict.again] == [fresh.block]
    assert verdict.failed == (old,)


def test_rows_nobody_waits_for_are_dropped() -> None:
    part = make_block(1, recipient=Listener(is_closed=True)).whole()
    verdict = judge([part], StreamLost("x"), retries=2)
    assert (verdict.again, verdict.failed) == ((), ())


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0.05), (2, 0.1), (3, 0.2), (6, 1.6), (7, PAUSE_MAX_S), (999, 2.0)]
)
def test_a_replica_pauses_twice_as_long_each_time(failures: int, seconds: float) -> None:
    assert pause_s(failures, 0.5) == pytest.approx(seconds)
    assert pause_s(failures, 0.0) == pytest.approx(0.75 * seconds)
    assert pause_s(failures, 1.0) == pytest.approx(1.25 * seconds)


def test_the_least_loaded_replica_that_can_is_chosen() -> None:
    assert choose([]) is None
    assert choose([Load(0, 0, can_take=False)]) is None
    assert choose([Load(0, 0, can_take=False), Load(2, 2, can_take=True), Load(1, 9, can_take=True)]) == 2
    assert choose([Load(1, 5, can_take=True), Load(1, 4, can_take=True)]) == 1
    assert choose([Load(1, 4, can_take=True), Load(1, 4, can_take=True)]) == 0
