"""Batches that stall: sent twice where it can help, in virtual time. Calls take 1 s, so a stall begins at 2 s."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from router.core.pulse import Sign
from router.core.types import ANY_ANSWER, BatchAnswer, Contract, Tensor
from router.dispatch.pool import ReplicaPool
from router.errors import Refused, StreamLost
from tests.unit.router.dispatch.client import Key, sent
from tests.unit.router.fakes import FakeBackend, pool_of
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def stalling(
    *,
    number: int = 2,
    max_in_flight: int = 1,
    budget: int = 1000,
    is_allowed: bool = True,
    known: bool = True,
    contract: Contract = ANY_ANSWER,
) -> AsyncIterator[tuple[ReplicaPool, Key, list[FakeBackend]]]:
    """A pool of replicas that hang, a key that may hedge once, and its first batch at the first replica."""
    replicas = [FakeBackend(f"r:{index}") for index in range(1, number + 1)]
    pool = pool_of(*replicas, max_in_flight=max_in_flight)
    pool.start()
    key = Key(pool, budget=budget, is_allowed=is_allowed, contract=contract)
    if known:
        key.learn([replica.address for replica in replicas], 1.0)
    key.save_for_hedges()
    key.send()
    await asyncio.sleep(0)
    assert sent(*replicas)[0] == 1
    yield pool, key, replicas
    await pool.aclose()
    for replica in replicas:
        assert replica.in_flight == 0


def winners(key: Key) -> list[str]:
    return [end.replica if isinstance(end, BatchAnswer) else type(end).__name__ for end in key.ends]


async def test_a_batch_that_stalls_is_sent_to_an_idle_replica_too_and_not_before() -> None:
    async with stalling() as (pool, key, (one, two)):
        await asyncio.sleep(1.99)
        assert sent(one, two) == [1, 0]
        await asyncio.sleep(0.02)
        assert sent(one, two) == [1, 1]
        assert two.sent[0].batch is one.sent[0].batch
        assert pool.slots(("m", "")).busy == 2
        two.sent[0].answer()
        await key.wait()


async def test_the_first_answer_wins_and_the_loser_is_cancelled() -> None:
    for winner in (0, 1):
        async with stalling() as (pool, key, replicas):
            await asyncio.sleep(2.5)
            replicas[winner].sent[0].answer()
            await key.wait()
            assert winners(key) == [replicas[winner].address]
            assert replicas[1 - winner].sent[0].future.cancelled()
            assert pool.slots(("m", "")).busy == 0
            key.send(2)
            await asyncio.sleep(0)
            assert sent(*replicas) == [2, 2]
            for replica in replicas:
                replica.sent[1].answer()
            await key.wait()


async def test_when_both_answer_at_once_one_answer_is_told() -> None:
    async with stalling() as (_, key, (one, two)):
        await asyncio.sleep(2.5)
        two.sent[0].answer()
        one.sent[0].answer()
        await key.wait()
        assert len(key.ends) == 1


@pytest.mark.parametrize("failing", [0, 1])
async def test_when_one_copy_fails_the_other_goes_on(failing: int) -> None:
    async with stalling() as (_, key, replicas):
        await asyncio.sleep(2.5)
        replicas[failing].sent[0].fail(StreamLost("gone"))
        await asyncio.sleep(5.0)
        assert key.ends == []
        replicas[1 - failing].sent[0].answer()
        await key.wait()
        assert winners(key) == [replicas[1 - failing].address]
        assert sum(sent(*replicas)) == 2


@pytest.mark.parametrize("first", [0, 1])
async def test_a_failure_is_told_when_both_copies_have_failed_and_once(first: int) -> None:
    async with stalling() as (_, key, replicas):
        await asyncio.sleep(2.5)
        for failing in (first, 1 - first):
            assert key.ends == []
            replicas[failing].sent[0].fail(StreamLost("gone") if failing else Refused("bad row"))
            await asyncio.sleep(0.1)
        assert winners(key) == ["Refused"]


async def test_a_batch_that_fails_early_is_not_sent_twice() -> None:
    async with stalling() as (_, key, (one, two)):
        one.sent[0].fail(StreamLost("gone"))
        await key.wait()
        await asyncio.sleep(10.0)
        assert (winners(key), sent(one, two)) == (["StreamLost"], [1, 0])


async def test_nothing_is_sent_twice_while_no_slot_is_idle_and_looked_at_again_later() -> None:
    async with stalling() as (_, key, (one, two)):
        await asyncio.sleep(1.0)
        key.send()
        await asyncio.sleep(0)
        assert sent(one, two) == [1, 1]
        await asyncio.sleep(1.5)
        assert sent(one, two) == [1, 1]
        two.sent[0].answer()
        await asyncio.sleep(2.0)
        assert sent(one, two) == [1, 2]
        two.sent[1].answer()
        await key.wait()


async def test_rows_that_wait_come_before_copies() -> None:
    async with stalling(number=3) as (pool, key, replicas):
        pool.slots(("m", "")).hold(Key(pool), lapses=False)
        await asyncio.sleep(10.0)
        assert sent(*replicas) == [1, 0, 0]
        replicas[0].sent[0].answer()
        await key.wait()


@pytest.mark.parametrize(
    "refusal", [{"budget": 0}, {"is_allowed": False}, {"known": False}, {"number": 1}], ids=lambda one: next(iter(one))
)
async def test_where_hedging_does_not_apply_nothing_is_sent_twice(refusal: dict[str, int]) -> None:
    async with stalling(**refusal) as (_, key, replicas):  # type: ignore[arg-type]
        await asyncio.sleep(30.0)
        assert sent(*replicas)[1:] == [0] * (len(replicas) - 1)
        replicas[0].sent[0].answer()
        await key.wait()


async def test_a_copy_goes_to_no_replica_that_anything_speaks_against() -> None:
    pool = pool_of(one := FakeBackend("r:1"), two := FakeBackend("r:2"), probe_interval_s=4.0)
    pool.start()
    await asyncio.sleep(0.1)
    two.sign = Sign.UNREADY
    await asyncio.sleep(5.0)
    key = Key(pool)
    key.learn(["r:1", "r:2"], 1.0)
    key.save_for_hedges()
    key.send()
    await asyncio.sleep(30.0)
    assert sent(one, two) == [1, 0]
    two.sign = Sign.READY
    await asyncio.sleep(10.0)
    assert sent(one, two) == [1, 1]
    two.sent[0].answer()
    await key.wait()
    await pool.aclose()


async def test_a_stall_of_the_router_itself_is_none_of_the_replica() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    async with stalling() as (_, key, (one, two)):
        loop.call_later(0.9, one.sent[0].answer)
        await asyncio.sleep(0.5)
        loop.stall(5.0)
        await key.wait()
        assert (winners(key), sent(one, two)) == (["r:1"], [1, 0])


async def test_an_answer_at_the_moment_of_the_second_copy_leaves_no_slot_taken() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    async with stalling() as (pool, key, (one, two)):
        loop.call_later(1.99, one.sent[0].answer)
        loop.call_later(1.95, loop.stall, 0.06)  # so that both are due on one turn of the loop
        await key.wait()
        assert winners(key) == ["r:1"]
        assert (pool.slots(("m", "")).busy, two.in_flight) == (0, 0)


async def test_a_trial_that_is_overtaken_by_a_second_copy_has_failed() -> None:
    """It once told nothing, and a replica that hangs was on trial for as long as others were faster."""
    pool = pool_of(one := FakeBackend("r:1"), two := FakeBackend("r:2", service_s=1.0))
    pool.start()
    key = Key(pool)
    key.learn(["r:1", "r:2"], 1.0)
    key.save_for_hedges()
    for _ in range(3):
        one.set_ready(is_ready=True)
        two.set_ready(is_ready=False)
        key.send()
        await asyncio.sleep(0)
        two.set_ready(is_ready=True)
        one.sent[-1].fail(StreamLost("gone"))
        await key.wait()
        await asyncio.sleep(3.0)
    assert pool.count_ejected() == 1
    await asyncio.sleep(30.0)
    key.send()
    await key.wait()
    assert (winners(key)[-1], sent(one, two)) == ("r:2", [4, 1])
    await asyncio.sleep(50.0)
    await key.exchange()
    assert sent(one, two) == [4, 2]  # on trial again after 60 s
    await pool.aclose()


async def test_a_batch_nobody_waits_for_is_not_sent_twice() -> None:
    async with stalling() as (_, key, (one, two)):
        recipient = one.sent[0].batch.parts[0].block.recipient
        recipient.is_closed = True  # type: ignore[misc]
        await asyncio.sleep(30.0)
        assert sent(one, two) == [1, 0]
        one.sent[0].answer()
        await key.wait()


async def test_cancelling_ends_both_copies() -> None:
    async with stalling() as (pool, key, (one, two)):
        await asyncio.sleep(2.5)
        assert sent(one, two) == [1, 1]
        await key.cancel()
        assert one.sent[0].future.cancelled()
        assert two.sent[0].future.cancelled()
        assert pool.slots(("m", "")).busy == 0


NAN = (Tensor("output", "FP32", (8,), b"\0\0\xc0\x7f" * 8),)


@pytest.mark.parametrize("first", [0, 1])
async def test_a_copy_whose_answer_cannot_be_believed_does_not_win(first: int) -> None:
    async with stalling(contract=Contract(None, allow_nan=False)) as (_, key, replicas):
        await asyncio.sleep(2.5)
        replicas[first].sent[0].answer(NAN)
        await asyncio.sleep(0.1)
        assert key.ends == []
        replicas[1 - first].sent[0].answer()
        await key.wait()
        assert winners(key) == [replicas[1 - first].address]


async def test_an_answer_that_cannot_be_believed_is_better_than_none() -> None:
    for first in (0, 1):
        async with stalling(contract=Contract(None, allow_nan=False)) as (_, key, replicas):
            await asyncio.sleep(2.5)
            replicas[first].sent[0].answer(NAN)
            await asyncio.sleep(0.1)
            replicas[1 - first].sent[0].fail(StreamLost("gone"))
            await key.wait()
            assert winners(key) == [replicas[first].address]
