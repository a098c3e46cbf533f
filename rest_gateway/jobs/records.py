"""What the job store takes and gives: frozen records, its errors, and the store itself as a protocol.

Knows no SQL, no web framework, no router and nothing of what a job does. Datetimes are aware UTC from the database's
clock; spans are seconds.
"""

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias
from uuid import UUID

Kind: TypeAlias = Literal["text", "agents"]
Status: TypeAlias = Literal["pending", "processing", "completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How to reach the database and how to treat jobs there.

    `url`: `sqlite:///FILE` (four slashes for an absolute path), `postgres://`, `postgresql://`, either with a
    `+driver`, which is ignored. `should_migrate`: bring the tables up to date at the first contact with the database.
    """

    url: str = "sqlite:///./var/jobs.sqlite3"
    should_migrate: bool = True
    lease_s: float = 6.0
    # A job whose worker was lost this often probably ends the processes that run it.
    max_lost_leases: int = 5
    max_waiting: int = 100_000
    # How long a method may take in all before it raises StoreUnavailable.
    timeout_s: float = 5.0
    connect_timeout_s: float = 2.0
    pool_size: int = 5


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: a canonical code such as DEADLINE_EXCEEDED, and a text for its owner."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to store. `tenant` and `idempotency_key` hold no U+0000 and no lone surrogate (ValueError)."""

    kind: Kind
    input: bytes  # canonical JSON
    timeout_s: float  # from its creation; past it the job fails
    tenant: str = "default"
    idempotency_key: str | None = None  # unique per tenant while the job is kept
    fingerprint: bytes = b""  # of kind and input; tells a repetition from another job with the same key


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as its owner sees it. `version` rises with each change of status."""

    id: UUID  # time-ordered
    kind: Kind
    status: Status
    tenant: str
    attempt: int  # how often it was claimed
    version: int
    created_at: dt.datetime
    updated_at: dt.datetime
    started_at: dt.datetime | None  # its present attempt's begin, or its last one's; None while pending
    finished_at: dt.datetime | None  # set in a terminal state only
    not_before: dt.datetime | None  # pending, and waits until then
    result: bytes | None  # JSON
    error: JobError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A job that this process has to do now. `attempt` is its fencing token."""

    id: UUID
    kind: Kind
    tenant: str
    attempt: int
    input: bytes
    expires_in_s: float  # until its own deadline


@dataclass(frozen=True, slots=True)
class Submitted:
    """A stored job."""

    job: Job
    is_new: bool  # False: found by its idempotency key
    claimed: Claimed | None  # set when it was stored as processing for the worker that was named


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of one attempt: `result` of a completed job (a failed one may have one, too), `error` of a failed one."""

    id: UUID
    attempt: int
    status: Literal["completed", "failed"]
    result: bytes | None = None
    error: JobError | None = None


@dataclass(frozen=True, slots=True)
class Reaped:
    """What a round of reaping found."""

    lost: Sequence[UUID] = ()  # lease over: pending again
    abandoned: Sequence[UUID] = ()  # lease over once too often: failed
    expired: Sequence[UUID] = ()  # deadline over: failed


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last job of a page; the next page begins after it."""

    created_at: dt.datetime
    id: UUID


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs, newest first."""

    jobs: Sequence[Job]
    next_cursor: Cursor | None  # None: there are no more


class StoreError(Exception):
    """The store did not do what it was asked for."""


class StoreUnavailable(StoreError):
    """The database is away, too slow or not in order. Nothing is known about the write; it may be tried again."""


class SchemaError(StoreUnavailable):
    """The tables are not those of this program: too old and not to be migrated, or newer than the program."""


class StoreInUse(StoreError):
    """Another process uses the SQLite file; raised by `open`. The text says what to do."""


class TooManyJobs(StoreError):
    """As many jobs wait as may."""


class KeyReused(StoreError):
    """The idempotency key belongs to a job with another fingerprint."""


class JobNotFound(StoreError):
    """The tenant has no such job."""


class WrongState(StoreError):
    """The job's status does not allow it: cancel of a completed or failed one, delete of a live one."""

    def __init__(self, status: Status) -> None:
        super().__init__(f"the job is {status}")
        self.status: Status = status


class JobStore(Protocol):
    """The jobs in a database. Every method but `open` and `aclose` raises StoreUnavailable when the database is away.

    A caller that is cancelled leaves what it began to run to its end; jobs that a cancelled `claim` or `submit` took
    for a worker are given back.
    """

    async def open(self) -> None:
        """Makes ready; does not need the database to be there. Raises StoreInUse, or ValueError for a bad URL."""

    async def prepare(self) -> None:
        """Migrates the tables, or checks them. Every other method does so at its first contact with the database.

        Raises SchemaError, and ValueError for a URL that the driver refuses, which a gateway should end with at its
        start, and StoreUnavailable, which it should not.
        """

    async def aclose(self) -> None:
        """Waits for what is under way, closes the connections and lets go of the file."""

    async def ping(self) -> None:
        """Asks the database for an answer."""

    async def submit(self, job: NewJob, *, worker: str | None) -> Submitted:
        """Stores a job; durable when it returns. Concurrent calls share a transaction.

        `worker`: the worker that has room for it and whose last claim left nothing: the job is stored as processing
        with its lease, attempt 1. Raises TooManyJobs and KeyReused.
        """

    async def claim(self, worker: str, limit: int) -> tuple[list[Claimed], bool]:
        """At most `limit` jobs, oldest first, now leased to the worker; and whether there are probably more.

        Fewer where their inputs are large: one at least.
        """

    async def renew(self, worker: str, held: Sequence[tuple[UUID, int]]) -> set[tuple[UUID, int]]:
        """Extends the leases of (id, attempt) from now on; returns those that are still the worker's."""

    async def finish(self, finished: Sequence[Finished]) -> set[UUID]:
        """Ends attempts; returns the ids that ended so. The others were fenced: cancelled, expired, lost, claimed anew.

        Safe to repeat after StoreUnavailable: what was written the first time counts as written.
        """

    async def release(self, jobs: Sequence[tuple[UUID, int]], delay_s: float, reason: str) -> set[UUID]:
        """Puts attempts back to pending, not before `delay_s` have passed; no lost lease. Returns the ids put back.

        Without a delay a job gets its old place back; `reason` stands in the error of a job that expires waiting.
        """

    async def reap(self) -> Reaped:
        """Takes jobs from workers that let their lease run out, and fails those past their deadline."""

    async def cancel(self, job_id: UUID, tenant: str) -> Job:
        """Cancels, or finds it cancelled. Raises JobNotFound and WrongState."""

    async def delete(self, job_id: UUID, tenant: str) -> None:
        """Deletes a job in a terminal state. Raises JobNotFound and WrongState."""

    async def get(self, job_id: UUID, tenant: str) -> Job:
        """The job. Raises JobNotFound."""

    async def versions(self, ids: Collection[UUID]) -> dict[UUID, int]:
        """The version of each job that exists, of whatever tenant."""

    async def list(
        self, tenant: str, *, limit: int, cursor: Cursor | None, status: Status | None, kind: Kind | None
    ) -> Page:
        """The tenant's jobs, newest first."""

    async def purge(self, retention_s: float, chunk: int) -> int:
        """Deletes up to `chunk` jobs that ended longer ago than that, with their keys; returns how many."""

    async def waiting(self) -> int:
        """How many jobs are pending, counted no further than just past the bound, and at most a second ago."""
