"""What the release is good for: figures of whole runs in virtual time beside the plain release; what never happens.

The figures are deterministic: the same seed gives the same run on every machine.
"""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.policy import Hold, Policy, View, WorkConserving
from router.core.types import Part
from router.simulate.engine import Arrival, ClosedLoop, Outcome, Setup, Simulation
from router.simulate.scenario import Figures, Scenario, Service, Traffic, parse_service, run

SLOT = parse_service("0.05")


def both(scenario: Scenario) -> tuple[Figures, Figures]:
    """The figures with the plain release and with the router's own."""
    plain = Scenario(**{**{name: getattr(scenario, name) for name in Scenario.__slots__}, "policy": "plain"})
    return run(plain), run(scenario)


def slot(traffic: Traffic, seconds: float = 25.0) -> Scenario:
    """One slot of 50 ms, batches of 64."""
    return Scenario(traffic, SLOT, seconds=seconds, warm_up_s=5.0)


def test_callers_in_a_closed_loop_fill_their_batches() -> None:
    """The ceiling is 64 rows in 50 ms and the wave, at most 5 ms: 1,164 requests/s."""
    plain, full = both(slot(Traffic(callers=64)))
    assert plain.answered == pytest.approx(640, rel=0.01)
    assert full.answered >= 1150
    assert full.p50_s <= 0.055
    assert full.batch_mean > 63


@pytest.mark.parametrize("callers", [4, 16, 40, 100])
def test_the_number_of_callers_does_not_matter(callers: int) -> None:
    plain, full = both(slot(Traffic(callers=callers)))
    assert full.answered > min(1.7 * plain.answered, 1200)


def test_other_callers_do_not_disturb_the_closed_loop() -> None:
    """350 Poisson rows a second, three tenths of all."""
    plain, full = both(slot(Traffic(callers=64, rate=350)))
    assert full.answered > 1.15 * plain.answered
    assert full.mean_s < 0.8 * plain.mean_s


@pytest.mark.parametrize("load", [0.02, 0.1, 0.3, 0.6, 0.9])
def test_callers_who_do_not_come_back_are_not_waited_for(load: float) -> None:
    plain, full = both(slot(Traffic(rate=1280 * load), seconds=60.0))
    assert full.mean_s <= 1.005 * plain.mean_s
    assert full.p99_s <= 1.005 * plain.p99_s


@pytest.mark.parametrize(
    ("service", "arrivals", "replicas", "load"),
    [
        ("5", "on-off", 1, 0.3),
        ("5", "bursts", 1, 0.5),
        ("5", "bursts", 8, 0.1),
        ("0.005+0.00035*rows", "bursts", 2, 0.5),
        ("0.005+0.00035*rows", "poisson", 2, 0.5),
        ("3-7", "poisson", 2, 0.3),
        ("lognormal:5:0.2", "poisson", 8, 0.9),
    ],
)
def test_no_traffic_is_served_worse(service: str, arrivals: str, replicas: int, load: float) -> None:
    """At most 1 % in the mean and 3 % in the p99."""
    rate = load * Scenario(Traffic(), parse_service(service), replicas=replicas).capacity
    seconds = 15_000 / rate
    traffic = Traffic(rate=rate, arrivals=arrivals)
    plain, full = both(Scenario(traffic, parse_service(service), replicas=replicas, seconds=seconds, warm_up_s=0))
    assert full.mean_s <= 1.01 * plain.mean_s
    assert full.p99_s <= 1.03 * plain.p99_s


@pytest.mark.parametrize(("replicas", "load"), [(4, 0.5), (4, 0.9), (8, 0.5), (8, 0.9)])
def test_even_gaps_take_a_fifth_off_the_latency_of_several_slots(replicas: int, load: float) -> None:
    traffic = Traffic(rate=load * replicas * 64 / 5)
    plain, full = both(Scenario(traffic, parse_service("5"), replicas=replicas, seconds=1000, warm_up_s=200))
    assert full.mean_s <= 0.8 * plain.mean_s
    assert full.p99_s <= 0.8 * plain.p99_s


def test_even_gaps_come_near_the_mean_latency_that_theory_gives() -> None:
    scenario = Scenario(Traffic(rate=35), parse_service("5"), replicas=4, seconds=1000, warm_up_s=200)
    assert run(scenario).mean_s == pytest.approx(scenario.busy_mean_s(35), rel=0.01)


@pytest.mark.parametrize("service", ["0.05", "3-7", "0.005+0.00035*rows"])
@pytest.mark.parametrize("replicas", [1, 4])
def test_saturated_slots_do_all_that_they_can(service: str, replicas: int) -> None:
    """250 calls a slot; of U(3, 7) their mean is up to 3 % off, for one slot."""
    parsed = parse_service(service)
    bare = Scenario(Traffic(), parsed, replicas=replicas)
    seconds = 250 * parsed.mean_s(64)
    traffic = Traffic(rate=1.2 * bare.capacity)
    scenario = Scenario(traffic, parsed, replicas=replicas, seconds=seconds, warm_up_s=seconds / 10)
    assert run(scenario).answered >= 0.98 * (0.97 if parsed.low_s < parsed.high_s else 1) * bare.capacity


# -- what never happens ----------------------------------------------------------------------------------------------


class Watched(WorkConserving):
    """The router's policy, with a protocol of what it held."""

    def __init__(self) -> None:
        super().__init__(0.01)
        self.held: list[tuple[float, float, bool]] = []

    def hold(self, view: View, now: float) -> Hold | None:
        hold = super().hold(view, now)
        if hold:
            self.held.append((now, hold.until, view.is_full))
        return hold


