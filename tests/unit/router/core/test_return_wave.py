"""The return wave: who is taken for one, how long rows wait for it."""

import random

import pytest

from router.core.return_wave import MAX_INCREMENT, WEIGHT, ReturnWave
from router.core.service_time import MIN_CALLS

SERVICE_S = 1.0


class Calls:
    """Calls of a second, one after the other; rows come at given lags after each completion."""

    def __init__(self) -> None:
        self.wave = ReturnWave()
        self.now = 0.0
        self._rows = 0

    def go(self, calls: int, *lags: float, rate: float | None = None) -> "Calls":
        for _ in range(calls):
            self.complete(rate)
            for lag in sorted(lags):
                self.wave.arrived(1, self.now + lag)
            self._rows = len(lags)
            self.now += SERVICE_S
        return self

    def complete(self, rate: float | None = None) -> None:
        self.wave.completed(self._rows / SERVICE_S if rate is None else rate, SERVICE_S, self.now)


WAVE = tuple(0.001 + 0.01 * number for number in range(10))


def test_nothing_is_known_before_the_first_completions() -> None:
    wave = ReturnWave()
    wave.arrived(5, 0.01)
    assert wave.hold_until(1, 0.0, SERVICE_S, 0.02) == 0.02


def test_rows_that_come_right_after_completions_are_a_wave() -> None:
    """Ten rows in a tenth of the time: nine more than the same rate would bring by chance."""
    calls = Calls().go(30, *WAVE)
    calls.complete()
    assert calls.wave.lasts_s == pytest.approx(0.09)
    assert calls.wave.rows == pytest.approx(9 - 10 * 0.09, rel=0.05)


def test_a_wave_may_be_wide() -> None:
    """Callers who come one by one, since their own calls take time."""
    calls = Calls().go(30, *(0.33 * number / 30 for number in range(30)))
    calls.complete()
    assert calls.wave.lasts_s == pytest.approx(0.3, abs=0.02)
    assert calls.wave.rows > 15


def test_rows_wait_the_whole_wave_however_many_have_come() -> None:
    calls = Calls().go(30, *WAVE)
    calls.complete()
    until = calls.wave.hold_until(1, 0.0, SERVICE_S, calls.now)
    assert until == pytest.approx(calls.now + 0.09)
    assert calls.wave.hold_until(12, 0.0, SERVICE_S, calls.now + 0.08) == until
    assert calls.wave.hold_until(12, 0.0, SERVICE_S, until) == until


def test_many_rows_do_not_wait_for_few() -> None:
    """k (beta - delta) = 8.1 * 0.91 = 7.4 row seconds are saved; n rows lose 0.09 n."""
    calls = Calls().go(30, *WAVE)
    calls.complete()
    assert calls.wave.hold_until(80, 0.0, SERVICE_S, calls.now) > calls.now
    assert calls.wave.hold_until(84, 0.0, SERVICE_S, calls.now) == calls.now


def test_rows_do_not_wait_longer_than_a_call_costs_without_them() -> None:
    """Bug: 64 callers of 5 ms + 0.35 ms a row, S(64) = 27 ms, were merged by holds of 5 ms: p99 80 % worse."""
    calls = Calls().go(30, *WAVE)
    calls.complete()
    assert calls.wave.hold_until(1, 0.0, 0.11, calls.now) > calls.now
    assert calls.wave.hold_until(1, 0.0, 0.1, calls.now) == calls.now


def one_caller(rows: int, callers: int = 1) -> ReturnWave:
    """Callers who come back after every second, each with so many rows at once, after up to 0.3 s; until now = 0."""
    chance = random.Random(1)
    wave = ReturnWave()
    for number in range(-100, 0):
        wave.completed(callers * rows, SERVICE_S, float(number))
        for lag in sorted(chance.uniform(0, 0.3) for _ in range(callers)):
            wave.arrived(rows, number + lag)
    wave.completed(callers * rows, SERVICE_S, 0.0)
    return wave


def test_the_rows_of_a_single_caller_do_not_wait_for_him() -> None:
    """Bug: a lone caller of 16 rows waited 0.13 S each time for nobody: 12 % of the mean latency."""
    wave = one_caller(rows=16)
    assert wave.hold_until(16, 0.1, SERVICE_S, 0.1) == 0.1
    assert wave.hold_until(16, 0.0, SERVICE_S, 0.0) == 0.0
    assert wave.hold_until(1, 0.1, SERVICE_S, 0.1) > 0.2  # somebody else's row


