"""The store of jobs: what the gateway asks for, as transactions on SQLite or PostgreSQL.

Knows no web framework, no router, and not what a job does. `records` holds what comes in and goes out, and each
method's promise; `statements` the SQL; `database` connections, bounds and errors; `commits` why submits are fast.
"""

import asyncio
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast
from uuid import UUID

import sqlalchemy as sa

from rest_gateway.jobs import statements
from rest_gateway.jobs.commits import GroupCommit
from rest_gateway.jobs.database import Database
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
    StoreSettings,
    StoreUnavailable,
    Submitted,
    TooManyJobs,
    WrongState,
)
from rest_gateway.jobs.states import TARGET, Event
from rest_gateway.jobs.tables import json_records

logger = logging.getLogger(__name__)

# A backlog that lost its workers is taken back in pieces of this many, each reaping one.
REAP_CHUNK: Final = 1000
# A claim that brought inputs of 8 MiB by the hundred would take longer than it may, each time anew, and then hold the
# loop for seconds to read them. It ends with the job that brings it to this; 100 texts of the longest are less.
CLAIM_BYTES: Final = 4 * 2**20
# How old a count of the waiting jobs may be: when there is room, and when there seems to be none.
COUNT_AGE_S: Final = 1.0
FULL_COUNT_AGE_S: Final = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A job on its way in. Its id is made once, so that a repeated transaction finds what the first one wrote."""

    id: UUID
    job: NewJob
    worker: str | None

    @property
    def key(self) -> tuple[str, str] | None:
        key = self.job.idempotency_key
        return None if key is None else (self.job.tenant, key)


class SqlJobStore:
    """A `records.JobStore` on SQLAlchemy Core."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises ValueError for a URL of neither engine."""
        self._settings = settings
        self._database = Database(settings)
        self._submits = GroupCommit[_Entry, Submitted](
            self._write_submits, self._database.spawn, lambda entry: len(entry.job.input), self._give_back_submitted
        )
        self._finishes = GroupCommit[Finished, bool](
            self._write_finishes, self._database.spawn, lambda finished: len(finished.result or b"")
        )
        # Whether the tables are known to be this program's, and the task that finds out.
        self._is_prepared = False
        self._preparing: asyncio.Task[None] | None = None
        # The waiting jobs when they were last counted (monotonic), and what this process has changed since.
        self._waiting = 0
        self._counted_at_s = float("-inf")

    async def open(self) -> None:
        """See JobStore."""
        await self._database.open()

    async def aclose(self) -> None:
        """See JobStore."""
        await self._database.aclose()

    # --- the tables

    async def prepare(self) -> None:
        """See JobStore."""
        if self._is_prepared:
            return
        if self._preparing is None or self._preparing.done():
            self._preparing = self._database.spawn(self._prepare(), "job store tables")
            self._preparing.add_done_callback(_retrieve)
        task = self._preparing
        await asyncio.wait({task}, timeout=self._settings.timeout_s)
        if not task.done():
            raise StoreUnavailable("the database's tables are being prepared")
        task.result()

    async def _prepare(self) -> None:
        before, after = await self._database.prepare(should_migrate=self._settings.should_migrate)
        if before != after:
            logger.info("migrated the database's tables from version %s to %s", before or "none", after)
        self._is_prepared = True

    async def ping(self) -> None:
        """See JobStore."""
        await self.prepare()
        await self._database.read(lambda connection: connection.execute(statements.PING))

    # --- submit

    async def submit(self, job: NewJob, *, worker: str | None) -> Submitted:
        """See JobStore."""
        _check_text(job.tenant, job.idempotency_key or "")
        await self.prepare()
        return await self._submits(_Entry(new_job_id(), job, worker))

    async def _write_submits(self, entries: Sequence[_Entry]) -> list[Submitted | Exception]:
        async def give_back(answers: list[Submitted | Exception]) -> None:
            await self._give_back([a.claimed for a in answers if isinstance(a, Submitted) and a.claimed])

        answers = await self._database.transaction(lambda connection: self._insert(connection, entries), give_back)
        self._waiting += sum(isinstance(a, Submitted) and a.is_new and a.claimed is None for a in answers)
        return answers

    def _insert(self, connection: sa.Connection, entries: Sequence[_Entry]) -> list[Submitted | Exception]:
        refused: set[_Entry] = set()
        known: dict[tuple[str, str], sa.Row[Any]] = {}
        waiting = [entry for entry in entries if entry.worker is None]
        if len(waiting) > self._room(connection, len(waiting)):
            known = _find_keys(connection, waiting)
            new = [entry for entry in waiting if entry.key not in known]
            refused = set(new[max(0, self._room(connection, len(new))) :])
        # In one order everywhere: two transactions that insert the same keys must not wait for each other.
        chosen = [entry for entry in entries if entry.key not in known and entry not in refused]
        chosen.sort(key=lambda entry: entry.key or ("", ""))
        if chosen:
            parameters = [_parameters(entry, self._settings.lease_s) for entry in chosen]
            connection.execute(statements.INSERT[connection.dialect.name], parameters)
        stored = _find_ids(connection, [entry.id for entry in chosen])
        known |= _find_keys(connection, [entry for entry in chosen if entry.id not in stored])
        return [_answer(entry, stored.get(entry.id), known, is_refused=entry in refused) for entry in entries]

    def _room(self, connection: sa.Connection, wanted: int) -> int:
        """How many more may wait; counted anew when the last count is old, sooner when it would not do."""
        age_s = time.monotonic() - self._counted_at_s
        is_full = self._waiting + wanted > self._settings.max_waiting
        if age_s > (FULL_COUNT_AGE_S if is_full else COUNT_AGE_S):
            self._count(connection)
        return self._settings.max_waiting - self._waiting

    def _count(self, connection: sa.Connection) -> int:
        result = connection.execute(statements.COUNT_WAITING, {"limit": self._settings.max_waiting + 1})
        self._waiting = result.scalar_one()
        self._counted_at_s = time.monotonic()
        return self._waiting

    async def waiting(self) -> int:
        """See JobStore."""
        await self.prepare()
        if time.monotonic() - self._counted_at_s < COUNT_AGE_S:
            return self._waiting
        return await self._database.read(self._count)

    async def _give_back_submitted(self, submitted: Submitted) -> None:
        await self._give_back([submitted.claimed] if submitted.claimed else [])

    # --- workers

    async def claim(self, worker: str, limit: int) -> tuple[list[Claimed], bool]:
        """See JobStore."""
        await self.prepare()
        limits = {"limit": limit, "max_bytes": CLAIM_BYTES}
        parameters = {"of_worker": worker, "lease_s": self._settings.lease_s} | limits
        rows = await self._database.statement(lambda c: _rows(c, statements.CLAIM, parameters), self._give_back)
        self._waiting = max(0, self._waiting - len(rows))
        claimed = [
            Claimed(
                id=row.id,
                kind=row.kind,
                tenant=row.tenant,
                attempt=row.attempt,
                input=row.input,
                expires_in_s=row.expires_in_s,
            )
            for row in sorted(rows, key=lambda row: (row.not_before, row.id))
        ]
        is_full = len(claimed) >= limit or sum(len(job.input) for job in claimed) >= CLAIM_BYTES
        return claimed, is_full

    async def _give_back(self, claimed: Sequence[Claimed | sa.Row[Any]]) -> None:
        """Nobody knows of these any more: without this they would wait for their lease to run out."""
        held = [(job.id, job.attempt) for job in claimed]
        if held:
            released = await self.release(held, 0, "its worker had given up waiting for it")
            logger.info("gave back %d jobs that were claimed in vain", len(released))

    async def renew(self, worker: str, held: Sequence[tuple[UUID, int]]) -> set[tuple[UUID, int]]:
        """See JobStore."""
        if not held:
            return set()
        await self.prepare()
        parameters = {"of_worker": worker, "held": _held(held), "lease_s": self._settings.lease_s}
        rows = await self._database.statement(lambda c: _rows(c, statements.RENEW, parameters))
        return {(row.id, row.attempt) for row in rows}

    async def finish(self, finished: Sequence[Finished]) -> set[UUID]:
        """See JobStore."""
        await self.prepare()
        # Lands also when its caller is cancelled: it is the work of seconds.
        task = self._database.spawn(self._finish(finished), "job store finish")
        task.add_done_callback(_retrieve)
        return await asyncio.shield(task)

    async def _finish(self, finished: Sequence[Finished]) -> set[UUID]:
        written = await asyncio.gather(*map(self._finishes, finished))
        return {end.id for end, is_written in zip(finished, written, strict=True) if is_written}

    async def _write_finishes(self, finished: Sequence[Finished]) -> list[bool | Exception]:
        return await self._database.transaction(lambda connection: _end(connection, finished))

    async def release(self, jobs: Sequence[tuple[UUID, int]], delay_s: float, reason: str) -> set[UUID]:
        """See JobStore."""
        if not jobs:
            return set()
        await self.prepare()
        parameters = {"held": _held(jobs), "delay_s": float(delay_s), "reason": _storable(reason)}
        rows = await self._database.statement(lambda c: _rows(c, statements.RELEASE, parameters))
        self._waiting += len(rows)
        return {row.id for row in rows}

    async def reap(self) -> Reaped:
        """See JobStore. After an outage the workers get a heartbeat's time first: their leases ran out, not they."""
        await self.prepare()
        may_lose = not self._database.was_away_within(self._settings.lease_s / 2)
        reaped = await self._database.transaction(lambda connection: self._reap(connection, may_lose=may_lose))
        self._waiting += len(reaped.lost)
        return reaped

    def _reap(self, connection: sa.Connection, *, may_lose: bool) -> Reaped:
        chunk = {"limit": REAP_CHUNK}
        leases = chunk | {"max_lost_leases": self._settings.max_lost_leases}
        expired = _rows(connection, statements.EXPIRE, chunk)
        abandoned = _rows(connection, statements.ABANDON, leases) if may_lose else []
        lost = _rows(connection, statements.LOSE, leases) if may_lose else []
        return Reaped(*([row.id for row in rows] for rows in (lost, abandoned, expired)))

    async def purge(self, retention_s: float, chunk: int) -> int:
        """See JobStore."""
        await self.prepare()
        parameters = {"retention_s": float(retention_s), "limit": chunk}
        return len(await self._database.statement(lambda c: _rows(c, statements.PURGE, parameters)))

    # --- owners

    async def cancel(self, job_id: UUID, tenant: str) -> Job:
        """See JobStore."""
        _check_text(tenant)
        await self.prepare()
        mine = {"of_id": job_id, "of_tenant": tenant}
        rows = await self._database.statement(lambda c: _rows(c, statements.CANCEL, mine))
        job = _job(rows[0]) if rows else await self.get(job_id, tenant)
        if job.status != TARGET[Event.CANCEL]:
            raise WrongState(job.status)
        return job

    async def delete(self, job_id: UUID, tenant: str) -> None:
        """See JobStore."""
        _check_text(tenant)
        await self.prepare()
        mine = {"of_id": job_id, "of_tenant": tenant}
        if not await self._database.statement(lambda c: _rows(c, statements.DELETE, mine)):
            raise WrongState((await self.get(job_id, tenant)).status)

    async def get(self, job_id: UUID, tenant: str) -> Job:
        """See JobStore."""
        _check_text(tenant)
        await self.prepare()
        rows = await self._database.read(
            lambda c: _rows(c, statements.GET, {"of_id": job_id, "of_tenant": tenant}),
        )
        if not rows:
            raise JobNotFound(f"there is no job {job_id}")
        return _job(rows[0])

    async def versions(self, ids: Collection[UUID]) -> dict[UUID, int]:
        """See JobStore."""
        if not ids:
            return {}
        await self.prepare()
        parameters = {"ids": json_records({"id": job_id} for job_id in ids)}
        rows = await self._database.read(lambda c: _rows(c, statements.VERSIONS, parameters))
        return {row.id: row.version for row in rows}

    async def list(
        self, tenant: str, *, limit: int, cursor: Cursor | None, status: Status | None, kind: Kind | None
    ) -> Page:
        """See JobStore."""
        _check_text(tenant)
        await self.prepare()
        parameters: dict[str, Any] = {"of_tenant": tenant, "limit": limit + 1}
        if cursor is not None:
            parameters |= {"after_created_at": cursor.created_at, "after_id": cursor.id}
        page = statements.PAGES[status, kind, cursor is None]
        rows = await self._database.read(lambda c: _rows(c, page, parameters))
        jobs = [_job(row) for row in rows[:limit]]
        has_more = len(rows) > limit and bool(jobs)
        return Page(jobs, Cursor(jobs[-1].created_at, jobs[-1].id) if has_more else None)


