"""Frozen, busy, unready: what probes do to a pool of fake replicas, in virtual time."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from router.core.pulse import Sign
from router.core.types import BatchAnswer
from router.dispatch.pool import ReplicaPool
from router.errors import StreamLost
from tests.unit.router.dispatch.client import Key, sent
from tests.unit.router.fakes import FakeBackend, pool_of
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio

INTERVAL_S = 4.0


@asynccontextmanager
async def probing(
    *replicas: FakeBackend, later: tuple[FakeBackend, ...] = (), max_in_flight: int = 2, interval_s: float = INTERVAL_S
) -> AsyncIterator[ReplicaPool]:
    pool = pool_of(*replicas, later=later, max_in_flight=max_in_flight, probe_interval_s=interval_s)
    pool.start()
    await asyncio.sleep(10.0)
    yield pool
    await pool.aclose()


def backends(number: int, service_s: float | None = None) -> list[FakeBackend]:
    return [FakeBackend(f"r:{index}", service_s=service_s) for index in range(1, number + 1)]


def now() -> float:
    return asyncio.get_running_loop().time()


async def freeze_after_a_probe(replica: FakeBackend) -> float:
    """The worst moment: it has just been found alive. Returns it."""
    await asyncio.sleep(replica.probed_at[-1] + INTERVAL_S + 0.02 - now())
    replica.is_frozen = True
    return replica.probed_at[-1]


async def test_each_replica_is_asked_every_interval_and_not_all_at_one_instant() -> None:
    replicas = backends(8)
    async with probing(*replicas):
        await asyncio.sleep(20.0)
        for replica in replicas:
            asked = replica.probed_at
            assert asked[0] == 0.0
            assert INTERVAL_S / 2 <= asked[1] <= INTERVAL_S
            gaps_s = [after - before for before, after in itertools.pairwise(asked[1:])]
            assert gaps_s == pytest.approx([INTERVAL_S] * len(gaps_s))
        assert len({replica.probed_at[-1] for replica in replicas}) == 8


async def test_without_an_interval_nobody_is_asked() -> None:
    (one,) = backends(1)
    async with probing(one, interval_s=0.0):
        assert one.probed_at == []


async def test_an_idle_replica_that_is_frozen_is_suspect_within_13_s_and_not_before_its_second_miss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    frozen, other = backends(2, service_s=1.0)
    async with probing(frozen, other) as pool:
        key = Key(pool)
        frozen_at = await freeze_after_a_probe(frozen)
        await asyncio.sleep(frozen_at + 10.99 - now())
        assert "no sign of life" not in caplog.text
        await asyncio.sleep(0.02)
        assert caplog.text.count("backend r:1 gives no sign of life") == 1
        other.set_ready(is_ready=False)
        key.send()
        await asyncio.sleep(30.0)
        assert sent(frozen, other) == [0, 0]  # a batch that waits is better off than one that is lost
        other.set_ready(is_ready=True)
        await key.wait()
        assert caplog.text.count("no sign of life") == 1


async def test_a_frozen_replica_loses_its_batches_within_13_s_when_they_should_take_7_s() -> None:
    frozen, other = backends(2, service_s=7.0)
    async with probing(frozen, other) as pool:
        key = Key(pool)
        key.learn(["r:1", "r:2"], 7.0)
        frozen_at = await freeze_after_a_probe(frozen)
        await asyncio.sleep(frozen_at + 4.9 - now())  # as long as it looks as idle as the other
        key.send(2)
        await asyncio.sleep(0)
        assert sent(frozen, other) == [1, 1]
        await asyncio.sleep(frozen_at + 11.89 - now())
        assert frozen.in_flight == 1
        await asyncio.sleep(0.02)
        assert frozen.in_flight == 0
        assert StreamLost in [type(end) for end in key.ends]
        key.send(1)
        await key.wait()
        assert sent(frozen, other) == [1, 2]
        assert now() < frozen_at + 13.0 + 7.0


async def busy_for(replica: FakeBackend, busy_s: float, *, answers: bool = True) -> None:
    """Its loop is blocked by the batch that it has just got."""
    replica.is_frozen = True
    await asyncio.sleep(busy_s)
    replica.is_frozen = False
    if answers:
        replica.sent[-1].end(None)
    await asyncio.sleep(5.0)


async def test_a_replica_whose_calls_take_longer_from_now_on_is_not_given_up_for_ever() -> None:
    (one,) = backends(1)
    async with probing(one) as pool:
        key = Key(pool)
        key.learn(["r:1"], 1.0)
        for _ in range(4):
            key.send()
            await busy_for(one, 20.0)
        ends = [type(end).__name__ for end in key.ends]
        assert ends == ["StreamLost", "StreamLost", "BatchAnswer", "BatchAnswer"]


async def test_a_replica_that_freezes_now_and_then_is_found_each_time() -> None:
    """Bug: the first freeze counted as a call's time, and the next one was waited for as long."""
    (one,) = backends(1)
    async with probing(one) as pool:
        key = Key(pool)
        key.learn(["r:1"], 1.0)
        for _ in range(3):
            key.send()
            await busy_for(one, 20.0, answers=False)
            assert isinstance(key.ends[-1], StreamLost)
            key.send()
            await asyncio.sleep(1.0)
            one.sent[-1].end(None)
            await key.wait()
            assert isinstance(key.ends[-1], BatchAnswer)
        assert key.times.calls == 23


