"""The SQLite file: what was acknowledged is in it, however the process ended and whatever the disk does."""

import asyncio
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest

from rest_gateway.jobs.records import StoreUnavailable
from tests.integration.jobs.builders import submit
from tests.integration.jobs.conftest import opened

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[3]
# Submits from eight callers for ever; prints each id when its submit has returned.
SUBMITTER = """
import asyncio, sys
from rest_gateway.jobs.records import NewJob, StoreSettings
from rest_gateway.jobs.store import SqlJobStore

async def main():
    store = SqlJobStore(StoreSettings(url=sys.argv[1], timeout_s=60))
    await store.open()

    async def caller():
        while True:
            submitted = await store.submit(NewJob(kind="text", input=b"x" * 2000, timeout_s=60), worker=None)
            print(submitted.job.id.hex, flush=True)

    await asyncio.gather(*(caller() for _ in range(8)))

asyncio.run(main())
"""


def file_of(url: str) -> Path:
    """The database's file."""
    return Path(url.removeprefix("sqlite:///"))


def ids_in(database: Path) -> set[UUID]:
    """The jobs in a file that is sound."""
    connection = sqlite3.connect(database)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {UUID(hex=job_id) for (job_id,) in connection.execute("SELECT id FROM jobs")}
    finally:
        connection.close()


def test_every_acknowledged_submit_survives_a_kill(sqlite_url: str) -> None:
    acknowledged: set[UUID] = set()
    for wanted in (400, 90):
        command = [sys.executable, "-c", SUBMITTER, sqlite_url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(wanted)]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        acknowledged |= {UUID(hex=line.strip()) for line in lines if line.endswith("\n")}
        # A new process gets the lock: the killed one's went with it.
        assert acknowledged <= ids_in(file_of(sqlite_url))
    assert len(acknowledged) >= 490


async def test_what_was_acknowledged_survives_a_write_ahead_log_that_was_cut_anywhere_behind_it(
    sqlite_url: str, tmp_path: Path
) -> None:
    """A power cut leaves the log at any length from what was flushed on, and rubbish after it."""
    database = file_of(sqlite_url)
    log = database.with_name(database.name + "-wal")
    ends: list[tuple[int, UUID]] = []
    async with opened(sqlite_url) as store:
        for number in range(12):
            job = await submit(store, str(number))
            ends.append((log.stat().st_size, job.id))
        main, written = database.read_bytes(), log.read_bytes()
    for flushed, _ in ends:
        for torn in (0, 1, 37, 2000):
            copy = tmp_path / f"{flushed}-{torn}"
            copy.write_bytes(main)
            tail = written[flushed : flushed + torn][::-1]
            copy.with_name(copy.name + "-wal").write_bytes(written[:flushed] + tail)
            assert {job_id for end, job_id in ends if end <= flushed} <= ids_in(copy)


async def test_a_full_disk_refuses_submits_and_keeps_what_it_has(sqlite_url: str) -> None:
    async with opened(sqlite_url) as store:
        jobs = {(await submit(store)).id}
        log = file_of(sqlite_url + "-wal")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, limits[1]))
        try:
            with pytest.raises(StoreUnavailable, match="the database failed: "):
                await submit(store, "x" * 100_000)
            assert (await store.get(next(iter(jobs)), "default")).status == "pending"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        jobs.add((await submit(store)).id)
    assert jobs <= ids_in(file_of(sqlite_url))


async def test_a_reader_does_not_wait_for_a_writer(sqlite_url: str) -> None:
    async with opened(sqlite_url) as store:
        job = await submit(store)
        writer = sqlite3.connect(file_of(sqlite_url), isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        try:
            waiting = asyncio.create_task(submit(store))
            assert await store.get(job.id, "default") == job
            assert not waiting.done()
        finally:
            writer.execute("ROLLBACK")
            writer.close()
        assert (await waiting).status == "pending"


async def test_a_place_that_cannot_hold_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "var").write_text("a file, not a directory")
    with pytest.raises(Exception, match=f"cannot keep jobs in {tmp_path}{os.sep}var"):
        async with opened(f"sqlite:///{tmp_path}/var/jobs.sqlite3"):
            pass
