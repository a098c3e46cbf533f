"""The even-gap hold: the gap, each reason to go, and the end that is computed beforehand."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.even_gap import Gap

# One of two slots is free, the other comes back in 4 s: g = 4. Ten rows a second: 40 in a gap.
GAP = Gap(rows=1, age_s=0.0, slack_s=math.inf, rate=10.0, free=1, returns_at=[4.0], now=0.0, service_s=5.0, alpha=0.0)


def test_a_row_waits_until_it_is_as_old_as_what_is_left_of_the_gap() -> None:
    assert GAP.hold_s() == pytest.approx(2.0)
    assert replace(GAP, age_s=1.0, returns_at=[3.0]).hold_s() == pytest.approx(1.0)


def test_the_gap_is_the_largest_that_any_return_asks_for() -> None:
    """max(1/1, 2/2, 4.5/3) = 1.5 s."""
    gap = replace(GAP, returns_at=[4.5, 1.0, 2.0])
    assert replace(gap, rows=14).hold_s() > 0
    assert replace(gap, rows=15).hold_s() == 0
    assert replace(gap, age_s=1.49).hold_s() > 0
    assert replace(gap, age_s=1.5).hold_s() == 0


def test_more_free_slots_make_a_smaller_gap() -> None:
    assert replace(GAP, free=2, rows=19).hold_s() > 0
    assert replace(GAP, free=2, rows=20).hold_s() == 0


def test_many_rows_need_not_wait_for_age() -> None:
    """39 rows are a gap of 3.9 s, and 0.1 s from now that is what is left."""
    assert replace(GAP, rows=39).hold_s() == pytest.approx(0.1)


def test_a_hold_ends_while_the_deadline_can_still_be_met() -> None:
    assert replace(GAP, slack_s=4.0).hold_s() == 0
    assert replace(GAP, slack_s=4.5).hold_s() == pytest.approx(0.5)
    assert replace(GAP, slack_s=-1.0).hold_s() == 0


def test_a_slot_that_is_overdue_counts_as_due_in_two_hundredths_of_the_time() -> None:
    late = replace(GAP, returns_at=[-3.0], rate=20.0)
    assert late.hold_s() == pytest.approx(0.1)
    assert replace(late, age_s=0.1).hold_s() == 0


def test_nothing_waits_without_a_busy_slot() -> None:
    assert replace(GAP, returns_at=[]).hold_s() == 0


@pytest.mark.parametrize(("alpha", "share"), [(0.0, 1.0), (0.04, 1.0), (0.06, 0.5), (0.08, 0.0), (1.0, 0.0)])
def test_rows_that_cost_time_damp_the_gap(alpha: float, share: float) -> None:
    """Two slots, ten rows a second: u = 5 alpha = 0, 0.2, 0.3, 0.4, 5."""
    damped = replace(GAP, alpha=alpha)
    if share:
        assert replace(damped, age_s=4 * share - 0.01).hold_s() > 0
    assert replace(damped, age_s=4 * share + 0.01).hold_s() == 0


@pytest.mark.parametrize("slots", [32, 33, 64, 1024])
def test_of_many_slots_some_tell_the_gap(slots: int) -> None:
    """They come back evenly, in any order: 1 s between two starts."""
    many = replace(GAP, returns_at=[float(slots - number) for number in range(slots)])
    assert replace(many, rows=9).hold_s() > 0
    assert replace(many, rows=10).hold_s() == 0


@pytest.mark.parametrize("late", [0, 31, 40, 63, 500, 1000])
def test_of_many_slots_none_is_overlooked_by_much(late: int) -> None:
    """Half of them come back at once, the others together: g is that time over the number of the first."""
    many = replace(GAP, rate=1000.0, returns_at=[0.0] * late + [1000.0] * (1024 - late), service_s=0.0)
    gap_s = 1000 / (1 + late)
    assert replace(many, rows=int(1000 * gap_s) + 1).hold_s() == 0
    assert replace(many, rows=int(1000 * 0.9 * gap_s)).hold_s() > 0


def gap_after(gap: Gap, seconds: float) -> Gap:
    """The same later, when nothing has happened."""
    return replace(
        gap,
        age_s=gap.age_s + seconds,
        slack_s=gap.slack_s - seconds,
        now=gap.now + seconds,
    )


gaps = st.builds(
    Gap,
    rows=st.integers(1, 64),
    age_s=st.floats(0, 10),
    slack_s=st.one_of(st.just(math.inf), st.floats(-1, 60)),
    rate=st.floats(0.001, 1000),
    free=st.integers(1, 4),
    returns_at=st.lists(st.floats(-5, 10), max_size=8),
    now=st.just(0.0),
    service_s=st.floats(0.001, 10),
    alpha=st.floats(0, 0.1),
)


@given(gaps)
def test_a_hold_is_never_longer_than_the_longest_return_or_a_fiftieth_of_the_time(gap: Gap) -> None:
    hold_s = gap.hold_s()
    assert 0 <= hold_s <= max([*gap.returns_at, 0.02 * gap.service_s])


@given(gaps, st.floats(0, 0.99))
def test_a_hold_goes_on_until_its_end_and_not_beyond(gap: Gap, share: float) -> None:
    hold_s = gap.hold_s()
    if hold_s > 1e-6:
        assert gap_after(gap, share * hold_s).hold_s() > 0
        if gap.slack_s == math.inf:
            assert gap_after(gap, hold_s).hold_s() <= 1e-6
