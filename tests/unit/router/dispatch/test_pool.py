"""Replicas come, go, fail and return: the pool with fake replicas in virtual time."""

import asyncio

import pytest

from router.dispatch.pool import ReplicaPool
from router.errors import BackendError, BackendExhausted, BatchTimeout, Malformed, Refused, StreamLost
from tests.unit.router.dispatch.client import Key, sent
from tests.unit.router.fakes import FakeBackend, pool_of

pytestmark = pytest.mark.anyio


def backends(number: int, service_s: float | None = None) -> list[FakeBackend]:
    return [FakeBackend(f"r:{index}", service_s=service_s) for index in range(1, number + 1)]


async def turn(times: int = 5) -> None:
    """Let callbacks run that are due."""
    for _ in range(times):
        await asyncio.sleep(0)


class Narrow(FakeBackend):
    """Has room for one batch at a time, whatever its model, and says when it has again."""

    @property
    def is_connected(self) -> bool:
        return super().is_ready

    @property
    def is_ready(self) -> bool:
        return self.is_connected and not self.in_flight

    def free(self) -> None:
        super().free()
        self._on_change()


# -- members -----------------------------------------------------------------------------------------------------------


async def test_a_replica_that_joins_takes_what_waits() -> None:
    one, two = backends(2)
    pool = pool_of(one, later=[two])
    pool.start()
    key = Key(pool)
    key.send(2)
    await turn()
    assert sent(one, two) == [1, 0]
    pool.set_addresses(["r:1", "r:2"])
    await turn()
    assert sent(one, two) == [1, 1]
    one.sent[0].answer()
    two.sent[0].answer()
    await key.wait()
    await pool.aclose()
    assert one.is_closed
    assert two.is_closed


async def test_a_replica_that_leaves_gets_no_new_batch_ends_what_it_holds_and_is_closed_then() -> None:
    one, two = backends(2)
    pool = pool_of(one, two)
    pool.start()
    key = Key(pool)
    key.send(2)
    await turn()
    pool.set_addresses(["r:2"])
    key.send(1)
    two.sent[0].answer()
    await turn()
    assert sent(one, two) == [1, 2]
    assert not one.is_closed
    one.sent[0].answer()
    await turn()
    assert one.is_closed
    assert len(key.ends) == 2
    two.sent[1].answer()
    await key.wait()
    assert pool.count_ready() == 1
    await pool.aclose()


async def test_an_idle_replica_that_leaves_is_closed_at_once() -> None:
    one, two = backends(2)
    pool = pool_of(one, two)
    pool.start()
    pool.set_addresses(["r:2"])
    await turn()
    assert (one.is_closed, two.is_closed) == (True, False)
    await pool.aclose()


async def test_a_replica_that_comes_back_before_it_has_ended_is_the_same_with_the_same_slots() -> None:
    one, two = backends(2)
    pool = pool_of(one, two)
    pool.start()
    key = Key(pool)
    key.send(2)
    await turn()
    pool.set_addresses(["r:2"])
    pool.set_addresses(["r:1", "r:2"])
    key.send(1)
    await turn()
    assert sent(one, two) == [1, 1]  # its slot is still taken
    one.sent[0].answer()
    await turn()
    assert sent(one, two) == [2, 1]
    assert not one.is_closed
    for answering in (one.sent[1], two.sent[0]):
        answering.answer()
    await key.wait()
    await pool.aclose()


async def test_without_any_replica_batches_wait_for_one() -> None:
    (one,) = backends(1, service_s=1.0)
    pool = pool_of(later=[one])
    pool.start()
    key = Key(pool)
    key.send(1)
    await turn()
    pool.set_addresses(["r:1"])
    await turn()
    await key.wait()
    assert sent(one) == [1]
    await pool.aclose()


async def test_slots_are_added_and_taken_away_while_batches_fly() -> None:
    (one,) = backends(1)
    pool = pool_of(one)
    pool.start()
    key = Key(pool)
    key.send(4)
    await turn()
    assert sent(one) == [1]
    pool.set_max_in_flight(3)
    await turn()
    assert sent(one) == [3]
    pool.set_max_in_flight(1)
    one.sent[0].answer()
    one.sent[1].answer()
    await turn()
    assert sent(one) == [3]
    one.sent[2].answer()
    await turn()
    assert sent(one) == [4]
    one.sent[3].answer()
    await key.wait()
    assert one.most_in_flight == 3
    assert pool.slots(("other", "")).count_free(0.0) == 1
    await pool.aclose()


