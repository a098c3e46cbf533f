"""The simulator's loop: what it carries out, and that it does what the router does."""

import asyncio
import random
from collections.abc import Iterator

import pytest

from router.config import Settings
from router.core.policy import Policy, Window, WorkConserving
from router.core.types import Batch, BatchAnswer, Block
from router.dataplane import DataPlane
from router.metrics import Metrics
from router.simulate.engine import Arrival, ClosedLoop, Outcome, Setup, Simulation
from tests.builders import make_block, make_key
from tests.unit.router.fakes import FakeBackend, RecordingReply, pool_of

SERVICE_S = 0.5


def plain() -> Policy:
    return WorkConserving(0.002, even_gap=False, return_wave=False)


def simulate(arrivals: list[Arrival], until: float = 1e6, **setup: object) -> Outcome:
    defaults = {"policy": plain, "service_s": lambda chance, rows: SERVICE_S}
    return Simulation(Setup(**{**defaults, **setup}), arrivals).run(until)  # type: ignore[arg-type]


def test_rows_that_wait_for_a_slot_share_the_next_batch() -> None:
    outcome = simulate([Arrival(0.0), Arrival(0.1, rows=2), Arrival(0.2)])
    assert list(outcome.batch_starts_s) == [0.0, 0.5]
    assert list(outcome.batch_rows) == [1, 3]
    assert list(outcome.latencies_s) == pytest.approx([0.5, 0.9, 0.9, 0.8])


def test_a_large_block_is_spread_over_batches() -> None:
    outcome = simulate([Arrival(0.0, rows=20)], max_batch_size=8)
    assert list(outcome.batch_rows) == [8, 8, 4]


def test_keys_share_slots_and_no_batch() -> None:
    outcome = simulate([Arrival(0.0), *(Arrival(0.1, key=key) for key in "abab")])
    assert list(outcome.batch_rows) == [1, 2, 2]


def test_rows_whose_time_is_up_are_not_sent() -> None:
    outcome = simulate([Arrival(0.0), Arrival(0.1, timeout_s=0.3), Arrival(0.2, timeout_s=0.7)])
    assert list(outcome.batch_rows) == [1, 1]
    assert (outcome.expired_rows, outcome.late_rows) == (1, 1)


def test_of_a_block_whose_time_is_up_only_the_rows_that_were_not_sent_expire() -> None:
    outcome = simulate([Arrival(0.0, rows=10, timeout_s=0.8)], max_batch_size=4)
    assert (outcome.expired_rows, outcome.late_rows, len(outcome.latencies_s)) == (2, 4, 8)


def test_rows_beyond_the_bound_are_refused() -> None:
    outcome = simulate([Arrival(0.0), *(Arrival(0.1) for _ in range(5))], max_queued_rows=3)
    assert (outcome.refused_rows, len(outcome.latencies_s)) == (2, 4)


def test_a_request_that_could_never_fit_is_refused_and_the_run_goes_on() -> None:
    outcome = simulate([Arrival(0.0), Arrival(0.1, rows=4), Arrival(0.2)], max_queued_rows=3)
    assert (outcome.refused_rows, len(outcome.latencies_s)) == (4, 2)


def test_what_happens_before_the_warm_up_is_over_is_not_counted() -> None:
    outcome = simulate([Arrival(0.0), Arrival(0.1)], warm_up_s=0.6)
    assert (outcome.arrived_rows, len(outcome.latencies_s), list(outcome.batch_rows)) == (0, 1, [1])


def test_callers_in_a_closed_loop_ask_again_after_their_answer() -> None:
    outcome = simulate([], until=3.0, closed_loop=ClosedLoop(1, lambda chance: 0.25), policy=lambda: Window(0.0))
    assert list(outcome.batch_starts_s) == pytest.approx([0.25, 1.0, 1.75, 2.5])


class Told(WorkConserving):
    """Notes what it is told of arrivals."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.told: list[tuple[int, int, float]] = []

    def arrived(self, blocks: int, rows: int, now: float) -> None:
        self.told.append((blocks, rows, now))


def test_the_policy_is_told_once_of_all_that_comes_at_one_instant() -> None:
    """Bug: it was told of each row, unlike by the router, so that bursts passed for callers without each other."""
    policy = Told()
    simulate([Arrival(0.0), Arrival(0.1), Arrival(0.1, rows=2), Arrival(0.2)], policy=lambda: policy)
    assert policy.told == [(1, 1, 0.0), (2, 3, 0.1), (1, 1, 0.2)]


PER_ROW_S = 0.02
PATIENCE_S = 1.5
WEIGHTS = {"gold": 3.0}


class Taped(FakeBackend):
    """A backend that answers after SERVICE_S, and PER_ROW_S for each row, and notes its batches."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.tape: list[tuple[float, int]] = []

    async def infer(self, batch: Batch) -> BatchAnswer:
        self.tape.append((asyncio.get_running_loop().time(), batch.rows))
        self.service_s = SERVICE_S + PER_ROW_S * batch.rows
        return await super().infer(batch)


