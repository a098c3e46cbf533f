"""What happens at once: claims, keys, and the ends of a job, on both engines. PostgreSQL gets several processes' worth
of stores; SQLite has one, which is all that may use the file."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from uuid import UUID

import pytest

from rest_gateway.jobs.records import JobNotFound, KeyReused, StoreError, Submitted, WrongState
from rest_gateway.jobs.states import TERMINAL
from rest_gateway.jobs.store import SqlJobStore
from tests.integration.jobs.builders import claim, completed, failed, held, submit, text_job
from tests.integration.jobs.conftest import opened

pytestmark = pytest.mark.anyio

SEED = 20_240_607


@pytest.fixture
async def stores(url: str) -> AsyncIterator[list[SqlJobStore]]:
    """As many stores as the engine allows."""
    async with contextlib.AsyncExitStack() as stack:
        number = 1 if url.startswith("sqlite") else 3
        yield [await stack.enter_async_context(opened(url)) for _ in range(number)]


async def test_workers_that_claim_at_once_take_each_job_once(stores: list[SqlJobStore]) -> None:
    submitted = await asyncio.gather(*(submit(stores[0], str(number)) for number in range(200)))
    taken: Counter[UUID] = Counter()

    async def work(store: SqlJobStore, worker: str) -> None:
        while claimed := await claim(store, worker, limit=7):
            taken.update(job.id for job in claimed)
            assert await store.finish([completed(job) for job in claimed]) == {job.id for job in claimed}

    await asyncio.gather(*(work(stores[number % len(stores)], f"w{number}") for number in range(8)))
    assert taken == {job.id: 1 for job in submitted}


async def test_a_hundred_concurrent_submits_with_one_key_make_one_job(stores: list[SqlJobStore]) -> None:
    answers = await asyncio.gather(
        *(
            stores[number % len(stores)].submit(
                text_job("same", idempotency_key="k"), worker="w" if number % 2 else None
            )
            for number in range(100)
        )
    )
    assert len({answer.job.id for answer in answers}) == 1
    assert sum(answer.is_new for answer in answers) == 1
    assert sum(answer.claimed is not None for answer in answers) <= 1


async def test_concurrent_submits_with_one_key_and_two_bodies_agree_on_one(stores: list[SqlJobStore]) -> None:
    answers = await asyncio.gather(
        *(
            stores[number % len(stores)].submit(text_job(f"body {number % 2}", idempotency_key="k"), worker=None)
            for number in range(60)
        ),
        return_exceptions=True,
    )
    found = [answer for answer in answers if isinstance(answer, Submitted)]
    assert len({answer.job.id for answer in found}) == 1
    assert len(found) == 30
    assert sum(isinstance(answer, KeyReused) for answer in answers) == 30


async def test_processes_that_submit_the_same_keys_in_different_orders_do_not_block_each_other(
    stores: list[SqlJobStore],
) -> None:
    keys = [f"k{number}" for number in range(40)]
    chance = random.Random(SEED)
    answers = await asyncio.gather(
        *(
            store.submit(text_job(key, idempotency_key=key), worker=None)
            for store in (*stores, *stores)
            for key in chance.sample(keys, len(keys))
        )
    )
    assert len({answer.job.id for answer in answers}) == len(keys)
    assert sum(answer.is_new for answer in answers) == len(keys)


@dataclass
class History:
    """What the callers were told of each job; `check` compares it with what the job became."""

    submitted: set[UUID] = field(default_factory=set)
    cancelled: set[UUID] = field(default_factory=set)
    # (id, attempt) whose end was acknowledged, and how.
    ended: dict[UUID, list[str]] = field(default_factory=dict)
    # The highest version and last status seen, for time must not run backwards.
    versions: dict[UUID, int] = field(default_factory=dict)
    terminal: dict[UUID, str] = field(default_factory=dict)

    def see(self, job_id: UUID, status: str, version: int) -> None:
        """A job was read: versions never fall, and a terminal status never changes."""
        assert version >= self.versions.get(job_id, 0)
        self.versions[job_id] = version
        if job_id in self.terminal:
            assert status == self.terminal[job_id]
        if status in TERMINAL:
            self.terminal[job_id] = status

    def check(self, final: dict[UUID, str]) -> None:
        """Every job has one end, and it is the one that was acknowledged."""
        assert set(final) == self.submitted
        for job_id, status in final.items():
            assert status in TERMINAL
            acknowledged = self.ended.get(job_id, []) + ["cancelled"] * (job_id in self.cancelled)
            assert len(acknowledged) <= 1, f"{job_id} ended {acknowledged}"
            assert status in (acknowledged or ["failed"]), f"{job_id} is {status}, acknowledged {acknowledged}"
            assert self.terminal.get(job_id, status) == status


async def test_whatever_races_each_job_reaches_one_terminal_state_and_everybody_was_told_the_truth(url: str) -> None:
    """Cancels, ends, releases, lost leases and reaping at random instants, on leases that have always just run out."""
    chance = random.Random(SEED)
    history = History()
    number = 1 if url.startswith("sqlite") else 3
    async with contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(opened(url, lease_s=0, max_lost_leases=8)) for _ in range(number)]

        def any_store() -> SqlJobStore:
            return chance.choice(stores)

        async def live(worker: str | None) -> None:
            submitted = await any_store().submit(text_job(), worker=worker)
            job_id = submitted.job.id
            history.submitted.add(job_id)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(chance.random() * 0.02)
                if chance.random() < 0.25:
                    with contextlib.suppress(WrongState):
                        await any_store().cancel(job_id, "default")
                        history.cancelled.add(job_id)
                job = await any_store().get(job_id, "default")
                history.see(job_id, job.status, job.version)

        async def work(worker: str) -> None:
            while not is_over.is_set():
                store = any_store()
                for job in await claim(store, worker, limit=5):
                    await asyncio.sleep(chance.random() * 0.004)
                    what = chance.random()
                    if what < 0.2:
                        continue  # as if it had died: the lease is lost
                    if what < 0.4:
                        await store.release(held([job]), 0, "busy")
                        continue
                    end = completed(job) if what < 0.8 else failed(job)
                    if await store.finish([end]):
                        history.ended.setdefault(job.id, []).append(end.status)

        async def reap() -> None:
            while not is_over.is_set():
                await any_store().reap()
                await asyncio.sleep(chance.random() * 0.01)

        is_over = asyncio.Event()
        others = [asyncio.create_task(work(f"w{n}")) for n in range(4)] + [asyncio.create_task(reap())]
        await asyncio.gather(*(live(None if n % 3 else "w-gone") for n in range(150)))
        final: dict[UUID, str] = {}
        while len(final) < len(history.submitted):
            for status in TERMINAL:
                page = await stores[0].list("default", limit=200, cursor=None, status=status, kind=None)
                final |= {job.id: job.status for job in page.jobs}
            await asyncio.sleep(0)
        is_over.set()
        await asyncio.gather(*others)
        final = {job_id: (await stores[0].get(job_id, "default")).status for job_id in history.submitted}
    history.check(final)
    assert set(final.values()) == TERMINAL


async def test_deletes_cancels_and_reads_of_one_job_at_once_are_all_answered(stores: list[SqlJobStore]) -> None:
    job = await submit(stores[0])
    outcomes: Counter[str] = Counter()

    async def attempt(number: int) -> None:
        store = stores[number % len(stores)]
        try:
            if number % 3 == 0:
                await store.cancel(job.id, "default")
            elif number % 3 == 1:
                await store.delete(job.id, "default")
                outcomes["deleted"] += 1
            else:
                await store.get(job.id, "default")
        except (JobNotFound, WrongState) as exc:
            outcomes[type(exc).__name__] += 1

    await asyncio.gather(*map(attempt, range(30)))
    with contextlib.suppress(StoreError):
        await stores[0].delete(job.id, "default")
        outcomes["deleted"] += 1
    assert outcomes["deleted"] == 1
