"""The store, one promise a test, on SQLite and PostgreSQL. A lease or time of 0 s stands for one that has run out."""

import asyncio
import datetime as dt
from uuid import UUID, uuid4

import pytest
from sqlalchemy.dialects import postgresql

from rest_gateway.jobs import statements
from rest_gateway.jobs.records import (
    JobError,
    JobNotFound,
    KeyReused,
    NewJob,
    Reaped,
    TooManyJobs,
    WrongState,
)
from rest_gateway.jobs.store import CLAIM_BYTES, SqlJobStore
from tests.integration.jobs.builders import claim, claim_one, completed, failed, held, submit, text_job
from tests.integration.jobs.conftest import OpenStore
from tests.postgres import Postgres

pytestmark = pytest.mark.anyio


async def test_a_submitted_job_is_pending_and_can_be_read(store: SqlJobStore) -> None:
    submitted = await store.submit(text_job(), worker=None)
    job = submitted.job
    assert (submitted.is_new, submitted.claimed) == (True, None)
    assert (job.status, job.kind, job.tenant, job.attempt, job.version) == ("pending", "text", "default", 0, 1)
    assert (job.started_at, job.finished_at, job.not_before, job.result, job.error) == (None,) * 5
    assert job.created_at == job.updated_at
    assert abs(dt.datetime.now(dt.UTC) - job.created_at) < dt.timedelta(seconds=10)
    assert await store.get(job.id, "default") == job


async def test_a_job_for_a_worker_with_room_is_stored_as_its_first_attempt(store: SqlJobStore) -> None:
    submitted = await store.submit(text_job(timeout_s=60), worker="w")
    assert (submitted.job.status, submitted.job.attempt, submitted.job.version) == ("processing", 1, 1)
    assert submitted.job.started_at == submitted.job.created_at
    assert submitted.claimed is not None
    assert (submitted.claimed.input, submitted.claimed.expires_in_s) == (b'{"text":"fine"}', 60)
    assert await claim(store) == []
    assert await store.renew("w", held([submitted.claimed])) == {(submitted.job.id, 1)}
    assert await store.finish([completed(submitted.claimed)]) == {submitted.job.id}


async def test_jobs_are_claimed_oldest_first_and_the_rest_is_told(store: SqlJobStore) -> None:
    jobs = [await submit(store, str(number)) for number in range(5)]
    first, has_more = await store.claim("w", 3)
    assert ([job.id for job in first], has_more) == ([job.id for job in jobs[:3]], True)
    second, has_more = await store.claim("w", 3)
    assert ([job.id for job in second], has_more) == ([job.id for job in jobs[3:]], False)
    assert (second[0].attempt, second[0].input, second[0].kind) == (1, b'{"text":"3"}', "text")
    assert 3590 < second[0].expires_in_s <= 3600
    job = await store.get(jobs[0].id, "default")
    assert (job.status, job.attempt, job.version) == ("processing", 1, 2)
    assert job.started_at is not None
    assert job.started_at >= job.created_at


