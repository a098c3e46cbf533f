"""PostgreSQL away, frozen, restarted, cut off: the store says so quickly, loses nothing, and goes on by itself."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from uuid import UUID

import pytest

from rest_gateway.jobs.records import StoreUnavailable, Submitted
from rest_gateway.jobs.store import SqlJobStore
from tests.integration.jobs.builders import claim, claim_one, completed, held, submit, text_job
from tests.integration.jobs.conftest import opened
from tests.postgres import Postgres

pytestmark = pytest.mark.anyio

_numbers = count(1)


@pytest.fixture(scope="module")
def durable() -> Iterator[Postgres]:
    """A cluster with durable settings, to be treated badly."""
    cluster = Postgres()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
async def store(durable: Postgres) -> AsyncIterator[SqlJobStore]:
    """A store on a database of its own there."""
    url = durable.create_database(f"outage_{next(_numbers)}")
    async with opened(url) as store:
        await store.prepare()
        yield store


async def test_a_store_opens_while_its_database_is_away_and_migrates_when_it_comes(durable: Postgres) -> None:
    url = durable.create_database(f"outage_{next(_numbers)}")
    durable.stop_immediately()
    async with opened(url) as store:
        started_s = time.monotonic()
        for method in (store.prepare, store.ping, store.reap, store.waiting):
            with pytest.raises(StoreUnavailable, match="the database failed"):
                await method()
        with pytest.raises(StoreUnavailable):
            await submit(store)
        assert time.monotonic() - started_s < 5
        durable.start()
        assert (await submit(store)).status == "pending"


async def test_a_restart_between_two_calls_goes_unnoticed(durable: Postgres, store: SqlJobStore) -> None:
    job = await submit(store)
    durable.stop_immediately()
    durable.start()
    assert await store.get(job.id, "default") == job
    claimed = await claim_one(store)
    durable.stop_immediately()
    durable.start()
    assert await store.finish([completed(claimed)]) == {job.id}


async def test_every_call_fails_while_it_is_down_and_works_when_it_is_back(
    durable: Postgres, store: SqlJobStore
) -> None:
    await submit(store, idempotency_key="k")
    claimed = await claim_one(store)
    durable.stop_immediately()
    calls = (
        submit(store),
        store.claim("w", 1),
        store.renew("w", held([claimed])),
        store.finish([completed(claimed)]),
        store.release(held([claimed]), 0, "busy"),
        store.reap(),
        store.cancel(claimed.id, "default"),
        store.delete(claimed.id, "default"),
        store.get(claimed.id, "default"),
        store.versions([claimed.id]),
        store.list("default", limit=5, cursor=None, status=None, kind=None),
        store.purge(0, 10),
        store.ping(),
    )
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * len(calls)
    durable.start()
    assert await store.finish([completed(claimed)]) == {claimed.id}


async def test_after_an_outage_workers_get_time_to_renew_before_their_jobs_are_lost(durable: Postgres) -> None:
    """All leases are over by then, of the living, too."""
    url = durable.create_database(f"outage_{next(_numbers)}")
    async with opened(url, lease_s=1.0) as store:
        job = await submit(store)
        claimed = await claim_one(store)
        durable.stop_immediately()
        with pytest.raises(StoreUnavailable):
            await store.renew("w", held([claimed]))
        await asyncio.sleep(1.0)  # the lease, by the database's clock
        durable.start()
        assert (await store.reap()).lost == []
        returned_s = time.monotonic()
        while not (reaped := await store.reap()).lost:
            pass
        assert time.monotonic() - returned_s > 0.4
        assert reaped.lost == [job.id]


async def test_what_was_acknowledged_survives_immediate_restarts_under_load(
    durable: Postgres, store: SqlJobStore
) -> None:
    acknowledged: dict[str, UUID] = {}
    acknowledgements: asyncio.Queue[str] = asyncio.Queue()
    is_over = asyncio.Event()

    async def client(number: int) -> None:
        """Submits with a key until it is told that the job is stored; then the next."""
        for round_ in range(1000):
            key = f"{number}-{round_}"
            while True:
                try:
                    answer = await store.submit(text_job(key, idempotency_key=key), worker=None)
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.01)
            acknowledged[key] = answer.job.id
            acknowledgements.put_nowait(key)
            if is_over.is_set():
                return

    clients = [asyncio.create_task(client(number)) for number in range(20)]
    for _ in range(2):
        for _ in range(100):
            await acknowledgements.get()
        await asyncio.to_thread(durable.stop_immediately)
        await asyncio.to_thread(durable.start)
    is_over.set()
    await asyncio.gather(*clients)
    assert len(set(acknowledged.values())) == len(acknowledged)
    assert set(await store.versions(acknowledged.values())) == set(acknowledged.values())
    rows = 0
    while claimed := await claim(store, limit=500):
        rows += len(claimed)
    assert rows == len(acknowledged)


async def test_connections_that_are_killed_midway_cost_at_most_a_repetition(
    durable: Postgres, store: SqlJobStore
) -> None:
    answers: list[Submitted | BaseException] = []
    for round_ in range(6):
        group = asyncio.gather(*(submit(store, f"{round_}-{number}") for number in range(30)), return_exceptions=True)
        kill = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'inference-router'"
        )
        await asyncio.to_thread(durable.run_sql, kill)
        answers += await group  # type: ignore[arg-type]
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(answer, StoreUnavailable) for answer in refused), refused
    rows = 0
    while claimed := await claim(store, limit=500):
        rows += len(claimed)
    assert len(answers) - len(refused) <= rows <= len(answers)


async def test_a_frozen_database_is_given_up_and_found_again(durable: Postgres) -> None:
    url = durable.create_database(f"outage_{next(_numbers)}")
    async with opened(url) as store:
        await store.prepare()
    async with opened(url, timeout_s=0.5, connect_timeout_s=0.3, pool_size=2) as store:
        job = await until_it_works(store)
        with durable.frozen():
            started_s = time.monotonic()
            outcomes = await asyncio.gather(
                *(store.get(job, "default") for _ in range(5)), submit(store), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 6
            assert time.monotonic() - started_s < 3
        assert (await store.get(await until_it_works(store), "default")).status == "pending"


async def until_it_works(store: SqlJobStore) -> UUID:
    """A new job, within seconds."""
    async with asyncio.timeout(10):
        while True:
            try:
                return (await submit(store)).id
            except StoreUnavailable:
                await asyncio.sleep(0.02)


async def test_workers_keep_their_jobs_when_their_leases_ran_out_during_an_outage(
    durable: Postgres, store: SqlJobStore
) -> None:
    await submit(store)
    claimed = await claim_one(store)
    durable.run_sql("UPDATE jobs SET lease_until = now() - interval '1 minute'", f"outage_{next(_numbers) - 1}")
    durable.stop_immediately()
    with pytest.raises(StoreUnavailable):
        await store.reap()
    durable.start()
    assert (await store.reap()).lost == []
    assert await store.renew("w", held([claimed])) == set(held([claimed]))


@pytest.mark.parametrize("is_submit", [False, True])
async def test_jobs_that_a_cancelled_call_took_for_a_worker_are_given_back(durable: Postgres, is_submit: bool) -> None:
    url = durable.create_database(f"outage_{next(_numbers)}")
    async with opened(url) as store:
        if not is_submit:
            await submit(store)
        await store.prepare()
        call = store.submit(text_job(), worker="w") if is_submit else store.claim("w", 10)
        task = asyncio.create_task(call)
        for _ in range(4):  # until its transaction has begun
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with opened(url) as store:
        assert (await claim_one(store)).attempt == 2