async def test_a_replica_that_was_started_again_had_not_been_busy() -> None:
    (one,) = backends(1)
    async with probing(one) as pool:
        key = Key(pool)
        key.learn(["r:1"], 1.0)
        for calls in (20, 21):
            key.send()
            await busy_for(one, 20.0, answers=False)
            assert key.times.calls == calls
        key.send()
        one.is_frozen = True
        await asyncio.sleep(50.0)
        assert one.in_flight == 0
        one.set_ready(is_ready=False)
        one.is_frozen = False
        one.set_ready(is_ready=True)
        await asyncio.sleep(5.0)
        assert key.times.calls == 21


async def test_before_the_key_is_known_a_silent_replica_keeps_its_batches_until_their_timeout() -> None:
    (frozen,) = backends(1)
    async with probing(frozen) as pool:
        key = Key(pool)
        key.send()
        sent_at = now()
        frozen.is_frozen = True
        await asyncio.sleep(sent_at + 59.9 - now())
        assert key.ends == []
        await asyncio.sleep(0.2)
        assert [type(end) for end in key.ends] == [StreamLost]


async def test_a_busy_replica_whose_loop_is_blocked_for_less_than_its_service_time_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    busy, other = backends(2)
    async with probing(busy, other) as pool:
        key = Key(pool)
        key.learn(["r:1", "r:2"], 20.0)
        key.send(1)
        await asyncio.sleep(0)
        busy.is_frozen = True
        await asyncio.sleep(19.9)
        busy.is_frozen = False
        busy.sent[0].answer()
        await key.wait()
        await asyncio.sleep(20.0)
        assert "no sign of life" not in caplog.text
        assert len(key.ends) == 1


async def test_a_batch_that_comes_back_is_a_sign_of_life() -> None:
    """A server that has the question but never answers it, and still computes."""
    mute, other = backends(2, service_s=1.0)
    async with probing(mute, other, max_in_flight=1) as pool:
        key = Key(pool)
        key.learn(["r:1", "r:2"], 1.0)
        mute.probe_s = 1000.0
        for _ in range(60):
            key.send(2)
            await key.wait()
        assert min(sent(mute, other)) == 60
        assert all(not isinstance(end, StreamLost) for end in key.ends)


async def test_while_a_probe_is_out_for_long_others_are_preferred_and_no_more() -> None:
    silent, other = backends(2)
    async with probing(silent, other, max_in_flight=1) as pool:
        key = Key(pool)
        frozen_at = await freeze_after_a_probe(silent)
        await asyncio.sleep(frozen_at + 4.99 - now())
        key.send()
        await asyncio.sleep(0)
        assert sent(silent, other) == [1, 0]
        silent.sent[0].answer()
        await key.wait()
        await asyncio.sleep(frozen_at + 5.01 - now())
        key.send()
        await asyncio.sleep(0)
        assert sent(silent, other) == [1, 1]
        key.send()
        await asyncio.sleep(0)
        assert sent(silent, other) == [2, 1]


async def test_a_suspect_that_answers_again_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    frozen, other = backends(2, service_s=1.0)
    async with probing(frozen, other) as pool:
        key = Key(pool)
        frozen.is_frozen = True
        await asyncio.sleep(20.0)
        await key.exchange(3)
        assert sent(frozen, other) == [0, 3]
        frozen.is_frozen = False
        await asyncio.sleep(INTERVAL_S + 0.1)
        await key.exchange(1)
        assert sent(frozen, other) == [1, 3]
        assert caplog.text.count("backend r:1 answers again") == 1


