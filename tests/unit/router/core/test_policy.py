"""The release rules, one step before each boundary and one step on it."""

import math

import pytest

from router.core.policy import Hold, Rate, View, Window, WorkConserving, choose_policy


def view(
    *, blocks: int = 1, oldest_at: float = 0.0, is_full: bool = False, blocks_in_flight: int = 0, busy_slots: int = 0
) -> View:
    return View(blocks, oldest_at, is_full, blocks_in_flight, busy_slots)


def dense(policy: WorkConserving, now: float, blocks_per_s: float) -> WorkConserving:
    """Let blocks arrive evenly for a long while, up to `now`."""
    gap = 1 / blocks_per_s
    for number in reversed(range(round(3 * blocks_per_s))):
        policy.arrived(1, now - number * gap)
    return policy


def test_a_row_goes_at_once_while_nothing_is_known() -> None:
    assert WorkConserving(0.002).hold(view(), now=0.0) is None


def test_an_idle_model_waits_two_hundredths_of_its_service_time_for_company() -> None:
    policy = WorkConserving(max_queue_delay_s=1.0)
    policy.completed(5.0)
    assert policy.hold(view(oldest_at=10.0), now=10.0) == Hold(10.1, lapses_with_slots=True)
    assert policy.hold(view(oldest_at=10.0), now=math.nextafter(10.1, 0)) is not None
    assert policy.hold(view(oldest_at=10.0), now=10.1) is None


def test_the_wait_never_exceeds_max_queue_delay() -> None:
    policy = WorkConserving(max_queue_delay_s=0.002)
    policy.completed(5.0)
    assert policy.hold(view(), now=0.0) == Hold(0.002, lapses_with_slots=True)


@pytest.mark.parametrize(("service_s", "is_held"), [(0.05, True), (0.0499, False)])
def test_a_wait_below_a_millisecond_is_none(service_s: float, is_held: bool) -> None:
    policy = WorkConserving(0.002)
    policy.completed(service_s)
    assert (policy.hold(view(), now=0.0) is not None) is is_held


@pytest.mark.parametrize("busy", [{"busy_slots": 1}, {"is_full": True}])
def test_a_busy_model_or_a_full_batch_is_not_held(busy: dict[str, int]) -> None:
    policy = WorkConserving(0.002)
    policy.completed(5.0)
    assert policy.hold(view(**busy), now=0.0) is None  # type: ignore[arg-type]


def test_dense_arrivals_gather_until_the_oldest_is_two_milliseconds_old() -> None:
    policy = dense(WorkConserving(0.01), now=10.0, blocks_per_s=550)
    company = view(oldest_at=10.0, blocks=2, busy_slots=1)
    assert policy.hold(company, now=10.0) == Hold(10.002)
    assert policy.hold(company, now=math.nextafter(10.002, 0)) is not None
    assert policy.hold(company, now=10.002) is None


def test_gathering_needs_company_in_the_queue_or_in_flight() -> None:
    policy = dense(WorkConserving(0.002), now=10.0, blocks_per_s=550)
    assert policy.hold(view(oldest_at=10.0), now=10.0) is None
    assert policy.hold(view(oldest_at=10.0, blocks_in_flight=1, busy_slots=1), now=10.0) is not None


def test_sparser_arrivals_do_not_gather() -> None:
    policy = dense(WorkConserving(0.002), now=10.0, blocks_per_s=450)
    assert policy.hold(view(oldest_at=10.0, blocks=2), now=10.0) is None


def test_a_full_batch_is_not_gathered() -> None:
    policy = dense(WorkConserving(0.002), now=10.0, blocks_per_s=5000)
    assert policy.hold(view(oldest_at=10.0, blocks=2, is_full=True), now=10.0) is None


def test_zero_delay_turns_every_hold_off() -> None:
    policy = dense(WorkConserving(0.0), now=10.0, blocks_per_s=5000)
    policy.completed(5.0)
    assert policy.hold(view(oldest_at=10.0, blocks=2), now=10.0) is None


def test_a_window_waits_for_its_delay_or_a_full_batch() -> None:
    window = Window(0.02)
    window.arrived(1, 0.0)
    window.completed(5.0)
    assert window.hold(view(oldest_at=1.0), now=1.0) == Hold(1.02)
    assert window.hold(view(oldest_at=1.0, busy_slots=3), now=math.nextafter(1.02, 0)) is not None
    assert window.hold(view(oldest_at=1.0), now=1.02) is None
    assert window.hold(view(oldest_at=1.0, is_full=True), now=1.0) is None


def test_the_policy_follows_from_the_slots() -> None:
    assert isinstance(choose_policy(4, 0.002), WorkConserving)
    assert isinstance(choose_policy(0, 0.002), Window)


@pytest.mark.parametrize("policy", [WorkConserving(0.002), Window(0.002)])
def test_the_service_time_is_a_mean_that_follows_the_newest_batches(policy: WorkConserving | Window) -> None:
    assert policy.service_s is None
    policy.completed(1.0)
    assert policy.service_s == 1.0
    policy.completed(2.0)
    assert policy.service_s == pytest.approx(1.2)


def test_a_rate_settles_at_the_truth_and_decays_when_nothing_comes() -> None:
    rate = Rate()
    for number in range(1000):
        rate.add(1, number * 0.01, span_s=0.25)
    assert rate.at(9.99, span_s=0.25) == pytest.approx(100, rel=0.03)
    assert rate.at(9.99 + 0.25, span_s=0.25) == pytest.approx(100 / math.e, rel=0.03)
