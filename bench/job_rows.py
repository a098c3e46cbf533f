"""Jobs put into a database by SQL: `python -m bench.job_rows URL ROWS` makes the tables and fills in finished ones.

Tells on stdout how many there are, each time that there are more. What is put in need not be durable, only there: it is
no part of what is measured.
"""

import asyncio
import os
import sqlite3
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import asyncpg

from rest_gateway.jobs.records import StoreSettings
from rest_gateway.jobs.store import SqlJobStore

SPAN_S = 23 * 3600  # from the oldest to the newest finished job
AGE_S = SPAN_S + 1800  # of the oldest one
CHUNK = 100_000
PATIENCE_S = 30.0  # of the store: on a busy machine a slow answer is a figure, no failure
QUEUE = "queue"  # the tenant of those that wait


@dataclass(frozen=True, slots=True)
class Dialect:
    """The few words in which the engines differ. `instant` and `text` take an expression, `id` milliseconds and i."""

    series: str
    instant: str
    text: str
    id: str


# Ids are those of UUID version 7, but for the chance in them.
POSTGRESQL = Dialect(
    series="generate_series({first}::bigint, {last}::bigint) AS series(i)",
    instant="to_timestamp(({}) / 1e6)",
    text="convert_to({}, 'UTF8')",
    id="CAST(lpad(to_hex(({milliseconds})::bigint), 12, '0') || '70008000' || lpad(to_hex(i), 12, '0') AS uuid)",
)
SQLITE = Dialect(
    series="(WITH RECURSIVE series(i) AS (VALUES({first}) UNION ALL SELECT i + 1 FROM series WHERE i < {last})"
    " SELECT i FROM series)",
    instant="({})",
    text="CAST({} AS BLOB)",
    id="printf('%012x70008000%012x', {milliseconds}, i)",
)

COLUMNS = (
    "id, tenant, kind, status, attempt, lost_leases, version, created_at, updated_at, started_at, finished_at, "
    "not_before, deadline_at, fingerprint, error_code, error_message, input, result"
)
INPUT = '\'{"text":"The delivery was late, but the product itself is amazing!","timeout_s":null}\''
RESULT = '\'{"sentiment":"positive","confidence":0.81195}\''


def finished_jobs(dialect: Dialect, first: int, last: int, begin_us: int, step_us: int) -> str:
    """Of every status and kind, in the order of their creation."""
    created = f"{begin_us} + i * {step_us}"
    status = "CASE WHEN i % 50 = 0 THEN 'cancelled' WHEN i % 10 = 0 THEN 'failed' ELSE 'completed' END"
    is_failed = "i % 10 = 0 AND i % 50 <> 0"
    values = (
        dialect.id.format(milliseconds=f"({created}) / 1000"),
        "'default'",
        "CASE WHEN i % 7 = 0 THEN 'agents' ELSE 'text' END",
        status,
        *("1", "0", "3"),
        *(
            dialect.instant.format(created + later)
            for later in ("", " + 5000000", "", " + 5000000", "", " + 3600000000")
        ),
        dialect.text.format("''"),
        f"CASE WHEN {is_failed} THEN 'UNKNOWN' END",
        f"CASE WHEN {is_failed} THEN 'the model failed' END",
        dialect.text.format(INPUT),
        f"CASE WHEN i % 10 <> 0 THEN {dialect.text.format(RESULT)} END",
    )
    return _insert(values, dialect, first, last)


def waiting_jobs(dialect: Dialect, count: int, begin_us: int) -> str:
    """Texts that wait to be claimed, with an hour to go."""
    created = f"{begin_us} + i"
    at = dialect.instant.format(created)
    values = (
        dialect.id.format(milliseconds=f"({created}) / 1000"),
        f"'{QUEUE}'",
        *("'text'", "'pending'", "0", "0", "1"),
        *(at, at, "NULL", "NULL", at, dialect.instant.format(f"{created} + 3600000000")),
        dialect.text.format("''"),
        *("NULL", "NULL", dialect.text.format(INPUT), "NULL"),
    )
    return _insert(values, dialect, 1, count)


def _insert(values: Sequence[str], dialect: Dialect, first: int, last: int) -> str:
    series = dialect.series.format(first=first, last=last)
    return f"INSERT INTO jobs ({COLUMNS}) SELECT {', '.join(values)} FROM {series}"


async def fill(url: str, rows: int) -> None:
    """The tables, with the finished jobs of a day; then the database is as if they had long been there."""
    store = SqlJobStore(StoreSettings(url=url, timeout_s=PATIENCE_S))
    await store.open()
    await store.prepare()
    await store.aclose()
    begin_us, step_us = _now_us() - AGE_S * 1_000_000, SPAN_S * 1_000_000 // rows
    async with _Connection(url) as connection:
        for first in range(1, rows + 1, CHUNK):
            last = min(first + CHUNK - 1, rows)
            await connection.execute(finished_jobs(connection.dialect, first, last, begin_us, step_us))
            print(last, flush=True)
        await connection.calm()
    os.sync()


async def lay_in(url: str, count: int) -> None:
    """So many jobs wait then, and no others."""
    if not count:
        return
    async with _Connection(url) as connection:
        await connection.execute(f"DELETE FROM jobs WHERE tenant = '{QUEUE}'")
        await connection.execute(waiting_jobs(connection.dialect, count, _now_us() - 60_000_000))
        await connection.calm()


class _Connection:
    """To either engine, for statements without answers."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._sqlite: sqlite3.Connection | None = None
        self._postgresql: asyncpg.Connection | None = None
        self.dialect = SQLITE if url.startswith("sqlite") else POSTGRESQL

    async def __aenter__(self) -> Self:
        if self.dialect is SQLITE:
            self._sqlite = sqlite3.connect(self._url.removeprefix("sqlite:///"), isolation_level=None)
            await self.execute("PRAGMA synchronous=OFF")
        else:
            self._postgresql = await asyncpg.connect(self._url)
            await self.execute("SET synchronous_commit = off")
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._sqlite is not None:
            self._sqlite.close()
        if self._postgresql is not None:
            await self._postgresql.close()

    async def execute(self, statement: str) -> None:
        if self._sqlite is not None:
            self._sqlite.execute(statement)
        if self._postgresql is not None:
            await self._postgresql.execute(statement)

    async def calm(self) -> None:
        """Does now what the engine would do some time later, in the midst of what is measured."""
        tidy = ("PRAGMA wal_checkpoint(TRUNCATE)",) if self.dialect is SQLITE else ("VACUUM ANALYZE jobs", "CHECKPOINT")
        for statement in tidy:
            await self.execute(statement)


def _now_us() -> int:
    return time.time_ns() // 1000


if __name__ == "__main__":
    asyncio.run(fill(sys.argv[1], int(sys.argv[2])))
