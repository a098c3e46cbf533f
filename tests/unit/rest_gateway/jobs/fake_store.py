"""A job store in memory with the semantics of the real one; it hangs or is away where a test says so.

Its clock is the loop's. `calls` counts the calls of each method.
"""

import asyncio
import datetime as dt
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from rest_gateway.jobs.records import (
    Claimed,
    Cursor,
    Finished,
    Job,
    JobError,
    JobNotFound,
    KeyReused,
    Kind,
    NewJob,
    Page,
    Reaped,
    Status,
    StoreUnavailable,
    Submitted,
    TooManyJobs,
    WrongState,
)

EPOCH = dt.datetime(2026, 7, 1, 12, tzinfo=dt.UTC)
LIVE = ("pending", "processing")


@dataclass
class Row:
    """A job with what its owner does not see."""

    job: Job
    new: NewJob
    deadline_s: float
    not_before_s: float = 0.0
    worker: str | None = None
    lease_s: float = 0.0
    lost: int = 0
    reason: str = ""


class FakeStore:
    def __init__(self, *, lease_s: float = 6.0, max_waiting: int = 100_000) -> None:
        self.rows: dict[UUID, Row] = {}
        self.calls: Counter[str] = Counter()
        self.history: dict[UUID, list[Status]] = {}
        self._is_away = False
        self._returned_s = -math.inf
        self.bug: Exception | None = None
        # Methods for which the database is away; a result (None: any) that cannot be written for a job.
        self.broken: set[str] = set()
        self.unwritable: tuple[bytes | None, UUID] | None = None
        self._lease_s = lease_s
        self._max_waiting = max_waiting
        self._numbers = itertools.count(1)
        self._gates: dict[str, asyncio.Event] = {}
        self.entered: dict[str, asyncio.Event] = {}

    # What a test does

    @property
    def is_away(self) -> bool:
        """Whether nobody can reach the database."""
        return self._is_away

    @is_away.setter
    def is_away(self, is_away: bool) -> None:
        self._is_away, self._returned_s = is_away, now_s()

    def close_gate(self, method: str) -> asyncio.Event:
        """Calls of the method hang, after they have done their work, until the event is set."""
        self.entered[method] = asyncio.Event()
        return self._gates.setdefault(method, asyncio.Event())

    def add(self, status: Status = "pending", kind: Kind = "text", **changes: object) -> UUID:
        """A job that others stored."""
        new = NewJob(kind=kind, input=b'{"text":"x","timeout_s":null}', timeout_s=3600)
        job = self._insert(new, None)
        self.change(job.id, status, **changes)
        return job.id

    def change(self, job_id: UUID, status: Status, **changes: object) -> None:
        """Another process changes the job."""
        row = self.rows[job_id]
        if status == row.job.status and not changes:
            return
        finished_at = None if status in LIVE else now()
        given = {"status": status, "version": row.job.version + 1, "updated_at": now(), "finished_at": finished_at}
        row.job = replace(row.job, **(given | changes))  # type: ignore[arg-type]  # a test's own words
        self.history[job_id].append(status)

    def lose_lease(self, job_id: UUID) -> None:
        """As when its worker was frozen."""
        self.rows[job_id].lease_s = now_s()

    def status(self, job_id: UUID) -> Status:
        return self.rows[job_id].job.status

    # The protocol

    async def open(self) -> None:
        pass

    async def prepare(self) -> None:
        await self._enter("prepare")

    async def aclose(self) -> None:
        pass

    async def ping(self) -> None:
        await self._enter("ping")

    async def submit(self, job: NewJob, *, worker: str | None) -> Submitted:
        await self._enter("submit")
        for row in self.rows.values():
            if job.idempotency_key is not None and (row.new.tenant, row.new.idempotency_key) == (
                job.tenant,
                job.idempotency_key,
            ):
                if row.new.fingerprint != job.fingerprint:
                    raise KeyReused
                return Submitted(row.job, is_new=False, claimed=None)
        if worker is None and len(self._pending()) >= self._max_waiting:
            raise TooManyJobs
        row = self.rows[self._insert(job, worker).id]
        submitted = Submitted(row.job, is_new=True, claimed=_claimed(row) if worker else None)
        await self._leave("submit")
        return submitted

    async def claim(self, worker: str, limit: int) -> tuple[list[Claimed], bool]:
        await self._enter("claim")
        due = [row for row in self._pending() if row.not_before_s <= now_s() < row.deadline_s]
        for row in due[:limit]:
            row.worker, row.lease_s = worker, now_s() + self._lease_s
            self.change(row.job.id, "processing", attempt=row.job.attempt + 1, started_at=now(), not_before=None)
        answer = [_claimed(row) for row in due[:limit]], len(due) > limit
        await self._leave("claim")
        return answer

    async def renew(self, worker: str, held: Sequence[tuple[UUID, int]]) -> set[tuple[UUID, int]]:
        await self._enter("renew")
        ours = {(job_id, attempt) for job_id, attempt in held if self._is_held(job_id, attempt, worker)}
        for job_id, _ in ours:
            self.rows[job_id].lease_s = now_s() + self._lease_s
        await self._leave("renew")
        return ours

    async def finish(self, finished: Sequence[Finished]) -> set[UUID]:
        await self._enter("finish")
        if any(self.unwritable in ((end.result, end.id), (None, end.id)) for end in finished):
            raise RuntimeError("this end cannot be written")
        written = set()
        for end in finished:
            if self._is_held(end.id, end.attempt):
                self.change(end.id, end.status, result=end.result, error=end.error)
                written.add(end.id)
        await self._leave("finish")
        return written

    async def release(self, jobs: Sequence[tuple[UUID, int]], delay_s: float, reason: str) -> set[UUID]:
        await self._enter("release")
        written = set()
        for job_id, attempt in jobs:
            if self._is_held(job_id, attempt):
                row = self.rows[job_id]
                row.not_before_s, row.reason = now_s() + delay_s, reason
                not_before = now() + dt.timedelta(seconds=delay_s) if delay_s else None
                self.change(job_id, "pending", not_before=not_before, started_at=None)
                written.add(job_id)
        return written

    async def reap(self) -> Reaped:
        await self._enter("reap")
        lost, abandoned, expired = list[UUID](), list[UUID](), list[UUID]()
        may_lose = now_s() >= self._returned_s + self._lease_s / 2
        for job_id, row in self.rows.items():
            if row.job.status in LIVE and now_s() >= row.deadline_s:
                expired.append(job_id)
                error = JobError("DEADLINE_EXCEEDED", f"the job's time is over: {row.reason}")
                self.change(job_id, "failed", error=error)
            elif may_lose and row.job.status == "processing" and now_s() >= row.lease_s:
                row.lost += 1
                (abandoned if row.lost >= 5 else lost).append(job_id)
                self.change(job_id, "failed" if row.lost >= 5 else "pending", started_at=None)
        return Reaped(lost, abandoned, expired)

    async def cancel(self, job_id: UUID, tenant: str) -> Job:
        await self._enter("cancel")
        row = self._find(job_id, tenant)
        if row.job.status in ("completed", "failed"):
            raise WrongState(row.job.status)
        if row.job.status != "cancelled":
            self.change(job_id, "cancelled")
        return row.job

    async def delete(self, job_id: UUID, tenant: str) -> None:
        await self._enter("delete")
        row = self._find(job_id, tenant)
        if row.job.status in LIVE:
            raise WrongState(row.job.status)
        del self.rows[job_id]

    async def get(self, job_id: UUID, tenant: str) -> Job:
        await self._enter("get")
        return self._find(job_id, tenant).job

    async def versions(self, ids: Collection[UUID]) -> dict[UUID, int]:
        await self._enter("versions")
        return {job_id: self.rows[job_id].job.version for job_id in ids if job_id in self.rows}

    async def purge(self, retention_s: float, chunk: int) -> int:
        await self._enter("purge")
        old = now() - dt.timedelta(seconds=retention_s)
        gone = [job_id for job_id, row in self.rows.items() if row.job.finished_at and row.job.finished_at < old]
        for job_id in gone[:chunk]:
            del self.rows[job_id]
        return len(gone[:chunk])

    async def waiting(self) -> int:
        await self._enter("waiting")
        return len(self._pending())

    # Inside

    async def _enter(self, method: str) -> None:
        self.calls[method] += 1
        await asyncio.sleep(0)
        if self.bug is not None:
            raise self.bug
        if self.is_away or method in self.broken:
            raise StoreUnavailable("nobody listens")

    async def _leave(self, method: str) -> None:
        if (gate := self._gates.get(method)) is not None:
            self.entered[method].set()
            await gate.wait()

    def _insert(self, new: NewJob, worker: str | None) -> Job:
        status: Status = "processing" if worker else "pending"
        job = Job(
            id=UUID(int=next(self._numbers)),
            kind=new.kind,
            status=status,
            tenant=new.tenant,
            attempt=1 if worker else 0,
            version=1,
            created_at=now(),
            updated_at=now(),
            started_at=now() if worker else None,
            finished_at=None,
            not_before=None,
            result=None,
            error=None,
        )
        self.rows[job.id] = Row(job, new, now_s() + new.timeout_s, worker=worker, lease_s=now_s() + self._lease_s)
        self.history[job.id] = [status]
        return job

    def _pending(self) -> list[Row]:
        return [row for row in self.rows.values() if row.job.status == "pending"]

    def _is_held(self, job_id: UUID, attempt: int, worker: str | None = None) -> bool:
        row = self.rows.get(job_id)
        is_held = row is not None and (row.job.status, row.job.attempt) == ("processing", attempt)
        return is_held and row is not None and worker in (None, row.worker)

    def _find(self, job_id: UUID, tenant: str) -> Row:
        row = self.rows.get(job_id)
        if row is None or row.job.tenant != tenant:
            raise JobNotFound
        return row

    # The last one: in a class body its name hides the type.

    async def list(
        self, tenant: str, *, limit: int, cursor: Cursor | None, status: Status | None, kind: Kind | None
    ) -> Page:
        await self._enter("list")
        jobs = [
            row.job
            for row in self.rows.values()
            if row.job.tenant == tenant
            and status in (None, row.job.status)
            and kind in (None, row.job.kind)
            and (cursor is None or (row.job.created_at, row.job.id) < (cursor.created_at, cursor.id))
        ]
        jobs.sort(key=lambda job: (job.created_at, job.id), reverse=True)
        page = jobs[:limit]
        return Page(page, Cursor(page[-1].created_at, page[-1].id) if len(jobs) > limit else None)


def _claimed(row: Row) -> Claimed:
    job = row.job
    return Claimed(
        id=job.id,
        kind=job.kind,
        tenant=job.tenant,
        attempt=job.attempt,
        input=row.new.input,
        expires_in_s=row.deadline_s - now_s(),
    )


def now_s() -> float:
    return asyncio.get_running_loop().time()


def now() -> dt.datetime:
    return EPOCH + dt.timedelta(seconds=now_s())


async def until(condition: Callable[[], bool], patience_s: float = 60.0) -> None:
    """Lets virtual time pass until the condition holds."""
    async with asyncio.timeout(patience_s):
        while not condition():  # noqa: ASYNC110 -- virtual time
            await asyncio.sleep(0.01)