# -- ejection ----------------------------------------------------------------------------------------------------------


async def fail_thrice(pool: ReplicaPool, key: Key, replica: FakeBackend) -> None:
    """Three failures in a row, each of a batch that was sent after the one before; others answer by themselves."""
    for _ in range(3):
        before = len(replica.sent)
        while len(replica.sent) == before:
            key.send()
            await turn()
            if len(replica.sent) == before:
                await key.wait()
        replica.sent[-1].fail(StreamLost("gone"))
        await key.wait()
        await asyncio.sleep(3.0)  # its pause


async def pool_with_an_ejected_one(number: int = 2) -> tuple[ReplicaPool, Key, list[FakeBackend]]:
    replicas = [FakeBackend("r:1"), *backends(number, service_s=1.0)[1:]]
    pool = pool_of(*replicas)
    pool.start()
    key = Key(pool)
    await fail_thrice(pool, key, replicas[0])
    assert pool.count_ejected() == 1
    return pool, key, replicas


async def test_a_replica_that_fails_three_times_in_a_row_gets_nothing_for_30_s(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool, key, (bad, _) = await pool_with_an_ejected_one()
    ejected_at = asyncio.get_running_loop().time() - 3.0
    before = len(bad.sent)
    while asyncio.get_running_loop().time() < ejected_at + 29.0:
        await key.exchange()
    assert len(bad.sent) == before
    assert len([record for record in caplog.records if "ejected for 30 s: 3 failures in a row" in record.message]) == 1
    await pool.aclose()


async def test_an_ejected_replica_is_tried_with_one_small_batch_and_returns_when_it_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    pool, key, (bad, _) = await pool_with_an_ejected_one()
    await asyncio.sleep(30.0)
    key.send(3)
    await turn()
    trial = bad.sent[-1]
    assert (trial.batch.rows, len(bad.sent), bad.in_flight) == (4, 4, 1)
    await asyncio.sleep(10.0)
    assert len(bad.sent) == 4  # one at a time
    trial.answer()
    await key.wait()
    assert pool.count_ejected() == 0
    assert [record.message for record in caplog.records if "is back" in record.message] == ["backend r:1 is back"]
    key.send(2)
    await turn()
    assert bad.sent[-1].batch.rows == 8
    bad.sent[-1].answer()
    await key.wait()
    await pool.aclose()


async def test_of_slots_without_limit_none_counts_as_free_trial_or_not() -> None:
    pool, _, _ = await pool_with_an_ejected_one()
    pool.set_max_in_flight(0)
    slots = pool.slots(("m", ""))
    assert slots.count_free(asyncio.get_running_loop().time()) == 0
    await asyncio.sleep(30.0)
    assert slots.count_free(asyncio.get_running_loop().time()) == 0
    await pool.aclose()


async def test_a_trial_that_fails_ejects_for_twice_as_long() -> None:
    pool, key, (bad, _) = await pool_with_an_ejected_one()
    await asyncio.sleep(30.0)
    key.send()
    await turn()
    bad.sent[-1].fail(StreamLost("gone"))
    await key.wait()
    await asyncio.sleep(59.0)
    await key.exchange()
    assert len(bad.sent) == 4
    await asyncio.sleep(1.0)
    key.send()
    await turn()
    assert (len(bad.sent), bad.sent[-1].batch.rows) == (5, 4)
    bad.sent[-1].answer()
    await key.wait()
    assert pool.count_ejected() == 0
    await pool.aclose()


async def test_a_trial_that_is_refused_tells_nothing_and_the_next_one_decides() -> None:
    pool, key, (bad, _) = await pool_with_an_ejected_one()
    await asyncio.sleep(30.0)
    key.send()
    await turn()
    bad.sent[-1].fail(Refused("bad row"))
    await key.wait()
    assert pool.count_ejected() == 1
    key.send()
    await turn()
    assert bad.sent[-1].batch.rows == 4
    bad.sent[-1].answer()
    await key.wait()
    assert pool.count_ejected() == 0
    await pool.aclose()


async def test_the_last_replica_is_never_ejected() -> None:
    (only,) = backends(1)
    pool = pool_of(only)
    pool.start()
    key = Key(pool)
    await fail_thrice(pool, key, only)
    await fail_thrice(pool, key, only)
    assert pool.count_ejected() == 0
    await pool.aclose()


async def test_a_replica_is_not_ejected_while_the_others_are_away() -> None:
    bad, away = FakeBackend("r:1"), FakeBackend("r:2", is_ready=False)
    pool = pool_of(bad, away)
    pool.start()
    key = Key(pool)
    await fail_thrice(pool, key, bad)
    assert pool.count_ejected() == 0
    away.set_ready(is_ready=True)
    await pool.aclose()


async def test_at_most_half_of_the_pool_is_ejected() -> None:
    *bad, good = backends(3, service_s=1.0)
    pool = pool_of(*bad, good)
    pool.start()
    key = Key(pool)
    for replica in bad:
        replica.error = StreamLost("gone")
    for _ in range(7):
        key.send(3)
        await key.wait()
        await asyncio.sleep(3.0)
    assert pool.count_ejected() == 1
    assert min(sent(*bad)) == 3
    await pool.aclose()


async def test_an_ejected_replica_serves_whole_batches_while_all_others_are_away() -> None:
    pool, key, (bad, good) = await pool_with_an_ejected_one()
    good.set_ready(is_ready=False)
    key.send()
    await turn()
    assert bad.sent[-1].batch.rows == 8
    bad.sent[-1].answer()
    await key.wait()
    good.set_ready(is_ready=True)
    before = len(bad.sent)
    await key.exchange(2)
    assert len(bad.sent) == before
    await pool.aclose()


async def test_batches_that_are_lost_with_one_connection_are_one_failure() -> None:
    bad, good = FakeBackend("r:1"), FakeBackend("r:2", service_s=1.0)
    pool = pool_of(bad, good, max_in_flight=4)
    pool.start()
    key = Key(pool)
    key.send(8)
    await turn()
    for lost in list(bad.sent):
        lost.fail(StreamLost("gone"))
    await key.wait()
    assert len(bad.sent) == 4
    assert pool.count_ejected() == 0
    await pool.aclose()


@pytest.mark.parametrize(
    ("error", "is_ejected"),
    [
        (StreamLost("x"), True),
        (BatchTimeout("x"), True),
        (Malformed("x"), True),
        (BackendExhausted("x"), False),
        (Refused("x"), False),
    ],
)
async def test_only_what_the_replica_is_to_blame_for_ejects_it(error: BackendError, is_ejected: bool) -> None:
    bad, good = backends(2, service_s=1.0)
    bad.error = error
    pool = pool_of(bad, good)
    pool.start()
    key = Key(pool)
    for _ in range(5):
        key.send(2)
        await key.wait()
        await asyncio.sleep(3.0)
    assert pool.count_ejected() == int(is_ejected)
    await pool.aclose()


async def test_a_replica_five_times_as_slow_as_its_peers_is_ejected_and_returns_after_the_cure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow, *others = backends(3, service_s=1.0)
    pool = pool_of(slow, *others, max_in_flight=2)
    pool.start()
    key = Key(pool)
    key.learn([replica.address for replica in (slow, *others)], 1.0)
    slow.service_s = 5.0
    while not pool.count_ejected():
        key.send(6)
        await key.wait()
    assert "5.0 times as slow as its peers" in caplog.text
    assert len(slow.sent) == 10  # five rounds of two that are out together
    await asyncio.sleep(30.0)
    await key.exchange()
    assert pool.count_ejected() == 1  # the trial was slow, too
    slow.service_s = 1.0
    await asyncio.sleep(60.0)
    await key.exchange()
    assert pool.count_ejected() == 0
    await pool.aclose()


async def test_when_all_are_slow_nobody_is_ejected() -> None:
    replicas = backends(3, service_s=1.0)
    pool = pool_of(*replicas, max_in_flight=2)
    pool.start()
    key = Key(pool)
    key.learn([replica.address for replica in replicas], 1.0)
    for replica in replicas:
        replica.service_s = 5.0
    for _ in range(20):
        key.send(6)
        await key.wait()
    assert pool.count_ejected() == 0
    await pool.aclose()


# -- replicas with less room than slots --------------------------------------------------------------------------------


async def test_slots_are_there_while_their_replica_is_full() -> None:
    pool = pool_of(one := Narrow("r:1"))
    pool.start()
    key = Key(pool)
    assert pool.slots(("m", "")).usable == 1
    key.send(2)
    await turn()
    assert (sent(one), pool.slots(("m", "")).usable) == ([1], 1)
    assert pool.count_ready() == 1
    for _ in range(2):
        one.sent[-1].answer()
        await turn()
    await pool.aclose()


async def test_no_more_slots_are_counted_than_a_replica_has_room_for() -> None:
    # A model was told of 8 slots where 4 batches may be out, and the admission took twice as much as could be in time.
    pool = pool_of(*backends(2), max_in_flight=8, max_in_flight_total=4)
    pool.start()
    now = asyncio.get_running_loop().time()
    slots = pool.slots(("m", ""))
    assert (slots.usable, slots.count_free(now), len(slots.returns_s(now))) == (8, 8, 8)
    pool.set_max_in_flight(3)
    assert (slots.usable, slots.count_free(now)) == (6, 6)
    pool.set_max_in_flight(5)
    assert (slots.usable, slots.count_free(now)) == (8, 8)
    await pool.aclose()


async def test_it_is_told_in_order_when_slots_come_back_and_anew_after_each_batch() -> None:
    one, two = backends(2)
    pool = pool_of(one, two, max_in_flight=2)
    pool.start()
    loop = asyncio.get_running_loop()
    key, slots = Key(pool), pool.slots(("m", ""))
    key.learn(["r:1", "r:2"], 5.0)

    def returns() -> list[float]:
        told = slots.returns_s(loop.time())
        return [round(told[number], 3) for number in range(len(told))]

    assert returns() == [0, 0, 0, 0]
    key.send(1)
    await asyncio.sleep(2.0)
    assert returns() == [0, 0, 0, 3]
    key.send(3)
    await turn()
    assert returns() == [3, 5, 5, 5]
    await asyncio.sleep(3.5)
    assert returns() == [0, 1.5, 1.5, 1.5]  # the first is overdue
    one.sent[0].answer()
    await turn()
    assert returns() == [0, 1.5, 1.5, 1.5]
    await asyncio.sleep(1.0)
    assert returns() == [0, 0.5, 0.5, 0.5]
    for sent_batch in [*one.sent[1:], *two.sent]:
        sent_batch.answer()
    await key.wait()
    assert returns() == [0, 0, 0, 0]
    pool.set_max_in_flight(0)
    assert returns() == []
    await pool.aclose()


async def test_room_that_another_model_has_taken_is_no_free_slot() -> None:
    one, two = backends(2)
    pool = pool_of(one, two, max_in_flight=3, max_in_flight_total=4)
    pool.start()
    key = Key(pool)
    key.send(5)
    await turn()
    assert sorted(sent(one, two)) == [2, 3]
    now = asyncio.get_running_loop().time()
    assert pool.slots(("m", "")).count_free(now) == 1
    assert pool.slots(("other", "")).count_free(now) == 1 + 2
    for sent_batch in [*one.sent, *two.sent]:
        sent_batch.answer()
    await key.wait()
    await pool.aclose()


async def test_a_full_replica_that_loses_a_batch_pauses_before_the_next() -> None:
    pool = pool_of(one := Narrow("r:1"))
    pool.start()
    key = Key(pool)
    key.send(2)
    await turn()
    one.sent[0].fail(StreamLost("gone"))
    await asyncio.sleep(0.03)
    assert sent(one) == [1]
    await asyncio.sleep(0.04)
    assert sent(one) == [2]
    one.sent[1].answer()
    await key.wait()
    await pool.aclose()