@pytest.mark.parametrize("rows", [1, 16])
def test_rows_that_were_left_behind_wait_for_a_single_caller(rows: int) -> None:
    """Two callers, each on his own: what one has left behind meets the other. With a row each they never did: a bug."""
    wave = one_caller(rows)
    assert wave.hold_until(rows, -0.5, SERVICE_S, 0.0) > 0.2
    assert wave.hold_until(rows, 0.0, SERVICE_S, 0.0) == 0.0


def test_the_rows_of_two_callers_wait_for_each_other() -> None:
    wave = one_caller(rows=16, callers=2)
    assert wave.hold_until(16, 0.1, SERVICE_S, 0.1) > 0.2


def test_pieces_of_a_large_request_do_not_wait_for_its_caller() -> None:
    """Bug: 100 rows, 64 to a batch: the other 36 waited for their own caller, who waits for them."""
    wave = ReturnWave()
    for number in range(100):
        wave.completed(50.0, SERVICE_S, float(number))
        if number % 2:
            wave.arrived(100, number + 0.1)
    wave.completed(50.0, SERVICE_S, 100.0)
    assert wave.hold_until(36, 99.1, SERVICE_S, 100.0) == 100.0


def test_rows_that_come_at_any_time_are_no_wave() -> None:
    chance = random.Random(1)
    calls = Calls()
    for _ in range(2000):
        calls.go(1, *(chance.random() for _ in range(20)), rate=20.0)
        assert calls.wave.lasts_s == 0.0


def test_bursts_that_come_at_any_time_are_no_wave() -> None:
    """Once in some hundred completions chance may look like one; nobody relies on the first twenty."""
    chance = random.Random(1)
    calls = Calls()
    waves = 0
    for number in range(2000):
        calls.complete(rate=20.0)
        for lag in sorted(chance.random() for _ in range(2)):
            calls.wave.arrived(10, calls.now + lag)
        calls.now += SERVICE_S
        waves += number >= MIN_CALLS and calls.wave.lasts_s > 0
    assert waves <= 5


def test_rows_that_come_evenly_are_no_wave_when_the_rate_lags_behind() -> None:
    """On/off traffic: the rate is still a third of what comes."""
    calls = Calls().go(30, *(0.01 + 0.02 * number for number in range(50)), rate=17.0)
    assert calls.wave.lasts_s == 0.0


def test_rows_that_come_late_are_no_wave() -> None:
    calls = Calls().go(30, *(0.4 + lag for lag in WAVE))
    assert calls.wave.lasts_s == 0.0


def test_a_wave_that_has_stopped_is_forgotten() -> None:
    calls = Calls().go(30, *WAVE).go(100)
    assert calls.wave.lasts_s == 0.0


def test_completions_during_a_hold_do_not_prolong_it() -> None:
    calls = Calls().go(30, *WAVE)
    calls.complete()
    wave, until = calls.wave, calls.wave.hold_until(1, 0.0, SERVICE_S, calls.now)
    for share in (0.3, 0.6, 0.9, 0.999):
        wave.completed(10.0, SERVICE_S, calls.now + share * 0.09)
        assert wave.hold_until(1, 0.0, SERVICE_S, calls.now + share * 0.09) == until
    wave.completed(10.0, SERVICE_S, until)
    assert wave.hold_until(1, 0.0, SERVICE_S, until) == pytest.approx(until)


def test_the_next_batch_may_be_held_again() -> None:
    calls = Calls().go(30, *WAVE)
    calls.complete()
    calls.wave.hold_until(1, 0.0, SERVICE_S, calls.now)
    calls.wave.released()
    calls.now += SERVICE_S
    calls.complete()
    assert calls.wave.hold_until(1, 0.0, SERVICE_S, calls.now) > calls.now


def test_what_is_known_survives_the_rescaling_of_its_weights() -> None:
    calls = Calls()
    growth = 1.0
    while growth < MAX_INCREMENT**1.5:
        calls.go(100, *WAVE)
        growth /= (1 - WEIGHT) ** 100
        assert calls.wave.lasts_s == pytest.approx(0.09)
