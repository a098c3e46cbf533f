"""What any process does for the jobs of all: takes them from workers that are gone, ends them in time, deletes them.

Must not know what this process runs itself. After a time without the database every lease may be over, of workers that
live and of those that do not: how long they get to renew theirs, the store decides.
"""

import logging
from collections.abc import Callable
from uuid import UUID

from rest_gateway.jobs.loops import Loops
from rest_gateway.jobs.records import JobStore
from rest_gateway.metrics import Metrics

logger = logging.getLogger(__name__)

REAP_S = 1.0
PURGE_S = 60.0
PURGE_ROWS = 1000
PURGE_PAUSE_S = 0.05
GAUGE_S = 5.0


class Housekeeping:
    """Reaping every second, purging in chunks, and the count of who waits.

    `on_change` is told the id of every job whose status changes, `on_arrival` that some are pending again.
    """

    def __init__(
        self,
        store: JobStore,
        loops: Loops,
        metrics: Metrics,
        *,
        retention_s: float,
        on_change: Callable[[UUID], None],
        on_arrival: Callable[[], None],
    ) -> None:
        self._store = store
        self._loops = loops
        self._metrics = metrics
        self._retention_s = retention_s
        self._on_change = on_change
        self._on_arrival = on_arrival

    def start(self) -> None:
        """Starts the loops."""
        self._loops.start("reap", self._reap)
        self._loops.start("purge", self._purge)
        self._loops.start("gauge", self._gauge)

    async def _reap(self) -> float:
        reaped = await self._loops.ask(self._store.reap())
        for ids, status, why in (
            (reaped.lost, "pending", "its worker let the lease run out"),
            (reaped.abandoned, "failed", "its workers let the lease run out too often"),
            (reaped.expired, "failed", "its time is over"),
        ):
            for job_id in ids:
                self._note(job_id, status, why)
        self._metrics.jobs_lost_leases.inc(len(reaped.lost) + len(reaped.abandoned))
        if reaped.lost:
            self._on_arrival()
        return REAP_S

    def _note(self, job_id: UUID, status: str, why: str) -> None:
        """One transition, of a job of which only the id is known."""
        logger.info("job %s: %s, %s", job_id, status, why, extra={"job_id": str(job_id), "status": status})
        self._metrics.count_job("reaped", status)
        self._on_change(job_id)

    async def _purge(self) -> float:
        deleted = await self._loops.ask(self._store.purge(self._retention_s, PURGE_ROWS))
        if deleted:
            logger.info("%d jobs that ended more than %g s ago were deleted", deleted, self._retention_s)
        return PURGE_PAUSE_S if deleted == PURGE_ROWS else min(PURGE_S, max(1.0, self._retention_s / 10))

    async def _gauge(self) -> float:
        self._metrics.jobs_waiting.set(await self._loops.ask(self._store.waiting()))
        return GAUGE_S
