"""What the gateway offers to do with jobs: submit, look, wait, cancel, delete. The routes' only way to them.

Must not know HTTP or SQL. What changes a job here tells the worker, which may be running it, and the watchers.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Literal
from uuid import UUID

from rest_gateway.jobs.housekeeping import Housekeeping
from rest_gateway.jobs.loops import Loops
from rest_gateway.jobs.records import Cursor, Job, JobStore, Kind, NewJob, Page, Status, StoreUnavailable, Submitted
from rest_gateway.jobs.watch import AWAY_S, Watch, Watcher
from rest_gateway.jobs.worker import Worker
from rest_gateway.metrics import Metrics

logger = logging.getLogger(__name__)

TERMINAL: frozenset[Status] = frozenset({"completed", "failed", "cancelled"})
DatabaseState = Literal["unknown", "connected", "away"]


class Jobs:
    """The jobs of every tenant; `tenant` says whose are meant, and another's are not found."""

    def __init__(
        self,
        store: JobStore,
        worker: Worker,
        housekeeping: Housekeeping,
        loops: Loops,
        watch: Watch,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self.worker = worker
        self._housekeeping = housekeeping
        self.loops = loops
        self.watch = watch
        self._metrics = metrics

    @property
    def has_tried_to_claim(self) -> bool:
        """Whether the worker has looked for jobs, with or without success."""
        return self.worker.has_tried_to_claim

    @property
    def database(self) -> DatabaseState:
        """As it was found last."""
        return _DATABASE[self.loops.is_database_away]

    def start(self) -> None:
        """Begins to work."""
        self.worker.start()
        self._housekeeping.start()

    def start_drain(self) -> None:
        """No further job is claimed; whoever waits for one is answered with what it is now."""
        self.worker.stop_claiming()
        self.watch.close()

    async def drain(self, timeout_s: float) -> None:
        """Lets what runs end, at most `timeout_s` seconds, gives the rest back, and stops for good."""
        await self.worker.drain(timeout_s)

    async def aclose(self) -> None:
        """Stops at once, as if the process had been killed."""
        await self.worker.aclose()

    async def submit(self, job: NewJob) -> Submitted:
        """Stores a job. Raises TooManyJobs, KeyReused and, as everything here, StoreUnavailable."""
        return await self.worker.submit(job)

    async def get(self, job_id: UUID, tenant: str) -> Job:
        """Raises JobNotFound."""
        return await self._store.get(job_id, tenant)

    async def list(
        self, tenant: str, *, limit: int, cursor: Cursor | None, status: Status | None, kind: Kind | None
    ) -> Page:
        """Newest first."""
        return await self._store.list(tenant, limit=limit, cursor=cursor, status=status, kind=kind)

    async def wait(self, job_id: UUID, tenant: str, wait_s: float) -> Job:
        """The job when it has ended, or as it is after `wait_s` seconds, or when a drain begins."""
        give_up_s = _now_s() + wait_s
        with self.watch.on(job_id) as watcher:
            while True:
                job = await self._store.get(job_id, tenant)
                if job.status in TERMINAL or self.watch.is_closed:
                    return job
                if not await watcher.wait(job.version, give_up_s - _now_s()):
                    return job

    async def changes(
        self, job_id: UUID, tenant: str, *, seen: int, heartbeat_s: float
    ) -> AsyncGenerator[Job | None, None]:
        """The job each time it has a newer version than `seen`, and None after each quiet `heartbeat_s` seconds.

        Ends after a terminal state, when the job is gone, and when a drain begins; goes on while the database is away,
        but for the first look. Versions that came and went between two looks are left out.
        """
        with self.watch.on(job_id) as watcher:
            job = await self._store.get(job_id, tenant)
            while True:
                if job.version > seen:
                    seen = job.version
                    yield job
                if job.status in TERMINAL or self.watch.is_closed:
                    return
                if not await watcher.wait(job.version, heartbeat_s):
                    yield None
                elif not self.watch.is_closed:
                    job = await self._look_again(job, watcher)

    async def _look_again(self, job: Job, watcher: Watcher) -> Job:
        try:
            return await self._store.get(job.id, job.tenant)
        except StoreUnavailable:
            await asyncio.sleep(AWAY_S)
            watcher.wake()
            return job

    async def cancel(self, job_id: UUID, tenant: str) -> Job:
        """Cancels the job, and its call where it runs here. Raises JobNotFound and WrongState."""
        before = await self._store.get(job_id, tenant)
        job = await self._store.cancel(job_id, tenant)
        self.worker.forget(job_id)
        self.watch.changed(job_id)
        if before.status != "cancelled":
            logger.info("job %s %s: cancelled", job.id, job.kind)
            self._metrics.count_job(job.kind, "cancelled")
        return job

    async def delete(self, job_id: UUID, tenant: str) -> None:
        """Deletes a job that has ended. Raises JobNotFound and WrongState."""
        await self._store.delete(job_id, tenant)
        logger.info("job %s was deleted", job_id)
        self.watch.changed(job_id)


_DATABASE: dict[bool | None, DatabaseState] = {None: "unknown", False: "connected", True: "away"}


def _now_s() -> float:
    return asyncio.get_running_loop().time()
