"""Who waits for a job to change, and how they learn of it: long polls and event streams of this process.

A change that is made here wakes its watchers at once. Those of other processes are found by asking the store for the
versions of all watched jobs, one query a quarter of a second, as long as anybody watches. A watcher is only told to
look again: what it sees then is the store's word, so a wake-up too many does no harm, and one too few ends with the
next query.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from uuid import UUID

from rest_gateway.jobs.records import JobStore, StoreUnavailable

logger = logging.getLogger(__name__)

POLL_S = 0.25
# While the database is away.
AWAY_S = 1.0


class Watcher:
    """One who waits for one job."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._may_have_changed = asyncio.Event()

    async def wait(self, version: int, timeout_s: float) -> bool:
        """True as soon as the job may have another version than the one that the watcher saw, False after the time."""
        self._version = version
        try:
            async with asyncio.timeout(timeout_s):
                await self._may_have_changed.wait()
        except TimeoutError:
            return False
        self._may_have_changed.clear()
        return True

    def wake(self) -> None:
        """Look again."""
        self._may_have_changed.set()

    def compare(self, version: int | None) -> None:
        """What the store has; None: the job is gone."""
        if self._version is not None and version != self._version:
            self.wake()


class Watch:
    """Every watcher of this process. `is_closed`: nobody shall wait any more, the process is about to leave."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._watchers: dict[UUID, set[Watcher]] = {}
        self._poller: asyncio.Task[None] | None = None
        self.is_closed = False

    def __len__(self) -> int:
        return sum(map(len, self._watchers.values()))

    def changed(self, job_id: UUID) -> None:
        """The job changed in this process."""
        for watcher in self._watchers.get(job_id, ()):
            watcher.wake()

    def close(self) -> None:
        """Wakes everybody for the last time."""
        self.is_closed = True
        for job_id in self._watchers:
            self.changed(job_id)

    @contextlib.contextmanager
    def on(self, job_id: UUID) -> Iterator[Watcher]:
        """A watcher of the job; to be had before one looks at the job, so that no change falls between."""
        watcher = Watcher()
        self._watchers.setdefault(job_id, set()).add(watcher)
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll(), name="jobs-watch")
        try:
            yield watcher
        finally:
            self._watchers[job_id].discard(watcher)
            if not self._watchers[job_id]:
                del self._watchers[job_id]
            if not self._watchers:
                self._poller.cancel()
                self._poller = None

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                self._compare(await self._store.versions(list(self._watchers)))
            except StoreUnavailable:  # the worker's loops say so in the log
                await asyncio.sleep(AWAY_S)
            except Exception:
                logger.exception("unexpected error while watching jobs")
                await asyncio.sleep(AWAY_S)

    def _compare(self, versions: dict[UUID, int]) -> None:
        for job_id, watchers in self._watchers.items():
            for watcher in watchers:
                watcher.compare(versions.get(job_id))