def _rows(connection: sa.Connection, statement: sa.Executable, parameters: Mapping[str, Any]) -> Sequence[sa.Row[Any]]:
    return connection.execute(statement, parameters).all()


def _find_ids(connection: sa.Connection, ids: Iterable[UUID]) -> dict[UUID, sa.Row[Any]]:
    parameters = {"ids": json_records({"id": job_id} for job_id in ids)}
    return {row.id: row for row in _rows(connection, statements.BY_ID, parameters)}


def _find_keys(connection: sa.Connection, entries: Iterable[_Entry]) -> dict[tuple[str, str], sa.Row[Any]]:
    keys = {entry.key for entry in entries if entry.key is not None}
    if not keys:
        return {}
    parameters = {"keys": json_records({"tenant": tenant, "idempotency_key": key} for tenant, key in keys)}
    return {(row.tenant, row.idempotency_key): row for row in _rows(connection, statements.BY_KEY, parameters)}


def _parameters(entry: _Entry, lease_s: float) -> dict[str, Any]:
    is_claimed = entry.worker is not None
    return {
        "id": entry.id,
        "tenant": entry.job.tenant,
        "kind": entry.job.kind,
        "status": "processing" if is_claimed else "pending",
        "attempt": int(is_claimed),
        "worker": entry.worker,
        "idempotency_key": entry.job.idempotency_key,
        "fingerprint": entry.job.fingerprint,
        "input": entry.job.input,
        "is_claimed": is_claimed,
        "lease_s": lease_s,
        "timeout_s": float(entry.job.timeout_s),
    }


