"""Migrations: they make the tables that the statements are written for, once, whoever starts at the same time."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from rest_gateway.jobs.database import Database
from rest_gateway.jobs.records import SchemaError, StoreInUse, StoreSettings
from rest_gateway.jobs.schema import VERSION_TABLE
from rest_gateway.jobs.store import SqlJobStore
from rest_gateway.jobs.tables import metadata
from rest_gateway.migrate import main
from tests.integration.jobs.builders import submit
from tests.integration.jobs.conftest import opened
from tests.postgres import Postgres

pytestmark = pytest.mark.anyio

_numbers = count(1)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A database without tables."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_url")
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    yield postgres.create_database(f"empty_{next(_numbers)}")


async def test_the_migrations_make_the_tables_that_the_statements_know(empty_url: str) -> None:
    database = Database(StoreSettings(url=empty_url, timeout_s=60))
    await database.open()
    assert await database.prepare(should_migrate=True) == (None, "0001")

    def differences(connection: sa.Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    try:
        found = await database.transaction(differences)
    finally:
        await database.aclose()
    assert [difference for difference in found if VERSION_TABLE not in str(difference)] == []


async def test_a_second_migration_finds_nothing_to_do(empty_url: str) -> None:
    for before in (None, "0001"):
        database = Database(StoreSettings(url=empty_url, timeout_s=60))
        await database.open()
        assert await database.prepare(should_migrate=True) == (before, "0001")
        await database.aclose()


async def test_several_gateways_that_start_at_once_migrate_once(postgres: Postgres) -> None:
    url = postgres.create_database(f"empty_{next(_numbers)}")
    stores = [SqlJobStore(StoreSettings(url=url, timeout_s=60, connect_timeout_s=30)) for _ in range(5)]
    for store in stores:
        await store.open()
    try:
        await asyncio.gather(*(submit(store) for store in stores))
        page = await stores[0].list("default", limit=10, cursor=None, status=None, kind=None)
        assert len(page.jobs) == 5
    finally:
        await asyncio.gather(*(store.aclose() for store in stores))


async def test_tables_that_are_missing_or_old_are_told_when_they_must_not_be_migrated(empty_url: str) -> None:
    async with opened(empty_url, should_migrate=False) as store:
        with pytest.raises(SchemaError, match=r"version none.*run python -m rest_gateway.migrate"):
            await store.prepare()
        with pytest.raises(SchemaError):
            await submit(store)


async def test_tables_newer_than_the_program_are_told(empty_url: str) -> None:
    async with opened(empty_url) as store:
        await submit(store)
    database = Database(StoreSettings(url=empty_url))
    await database.open()
    await database.transaction(lambda c: c.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")))
    await database.aclose()
    for should_migrate in (True, False):
        async with opened(empty_url, should_migrate=should_migrate) as store:
            with pytest.raises(SchemaError, match=r"version 9999.*a newer program has migrated them"):
                await store.prepare()


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
async def test_every_spelling_of_a_postgresql_url_is_taken(migrated_url: str, scheme: str) -> None:
    async with opened(migrated_url.replace("postgresql", scheme, 1)) as store:
        await store.ping()


@pytest.mark.parametrize("url", ["mysql://h/d", "sqlite://", "sqlite:///:memory:", "jobs.sqlite3", ""])
def test_a_url_that_cannot_keep_jobs_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must"):
        SqlJobStore(StoreSettings(url=url))


async def test_a_second_process_on_one_sqlite_file_is_refused(sqlite_url: str) -> None:
    async with opened(sqlite_url):
        other = SqlJobStore(StoreSettings(url=sqlite_url))
        with pytest.raises(StoreInUse, match=rf"in use by another process \(pid {os.getpid()}\).*DATABASE_URL"):
            await other.open()
    async with opened(sqlite_url) as store:
        await store.ping()


def test_the_command_migrates_the_default_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "DATABASE_URL": ""}
    command = [sys.executable, "-m", "rest_gateway.migrate"]
    first = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (first.returncode, first.stdout) == (0, "migrated the tables from version none to 0001\n"), first.stderr
    assert (tmp_path / "var" / "jobs.sqlite3").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert main([]) == 0
    assert capsys.readouterr().out == "the tables have version 0001, which is the newest\n"


@pytest.mark.parametrize(
    ("url", "status", "text"),
    [
        ("mysql://h/d", 2, "rest_gateway.migrate: bad setting: DATABASE_URL must be"),
        ("postgresql:///jobs?host={directory}", 1, "rest_gateway.migrate: the database failed: "),
        # Bug: a traceback.
        ("postgresql://127.0.0.1:65536/d", 2, "rest_gateway.migrate: bad setting: DATABASE_URL cannot be used: "),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    url: str,
    status: int,
    text: str,
) -> None:
    monkeypatch.setenv("DATABASE_URL", url.format(directory=tmp_path))
    assert main([]) == status
    complaint = capsys.readouterr().err
    assert complaint.startswith(text)
    assert complaint.count("\n") == 1
