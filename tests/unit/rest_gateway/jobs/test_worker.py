"""The worker against a store in memory: claims, leases, ends, back-pressure, drains, and a database that goes away."""

import asyncio
import logging
from uuid import UUID

import pytest

from rest_gateway.jobs.records import JobError, StoreUnavailable
from rest_gateway.jobs.worker import HELD_BYTES, backoff_s
from tests.unit.rest_gateway.fake_router import FakeRouter, tensor_failure
from tests.unit.rest_gateway.jobs.fake_store import FakeStore, now_s, until
from tests.unit.rest_gateway.jobs.workshop import busy_router, text_job, working

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rest_gateway")


# From submission to end


async def test_a_submitted_job_is_stored_as_processing_and_completes_with_a_line_for_each_transition(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with working() as shop:
        await shop.settled()
        submitted = await shop.submit()
        assert submitted.job.status == "processing"
        job_id = submitted.job.id
        await until(lambda: shop.store.status(job_id) == "completed")
    job = shop.store.rows[job_id].job
    assert job.result == b'{"sentiment":"positive","confidence":0.75}'
    assert shop.store.history[job_id] == ["processing", "completed"]
    assert [record.getMessage() for record in caplog.records] == [
        f"job {job_id} text: processing, attempt 1",
        f"job {job_id} text: completed",
    ]
    assert shop.changed == [job_id, job_id]
    assert shop.count("gateway_jobs_total", kind="text", status="processing") == 1
    assert shop.count("gateway_jobs_total", kind="text", status="completed") == 1
    assert shop.count("gateway_jobs_running") == 0


async def test_a_failed_model_fails_the_job_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    async with working(router=FakeRouter(tensors=tensor_failure("UNKNOWN", "boom"))) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        await until(lambda: shop.store.status(job_id) == "failed")
    assert shop.store.rows[job_id].job.error == JobError("UNKNOWN", "boom")
    assert f"job {job_id} text: failed, UNKNOWN: boom" in caplog.text


async def test_a_bug_in_a_run_fails_the_job_and_not_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    async with working(router=FakeRouter(error=RuntimeError("secret"))) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        await until(lambda: shop.store.status(job_id) == "failed")
        error = shop.store.rows[job_id].job.error
        assert error is not None
        assert (error.code, "secret" in error.message) == ("INTERNAL", False)
        shop.router.error = None
        other = (await shop.submit()).job.id
        await until(lambda: shop.store.status(other) == "completed")
    assert "secret" in caplog.text


async def test_before_the_first_claim_a_job_is_stored_as_pending_and_then_claimed_at_once() -> None:
    store = FakeStore()
    gate = store.close_gate("claim")
    async with working(store) as shop:
        await store.entered["claim"].wait()
        job_id = (await shop.submit()).job.id
        assert store.status(job_id) == "pending"
        assert not shop.worker.has_tried_to_claim
        gate.set()  # this claim did not see the job
        await until(lambda: store.status(job_id) == "completed")
        assert shop.worker.has_tried_to_claim
        assert now_s() < 0.1


async def test_jobs_of_others_are_claimed_within_half_a_second() -> None:
    async with working() as shop:
        await shop.settled()
        job_id, started_s = shop.store.add(), now_s()
        await until(lambda: shop.store.status(job_id) == "completed")
        assert now_s() - started_s <= 0.6


async def test_what_finds_no_room_waits_and_is_claimed_as_soon_as_there_is_some() -> None:
    async with working(router=busy_router(), concurrency=2) as shop:
        await shop.settled()
        ids = [(await shop.submit()).job.id for _ in range(5)]
        assert [shop.store.status(job_id) for job_id in ids] == ["processing"] * 2 + ["pending"] * 3
        await asyncio.sleep(2)
        assert len(shop.router.tensor_calls) == 2
        started_s = now_s()
        for _ in range(5):
            shop.router.release()
        await until(lambda: all(shop.store.status(job_id) == "completed" for job_id in ids))
        assert now_s() - started_s < 0.1
        assert shop.count("gateway_jobs_total", kind="text", status="pending") == 3


async def test_never_more_jobs_run_than_there_is_room_for() -> None:
    store = FakeStore()
    for _ in range(20):
        store.add()
    async with working(store, busy_router(), concurrency=3) as shop:
        await asyncio.sleep(6)
        assert [store.status(job_id) for job_id in store.rows].count("processing") == 3
        assert len(shop.router.tensor_calls) == 3
        assert repr(shop.worker) == "<Worker 3 held, 0 to write, room for 0>"
        assert shop.count("gateway_jobs_running") == 3
        assert shop.count("gateway_jobs_waiting") == 17


async def test_a_burst_of_submissions_overbooks_nothing() -> None:
    async with working(router=busy_router(), concurrency=3) as shop:
        await shop.settled()
        await asyncio.gather(*(shop.submit() for _ in range(10)))
        assert [shop.store.status(job_id) for job_id in shop.store.rows].count("processing") == 3


# Bug: 256 inputs of 8 MiB were held at once, several times over: as JSON, as numbers and on their way to the router.
async def test_there_is_no_room_beside_large_inputs() -> None:
    async with working(router=busy_router(), concurrency=8) as shop:
        await shop.settled()
        ids = [(await shop.submit("x" * (HELD_BYTES // 2))).job.id for _ in range(3)]
        await asyncio.sleep(2)
        assert [shop.store.status(job_id) for job_id in ids] == ["processing"] * 2 + ["pending"]
        shop.router.release()
        await until(lambda: shop.store.status(ids[2]) == "processing")


async def test_without_a_router_nothing_is_claimed_and_with_it_everything_at_once() -> None:
    async with working(router=FakeRouter(is_connected=False)) as shop:
        job_id = (await shop.submit()).job.id
        await asyncio.sleep(30)
        assert shop.store.history[job_id] == ["pending"]
        assert not shop.worker.has_tried_to_claim
        shop.router.is_connected, started_s = True, now_s()
        await until(lambda: shop.store.status(job_id) == "completed")
        assert now_s() - started_s < 0.6


# Back-pressure


def test_the_backoff_doubles_up_to_half_a_minute() -> None:
    assert [backoff_s(attempt) for attempt in (1, 2, 3, 6, 7, 8, 5000)] == [0.5, 1, 2, 16, 30, 30, 30]


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE"])
async def test_a_refused_job_waits_longer_and_longer_and_completes_when_it_can(
    code: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(router=FakeRouter(tensors=tensor_failure(code, "full"))) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        await until(lambda: len(shop.router.tensor_calls) == 5)  # after 0.5, 1, 2 and 4 s
        assert 7.5 <= now_s() <= 10
        assert shop.store.rows[job_id].lost == 0
        shop.router.tensors = FakeRouter().tensors
        await until(lambda: shop.store.status(job_id) == "completed")
    assert f"job {job_id} text: pending, again in 0.5 s: {code}: full" in caplog.text
    assert f"job {job_id} text: pending, again in 4.0 s: {code}: full" in caplog.text


async def test_the_routers_own_time_is_kept() -> None:
    async with working(router=FakeRouter(tensors=tensor_failure("RESOURCE_EXHAUSTED", "full", 20_000))) as shop:
        await shop.settled()
        await shop.submit()
        await asyncio.sleep(19)
        assert len(shop.router.tensor_calls) == 1
        await asyncio.sleep(3)
        assert len(shop.router.tensor_calls) == 2


async def test_a_refused_job_fails_only_at_its_own_deadline() -> None:
    async with working(router=FakeRouter(tensors=tensor_failure("UNAVAILABLE", "no router"))) as shop:
        await shop.settled()
        started_s = now_s()
        job_id = (await shop.submit(timeout_s=10)).job.id
        await until(lambda: shop.store.status(job_id) == "failed")
        assert 10 <= now_s() - started_s <= 11.1
        error = shop.store.rows[job_id].job.error
        assert error is not None
        assert (error.code, "UNAVAILABLE: no router" in error.message) == ("DEADLINE_EXCEEDED", True)
        assert shop.count("gateway_jobs_total", kind="reaped", status="failed") == 1


# Leases


async def test_a_long_run_keeps_its_lease() -> None:
    async with working(router=busy_router()) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        await asyncio.sleep(60)
        assert shop.store.history[job_id] == ["processing"]
        assert shop.store.calls["renew"] == pytest.approx(30, abs=1)
        shop.router.release()
        await until(lambda: shop.store.status(job_id) == "completed")


async def test_a_run_whose_lease_was_lost_is_abandoned_and_its_call_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with working(router=busy_router()) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        await shop.router.entered.wait()
        shop.store.change(job_id, "processing", attempt=2)  # somebody else has it
        shop.store.rows[job_id].worker = "other"
        await asyncio.wait_for(shop.router.cancelled.wait(), 2.1)
        assert f"job {job_id} is not ours any more, attempt 1 is abandoned" in caplog.text
        assert repr(shop.worker).startswith("<Worker 0 held")


async def test_a_job_that_was_cancelled_elsewhere_is_abandoned() -> None:
    async with working(router=busy_router()) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        await shop.router.entered.wait()
        shop.store.change(job_id, "cancelled")
        await asyncio.wait_for(shop.router.cancelled.wait(), 2.1)
        await asyncio.sleep(5)
        assert shop.store.history[job_id] == ["processing", "cancelled"]


async def test_a_job_that_was_cancelled_here_is_abandoned_at_once() -> None:
    async with working(router=busy_router(), concurrency=1) as shop:
        await shop.settled()
        job_id, waiting = (await shop.submit()).job.id, (await shop.submit()).job.id
        await shop.router.entered.wait()
        started_s = now_s()
        shop.store.change(job_id, "cancelled")
        shop.worker.forget(job_id)
        await shop.router.cancelled.wait()
        await until(lambda: shop.store.status(waiting) == "processing")  # its room is free
        assert now_s() - started_s < 0.1
        shop.worker.forget(UUID(int=99))  # nobody's


async def test_the_end_of_a_cancelled_job_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with working() as shop:
        await shop.settled()
        gate = shop.store.close_gate("submit")
        submitting = asyncio.create_task(shop.submit())
        await shop.store.entered["submit"].wait()
        (job_id,) = shop.store.rows
        shop.store.change(job_id, "cancelled")
        gate.set()
        await submitting
        await until(lambda: shop.count("gateway_jobs_fenced_finishes_total") == 1)
        assert shop.store.history[job_id] == ["processing", "cancelled"]
        assert f"job {job_id} had ended, or was not ours any more: attempt 1 is void" in caplog.text
        assert repr(shop.worker).startswith("<Worker 0 held, 0 to write")


async def test_an_end_that_is_being_written_is_not_abandoned_by_a_renewal() -> None:
    async with working() as shop:
        await shop.settled()
        gate = shop.store.close_gate("finish")
        job_id = (await shop.submit()).job.id
        await shop.store.entered["finish"].wait()  # written, but the answer is on its way
        await asyncio.sleep(5)  # renewals do not find it any more
        gate.set()
        await until(lambda: repr(shop.worker).startswith("<Worker 0 held"))
        assert shop.store.history[job_id] == ["processing", "completed"]
        assert shop.count("gateway_jobs_fenced_finishes_total") == 0


async def test_a_job_that_is_claimed_again_by_the_same_worker_runs_once() -> None:
    """A frozen process may get its own job anew before it knows that it has lost it."""
    async with working(router=busy_router()) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        await shop.router.entered.wait()
        shop.store.lose_lease(job_id)
        await until(lambda: len(shop.router.tensor_calls) == 2)
        assert shop.router.cancelled.is_set()
        shop.router.release()
        shop.router.release()
        await until(lambda: shop.store.status(job_id) == "completed")
        assert shop.store.rows[job_id].job.attempt == 2
        assert shop.count("gateway_jobs_fenced_finishes_total") == 0


# Reaping and retention


async def test_a_job_of_a_worker_that_is_gone_is_claimed_again_within_eight_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FakeStore()
    job_id = store.add()
    await store.claim("gone", 1)
    async with working(store) as shop:
        await until(lambda: store.status(job_id) == "completed")
        assert now_s() <= 8
        assert store.history[job_id] == ["pending", "processing", "pending", "processing", "completed"]
        assert f"job {job_id}: pending, its worker let the lease run out" in caplog.text
        assert shop.count("gateway_jobs_lost_leases_total") == 1
        assert job_id in shop.changed


async def test_a_pending_job_past_its_deadline_fails_within_a_second_and_tells_the_watchers() -> None:
    async with working(router=FakeRouter(is_connected=False)) as shop:
        job_id = (await shop.submit(timeout_s=3)).job.id
        await until(lambda: shop.store.status(job_id) == "failed")
        assert 3 <= now_s() <= 4.1
        assert shop.changed == [job_id, job_id]


async def test_old_jobs_are_deleted_in_chunks(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    for _ in range(2500):
        store.change(store.add(), "completed")
    async with working(store, retention_s=20):
        await asyncio.sleep(20)
        assert len(store.rows) == 2500
        await asyncio.sleep(3)
        assert len(store.rows) == 0
    assert [record.getMessage() for record in caplog.records if "deleted" in record.getMessage()] == [
        "1000 jobs that ended more than 20 s ago were deleted",
        "1000 jobs that ended more than 20 s ago were deleted",
        "500 jobs that ended more than 20 s ago were deleted",
    ]


# The database goes away


async def test_a_database_that_is_away_at_the_start_counts_as_tried() -> None:
    store = FakeStore()
    store.is_away = True
    async with working(store) as shop:
        await until(lambda: shop.worker.has_tried_to_claim)
        assert shop.loops.is_database_away
        with pytest.raises(StoreUnavailable):
            await shop.submit()


async def test_no_loop_spins_and_none_ends_while_the_database_is_away(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    async with working(store) as shop:
        await shop.settled()
        store.is_away = True
        before = sum(store.calls.values())
        await asyncio.sleep(100)
        # Five loops that ask something, twice a second each; the others have nothing to ask.
        assert 400 < sum(store.calls.values()) - before < 1100
        store.is_away = False
        job_id = store.add()
        await until(lambda: store.status(job_id) == "completed", 2)
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert messages == ["the database is away, jobs wait: nobody listens", "the database is back"]


async def test_an_end_is_written_when_the_database_is_back_and_its_lease_lives() -> None:
    async with working(router=busy_router()) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        shop.store.is_away = True
        shop.router.release()
        await asyncio.sleep(60)  # ten leases
        assert shop.store.status(job_id) == "processing"
        shop.store.is_away = False
        await until(lambda: shop.store.status(job_id) == "completed", 1)
        assert shop.store.history[job_id] == ["processing", "completed"]


async def test_after_an_outage_workers_renew_before_anybody_reaps() -> None:
    """Every lease is over then; reaping first would take from all the living, and five outages would fail a job."""
    async with working(router=busy_router()) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        for _ in range(6):
            shop.store.is_away = True
            await asyncio.sleep(30)
            shop.store.is_away = False
            await asyncio.sleep(30)
        assert shop.store.history[job_id] == ["processing"]
        assert shop.store.rows[job_id].lost == 0


async def test_after_an_outage_a_job_is_stored_as_pending_until_a_claim_came_back() -> None:
    async with working(router=busy_router()) as shop:
        await shop.settled()
        shop.store.is_away = True
        with pytest.raises(StoreUnavailable):
            await shop.submit()
        shop.store.is_away = False
        job_id = (await shop.submit()).job.id
        assert shop.store.history[job_id] == ["pending"]
        await until(lambda: shop.store.status(job_id) == "processing", 1)
        assert (await shop.submit()).job.status == "processing"


async def test_an_end_that_cannot_be_written_keeps_no_other() -> None:
    async with working(router=busy_router()) as shop:
        await shop.settled()
        ids = [(await shop.submit()).job.id for _ in range(3)]
        shop.store.unwritable = b'{"sentiment":"positive","confidence":0.75}', ids[1]
        for _ in range(3):
            shop.router.release()
        await until(lambda: all(shop.store.status(job_id) != "processing" for job_id in ids), 2)
        assert [shop.store.status(job_id) for job_id in ids] == ["completed", "failed", "completed"]
        error = shop.store.rows[ids[1]].job.error
        assert error is not None
        assert error.code == "INTERNAL"


async def test_a_job_with_no_end_that_can_be_written_is_left_to_its_lease() -> None:
    async with working(router=busy_router()) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        shop.store.unwritable = None, job_id
        shop.router.release()
        await until(lambda: repr(shop.worker).startswith("<Worker 0 held"), 3)
        assert shop.store.status(job_id) == "processing"


async def test_one_loop_without_a_database_keeps_no_job_from_being_reaped() -> None:
    """Purging once more than the database can do made it look away for all, and the reaper waited for ever."""
    store = FakeStore()
    store.broken.add("purge")
    job_id = store.add()
    await store.claim("gone", 1)
    async with working(store):
        await until(lambda: store.status(job_id) == "completed", 8)


async def test_a_bug_in_the_store_is_logged_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    async with working() as shop:
        await shop.settled()
        shop.store.bug = RuntimeError("a bug")
        await asyncio.sleep(5)
        shop.store.bug = None
        job_id = shop.store.add()
        await until(lambda: shop.store.status(job_id) == "completed", 2)
    assert "unexpected error in the loop claim" in caplog.text


async def test_a_submission_whose_caller_leaves_is_claimed_later() -> None:
    async with working() as shop:
        await shop.settled()
        gate = shop.store.close_gate("submit")
        task = asyncio.create_task(shop.submit())
        await shop.store.entered["submit"].wait()
        task.cancel()
        await asyncio.wait([task])
        (job_id,) = shop.store.rows
        shop.store.change(job_id, "pending")  # as the store gives it back
        gate.set()
        await until(lambda: shop.store.status(job_id) == "completed", 1)
        assert repr(shop.worker).endswith("room for 4>")


# The drain


async def test_a_drain_waits_for_what_runs_and_claims_nothing() -> None:
    async with working(router=busy_router(), concurrency=1) as shop:
        await shop.settled()
        running, waiting = (await shop.submit()).job.id, (await shop.submit()).job.id
        await shop.router.entered.wait()
        draining = asyncio.create_task(shop.worker.drain(30))
        await asyncio.sleep(10)
        assert (await shop.worker.submit(text_job())).job.status == "pending"
        shop.router.release()
        await draining
        assert now_s() < 11
        assert shop.store.status(running) == "completed"
        assert shop.store.history[waiting] == ["pending"]


async def test_what_runs_at_the_end_of_a_drain_is_given_back(caplog: pytest.LogCaptureFixture) -> None:
    async with working(router=busy_router()) as shop:
        await shop.settled()
        job_id = (await shop.submit()).job.id
        await shop.router.entered.wait()
        started_s = now_s()
        await shop.worker.drain(30)
        assert 30 <= now_s() - started_s < 30.1
        assert shop.store.history[job_id] == ["processing", "pending"]
        assert shop.store.rows[job_id].not_before_s <= now_s()
        assert shop.router.cancelled.is_set()
    assert f"job {job_id} text: pending, again in 0.0 s: its gateway was shut down" in caplog.text


async def test_a_drain_without_a_database_ends_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    async with working(router=busy_router()) as shop:
        await shop.settled()
        await shop.submit()
        await shop.router.entered.wait()
        shop.store.is_away = True
        started_s = now_s()
        await shop.worker.drain(5)
        assert now_s() - started_s < 7.1
    assert "1 jobs could not be given back; their leases will run out" in caplog.text


async def test_a_drain_leaves_no_task_behind() -> None:
    before = asyncio.all_tasks()
    async with working(router=busy_router()) as shop:
        await shop.settled()
        await shop.submit()
        await shop.worker.drain(0)
        assert asyncio.all_tasks() == before
