"""The jobs of a gateway: submit, look at, wait for, cancel, delete. Must not know how a request is carried.

Waiting is a chain of long polls (`Prefer: wait=N`), so a gateway may restart, or another one take over, in between: the
next poll finds the job where it is.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from math import ceil, inf
from typing import Any, Protocol
from uuid import uuid4

from router_client.blocks import Agent
from router_client.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    RouterError,
    Unavailable,
)
from router_client.gateway import Closed, Request
from router_client.jobs import Job, JobKind, JobStatus, Priority, agents_body, read_job, text_body
from router_client.retry import MAX_PUSHBACK_S, RetryPolicy, backoff_s, left_s

HOLD_S = 30
"""Of one poll when only the end matters; the gateway holds one for 60 s, a proxy often not."""

LOOK_S = 2
"""Of one poll when every change matters: they are told no later."""

ANSWER_S = 10.0
"""So much longer than its hold a poll may take."""

MIN_GAP_S = 0.25
"""Between two polls: something on the way may strip the wish to wait."""

AWAY_S = 60.0
"""A gateway that has not answered for so long does not come back."""

LONGEST_PAGE = 200
# Of a gateway that leaves or is away, of a proxy that does not find it, of one that ends what it has open.
_PASSING = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "UNKNOWN", "INTERNAL"})
_ONCE = RetryPolicy(retries=0)


class Asker(Protocol):
    """What is used of Gateway."""

    async def ask(self, request: Request, *, timeout_s: float, policy: RetryPolicy | None = None) -> Any:  # noqa: ANN401
        """Return the JSON of the answer; see Gateway."""


class JobApi:
    """The job API of one gateway. ``timeout_s``: seconds of one request with its repetitions."""

    def __init__(self, gateway: Asker, *, timeout_s: float) -> None:
        self._gateway = gateway
        self._timeout_s = timeout_s

    async def submit(
        self,
        work: str | Mapping[str, Agent],
        *,
        job_timeout_s: float | None,
        priority: Priority,
        explain: bool,
        idempotency_key: str | None,
    ) -> Job:
        """Make a job; arguments and errors as in `AsyncClient.submit`."""
        kind: JobKind = "text" if isinstance(work, str) else "agents"
        headers = {"Idempotency-Key": _quoted(uuid4().hex if idempotency_key is None else idempotency_key)}
        if kind == "agents":
            headers["Prefer"] = "respond-async"
        if isinstance(work, str):
            body = text_body(work, job_timeout_s)
        else:
            body = agents_body(work, job_timeout_s, priority, explain=explain)
        return read_job(await self._ask(Request(method="POST", path="/predict", body=body, headers=headers)), kind)

    async def get(self, job_id: str) -> Job:
        """Return a job as it is."""
        return read_job(await self._ask(Request(method="GET", path=_path(job_id))))

    async def cancel(self, job_id: str) -> Job:
        """End a job that has not ended. Twice is the same as once."""
        return read_job(await self._ask(Request(method="POST", path=f"{_path(job_id)}/cancel")))

    async def delete(self, job_id: str) -> None:
        """Delete a job that has ended. After a lost answer the job may be gone: it is not asked again."""
        await self._ask(Request(method="DELETE", path=_path(job_id), may_repeat=False))

    async def pages(
        self, status: JobStatus | None, kind: JobKind | None, limit: int | None
    ) -> AsyncGenerator[Job, None]:
        """Yield jobs, newest first, at most ``limit``; a page is asked for when it is needed."""
        wanted: float = inf if limit is None else limit
        query: dict[str, str] = {}
        if status is not None:
            query["status"] = status
        if kind is not None:
            query["kind"] = kind
        cursors: set[str] = set()
        while wanted > 0:
            query["limit"] = str(int(min(wanted, LONGEST_PAGE)))
            page = await self._ask(Request(method="GET", path="/jobs", query=query))
            jobs, cursor = _read_page(page)
            for job in jobs:
                yield job
            wanted -= len(jobs)
            if cursor is None:
                return
            if cursor in cursors:
                raise Internal(f"the gateway's pages of jobs lead in a circle, back to {cursor!r}")
            cursors.add(cursor)
            query["cursor"] = cursor

    async def changes(self, job_id: str, *, timeout_s: float | None, hold_s: int) -> AsyncGenerator[Job, None]:
        """Yield the job as it is, and again whenever its state has changed, until it has ended."""
        poll = _Poll(self._gateway, job_id, hold_s, timeout_s)
        version = -1
        while True:
            job = await poll.next()
            if job.version != version:
                version = job.version
                yield job
            if job.is_over:
                return

    async def wait(self, job_id: str, *, timeout_s: float | None) -> Job:
        """Return the job once it has ended."""
        poll = _Poll(self._gateway, job_id, HOLD_S, timeout_s)
        while not (job := await poll.next()).is_over:
            pass
        return job

    async def _ask(self, request: Request) -> Any:  # noqa: ANN401 -- JSON
        return await self._gateway.ask(request, timeout_s=self._timeout_s)


class _Poll:
    """A chain of long polls for one job, until its deadline."""

    def __init__(self, gateway: Asker, job_id: str, hold_s: int, timeout_s: float | None) -> None:
        self._gateway = gateway
        self._job_id = job_id
        self._hold_s = hold_s
        self._deadline = None if timeout_s is None else _now() + timeout_s
        self._next_at = 0.0  # loop time of the next poll, at the earliest
        self._answered_at = _now()
        self._failures = 0

    async def next(self) -> Job:
        """Return the job at the end of a poll, through restarts of the gateway.

        Raises:
            DeadlineExceeded: the time is over; the job goes on.
            RouterError: the gateway refuses, or has been away for AWAY_S.
        """
        while True:
            await self._sleep_until(self._next_at)
            try:
                document = await self._look()
            except RouterError as exc:
                self._note_failure(exc)
            else:
                self._answered_at, self._failures = _now(), 0
                return read_job(document)

    async def _look(self) -> Any:  # noqa: ANN401 -- JSON
        left = left_s(self._deadline, _now())
        hold_s = ceil(max(min(self._hold_s, left), 0))
        self._next_at = _now() + MIN_GAP_S
        request = Request(method="GET", path=_path(self._job_id), headers={"Prefer": f"wait={hold_s}"})
        try:
            return await self._gateway.ask(request, timeout_s=min(hold_s + ANSWER_S, max(left, 0.0)), policy=_ONCE)
        except DeadlineExceeded as exc:
            raise self._out_of_time(exc) from exc

    def _out_of_time(self, exc: DeadlineExceeded) -> RouterError:
        """Whose time was it: the caller's, or that of this poll, which the gateway should have answered?"""
        if left_s(self._deadline, _now()) <= 0:
            return DeadlineExceeded(f"job {self._job_id} has not ended in time; it goes on")
        return Unavailable(exc.message)

    def _note_failure(self, error: RouterError) -> None:
        self._failures += 1
        if isinstance(error, Closed) or error.code not in _PASSING or _now() - self._answered_at >= AWAY_S:
            raise error
        pause_s = backoff_s(self._failures) if error.retry_after_s is None else error.retry_after_s
        self._next_at = _now() + min(pause_s, MAX_PUSHBACK_S)

    async def _sleep_until(self, when: float) -> None:
        end = when if self._deadline is None else min(when, self._deadline)
        await asyncio.sleep(max(end - _now(), 0.0))


def _read_page(page: Any) -> tuple[list[Job], str | None]:  # noqa: ANN401 -- JSON
    try:
        return [read_job(document) for document in page["jobs"]], page["next_cursor"]
    except (KeyError, TypeError) as exc:
        raise Internal(f"the gateway's answer is no page of jobs: {exc!r}") from exc


def _path(job_id: str) -> str:
    """The job's path; what is no id at all must not lead to another route."""
    if not job_id.replace("-", "").isalnum() or not job_id.isascii():
        raise InvalidArgument(f"{job_id!r} is no job's id")
    return f"/jobs/{job_id}"


def _quoted(key: str) -> str:
    """A string as HTTP's structured fields write it."""
    if not (key.isascii() and key.isprintable() and key):
        raise InvalidArgument("the idempotency key must be printable ASCII")
    return '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _now() -> float:
    return asyncio.get_running_loop().time()