def _answer(
    entry: _Entry, stored: sa.Row[Any] | None, known: Mapping[tuple[str, str], sa.Row[Any]], *, is_refused: bool
) -> Submitted | Exception:
    if is_refused:
        return TooManyJobs("as many jobs wait as may")
    if stored is not None:
        return Submitted(_job(stored), is_new=True, claimed=_claimed(entry, stored))
    row = known.get(entry.key) if entry.key is not None else None
    if row is None:
        # Another was there with its key, and was deleted before this transaction could read it.
        return StoreUnavailable("the job with this idempotency key was deleted just now")
    if row.fingerprint != entry.job.fingerprint:
        return KeyReused("the idempotency key belongs to a job with another body")
    return Submitted(_job(row), is_new=False, claimed=None)


def _claimed(entry: _Entry, stored: sa.Row[Any]) -> Claimed | None:
    """The job as its worker gets it, unless this is a repetition and the job has moved on since the first time."""
    if entry.worker is None or (stored.status, stored.attempt) != ("processing", 1):
        return None
    job = entry.job
    return Claimed(
        id=entry.id, kind=job.kind, tenant=job.tenant, attempt=1, input=job.input, expires_in_s=job.timeout_s
    )


def _end(connection: sa.Connection, finished: Sequence[Finished]) -> list[bool | Exception]:
    """Locks the rows, sees which attempts may end, ends them."""
    held = _held([(end.id, end.attempt) for end in finished])
    rows = _rows(connection, statements.FINISHING, {"held": held})
    status = {(row.id, row.attempt): row.status for row in rows}
    live = [end for end in finished if status.get((end.id, end.attempt)) == "processing"]
    for statement, parameters in (
        (statements.COMPLETE, [_ended(end) for end in live if end.status == "completed"]),
        (statements.FAIL, [_ended(end) | _error(end.error) for end in live if end.status == "failed"]),
    ):
        if parameters:
            connection.execute(statement, parameters)
    # One that has this end already was written by a transaction whose acknowledgement was lost.
    return [status.get((end.id, end.attempt)) in ("processing", end.status) for end in finished]


