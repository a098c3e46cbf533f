"""Watchers: told at once of what happens here, within a quarter of a second of what happens elsewhere."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import pytest

from rest_gateway.jobs.records import Job, JobNotFound, StoreUnavailable
from rest_gateway.jobs.service import Jobs
from rest_gateway.jobs.watch import Watch
from tests.unit.rest_gateway.jobs.fake_store import FakeStore, now_s, until
from tests.unit.rest_gateway.jobs.workshop import Workshop, busy_router

pytestmark = pytest.mark.anyio


class Desk:
    """Jobs of one process, whose worker does not run."""

    def __init__(self, store: FakeStore) -> None:
        self.store = store
        self.watch = Watch(store)
        shop = Workshop(store, busy_router(), concurrency=1)
        self.jobs = Jobs(store, shop.worker, shop.housekeeping, shop.loops, self.watch, shop.metrics)


@asynccontextmanager
async def desk() -> AsyncIterator[Desk]:
    before = asyncio.all_tasks()
    given = Desk(FakeStore())
    yield given
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(given.watch) == 0
    assert asyncio.all_tasks() == before


async def follow(given: Desk, job_id: UUID, seen: int, events: list[Job | None]) -> None:
    async for job in given.jobs.changes(job_id, "default", seen=seen, heartbeat_s=15):
        events.append(job)  # noqa: PERF401 -- tests look at it meanwhile


async def test_a_change_here_wakes_at_once() -> None:
    async with desk() as given:
        job_id = given.store.add("processing")
        waiting = asyncio.create_task(given.jobs.wait(job_id, "default", 60))
        await asyncio.sleep(0.01)
        given.store.change(job_id, "completed")
        given.watch.changed(job_id)
        assert (await waiting).status == "completed"
        assert now_s() < 0.02
        assert given.store.calls["versions"] == 0


async def test_a_change_elsewhere_is_found_within_a_quarter_of_a_second() -> None:
    async with desk() as given:
        job_id = given.store.add("processing")
        waiting = asyncio.create_task(given.jobs.wait(job_id, "default", 60))
        await asyncio.sleep(10.01)
        given.store.change(job_id, "failed")
        assert (await waiting).status == "failed"
        assert now_s() <= 10.3
        assert given.store.calls["get"] == 2


async def test_all_watchers_share_one_query_and_without_any_there_is_none() -> None:
    async with desk() as given:
        ids = [given.store.add("processing") for _ in range(50)]
        waiting = [asyncio.create_task(given.jobs.wait(job_id, "default", 10)) for job_id in ids * 2]
        await asyncio.sleep(5)
        assert len(given.watch) == 100
        assert given.store.calls["versions"] == pytest.approx(20, abs=1)
        await asyncio.gather(*waiting)
        before = given.store.calls["versions"]
        await asyncio.sleep(10)
        assert given.store.calls["versions"] == before


async def test_who_waits_long_enough_gets_the_job_as_it_is() -> None:
    async with desk() as given:
        job_id = given.store.add("processing")
        assert (await given.jobs.wait(job_id, "default", 3)).status == "processing"
        assert now_s() == pytest.approx(3)


async def test_what_has_ended_is_not_waited_for() -> None:
    async with desk() as given:
        job_id = given.store.add("cancelled")
        assert (await given.jobs.wait(job_id, "default", 60)).status == "cancelled"
        assert now_s() == 0


async def test_a_job_that_is_deleted_while_it_is_waited_for_is_not_found() -> None:
    async with desk() as given:
        job_id = given.store.add("processing")
        waiting = asyncio.create_task(given.jobs.wait(job_id, "default", 60))
        await asyncio.sleep(1)
        del given.store.rows[job_id]
        with pytest.raises(JobNotFound):
            await waiting


async def test_a_drain_answers_who_waits_with_what_there_is() -> None:
    async with desk() as given:
        job_id = given.store.add("processing")
        waiting = asyncio.create_task(given.jobs.wait(job_id, "default", 60))
        await asyncio.sleep(1)
        given.jobs.start_drain()
        assert (await waiting).status == "processing"
        assert (await given.jobs.wait(job_id, "default", 60)).status == "processing"
        assert now_s() == 1


async def test_a_waiter_outlives_a_database_that_goes_away_until_it_has_to_look() -> None:
    async with desk() as given:
        job_id = given.store.add("processing")
        waiting = asyncio.create_task(given.jobs.wait(job_id, "default", 60))
        await asyncio.sleep(1)
        given.store.is_away = True
        await asyncio.sleep(20)
        assert given.store.calls["versions"] < 25  # no spinning
        given.store.is_away = False
        given.store.change(job_id, "completed")
        assert (await waiting).status == "completed"
        assert now_s() < 23


async def test_a_waiter_that_leaves_frees_its_watcher() -> None:
    async with desk() as given:
        job_id = given.store.add("processing")
        waiting = [asyncio.create_task(given.jobs.wait(job_id, "default", 60)) for _ in range(2)]
        await asyncio.sleep(1)
        waiting[0].cancel()
        await asyncio.wait([waiting[0]])
        assert len(given.watch) == 1
        given.store.change(job_id, "completed")
        assert (await waiting[1]).status == "completed"


# Streams of changes


async def test_each_change_is_told_and_the_terminal_state_is_the_last() -> None:
    async with desk() as given:
        job_id, events = given.store.add(), list[Job | None]()
        following = asyncio.create_task(follow(given, job_id, 0, events))
        await asyncio.sleep(1)
        given.store.change(job_id, "processing")
        await asyncio.sleep(1)
        given.store.change(job_id, "completed")
        await following
        assert [(job.version, job.status) for job in events if job] == [
            (1, "pending"),
            (2, "processing"),
            (3, "completed"),
        ]


async def test_what_the_client_has_seen_is_left_out() -> None:
    async with desk() as given:
        job_id, events = given.store.add(), list[Job | None]()
        given.store.change(job_id, "processing")
        following = asyncio.create_task(follow(given, job_id, 2, events))
        await asyncio.sleep(1)
        assert events == []
        given.store.change(job_id, "completed")
        await following
        assert [job.version for job in events if job] == [3]


async def test_silence_is_broken_by_heartbeats() -> None:
    async with desk() as given:
        job_id, events = given.store.add("processing"), list[Job | None]()
        following = asyncio.create_task(follow(given, job_id, 9, events))
        await asyncio.sleep(46)
        assert events == [None, None, None]
        following.cancel()
        await asyncio.wait([following])


async def test_a_stream_outlives_a_database_that_goes_away() -> None:
    async with desk() as given:
        job_id, events = given.store.add(), list[Job | None]()
        following = asyncio.create_task(follow(given, job_id, 0, events))
        await asyncio.sleep(1)
        given.store.is_away = True
        given.watch.changed(job_id)  # makes it look
        await asyncio.sleep(10)
        assert given.store.calls["get"] < 15
        given.store.is_away = False
        given.store.change(job_id, "completed")
        await following
        assert [job.status for job in events if job] == ["pending", "completed"]


async def test_a_stream_begins_with_an_error_that_can_be_told() -> None:
    async with desk() as given:
        with pytest.raises(JobNotFound):
            await follow(given, UUID(int=99), 0, [])
        given.store.is_away = True
        with pytest.raises(StoreUnavailable):
            await follow(given, UUID(int=99), 0, [])


@pytest.mark.parametrize("is_before", [True, False])
async def test_a_drain_ends_a_stream_after_what_there_is(is_before: bool) -> None:
    async with desk() as given:
        job_id, events = given.store.add("processing"), list[Job | None]()
        if is_before:
            given.jobs.start_drain()
        following = asyncio.create_task(follow(given, job_id, 0, events))
        await asyncio.sleep(1)
        given.jobs.start_drain()
        await asyncio.wait_for(following, 1)
        assert [job.status for job in events if job] == ["processing"]


async def test_a_bug_in_the_query_is_logged_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    async with desk() as given:
        job_id = given.store.add("processing")
        waiting = asyncio.create_task(given.jobs.wait(job_id, "default", 60))
        await asyncio.sleep(0.1)
        given.store.bug = RuntimeError("a bug")
        await until(lambda: "unexpected error while watching jobs" in caplog.text)
        given.store.bug = None
        given.store.change(job_id, "completed")
        assert (await waiting).status == "completed"


# Cancel and delete


async def test_cancelling_tells_the_watchers_and_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rest_gateway")
    async with desk() as given:
        job_id = given.store.add("processing")
        waiting = asyncio.create_task(given.jobs.wait(job_id, "default", 60))
        await asyncio.sleep(0.01)
        for _ in range(2):
            assert (await given.jobs.cancel(job_id, "default")).status == "cancelled"
        assert (await waiting).status == "cancelled"
        assert now_s() < 0.02
        assert caplog.text.count("cancelled") == 1


async def test_deleting_ends_a_stream() -> None:
    async with desk() as given:
        job_id, events = given.store.add("pending"), list[Job | None]()
        following = asyncio.create_task(follow(given, job_id, 0, events))
        await asyncio.sleep(0.01)
        given.store.change(job_id, "completed")
        await given.jobs.delete(job_id, "default")
        with pytest.raises(JobNotFound):
            await following
