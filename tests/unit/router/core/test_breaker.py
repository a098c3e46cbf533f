"""The breaker, event by event, at its boundaries."""

import pytest

from router.core.breaker import Breaker, State, common_ratio, may_eject

EJECTION_S = 30.0


class Patient:
    """A breaker with a clock: each batch is sent a second after the one before it is back."""

    def __init__(self) -> None:
        self.now = 0.0
        self.breaker = Breaker(EJECTION_S)

    def stands(self, state: State) -> bool:
        return self.breaker.state is state

    def answer(self, times: int = 1, ratio: float | None = 1.0) -> None:
        for _ in range(times):
            sent_at, self.now = self.now + 1, self.now + 2
            self.breaker.answered(sent_at, self.now, ratio)

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            sent_at, self.now = self.now + 1, self.now + 2
            self.breaker.failed(sent_at, self.now)

    def eject(self) -> None:
        assert self.breaker.trip()
        self.breaker.eject(self.now)

    def go_to_trial(self) -> None:
        self.now = self.breaker.until
        self.breaker.wake(self.now)


def test_two_failures_in_a_row_trip_nothing_and_the_third_does() -> None:
    patient = Patient()
    patient.fail(2)
    assert patient.breaker.trip() is None
    patient.fail()
    assert patient.breaker.trip() == "3 failures in a row"


def test_an_answer_between_failures_begins_the_row_anew() -> None:
    patient = Patient()
    patient.answer(20)
    patient.fail(2)
    patient.answer()
    patient.fail(1)
    assert patient.breaker.trip() is None


def test_more_than_half_failed_trips_from_the_fifth_batch_on() -> None:
    patient = Patient()
    patient.fail(2)
    patient.answer()
    patient.fail()
    assert patient.breaker.trip() is None  # three of four
    patient.fail()
    assert patient.breaker.trip() == "80 % of its batches failed"


def test_two_of_five_failed_trip_nothing_and_three_do() -> None:
    for last_fails in (False, True):
        patient = Patient()
        for _ in range(2):
            patient.fail()
            patient.answer()
        patient.fail() if last_fails else patient.answer()
        assert patient.breaker.trip() == ("60 % of its batches failed" if last_fails else None)


def test_one_failure_in_ten_trips_nothing() -> None:
    patient = Patient()
    for _ in range(100):
        patient.answer(9)
        patient.fail()
        assert patient.breaker.trip() is None


def test_batches_that_were_out_together_are_one_failure() -> None:
    breaker = Breaker(EJECTION_S)
    for number in range(4):
        breaker.failed(sent_at=0.1 * number, now=10 + number)
    assert breaker.trip() is None
    for number in range(2):
        breaker.failed(sent_at=10.1 + 10 * number, now=20.0 + 10 * number)
    assert breaker.trip() == "3 failures in a row"


def test_a_batch_sent_within_a_tenth_of_a_second_of_a_failure_is_lost_together_with_it() -> None:
    breaker = Breaker(EJECTION_S)
    breaker.failed(0.0, 1.0)
    breaker.failed(1.09, 1.1)
    breaker.failed(1.1, 2.0)
    breaker.failed(2.1, 3.0)
    assert breaker.trip() == "3 failures in a row"


def test_good_ends_of_batches_that_were_out_with_a_failed_one_tell_nothing_either() -> None:
    """Else a replica that fails half of its batches, four at a time, would look as if it failed a fifth."""
    breaker = Breaker(EJECTION_S)
    for round_ in range(3):
        breaker.failed(10.0 * round_, 10.0 * round_ + 5)
        breaker.answered(10.0 * round_, 10.0 * round_ + 6)
    assert breaker.trip() == "3 failures in a row"


def test_three_of_the_last_five_batches_over_three_times_as_slow_trip() -> None:
    patient = Patient()
    patient.answer(20, ratio=1.0)
    for ratio in (3.1, 1.0, 3.2, 1.0):
        patient.answer(ratio=ratio)
    assert patient.breaker.trip() is None
    patient.answer(ratio=3.3)
    assert patient.breaker.trip() == "3.1 times as slow as its peers"


def test_exactly_three_times_as_slow_trips_nothing() -> None:
    patient = Patient()
    patient.answer(20, ratio=3.0)
    assert patient.breaker.trip() is None


def test_four_slow_batches_are_no_five() -> None:
    patient = Patient()
    for _ in range(4):
        patient.answer(ratio=5.0)
    assert patient.breaker.trip() is None
    patient.answer(ratio=5.0)
    assert patient.breaker.trip() == "5.0 times as slow as its peers"


def test_a_stall_of_the_router_makes_all_batches_late_and_is_one_slow_one() -> None:
    breaker = Breaker(EJECTION_S)
    for number in range(5):
        breaker.answered(number, number + 1, 1.0)
    for _ in range(5):
        breaker.answered(sent_at=10.0, now=15.0, ratio=50.0)
    assert breaker.trip() is None