def mixed_arrivals() -> Iterator[Arrival]:
    """Some 12 rows a second for two keys, sparse and dense in turn, for a minute: every hold has its occasion."""
    chance = random.Random(5)
    now = 0.0
    while now < 60:
        now += chance.expovariate(4 if int(now / 10) % 2 else 20)
        yield Arrival(now, chance.randint(1, 2), chance.choice("aaaaaaab") if now > 30 else "a", timeout_s=600.0)


def urgent_arrivals() -> Iterator[Arrival]:
    """As many rows as there are seats, now and then twice as many, of three tenants and both classes, in a hurry."""
    chance = random.Random(6)
    now = 0.0
    while now < 60:
        now += chance.expovariate(40 if int(now / 10) % 2 else 20)
        timeout_s = chance.uniform(0.5, 2.0) if chance.random() < 0.8 else 60.0
        tenant = chance.choice(["flood", "flood", "flood", "gold", "drop"])
        yield Arrival(
            now, chance.randint(1, 2), timeout_s=timeout_s, tenant=tenant, is_batch_class=chance.random() < 0.3
        )


async def serve(arrivals: list[Arrival]) -> tuple[list[tuple[float, int]], list[RecordingReply]]:
    """Give the arrivals to the running router with two replicas of one slot; the batches and the answers."""
    model = {"backend": "fake", "max_batch_size": 8, "max_queue_delay_s": 0.1, "batch_class_patience_s": PATIENCE_S}
    settings = Settings(
        backends={"fake": {"addresses": ["fake:1"], "max_in_flight": 1}},  # type: ignore[dict-item]
        models=[model],  # type: ignore[list-item]
        tenant_weights=WEIGHTS,
    )
    loop = asyncio.get_running_loop()
    replicas = [Taped("0"), Taped("1")]
    pool = pool_of(*replicas)
    pool.start()
    plane = DataPlane(settings, {"fake": pool}, Metrics())
    start = loop.time()
    replies = []
    for arrival in arrivals:
        await asyncio.sleep(start + arrival.at - loop.time())
        reply = RecordingReply()
        replies.append(reply)
        call = plane.open(reply, arrival.rows, arrival.timeout_s)
        like = make_block(*range(arrival.rows), key=make_key(agent_type=arrival.key))
        now = loop.time()
        times, whose = (now, now + arrival.timeout_s), (arrival.tenant, arrival.is_batch_class)
        plane.infer(call, [Block(like.key, 0, 0, like.rows, like.inputs, like.row_bytes, *times, call, *whose)])
    await plane.wait_until_idle()
    await plane.aclose()
    await pool.aclose()
    return sorted((at - start, rows) for replica in replicas for at, rows in replica.tape), replies


def simulate_served(arrivals: list[Arrival]) -> Outcome:
    return simulate(
        arrivals,
        policy=lambda: WorkConserving(0.1),
        service_s=lambda chance, rows: SERVICE_S + PER_ROW_S * rows,
        replicas=2,
        max_batch_size=8,
        tenant_weights=WEIGHTS,
        batch_class_patience_s=PATIENCE_S,
    )


def assert_same_batches(served: list[tuple[float, int]], outcome: Outcome) -> None:
    """Up to the slack of the router's clock, 0.6 ms, which the simulator does without."""
    simulated = sorted(zip(outcome.batch_starts_s, outcome.batch_rows, strict=True))
    assert len(simulated) > 100
    assert [rows for _, rows in served] == [rows for _, rows in simulated]
    assert [at for at, _ in served] == pytest.approx([at for at, _ in simulated], abs=0.01)


@pytest.mark.anyio
async def test_the_router_makes_the_very_batches_that_the_simulator_makes() -> None:
    arrivals = list(mixed_arrivals())
    outcome = simulate_served(arrivals)
    served, _ = await serve(arrivals)
    assert_same_batches(served, outcome)


@pytest.mark.anyio
async def test_the_router_gives_the_very_rows_up_that_the_simulator_gives_up() -> None:
    arrivals = list(urgent_arrivals())
    outcome = simulate_served(arrivals)
    served, replies = await serve(arrivals)
    assert_same_batches(served, outcome)
    assert sum(len(reply.failures) for reply in replies) > 1000
    assert sum(len(reply.values) for reply in replies) == len(outcome.latencies_s) - outcome.late_rows
