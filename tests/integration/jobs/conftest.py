"""One store suite for both engines: each test gets a database of its own, on SQLite and on PostgreSQL."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from rest_gateway.jobs.records import StoreSettings
from rest_gateway.jobs.store import SqlJobStore
from tests.postgres import Postgres

OpenStore: TypeAlias = Callable[..., contextlib.AbstractAsyncContextManager[SqlJobStore]]


@pytest.fixture(scope="package")
def postgres() -> Iterator[Postgres]:
    """A cluster for functional tests: not one that keeps its data through a power cut."""
    cluster = Postgres({"fsync": "off"})
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="package")
async def migrated_url(anyio_backend: object, postgres: Postgres) -> str:
    """A database with the tables."""
    url = postgres.create_database("jobs")
    async with opened(url) as store:
        await store.prepare()
    return url


@pytest.fixture
def postgres_url(postgres: Postgres, migrated_url: str) -> Iterator[str]:
    """The one database with tables; each test leaves them empty. Making a database takes longer than most tests."""
    yield migrated_url
    postgres.run_sql("TRUNCATE jobs", "jobs")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A file in a directory that does not exist yet."""
    return f"sqlite:///{tmp_path}/var/jobs.sqlite3"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture
def open_store(url: str) -> OpenStore:
    """Opens a store on the test's database: `async with open_store(lease_s=0) as store`."""
    return lambda **settings: opened(url, **settings)


@pytest.fixture
async def store(url: str) -> AsyncIterator[SqlJobStore]:
    """A store on the test's database."""
    async with opened(url) as store:
        yield store


@contextlib.asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[SqlJobStore]:  # noqa: ANN401 - of StoreSettings
    """A store until the end of the block."""
    # Patient: a busy machine is not a database that is away.
    store = SqlJobStore(StoreSettings(url=url, **({"timeout_s": 60.0, "connect_timeout_s": 30.0} | settings)))
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()