def test_an_ejection_ends_on_time_and_not_before() -> None:
    patient = Patient()
    patient.fail(3)
    patient.eject()
    assert patient.breaker.until == patient.now + 30
    patient.breaker.wake(patient.now + 29.999)
    assert patient.stands(State.OPEN)
    patient.go_to_trial()
    assert patient.stands(State.HALF_OPEN)


def test_a_good_trial_closes_and_forgets_what_was() -> None:
    patient = Patient()
    patient.fail(3)
    patient.eject()
    patient.go_to_trial()
    patient.answer()
    assert patient.breaker.is_closed
    patient.fail(2)
    assert patient.breaker.trip() is None


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_bad_trial_opens_for_longer(is_slow: bool) -> None:
    patient = Patient()
    patient.fail(3)
    patient.eject()
    for count in range(2, 14):
        patient.go_to_trial()
        if is_slow:
            patient.answer(ratio=3.1)
        else:
            patient.fail()
        assert patient.stands(State.OPEN)
        assert patient.breaker.until - patient.now == min(30.0 * count, 300.0)


def test_what_was_sent_before_the_trial_is_no_part_of_it() -> None:
    patient = Patient()
    patient.fail(3)
    patient.eject()
    patient.breaker.answered(0.0, patient.now + 1)
    patient.breaker.failed(0.0, patient.now + 1)
    assert patient.stands(State.OPEN)
    patient.go_to_trial()
    patient.breaker.answered(0.0, patient.now)
    patient.breaker.failed(0.0, patient.now)
    assert patient.stands(State.HALF_OPEN)


@pytest.mark.parametrize(
    ("healthy_s", "ejected_s"), [(1, 90), (299.9, 90), (300, 60), (599.9, 60), (600, 30), (9e9, 30)]
)
def test_the_count_of_ejections_falls_by_one_for_five_minutes_of_health(healthy_s: float, ejected_s: float) -> None:
    breaker = Breaker(EJECTION_S)
    breaker.eject(0.0)
    breaker.wake(30.0)
    breaker.failed(30.0, 40.0)
    breaker.wake(100.0)
    breaker.answered(100.0, 101.0)
    breaker.eject(101.0 + healthy_s)
    assert breaker.until - (101.0 + healthy_s) == pytest.approx(ejected_s)


@pytest.mark.parametrize(
    ("members", "ejected", "others_fit", "may"),
    [
        (1, 0, 0, False),
        (2, 0, 1, True),
        (2, 0, 0, False),  # the other one is away
        (2, 1, 0, False),
        (3, 0, 2, True),
        (3, 1, 1, False),  # two of three would be more than half
        (4, 1, 2, True),
        (4, 2, 1, False),
        (10, 4, 5, True),
        (10, 5, 4, False),
    ],
)
def test_never_the_last_fit_one_and_at_most_half_are_ejected(
    members: int, ejected: int, others_fit: int, may: bool
) -> None:
    assert may_eject(members, ejected, others_fit) is may


def test_when_the_others_are_slow_too_a_replica_must_be_slower_still() -> None:
    slow = [Patient() for _ in range(4)]
    for patient in slow[:3]:
        patient.answer(3, ratio=1.0)
        patient.answer(2, ratio=5.0)  # the third one is on its way
    slow[3].answer(2, ratio=1.0)
    slow[3].answer(3, ratio=5.0)
    common = common_ratio(patient.breaker for patient in slow[:3])
    assert common == 5.0
    assert slow[3].breaker.trip()
    assert slow[3].breaker.trip(common) is None
    slow[3].answer(3, ratio=15.1)
    assert slow[3].breaker.trip(common) == "3.0 times as slow as its peers"


def test_a_slow_trial_is_good_when_all_are_as_slow() -> None:
    breaker = Breaker(EJECTION_S)
    breaker.eject(0.0)
    breaker.wake(30.0)
    breaker.answered(30.0, 40.0, 9.0, common=3.0)
    assert breaker.is_closed


@pytest.mark.parametrize(
    ("ratios", "common"),
    [
        ([], 1.0),
        ([[9.0]], 1.0),  # one slow batch is a chance
        ([[9.0, 9.0]], 9.0),
        ([[0.5, 0.5]], 1.0),
        ([[1, 1, 1, 1, 9]], 1.0),
        ([[1, 1, 1, 8, 9], [1, 1, 1, 1, 1], [1, 1]], 1.0),
        ([[1, 1, 1, 8, 9], [1, 1, 1, 6, 6], [1, 1]], 6.0),
    ],
)
def test_the_common_ratio_is_the_median_of_what_two_batches_of_each_have_reached(
    ratios: list[list[float]], common: float
) -> None:
    patients = [Patient() for _ in ratios]
    for patient, given in zip(patients, ratios, strict=True):
        for ratio in given:
            patient.answer(ratio=ratio)
    assert common_ratio(patient.breaker for patient in patients) == common
