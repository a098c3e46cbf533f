"""What becomes of the rows of a failed batch: the table, line by line."""

from collections.abc import Callable, Sequence

import pytest

from router.core.retry import PAUSE_MAX_S, Chances, Failure, Verdict, judge, pause_s
from router.core.types import Part
from router.errors import (
    BackendError,
    BackendExhausted,
    BatchTimeout,
    Blame,
    InvalidArgument,
    Malformed,
    ModelFailed,
    NotFound,
    Refused,
    StreamLost,
)
from tests.builders import Listener, make_block

LOST, SLOW, FULL, ODD = StreamLost("x"), BatchTimeout("x"), BackendExhausted("x"), Malformed("x")
UNCLEAR = Refused("x")
ROWS = Refused("x", InvalidArgument, Blame.ROWS)
MODEL = Refused("x", NotFound, Blame.MODEL)


def make_part(rows: int = 1, attempts: int = 0, losses: int = 0) -> Part:
    return Part(make_block(*range(rows)), 0, rows, attempts, losses)


class Purse:
    """A retry budget that remembers what it was asked."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.is_open = is_open
        self.asked: list[int] = []

    def may_spend(self, rows: int) -> bool:
        self.asked.append(rows)
        return self.is_open


def judged(
    error: BackendError,
    *parts: Part,
    retries: int = 2,
    has_other: bool = True,
    is_split: bool = False,
    had_second: bool = False,
    may_spend: Callable[[int], bool] = lambda _rows: True,
) -> Verdict:
    return judge(Failure(parts, error, is_split, had_second), Chances(retries, has_other, may_spend))


def rows_of(parts: Sequence[Part]) -> int:
    return sum(part.rows for part in parts)


@pytest.mark.parametrize("error", [LOST, SLOW])
def test_lost_rows_try_again_then_alone_and_fail_after_the_third_attempt(error: BackendError) -> None:
    part = make_part(4)
    (part,) = judged(error, part).again
    assert (part.attempts, part.losses) == (1, 1)
    (part,) = judged(error, part).alone
    assert (part.attempts, part.losses) == (2, 2)
    assert judged(error, part) == Verdict(failed=(part,))


@pytest.mark.parametrize("error", [LOST, SLOW])
def test_what_was_lost_is_charged_to_nobody(error: BackendError) -> None:
    purse = Purse(is_open=False)
    assert judged(error, make_part(), may_spend=purse.may_spend, has_other=False).again
    assert purse.asked == []


def test_rows_of_one_batch_have_their_own_attempts() -> None:
    fresh, old, oldest = make_part(), make_part(attempts=1, losses=1), make_part(attempts=2, losses=1)
    verdict = judged(LOST, fresh, old, oldest)
    assert [part.block for part in verdict.again] == [fresh.block]
    assert [part.block for part in verdict.alone] == [old.block]
    assert verdict.failed == (oldest,)


def test_back_pressure_is_tried_again_while_attempts_last_and_travels_with_others() -> None:
    part = make_part(4)
    for attempts in (1, 2):
        (part,) = judged(FULL, part).again
        assert (part.attempts, part.losses) == (attempts, 0)
    assert judged(FULL, part) == Verdict(failed=(part,))


def test_back_pressure_fails_the_rows_when_the_budget_is_spent() -> None:
    part, purse = make_part(4), Purse(is_open=False)
    assert judged(FULL, part, may_spend=purse.may_spend) == Verdict(failed=(part,))
    assert purse.asked == [4]


def test_the_budget_is_charged_for_rows_that_try_again_only() -> None:
    fresh, old, purse = make_part(4), make_part(3, attempts=2), Purse()
    verdict = judged(FULL, fresh, old, may_spend=purse.may_spend)
    assert (rows_of(verdict.again), verdict.failed) == (4, (old,))
    assert purse.asked == [4]


def test_what_no_rows_could_change_fails_all_of_them_at_once() -> None:
    part = make_part(4)
    assert judged(MODEL, part) == Verdict(failed=(part,))


def test_rows_that_every_replica_refuses_are_split_at_once() -> None:
    part, purse = make_part(4), Purse()
    assert judged(ROWS, part, may_spend=purse.may_spend) == Verdict(split=(part,))
    assert purse.asked == []


@pytest.mark.parametrize("error", [UNCLEAR, ODD])
def test_where_the_replica_may_be_to_blame_another_one_is_asked_once(error: BackendError) -> None:
    part, purse = make_part(4), Purse()
    verdict = judged(error, part, may_spend=purse.may_spend)
    (again,) = verdict.elsewhere
    assert verdict == Verdict(elsewhere=(again,))
    assert (again.rows, again.attempts, again.losses) == (4, 1, 0)
    assert purse.asked == [4]


@pytest.mark.parametrize(
    "why", [{"has_other": False}, {"had_second": True}, {"may_spend": lambda _: False}], ids=lambda why: next(iter(why))
)
def test_where_no_other_can_be_asked_refused_rows_are_split_and_nonsense_fails(why: dict[str, bool]) -> None:
    part = make_part(4)
    assert judged(UNCLEAR, part, **why) == Verdict(split=(part,))  # type: ignore[arg-type]
    assert judged(ODD, part, **why) == Verdict(failed=(part,))  # type: ignore[arg-type]


def test_nobody_is_asked_twice_about_rows_whose_attempts_are_used_up() -> None:
    fresh, old = make_part(2), make_part(3, attempts=2)
    assert judged(UNCLEAR, fresh, old) == Verdict(split=(fresh, old))
    verdict = judged(ODD, fresh, old)
    assert (rows_of(verdict.elsewhere), verdict.failed) == (2, (old,))


def test_a_refused_piece_is_split_further_without_asking_another_replica() -> None:
    part, purse = make_part(4), Purse()
    assert judged(UNCLEAR, part, is_split=True, may_spend=purse.may_spend) == Verdict(split=(part,))
    assert purse.asked == []


@pytest.mark.parametrize(("error", "is_split"), [(ROWS, False), (ROWS, True), (UNCLEAR, True)])
def test_a_single_row_that_was_refused_is_the_poison_row(error: BackendError, is_split: bool) -> None:
    part = make_part()
    assert judged(error, part, is_split=is_split) == Verdict(failed=(part,), is_poison=True)


def test_a_single_row_that_another_replica_has_not_seen_is_not_yet_poison() -> None:
    part = make_part()
    assert rows_of(judged(UNCLEAR, part).elsewhere) == 1
    assert judged(UNCLEAR, part, had_second=True) == Verdict(failed=(part,), is_poison=True)


def test_one_row_that_is_left_of_many_is_tried_alone_before_it_fails() -> None:
    left, gone = make_part(), Part(make_block(1, 2, recipient=Listener(is_closed=True)), 0, 2, 0)
    assert judged(ROWS, left, gone) == Verdict(split=(left,))


@pytest.mark.parametrize("error", [LOST, SLOW, FULL, ODD, UNCLEAR, ROWS, MODEL])
def test_without_retries_nothing_is_tried_again_nor_split(error: BackendError) -> None:
    part = make_part(4)
    assert judged(error, part, retries=0) == Verdict(failed=(part,))


@pytest.mark.parametrize("error", [LOST, SLOW, FULL, ODD, UNCLEAR, ROWS, MODEL])
def test_rows_nobody_waits_for_are_dropped(error: BackendError) -> None:
    part = make_block(1, recipient=Listener(is_closed=True)).whole()
    assert judged(error, part) == Verdict()


def test_callers_are_told_whose_fault_it_is() -> None:
    assert [type(error.for_caller()) for error in (ROWS, MODEL, UNCLEAR, ODD)] == [
        InvalidArgument,
        NotFound,
        ModelFailed,
        ModelFailed,
    ]


def test_a_verdict_tells_itself_in_rows() -> None:
    assert str(judged(LOST, make_part(3), make_part(2, attempts=2))) == "3 again, 2 failed"
    assert str(Verdict()) == "nobody waits for them"


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0.05), (2, 0.1), (3, 0.2), (6, 1.6), (7, PAUSE_MAX_S), (999, 2.0)]
)
def test_a_replica_pauses_twice_as_long_each_time(failures: int, seconds: float) -> None:
    assert pause_s(failures, 0.5) == pytest.approx(seconds)
    assert pause_s(failures, 0.0) == pytest.approx(0.75 * seconds)
    assert pause_s(failures, 1.0) == pytest.approx(1.25 * seconds)