class Recorded(Simulation):
    """A run that notes who went when: (arrival, first row, rows) per batch, of each key."""

    def __init__(self, setup: Setup, arrivals: list[Arrival]) -> None:
        super().__init__(setup, arrivals)
        self.batches: list[tuple[str, float, list[tuple[float, int, int]]]] = []

    def _start(self, key, replica: int, parts: tuple[Part, ...], now: float) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        rows = [(part.block.arrived_at, part.first, part.rows) for part in parts]
        self.batches.append((parts[0].block.key.agent_type, now, rows))
        super()._start(key, replica, parts, now)


traffics = st.lists(
    st.tuples(st.floats(0.0, 0.4, allow_nan=False), st.integers(1, 12), st.sampled_from(["a", "a", "a", "b"])),
    min_size=1,
    max_size=120,
)
models = st.sampled_from([Service(0.5, 0.5), Service(0.1, 0.9), Service(0.05, 0.05, 0.0, 0.01), Service(2.0, 2.0)])


def replay(
    gaps: list[tuple[float, int, str]], model: Service, slots: int, policy: Callable[[], Policy], seed: int = 0
) -> tuple[Recorded, Outcome, list[Arrival]]:
    now = 0.0
    arrivals = []
    for gap, rows, key in gaps:
        now += gap
        arrivals.append(Arrival(now, rows, key))
    setup = Setup(policy, model.draw_s, replicas=slots, max_batch_size=8, seed=seed)
    simulation = Recorded(setup, [Arrival(one.at, one.rows, one.key) for one in arrivals])
    return simulation, simulation.run(1e9), arrivals


@settings(max_examples=60, deadline=None)
@given(traffics, models, st.integers(1, 4))
def test_every_row_goes_once_and_in_order(gaps: list[tuple[float, int, str]], model: Service, slots: int) -> None:
    simulation, outcome, arrivals = replay(gaps, model, slots, Watched)
    assert len(outcome.latencies_s) == outcome.arrived_rows == sum(arrival.rows for arrival in arrivals)
    for key in {arrival.key for arrival in arrivals}:
        came = [(one.at, row) for one in arrivals if one.key == key for row in range(one.rows)]
        went = [
            (at, first + row)
            for name, _, parts in simulation.batches
            if name == key
            for at, first, rows in parts
            for row in range(rows)
        ]
        assert [at for at, _ in went] == [at for at, _ in came]
        assert sorted(went) == sorted(came)


@settings(max_examples=60, deadline=None)
@given(traffics, models, st.integers(1, 4))
def test_a_full_batch_is_never_held_and_every_hold_has_a_near_end(
    gaps: list[tuple[float, int, str]], model: Service, slots: int
) -> None:
    policies: list[Watched] = []

    def watched() -> Watched:
        policies.append(Watched())
        return policies[-1]

    _, outcome, _ = replay(gaps, model, slots, watched)
    longest = max(end - start for start, end in zip(outcome.batch_starts_s, outcome.batch_ends_s, strict=True))
    for policy in policies:
        for now, until, is_full in policy.held:
            assert not is_full
            assert now < until <= now + max(longest, 0.01)


@settings(max_examples=60, deadline=None)
@given(traffics, models, st.integers(1, 4))
def test_no_row_waits_longer_than_the_rows_before_it_and_one_hold_need(
    gaps: list[tuple[float, int, str]], model: Service, slots: int
) -> None:
    """Whatever is held goes at the latest when the slots that were busy are back, so a row behind n others has gone
    after n / 8 calls and a hold each."""
    _, outcome, arrivals = replay(gaps, model, slots, Watched)
    longest = max(end - start for start, end in zip(outcome.batch_starts_s, outcome.batch_ends_s, strict=True))
    most = sum(arrival.rows for arrival in arrivals)
    assert max(outcome.latencies_s) <= (2 * longest + 0.02) * (most / 8 + len(arrivals) / 8 + 2)


@settings(max_examples=30, deadline=None)
@given(traffics, models, st.integers(1, 4), st.integers(0, 3))
def test_the_same_seed_gives_the_same_run(
    gaps: list[tuple[float, int, str]], model: Service, slots: int, seed: int
) -> None:
    one, _, _ = replay(gaps, model, slots, Watched, seed)
    two, _, _ = replay(gaps, model, slots, Watched, seed)
    assert one.batches == two.batches


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 100))
def test_callers_in_a_closed_loop_are_never_forgotten(callers: int, slots: int, seed: int) -> None:
    """Each asks again and again: nobody's row is lost in a hold, and no slot is left idle for long."""
    loop = ClosedLoop(callers, lambda chance: chance.uniform(0.0, 0.02))
    setup = Setup(Watched, lambda chance, rows: 0.05, slots, 1, 16, closed_loop=loop, seed=seed)
    outcome = Simulation(setup, ()).run(10.0)
    turns = 10.0 / (0.05 + 0.02 + 0.35 * 0.05 + 0.05 * math.ceil(callers / 16))
    assert len(outcome.latencies_s) >= callers * turns * 0.8


def test_a_run_has_hardly_more_events_than_arrivals() -> None:
    """The cost of a run is that of its arrivals and batches: nothing polls, and nothing rings without need."""
    events = 0

    class Counting(Simulation):
        def _happen(self, event, touched, now: float) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
            nonlocal events
            events += 1
            super()._happen(event, touched, now)

    chance = random.Random(1)
    times = sorted(chance.uniform(0, 10) for _ in range(10_000))
    setup = Setup(lambda: WorkConserving(0.002), lambda chance, rows: 0.2, replicas=4)
    Counting(setup, [Arrival(at) for at in times]).run(20.0)
    assert events < 1.5 * len(times)