def _ended(end: Finished) -> dict[str, Any]:
    return {"of_id": end.id, "of_attempt": end.attempt, "its_result": end.result}


def _error(error: JobError | None) -> dict[str, str]:
    error = error or JobError("UNKNOWN", "it failed without a reason")
    return {"its_code": _storable(error.code), "its_message": _storable(error.message)}


def _held(held: Iterable[tuple[UUID, int]]) -> str:
    return json_records({"id": job_id, "attempt": attempt} for job_id, attempt in held)


def _job(row: sa.Row[Any]) -> Job:
    is_failed = row.status == "failed"
    is_delayed = row.status == "pending" and row.not_before > row.created_at
    return Job(
        id=row.id,
        kind=cast("Kind", row.kind),
        status=cast("Status", row.status),
        tenant=row.tenant,
        attempt=row.attempt,
        version=row.version,
        created_at=row.created_at,
        updated_at=row.updated_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        not_before=row.not_before if is_delayed else None,
        result=row.result,
        error=JobError(row.error_code, row.error_message) if is_failed else None,
    )


def new_job_id() -> UUID:
    """A version 7 UUID (RFC 9562, 5.7): 48 bits of Unix milliseconds, the rest chance.

    By this process's clock: it only keeps new rows together in the index, and decides between two of one microsecond.
    """
    milliseconds = time.time_ns() // 1_000_000 & (1 << 48) - 1
    chance = int.from_bytes(os.urandom(10), "big")
    return UUID(int=milliseconds << 80 | 0x7 << 76 | (chance >> 62 & 0xFFF) << 64 | 0x2 << 62 | chance & (1 << 62) - 1)


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Its callers may all have gone: then its failure is nobody's business, and not worth asyncio's complaint."""
    if not task.cancelled():
        task.exception()


def _check_text(*texts: str) -> None:
    """PostgreSQL cannot store these, and SQLite would: an owner must not depend on which it is."""
    for text in texts:
        if _storable(text) != text:
            raise ValueError("a tenant or key holds U+0000 or a lone surrogate")


def _storable(text: str) -> str:
    """The text as every engine can store it."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\N{REPLACEMENT CHARACTER}")