async def test_a_new_connection_is_asked_at_once() -> None:
    frozen, other = backends(2, service_s=1.0)
    async with probing(frozen, other) as pool:
        key = Key(pool)
        frozen.is_frozen = True
        await asyncio.sleep(20.0)
        frozen.set_ready(is_ready=False)
        frozen.is_frozen = False
        await asyncio.sleep(0.1)
        probes = len(frozen.probed_at)
        frozen.set_ready(is_ready=True)
        await asyncio.sleep(0.05)
        assert len(frozen.probed_at) == probes + 1
        await key.exchange(1)
        assert sent(frozen, other) == [1, 0]


async def test_misses_on_a_connection_that_is_gone_are_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    (one,) = backends(1, service_s=1.0)
    async with probing(one):
        one.sign = Sign.NONE
        await asyncio.sleep(3.9)
        one.set_ready(is_ready=False)
        one.set_ready(is_ready=True)
        await asyncio.sleep(0.1)
        one.sign = Sign.READY
        await asyncio.sleep(20.0)
        assert "no sign of life" not in caplog.text


async def test_a_replica_that_says_it_is_not_ready_gets_batches_only_while_no_other_is() -> None:
    unready, other = backends(2, service_s=1.0)
    async with probing(unready, other, max_in_flight=1) as pool:
        key = Key(pool)
        unready.sign = Sign.UNREADY
        await asyncio.sleep(INTERVAL_S)
        key.send(3)
        await key.wait()
        assert sent(unready, other) == [0, 3]
        other.sign = Sign.UNREADY
        await asyncio.sleep(INTERVAL_S)
        key.send(2)
        await key.wait()
        assert sent(unready, other) == [1, 4]
        unready.sign = Sign.READY
        await asyncio.sleep(INTERVAL_S)
        key.send(2)
        await key.wait()
        assert sent(unready, other) == [3, 4]


@pytest.mark.parametrize("stalled_s", [2.0, 5.0, 60.0])
async def test_a_stall_of_the_router_itself_makes_nobody_suspect(
    stalled_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    replicas = backends(3, service_s=1.0)
    for replica in replicas:
        replica.probe_s = 0.5
    async with probing(*replicas) as pool:
        key = Key(pool)
        key.learn(["r:1", "r:2", "r:3"], 1.0)
        for _ in range(40):
            key.send(3)
            await asyncio.sleep(0.7)
            loop.stall(stalled_s)
        await key.wait()
        assert len(key.ends) == 120
        assert "no sign of life" not in caplog.text
        assert "ejected" not in caplog.text
        assert not any(isinstance(end, StreamLost) for end in key.ends)


async def test_a_probe_whose_answer_came_while_the_router_stood_still_is_no_miss(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    (one,) = backends(1)
    one.probe_s = 1.5
    async with probing(one):
        await asyncio.sleep(one.probed_at[-1] + INTERVAL_S + 0.1 - now())
        for _ in range(5):
            probes = len(one.probed_at)
            await asyncio.sleep(one.probed_at[-1] + 1.2 - now())
            loop.stall(5.0)
            await asyncio.sleep(0.1)
            assert len(one.probed_at) == probes + 1
        assert "no sign of life" not in caplog.text


async def test_a_batch_that_came_back_while_the_router_stood_still_makes_nobody_suspect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    (busy,) = backends(1)
    async with probing(busy) as pool:
        key = Key(pool)
        key.learn(["r:1"], 20.0)
        key.send()
        busy.is_frozen = True
        await asyncio.sleep(19.8)
        loop.call_later(0.1, busy.sent[0].answer)
        await asyncio.sleep(0.05)
        loop.stall(3.0)
        await key.wait()
        busy.is_frozen = False
        await asyncio.sleep(10.0)
        assert len(key.ends) == 1
        assert "no sign of life" not in caplog.text


async def test_a_replica_that_has_left_is_asked_no_more() -> None:
    one, two = backends(2)
    async with probing(one, two) as pool:
        pool.set_addresses(["r:2"])
        await asyncio.sleep(0.1)
        probes = len(one.probed_at)
        await asyncio.sleep(20.0)
        assert len(one.probed_at) == probes
        assert one.is_closed


async def test_a_replica_that_joins_is_asked_too() -> None:
    one, two = backends(2)
    async with probing(one, later=(two,)) as pool:
        pool.set_addresses(["r:1", "r:2"])
        await asyncio.sleep(0.1)
        assert len(two.probed_at) == 1