# Bug: a claim took a hundred inputs of megabytes at once, which took longer than a statement may. So it was in vain,
# was tried anew for ever, and no job of anybody was run.
async def test_a_claim_ends_with_the_job_that_brings_its_inputs_to_the_bound(store: SqlJobStore) -> None:
    sizes = [CLAIM_BYTES + 1, CLAIM_BYTES // 2, CLAIM_BYTES // 2 - 1, 1, 1]
    jobs = [await submit(store, input=b"x" * size) for size in sizes]
    claims = [await store.claim("w", 100) for _ in range(3)]
    assert [[job.id for job in claimed] for claimed, _ in claims] == [
        [jobs[0].id],
        [job.id for job in jobs[1:4]],
        [jobs[4].id],
    ]
    assert [has_more for _, has_more in claims] == [True, True, False]


async def test_a_finished_job_keeps_its_result_to_the_byte(store: SqlJobStore) -> None:
    result = b'{"text":"\x00\xff nothing that a text column would take"}'
    job = await submit(store)
    assert await store.finish([completed(await claim_one(store), result)]) == {job.id}
    job = await store.get(job.id, "default")
    assert (job.status, job.result, job.error, job.version) == ("completed", result, None, 3)
    assert job.finished_at is not None
    assert job.finished_at == job.updated_at


async def test_a_failed_job_tells_why(store: SqlJobStore) -> None:
    job = await submit(store)
    await store.finish([failed(await claim_one(store), "no\x00t \ud800 good")])
    job = await store.get(job.id, "default")
    assert (job.status, job.error, job.result) == ("failed", JobError("INTERNAL", "no\ufffdt ? good"), None)


async def test_many_attempts_end_together_and_the_fenced_ones_are_left_out(store: SqlJobStore) -> None:
    for number in range(4):
        await submit(store, str(number))
    one, two, three, four = await claim(store)
    await store.cancel(two.id, "default")
    await store.release(held([three]), 0, "busy")
    assert await store.finish([completed(one), completed(two), completed(three), failed(four)]) == {one.id, four.id}
    statuses = [(await store.get(job.id, "default")).status for job in (one, two, three, four)]
    assert statuses == ["completed", "cancelled", "pending", "failed"]


async def test_a_finish_whose_acknowledgement_was_lost_counts_as_written_when_it_is_repeated(
    store: SqlJobStore,
) -> None:
    await submit(store)
    claimed = await claim_one(store)
    assert await store.finish([completed(claimed)]) == {claimed.id}
    assert await store.finish([completed(claimed)]) == {claimed.id}
    assert await store.finish([failed(claimed)]) == set()
    assert (await store.get(claimed.id, "default")).version == 3


async def test_a_stale_attempt_changes_nothing(open_store: OpenStore) -> None:
    async with open_store(lease_s=0) as store:
        await submit(store)
        stale = await claim_one(store, "frozen")
        assert (await store.reap()).lost == [stale.id]
        current = await claim_one(store, "other")
        assert (current.attempt, stale.attempt) == (2, 1)
        assert await store.finish([completed(stale)]) == set()
        assert await store.release(held([stale]), 0, "late") == set()
        assert await store.renew("frozen", held([stale])) == set()
        assert await store.renew("other", held([stale])) == set()
        assert await store.finish([completed(current)]) == {current.id}


async def test_a_lost_lease_gives_the_job_back_at_its_old_place(open_store: OpenStore) -> None:
    async with open_store(lease_s=0) as store:
        first = await submit(store, "first")
        second = await submit(store, "second")
        await store.claim("w", 1)
        assert await store.reap() == Reaped(lost=[first.id], abandoned=[], expired=[])
        job = await store.get(first.id, "default")
        assert (job.status, job.attempt, job.version, job.started_at) == ("pending", 1, 3, None)
        assert [job.id for job in await claim(store)] == [first.id, second.id]


async def test_a_renewed_lease_is_not_lost(open_store: OpenStore, url: str) -> None:
    async with open_store(lease_s=0) as store:
        await submit(store)
        claimed = await claim_one(store)
    async with open_store(lease_s=60) as store:
        # It has run out, and nobody has reaped it yet: still its worker's.
        assert await store.renew("w", [*held([claimed]), (uuid4(), 1)]) == {(claimed.id, 1)}
        assert await store.renew("somebody else", held([claimed])) == set()
        assert await store.reap() == Reaped([], [], [])


async def test_the_fifth_lost_lease_fails_the_job(open_store: OpenStore) -> None:
    async with open_store(lease_s=0) as store:
        job = await submit(store)
        for attempt in range(1, 5):
            assert (await claim_one(store)).attempt == attempt
            assert (await store.reap()).lost == [job.id]
        await claim_one(store)
        assert await store.reap() == Reaped(lost=[], abandoned=[job.id], expired=[])
        job = await store.get(job.id, "default")
        assert (job.status, job.attempt) == ("failed", 5)
        assert job.error is not None
        assert job.error.code == "INTERNAL"


async def test_a_release_is_no_lost_lease(open_store: OpenStore) -> None:
    async with open_store(lease_s=0) as store:
        job = await submit(store)
        for _ in range(8):
            assert await store.release(held([await claim_one(store)]), 0, "the router is away") == {job.id}
        assert (await store.get(job.id, "default")).status == "pending"
        assert (await claim_one(store)).attempt == 9


async def test_a_released_job_waits_out_its_delay(store: SqlJobStore) -> None:
    job = await submit(store)
    assert await store.release(held([await claim_one(store)]), 60, "busy") == {job.id}
    job = await store.get(job.id, "default")
    assert job.status == "pending"
    assert job.not_before is not None
    assert dt.timedelta(seconds=59) < job.not_before - job.created_at < dt.timedelta(seconds=70)
    assert await claim(store) == []
    assert await store.waiting() == 1


async def test_a_job_past_its_deadline_fails_whether_it_waits_or_runs(store: SqlJobStore) -> None:
    waiting = await submit(store, timeout_s=0)
    running = (await store.submit(text_job(timeout_s=0), worker="w")).claimed
    assert running is not None
    assert await claim(store) == []
    reaped = await store.reap()
    assert (set(reaped.expired), reaped.lost) == ({waiting.id, running.id}, [])
    job = await store.get(waiting.id, "default")
    assert (job.status, job.error) == (
        "failed",
        JobError("DEADLINE_EXCEEDED", "not done within the time that a job has"),
    )
    assert await store.finish([completed(running)]) == set()


async def test_an_expired_job_tells_what_it_waited_for(store: SqlJobStore) -> None:
    submitted = await store.submit(text_job(timeout_s=0), worker="w")
    assert submitted.claimed is not None
    await store.release(held([submitted.claimed]), 0, "the router was away")
    await store.reap()
    error = (await store.get(submitted.job.id, "default")).error
    assert error is not None
    assert error.message.endswith("the router was away")


async def test_cancel_is_final_and_may_be_repeated(store: SqlJobStore) -> None:
    job = await submit(store)
    cancelled = await store.cancel(job.id, "default")
    assert (cancelled.status, cancelled.version) == ("cancelled", 2)
    assert cancelled.finished_at is not None
    assert await store.cancel(job.id, "default") == cancelled
    assert await claim(store) == []


async def test_a_job_that_runs_can_be_cancelled_and_its_worker_hears_of_it(store: SqlJobStore) -> None:
    await submit(store)
    claimed = await claim_one(store)
    await store.cancel(claimed.id, "default")
    assert await store.renew("w", held([claimed])) == set()
    assert await store.finish([completed(claimed)]) == set()


async def test_what_has_ended_cannot_be_cancelled(store: SqlJobStore) -> None:
    await submit(store)
    claimed = await claim_one(store)
    await store.finish([completed(claimed)])
    with pytest.raises(WrongState) as caught:
        await store.cancel(claimed.id, "default")
    assert caught.value.status == "completed"


async def test_only_what_has_ended_can_be_deleted(store: SqlJobStore) -> None:
    job = await submit(store)
    with pytest.raises(WrongState) as caught:
        await store.delete(job.id, "default")
    assert caught.value.status == "pending"
    await store.cancel(job.id, "default")
    await store.delete(job.id, "default")
    with pytest.raises(JobNotFound):
        await store.delete(job.id, "default")


async def test_a_job_of_another_tenant_is_not_found(store: SqlJobStore) -> None:
    job = await submit(store, tenant="a")
    for method in (store.get, store.cancel, store.delete):
        with pytest.raises(JobNotFound):
            await method(job.id, "b")
    assert (await store.list("b", limit=10, cursor=None, status=None, kind=None)).jobs == []


async def test_versions_tell_what_changed_and_what_is_gone(store: SqlJobStore) -> None:
    one, two = await submit(store), await submit(store)
    await store.cancel(two.id, "default")
    assert await store.versions([one.id, two.id, uuid4()]) == {one.id: 1, two.id: 2}
    assert await store.versions([]) == {}


# --- idempotency keys


async def test_the_same_key_and_body_is_the_same_job(store: SqlJobStore) -> None:
    first = await store.submit(text_job("a", idempotency_key="k"), worker=None)
    again = await store.submit(text_job("a", idempotency_key="k"), worker="w")
    assert (again.is_new, again.job, again.claimed) == (False, first.job, None)
    other = await store.submit(text_job("a", idempotency_key="k", tenant="b"), worker=None)
    assert other.is_new


async def test_the_same_key_with_another_body_is_refused_and_its_neighbours_are_not(store: SqlJobStore) -> None:
    await submit(store, "a", idempotency_key="k")
    answers = await asyncio.gather(
        store.submit(text_job("b"), worker=None),
        store.submit(text_job("b", idempotency_key="k"), worker=None),
        store.submit(text_job("b", idempotency_key="l"), worker=None),
        return_exceptions=True,
    )
    assert [type(answer).__name__ for answer in answers] == ["Submitted", "KeyReused", "Submitted"]
    assert isinstance(answers[1], KeyReused)


async def test_a_key_outlives_the_process(open_store: OpenStore) -> None:
    async with open_store() as store:
        first = await submit(store, "a", idempotency_key="k")
    async with open_store() as store:
        again = await store.submit(text_job("a", idempotency_key="k"), worker=None)
    assert (again.is_new, again.job) == (False, first)


async def test_a_key_is_free_again_when_its_job_was_deleted(store: SqlJobStore) -> None:
    job = await submit(store, "a", idempotency_key="k")
    await store.cancel(job.id, "default")
    await store.delete(job.id, "default")
    assert (await store.submit(text_job("b", idempotency_key="k"), worker=None)).is_new


@pytest.mark.parametrize("field", ["tenant", "idempotency_key"])
@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b"])
async def test_text_that_one_engine_could_not_store_is_refused_on_both(
    store: SqlJobStore, field: str, text: str
) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        await submit(store, **{field: text})


# --- the bound on waiting jobs


async def test_past_the_bound_no_more_may_wait_but_a_worker_with_room_may_take_one(open_store: OpenStore) -> None:
    async with open_store(max_waiting=3) as store:
        answers = await asyncio.gather(
            *(store.submit(text_job(str(number)), worker=None) for number in range(5)), return_exceptions=True
        )
        assert [isinstance(answer, TooManyJobs) for answer in answers] == [False] * 3 + [True] * 2
        assert await store.waiting() == 3
        assert (await store.submit(text_job(), worker="w")).claimed is not None
        await store.claim("w", 1)
        assert (await submit(store)).status == "pending"
        with pytest.raises(TooManyJobs):
            await submit(store)


async def test_a_repetition_is_found_even_when_no_more_may_wait(open_store: OpenStore) -> None:
    async with open_store(max_waiting=1) as store:
        job = await submit(store, "a", idempotency_key="k")
        assert not (await store.submit(text_job("a", idempotency_key="k"), worker=None)).is_new
        assert await submit(store, "a", idempotency_key="k") == job
        with pytest.raises(KeyReused):
            await submit(store, "b", idempotency_key="k")


async def test_the_bound_counts_what_others_left(open_store: OpenStore) -> None:
    async with open_store() as store:
        await submit(store)
    async with open_store(max_waiting=1) as store:
        with pytest.raises(TooManyJobs):
            await submit(store)
        assert await store.waiting() == 1


# --- lists


async def test_a_list_has_pages_newest_first(store: SqlJobStore) -> None:
    jobs = [await submit(store, str(number)) for number in range(5)]
    newest_first = [job.id for job in reversed(jobs)]
    seen: list[UUID] = []
    cursor = None
    for size in (2, 2, 1):
        page = await store.list("default", limit=2, cursor=cursor, status=None, kind=None)
        assert len(page.jobs) == size
        seen += [job.id for job in page.jobs]
        cursor = page.next_cursor
    assert (seen, cursor) == (newest_first, None)


async def test_pages_neither_miss_nor_repeat_jobs_of_one_instant(store: SqlJobStore) -> None:
    jobs = await asyncio.gather(*(submit(store, str(number)) for number in range(30)))
    seen: list[UUID] = []
    cursor = None
    while True:
        page = await store.list("default", limit=7, cursor=cursor, status=None, kind=None)
        seen += [job.id for job in page.jobs]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert len(seen) == 30
    assert set(seen) == {job.id for job in jobs}


async def test_a_list_is_filtered_by_status_and_kind(store: SqlJobStore) -> None:
    text, other = await submit(store), await submit(store)
    agents = (await store.submit(NewJob(kind="agents", input=b"{}", timeout_s=60), worker=None)).job
    await store.cancel(other.id, "default")

    async def ids(status: str | None, kind: str | None) -> list[UUID]:
        page = await store.list("default", limit=10, cursor=None, status=status, kind=kind)  # type: ignore[arg-type]
        return [job.id for job in page.jobs]

    assert await ids(None, None) == [agents.id, other.id, text.id]
    assert await ids("pending", None) == [agents.id, text.id]
    assert await ids(None, "text") == [other.id, text.id]
    assert await ids("cancelled", "text") == [other.id]
    assert await ids("completed", None) == []


# --- retention


async def test_what_ended_long_ago_is_purged_in_chunks_with_its_keys(store: SqlJobStore) -> None:
    for number in range(5):
        job = await submit(store, str(number), idempotency_key=f"k{number}")
        await store.cancel(job.id, "default")
    live = await submit(store, "live")
    assert await store.purge(3600, 100) == 0
    assert [await store.purge(0, 3), await store.purge(0, 3), await store.purge(0, 3)] == [3, 2, 0]
    assert await store.versions([live.id]) == {live.id: 1}
    assert (await store.submit(text_job("other", idempotency_key="k0"), worker=None)).is_new


def test_a_claim_does_not_look_for_jobs_by_their_deadlines(postgres: Postgres, postgres_url: str) -> None:
    """Bug: with many waiting, PostgreSQL took a claim of 50 by way of the deadlines, and sorted all 20,000: 30 ms."""
    compiled = statements.CLAIM.compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]
    claim = str(compiled) % (compiled.params | {"limit": 50, "of_worker": "'w'", "lease_s": 6.0, "max_bytes": 1000})
    # Without the index that a claim should take, the next best shows whether another could be taken.
    plan = postgres.run_sql(
        f"BEGIN; DROP INDEX jobs_pending; SET enable_seqscan = off; EXPLAIN {claim}; ROLLBACK", "jobs"
    )
    conditions = [line for line in plan.splitlines() if "Index Cond" in line]
    assert conditions
    assert not any("deadline_at" in line for line in conditions)
