"""The worker: takes jobs from the store, runs them, and brings their ends back. Lives in every gateway process.

Must not know SQL, HTTP, or what a job does. Theory of operation: three loops beside the runs.

    claim   when room appears, when a job was submitted here that had to wait, and twice a second: as many as there is
            room for. Not while no router takes calls: jobs that wait need no attempt to find that out.
    renew   every 2 s, one statement for all that is held. What is not ours any more (its lease ran out while this
            process was frozen, or somebody cancelled it elsewhere) is abandoned: its call is cancelled.
    write   the ends of runs, all that are ready in one transaction; and what goes back to wait.

A job is held from its claim until its end is written, so its lease lives on while a database that is away keeps the
end from being written.

`attempt` is the fencing token: the end of an attempt that is not the job's present one changes nothing in the store.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Literal
from uuid import UUID

from rest_gateway.jobs.loops import Loops
from rest_gateway.jobs.records import Claimed, Finished, JobError, JobStore, NewJob, StoreUnavailable, Submitted
from rest_gateway.jobs.tasks import INTERNAL_MESSAGE, End, Later, Tasks
from rest_gateway.metrics import Metrics

logger = logging.getLogger(__name__)

CLAIM_S = 0.5
RENEW_S = 2.0
UNTIL_WOKEN_S = 60.0
# Rows of one transaction: short enough not to hold the writer of SQLite for long.
WRITE_ROWS = 500
# Bytes of inputs past which there is room for no further job: in memory each is several times as large.
HELD_BYTES = 64 * 2**20
# After the n-th attempt that found no router, or a full one: 0.5, 1, 2, 4 ... 30 s.
BACKOFF_FIRST_S, BACKOFF_LONGEST_S = 0.5, 30.0
# The last try is so long before the deadline that it can be claimed and answered.
LAST_TRY_S = 1.0
# What is given back at the end of a drain has so long to be written; then its lease runs out.
GIVE_BACK_S = 2.0


def backoff_s(attempt: int) -> float:
    """The seconds after the n-th attempt: 0.5, 1, 2, 4, 8, 16, 30, 30."""
    return min(BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 10), BACKOFF_LONGEST_S)


class Run:
    """One attempt of a job, from its claim until its end is written."""

    def __init__(self, job: Claimed, expires_s: float) -> None:
        self.job = job
        self.expires_s = expires_s
        self.task: asyncio.Task[None] | None = None
        # What is to be written: an end, or the delay and the reason with which it goes back to wait.
        self.end: End | None = None
        self.back: tuple[float, str] | None = None

    @property
    def is_over(self) -> bool:
        """Only the writing is left."""
        return self.end is not None or self.back is not None

    def stop(self) -> None:
        """Cancels its call."""
        if self.task is not None:
            self.task.cancel()


class Worker:
    """Runs at most `concurrency` jobs at a time. `on_change` is told the id of every job whose status changes here."""

    def __init__(
        self,
        store: JobStore,
        tasks: Tasks,
        loops: Loops,
        metrics: Metrics,
        *,
        concurrency: int,
        on_change: Callable[[UUID], None],
    ) -> None:
        self.id = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._store = store
        self._tasks = tasks
        self._loops = loops
        self._metrics = metrics
        self._concurrency = concurrency
        self._on_change = on_change
        # What is held, and what of it waits to be written, in the order in which it ended.
        self._runs: dict[UUID, Run] = {}
        self._held_bytes = 0
        self._outbox: list[Run] = []
        # Room that is promised to submissions and to a claim under way.
        self._submitting = 0
        self._claiming = 0
        # Whether the store may have pending jobs that nobody claimed: unknown until a claim came back. Arrivals tell
        # a claim under way that its answer may be old.
        self._may_be_waiting = True
        self._arrivals = 0
        self._is_stopping = False
        self.has_tried_to_claim = False
        self._claim_now = asyncio.Event()
        self._write_now = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def __repr__(self) -> str:
        return f"<Worker {len(self._runs)} held, {len(self._outbox)} to write, room for {self._room()}>"

    def start(self) -> None:
        """Starts the loops."""
        self._loops.start("claim", self._claim, self._claim_now)
        self._loops.start("renew", self._renew)
        self._loops.start("write", self._write, self._write_now)

    def stop_claiming(self) -> None:
        """Takes no further job; goes on with those that it holds."""
        self._is_stopping = True

    async def drain(self, timeout_s: float) -> None:
        """Waits until what is held has ended, at most `timeout_s` seconds; gives the rest back. Then stops for good."""
        self.stop_claiming()
        if not await self._wait_idle(timeout_s):
            self._give_back()
            if not await self._wait_idle(GIVE_BACK_S):
                logger.warning("%d jobs could not be given back; their leases will run out", len(self._runs))
        await self.aclose()

    async def aclose(self) -> None:
        """Stops at once. What it held is claimed by others when its lease is over."""
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(self._loops.aclose(), *tasks, return_exceptions=True)

    async def submit(self, job: NewJob) -> Submitted:
        """Stores a job, and runs it at once if there is room and nobody waits longer.

        A caller that is cancelled leaves a job behind that waits to be claimed, or none.
        """
        may_run = self._may_run_at_once()
        self._submitting += may_run
        try:
            submitted = await self._loops.ask(self._store.submit(job, worker=self.id if may_run else None))
        except (StoreUnavailable, asyncio.CancelledError):
            self.note_arrival()  # perhaps
            raise
        finally:
            self._submitting -= may_run
        if submitted.is_new:
            self._accept(submitted)
        return submitted

    def forget(self, job_id: UUID) -> None:
        """The job was cancelled here: its call is, too."""
        run = self._runs.get(job_id)
        if run is not None:
            self._let_go(run)
            run.stop()

    def note_arrival(self) -> None:
        """The store may have a pending job that the last claim did not see."""
        self._arrivals += 1
        self._may_be_waiting = True
        self._claim_now.set()

    # Room

    def _room(self) -> int:
        if self._held_bytes >= HELD_BYTES:
            return 0
        return max(0, self._concurrency - len(self._runs) - self._submitting - self._claiming)

    def _may_run_at_once(self) -> bool:
        return not self._may_be_waiting and not self._is_stopping and self._tasks.is_ready and self._room() > 0

    def _accept(self, submitted: Submitted) -> None:
        job = submitted.job
        if submitted.claimed is not None:
            self._start(submitted.claimed)
        else:
            self._note(job.id, job.kind, "pending")
            self.note_arrival()

    # Runs

    def _start(self, job: Claimed) -> None:
        if (old := self._runs.get(job.id)) is not None:  # its lease was over before we knew
            self._let_go(old)
            old.stop()
        run = Run(job, _now_s() + job.expires_in_s)
        self._runs[job.id] = run
        self._held_bytes += len(job.input)
        self._is_idle.clear()
        self._metrics.jobs_running.set(len(self._runs))
        self._note(job.id, job.kind, "processing", f"attempt {job.attempt}")
        run.task = asyncio.create_task(self._run(run), name=f"job-{job.id}")

    async def _run(self, run: Run) -> None:
        try:
            answer = await self._tasks.run(run.job)
        except Exception:
            logger.exception("unexpected error job=%s", run.job.id)
            answer = End(None, JobError("INTERNAL", INTERNAL_MESSAGE))
        if self._holds(run) and not run.is_over:
            self._settle(run, answer)

    def _settle(self, run: Run, answer: End | Later) -> None:
        if isinstance(answer, Later):
            left_s = run.expires_s - _now_s()
            delay_s = max(answer.after_s, backoff_s(run.job.attempt))
            if answer.otherwise is None or left_s > BACKOFF_FIRST_S + LAST_TRY_S:
                delay_s = max(BACKOFF_FIRST_S, min(delay_s, left_s - LAST_TRY_S))
                self._send_back(run, round(delay_s, 1), answer.reason)
                return
            answer = answer.otherwise
        run.end = answer
        self._post(run)

    def _send_back(self, run: Run, delay_s: float, reason: str) -> None:
        run.back = (delay_s, reason)
        self._post(run)

    def _post(self, run: Run) -> None:
        self._outbox.append(run)
        self._write_now.set()

    def _give_back(self) -> None:
        """At the end of a drain: what still runs is for other processes, or for the next one."""
        for run in [run for run in self._runs.values() if not run.is_over]:
            run.stop()
            self._send_back(run, 0.0, "its gateway was shut down")

    def _holds(self, run: Run) -> bool:
        return self._runs.get(run.job.id) is run

    def _let_go(self, run: Run) -> None:
        del self._runs[run.job.id]
        self._held_bytes -= len(run.job.input)
        self._metrics.jobs_running.set(len(self._runs))
        if not self._runs:
            self._is_idle.set()
        if self._may_be_waiting:
            self._claim_now.set()

    async def _wait_idle(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        return not self._runs

    # Steps of the loops

    async def _claim(self) -> float:
        room = self._room()
        if self._is_stopping or not room or not self._tasks.is_ready:
            return CLAIM_S
        self._claiming = limit = room - room // 2  # the other half is for what is submitted meanwhile
        arrivals = self._arrivals
        try:
            jobs, are_left = await self._loops.ask(self._store.claim(self.id, limit))
        except StoreUnavailable:
            self._may_be_waiting = True
            raise
        finally:
            self._claiming = 0
            self.has_tried_to_claim = True
        self._may_be_waiting = are_left or arrivals != self._arrivals
        for job in jobs:
            self._start(job)
        return 0 if jobs and self._may_be_waiting and self._room() else CLAIM_S

    async def _renew(self) -> float:
        held = [(run.job.id, run.job.attempt) for run in self._runs.values()]
        if held:
            ours = await self._loops.ask(self._store.renew(self.id, held))
            self._abandon(key for key in held if key not in ours)
        return RENEW_S

    def _abandon(self, lost: Iterable[tuple[UUID, int]]) -> None:
        for job_id, attempt in lost:
            run = self._runs.get(job_id)
            # What waits to be written is left to the fence: it may have been written this moment.
            if run is not None and run.job.attempt == attempt and not run.is_over:
                logger.info("job %s is not ours any more, attempt %d is abandoned", job_id, attempt)
                self._let_go(run)
                run.stop()

    async def _write(self) -> float:
        batch = [run for run in self._outbox if self._holds(run)][:WRITE_ROWS]
        await self._write_ends([(run, run.end) for run in batch if run.end is not None])
        groups: defaultdict[tuple[float, str], list[Run]] = defaultdict(list)
        for run in batch:
            if run.back is not None:
                groups[run.back].append(run)
        for (delay_s, reason), runs in groups.items():
            await self._write_back(runs, delay_s, reason)
        self._outbox = [run for run in self._outbox if self._holds(run)]
        return 0 if self._outbox else UNTIL_WOKEN_S

    async def _write_ends(self, ends: list[tuple[Run, End]]) -> None:
        if not ends:
            return
        try:
            written = await self._loops.ask(self._store.finish([_finished(run.job, end) for run, end in ends]))
        except StoreUnavailable:
            raise
        except Exception:
            logger.exception("%d ends could not be written", len(ends))
            await self._write_one_by_one(ends)
            return
        for run, end in ends:
            self._close(run, is_written=run.job.id in written, status=_status(end), note=_describe(end.error))

    async def _write_one_by_one(self, ends: list[tuple[Run, End]]) -> None:
        """One of them cannot be written, and must not keep the others; the job whose it is gets another end."""
        if len(ends) > 1:
            for one in ends:
                await self._write_ends([one])
            return
        ((run, end),) = ends
        if end == _UNWRITABLE:
            self._let_go(run)  # its lease will run out
        run.end = _UNWRITABLE

    async def _write_back(self, runs: list[Run], delay_s: float, reason: str) -> None:
        written = await self._loops.ask(
            self._store.release([(run.job.id, run.job.attempt) for run in runs], delay_s, reason)
        )
        for run in runs:
            is_written = run.job.id in written
            self._close(run, is_written=is_written, status="pending", note=f"again in {delay_s:.1f} s: {reason}")
            if is_written:
                self._arrivals += 1

    def _close(self, run: Run, *, is_written: bool, status: str, note: str) -> None:
        if self._holds(run):
            self._let_go(run)
        if is_written:
            self._note(run.job.id, run.job.kind, status, note)
        else:
            logger.info("job %s had ended, or was not ours any more: attempt %d is void", run.job.id, run.job.attempt)
            self._metrics.jobs_fenced.inc()

    def _note(self, job_id: UUID, kind: str, status: str, note: str = "") -> None:
        """One transition."""
        fields = {"job_id": str(job_id), "status": status}
        logger.info("job %s %s: %s%s", job_id, kind, status, note and ", " + note, extra=fields)
        self._metrics.count_job(kind, status)
        self._on_change(job_id)


_UNWRITABLE = End(None, JobError("INTERNAL", INTERNAL_MESSAGE))


def _finished(job: Claimed, end: End) -> Finished:
    return Finished(id=job.id, attempt=job.attempt, status=_status(end), result=end.result, error=end.error)


def _status(end: End) -> Literal["completed", "failed"]:
    return "failed" if end.error else "completed"


def _describe(error: JobError | None) -> str:
    return "" if error is None else f"{error.code}: {error.message}"


def _now_s() -> float:
    return asyncio.get_running_loop().time()
