"""Asking the store of jobs itself, in a load process of its own: its pages and its claims, without HTTP around them.

The only part of the bench that knows more of a program than its command line: no command shows what a claim costs.
"""

import datetime as dt
from abc import ABC, abstractmethod

from bench.clients import AskError
from bench.job_rows import PATIENCE_S, SPAN_S, lay_in
from bench.orders import Order
from bench.workloads import CLAIM, CLAIM_FINISH, JOBS_PER_CLAIM, JOBS_PER_PAGE, JOBS_PER_TURN, PAGE
from rest_gateway.jobs.records import Claimed, Cursor, Finished, Kind, Status, StoreSettings
from rest_gateway.jobs.store import SqlJobStore

WORKER = "bench"
TENANT = "default"
RESULT = b'{"sentiment":"positive","confidence":0.81195}'


class StoreClient(ABC):
    """A store, opened when the jobs that are to wait in it have been laid in."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._store = SqlJobStore(StoreSettings(url=order.address, timeout_s=PATIENCE_S))

    async def open(self) -> None:
        await lay_in(self._order.address, self._order.backlog)
        await self._store.open()
        await self._store.prepare()

    @abstractmethod
    async def ask(self, variant: int) -> None:
        """One question to the store."""

    async def aclose(self) -> None:
        await self._store.aclose()


class PageClient(StoreClient):
    """The newest page, one from the middle, and one of failed texts, in turns."""

    async def open(self) -> None:
        await super().open()
        newest = await self._store.list(TENANT, limit=1, cursor=None, status=None, kind=None)
        [job] = newest.jobs
        middle = Cursor(job.created_at - dt.timedelta(seconds=SPAN_S / 2), job.id)
        self._pages: list[tuple[Cursor | None, Status | None, Kind | None]] = [
            (None, None, None),
            (middle, None, None),
            (None, "failed", "text"),
        ]

    async def ask(self, variant: int) -> None:
        cursor, status, kind = self._pages[variant]
        page = await self._store.list(TENANT, limit=JOBS_PER_PAGE, cursor=cursor, status=status, kind=kind)
        if len(page.jobs) != JOBS_PER_PAGE:
            raise AskError(f"a page of {len(page.jobs)} jobs")


class ClaimClient(StoreClient):
    """Claims, of which nothing is finished."""

    async def ask(self, variant: int) -> None:  # noqa: ARG002 -- there is only one
        await self._claim(JOBS_PER_CLAIM)

    async def _claim(self, limit: int) -> list[Claimed]:
        jobs, _ = await self._store.claim(WORKER, limit)
        if len(jobs) != limit:
            raise AskError(f"claimed {len(jobs)} jobs: no more were waiting")
        return jobs


class ClaimFinishClient(ClaimClient):
    """What a worker asks of the store, with no work in between."""

    async def ask(self, variant: int) -> None:  # noqa: ARG002 -- there is only one
        jobs = await self._claim(JOBS_PER_TURN)
        ends = [Finished(id=job.id, attempt=job.attempt, status="completed", result=RESULT) for job in jobs]
        if len(await self._store.finish(ends)) != len(jobs):
            raise AskError("a job could not be finished")


STORE_CLIENTS: dict[str, type[StoreClient]] = {
    PAGE.name: PageClient,
    CLAIM.name: ClaimClient,
    CLAIM_FINISH.name: ClaimFinishClient,
}
