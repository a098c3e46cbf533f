"""The release rules, one step before each boundary and one step on it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from router.core.policy import Hold, Policy, View, Window, WorkConserving, change_policy, choose_policy
from router.core.service_time import MIN_CALLS


@dataclass
class FakeSlots:
    """One free slot beside those that are expected back."""

    back_at: list[float] = field(default_factory=list)
    others_wait: bool = False

    @property
    def busy(self) -> int:
        return len(self.back_at)

    def count_free(self, now: float) -> int:
        return 1

    def expected_back(self) -> list[float]:
        return self.back_at


def view(
    *,
    blocks: int = 1,
    rows: int = 1,
    oldest_at: float = 0.0,
    deadline: float = math.inf,
    is_full: bool = False,
    blocks_in_flight: int = 0,
    back_at: tuple[float, ...] = (),
    others_wait: bool = False,
) -> View:
    return View(blocks, rows, oldest_at, deadline, is_full, blocks_in_flight, FakeSlots(list(back_at), others_wait))


def dense(policy: WorkConserving, now: float, blocks_per_s: float, seconds: float = 3) -> WorkConserving:
    """Let blocks of one row arrive evenly for a long while, up to `now`."""
    gap = 1 / blocks_per_s
    for number in reversed(range(round(seconds * blocks_per_s))):
        policy.arrived(1, 1, now - number * gap)
    return policy


def measured(policy: WorkConserving, service_s: float, calls: int = 1) -> WorkConserving:
    """Let so many batches of one row have come back long ago."""
    for _ in range(calls):
        policy.completed("replica:1", 1, service_s, -100.0)
    return policy


def test_a_row_goes_at_once_while_nothing_is_known() -> None:
    assert WorkConserving(0.002).hold(view(), now=0.0) is None


def test_an_idle_model_waits_two_hundredths_of_its_service_time_for_company() -> None:
    policy = measured(WorkConserving(max_queue_delay_s=1.0), 5.0)
    assert policy.hold(view(oldest_at=10.0), now=10.0) == Hold(10.1, lapses_with_slots=True)
    assert policy.hold(view(oldest_at=10.0), now=math.nextafter(10.1, 0)) is not None
    assert policy.hold(view(oldest_at=10.0), now=10.1) is None


def test_the_wait_never_exceeds_max_queue_delay() -> None:
    policy = measured(WorkConserving(max_queue_delay_s=0.002), 5.0)
    assert policy.hold(view(), now=0.0) == Hold(0.002, lapses_with_slots=True)


@pytest.mark.parametrize(("service_s", "is_held"), [(0.05, True), (0.0499, False)])
def test_a_wait_below_a_millisecond_is_none(service_s: float, is_held: bool) -> None:
    policy = measured(WorkConserving(0.002), service_s)
    assert (policy.hold(view(), now=0.0) is not None) is is_held


@pytest.mark.parametrize("seen", [view(back_at=(5.0,)), view(is_full=True)])
def test_a_busy_model_or_a_full_batch_does_not_wait_for_a_burst(seen: View) -> None:
    assert measured(WorkConserving(0.002), 5.0).hold(seen, now=0.0) is None


def test_dense_arrivals_gather_until_the_oldest_is_as_old_as_rows_may_get() -> None:
    policy = dense(WorkConserving(0.002), now=10.0, blocks_per_s=550)
    company = view(oldest_at=10.0, blocks=2, back_at=(20.0,))
    assert policy.hold(company, now=10.0) == Hold(10.002)
    assert policy.hold(company, now=math.nextafter(10.002, 0)) is not None
    assert policy.hold(company, now=10.002) is None


@pytest.mark.parametrize(("max_queue_delay_s", "gathers_s"), [(0.003, 0.003), (0.005, 0.005), (0.05, 0.005)])
def test_who_may_wait_longer_gathers_for_five_milliseconds_at_most(max_queue_delay_s: float, gathers_s: float) -> None:
    company = view(oldest_at=10.0, blocks=2)
    assert dense(WorkConserving(max_queue_delay_s), now=10.0, blocks_per_s=550).hold(company, now=10.0) == Hold(
        10.0 + gathers_s
    )
    assert dense(WorkConserving(max_queue_delay_s), now=10.0, blocks_per_s=450).hold(company, now=10.0) is None


def test_gathering_needs_company_in_the_queue_or_in_flight() -> None:
    policy = dense(WorkConserving(0.002), now=10.0, blocks_per_s=550)
    assert policy.hold(view(oldest_at=10.0), now=10.0) is None
    assert policy.hold(view(oldest_at=10.0, blocks_in_flight=1, back_at=(20.0,)), now=10.0) is not None


def test_sparser_arrivals_do_not_gather() -> None:
    policy = dense(WorkConserving(0.002), now=10.0, blocks_per_s=450)
    assert policy.hold(view(oldest_at=10.0, blocks=2), now=10.0) is None


def test_a_full_batch_is_not_gathered() -> None:
    policy = dense(WorkConserving(0.002), now=10.0, blocks_per_s=5000)
    assert policy.hold(view(oldest_at=10.0, blocks=2, is_full=True), now=10.0) is None


def test_zero_delay_turns_every_hold_off() -> None:
    policy = dense(measured(WorkConserving(0.0), 5.0, calls=MIN_CALLS), now=10.0, blocks_per_s=5000)
    assert policy.hold(view(oldest_at=10.0, blocks=2), now=10.0) is None
    assert policy.hold(view(oldest_at=10.0, blocks=2, back_at=(14.0,)), now=10.0) is None


def settled(*, calls: int = MIN_CALLS) -> WorkConserving:
    """A key that has ten rows a second up to now = 0, for calls of 5 s."""
    return dense(measured(WorkConserving(0.002), 5.0, calls), now=0.0, blocks_per_s=10, seconds=100)


def test_rows_wait_for_an_even_gap_to_the_next_slot() -> None:
    """One slot is free and one comes back in 4 s, so g = 4 s: a row that has come just now waits until it is as old as
    what is then left of the gap, 2 s. Ten rows a second would bring 40 in a gap."""
    assert settled().hold(view(back_at=(4.0,)), now=0.0) == Hold(2.0, lapses_with_slots=True)
    assert settled().hold(view(rows=30, back_at=(4.0,)), now=0.0) is not None
    assert settled().hold(view(rows=45, back_at=(4.0,)), now=0.0) is None


def test_nothing_waits_for_a_gap_before_twenty_calls_were_measured() -> None:
    assert settled(calls=MIN_CALLS - 1).hold(view(back_at=(4.0,)), now=0.0) is None
    assert settled(calls=MIN_CALLS).hold(view(back_at=(4.0,)), now=0.0) is not None


@pytest.mark.parametrize(
    "seen",
    [
        view(back_at=(4.0,), is_full=True),
        view(back_at=(4.0,), others_wait=True),
        view(back_at=(4.0,), deadline=8.9),
        view(back_at=()),
    ],
    ids=["a full batch", "another key waits", "a deadline is near", "no slot is busy"],
)
def test_nothing_waits_for_a_gap_that_it_would_harm(seen: View) -> None:
    seen.oldest_at = -0.1
    assert settled().hold(seen, now=0.0) is None


def test_a_policy_without_the_hold_does_not_wait_for_a_gap() -> None:
    policy = dense(
        measured(WorkConserving(0.002, even_gap=False), 5.0, MIN_CALLS), now=0.0, blocks_per_s=10, seconds=100
    )
    assert policy.hold(view(back_at=(4.0,)), now=0.0) is None


def coming_back(policy: WorkConserving, calls: int = 2 * MIN_CALLS) -> float:
    """Let 8 callers come back 2.4 ms after each of their batches, of 50 ms; the time of the last completion."""
    for number in range(calls):
        policy.completed("replica:1", 8, 0.05, number * 0.0525)
        policy.arrived(8, 8, number * 0.0525 + 0.0024)
    policy.completed("replica:1", 8, 0.05, calls * 0.0525)
    return calls * 0.0525


def test_after_a_completion_rows_wait_for_the_callers_who_come_back() -> None:
    policy = WorkConserving(0.0001)
    now = coming_back(policy)
    assert policy.hold(view(oldest_at=now), now) == Hold(pytest.approx(now + 0.0025))  # type: ignore[arg-type]
    assert policy.hold(view(oldest_at=now, is_full=True), now) is None
    assert policy.hold(view(oldest_at=now), now + 0.0025) is None


def test_rows_wait_for_callers_only_as_long_as_their_deadline_allows() -> None:
    """Bug: rows with 51 ms left, for calls of 50 ms, waited 2.5 ms, and all answers were late."""
    policy = WorkConserving(0.0001)
    now = coming_back(policy)
    assert policy.hold(view(oldest_at=now, deadline=now + 0.051), now) == Hold(pytest.approx(now + 0.001))  # type: ignore[arg-type]
    assert policy.hold(view(oldest_at=now, deadline=now + 0.05), now) is None


def test_a_row_that_is_late_already_does_not_hurry_the_others() -> None:
    policy = WorkConserving(0.0001)
    now = coming_back(policy)
    assert policy.hold(view(oldest_at=now, deadline=now + 0.0491), now) is None
    assert policy.hold(view(oldest_at=now, deadline=now + 0.0489), now) is not None


def test_a_burst_is_waited_for_only_as_long_as_the_deadline_allows() -> None:
    policy = measured(WorkConserving(max_queue_delay_s=1.0), 5.0)
    assert policy.hold(view(deadline=5.05), now=0.0) == Hold(pytest.approx(0.05), lapses_with_slots=True)  # type: ignore[arg-type]
    assert policy.hold(view(deadline=5.0), now=0.0) is None


def test_nothing_waits_for_callers_before_twenty_calls_were_measured() -> None:
    policy = WorkConserving(0.0001)
    now = coming_back(policy, MIN_CALLS - 2)
    assert policy.hold(view(oldest_at=now), now) is None


def test_a_policy_without_the_hold_does_not_wait_for_callers() -> None:
    policy = WorkConserving(0.0001, return_wave=False)
    now = coming_back(policy)
    assert policy.hold(view(oldest_at=now), now) is None


def test_rows_go_when_no_hold_applies_any_more() -> None:
    """Gathered for 5 ms, then held for a burst until 0.1 s."""
    policy = dense(measured(WorkConserving(1.0), 5.0), now=10.0, blocks_per_s=5000)
    assert policy.hold(view(oldest_at=10.0, blocks=2), now=10.0) == Hold(10.005)
    assert policy.hold(view(oldest_at=10.0, blocks=2), now=10.005) == Hold(10.1, lapses_with_slots=True)
    assert policy.hold(view(oldest_at=10.0, blocks=2), now=10.1) is None


def test_nothing_but_gathering_holds_the_rows_of_a_fast_model() -> None:
    policy = dense(measured(WorkConserving(1.0), 0.0019, MIN_CALLS), now=0.0, blocks_per_s=400)
    assert policy.hold(view(blocks=2, back_at=(0.0019,)), now=0.0) is None


def test_a_window_waits_for_its_delay_or_a_full_batch() -> None:
    window = Window(0.02)
    window.arrived(1, 1, 0.0)
    window.completed("replica:1", 1, 5.0, 0.0)
    assert window.service_times.calls == 1
    assert window.hold(view(oldest_at=1.0), now=1.0) == Hold(1.02)
    assert window.hold(view(oldest_at=1.0, back_at=(2.0, 3.0)), now=math.nextafter(1.02, 0)) is not None
    assert window.hold(view(oldest_at=1.0), now=1.02) is None
    assert window.hold(view(oldest_at=1.0, is_full=True), now=1.0) is None


def test_the_policy_follows_from_the_slots() -> None:
    assert isinstance(choose_policy(4, 0.002), WorkConserving)
    assert isinstance(choose_policy(0, 0.002), Window)


@pytest.mark.parametrize(
    "make", [lambda: WorkConserving(0.01, even_gap=False, return_wave=False), lambda: Window(0.01)]
)
def test_a_hold_ends_when_the_most_urgent_row_needs_its_time(make: Callable[[], Policy]) -> None:
    policy = make()
    for _ in range(MIN_CALLS):
        policy.completed("r", 1, 1.0, 0.0)
    assert policy.hold(view(deadline=101.01, oldest_at=100.0), 100.0) == Hold(
        100.01, isinstance(policy, WorkConserving)
    )
    hold = policy.hold(view(deadline=101.004, oldest_at=100.0), 100.0)
    assert hold is not None
    assert hold.until == pytest.approx(100.004)
    assert policy.hold(view(deadline=101.004, oldest_at=100.0), hold.until) is None
    lost = policy.hold(view(deadline=100.9, oldest_at=100.0), 100.0)
    assert (lost is None) is isinstance(policy, Window)  # who is late anyway breaks up no callers in a closed loop


@pytest.mark.parametrize(
    ("slots", "other_slots", "is_kept"), [(4, 2, True), (0, 0, True), (4, 0, False), (0, 4, False)]
)
def test_a_policy_that_changes_knows_what_was_known(slots: int, other_slots: int, *, is_kept: bool) -> None:
    policy = choose_policy(slots, 0.5)
    for _ in range(MIN_CALLS):
        policy.completed("fake:1", 1, 1.0, 0.0)
    changed = change_policy(policy, other_slots, 0.1)
    assert (changed is policy) is is_kept
    assert type(changed) is type(choose_policy(other_slots, 0.1))
    assert changed.service_times is policy.service_times
    if not other_slots:
        assert changed.hold(view(oldest_at=0.0), 0.05) == Hold(0.1)
