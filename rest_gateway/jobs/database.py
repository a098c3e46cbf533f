"""Connections and transactions: bounded in time, errors translated, the same to the store for both engines.

Knows no jobs. What is asked of a database that is away, frozen or being restarted:

* refused or unreachable: StoreUnavailable at once, or after `connect_timeout_s`;
* frozen, or gone without a word: StoreUnavailable after `timeout_s`. What was begun goes on and ends by its own bounds
  (the driver's and the server's statement timeouts); nothing hangs on to a connection for longer;
* restarted: the first use of a stale connection fails, is tried once more on a new one, and nobody notices. So every
  transaction must be safe to run twice: the acknowledgement of the first commit may have been lost.

A caller that is cancelled, or too late, leaves its transaction to its end: cancelling a statement midway leaves
open whether it was done. `orphaned` is then told the result that nobody waits for.

A transaction is a plain function of a connection, the same for both engines. On SQLite it runs in a thread, from BEGIN
to COMMIT in one go: a hop between threads costs more than a statement. There is one writer, a thread with a connection
of its own, whose transactions begin by taking the file's write lock; readers see the last commit and never wait. On
PostgreSQL it runs on the loop over one pool of asyncpg connections (SQLAlchemy's greenlets do the waiting); single
statements need no BEGIN and COMMIT around them.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import asyncpg
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from rest_gateway.jobs import schema
from rest_gateway.jobs.filelock import FileLock
from rest_gateway.jobs.records import StoreError, StoreSettings, StoreUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[sa.Connection], T]
Orphaned = Callable[[T], Awaitable[None]]

# Every wait of one statement ends before its caller gives up.
_STATEMENT_SHARE: Final = 0.8
# PostgreSQL's codes of what a second try may well mend: serialization failure, deadlock, a standby that was a primary.
_AGAIN: Final = frozenset({"40001", "40P01", "25006"})
# These say that the statement was wrong, so the program is. 42P01 and 42703: the tables are not there yet.
_OURS: Final = (sa.exc.DataError, sa.exc.IntegrityError, sa.exc.ProgrammingError)
_NO_TABLES: Final = frozenset({"42P01", "42703"})


class Database:
    """The engines of one URL."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self.is_sqlite = is_sqlite(settings.url)
        self._lock = FileLock(sqlite_path(settings.url)) if self.is_sqlite else None
        # Transactions, single statements, reads; None while closed.
        self._lanes: _Lanes | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        # Whether the last word of the database was a failure, and the monotonic time of the first answer after one.
        self._is_away = False
        self._returned_at_s = float("-inf")

    async def open(self) -> None:
        """Makes the engines, no connection yet. Raises StoreInUse; StoreError where SQLite has no place to write."""
        if self._lock is not None:
            _make_place(sqlite_path(self._settings.url), self._lock)
            writer = _Threads(_sqlite_engine(self._settings, begin="BEGIN IMMEDIATE", threads=1), 1)
            self._lanes = _Lanes(writer, writer, _Threads(_sqlite_engine(self._settings, begin="BEGIN", threads=2), 2))
        else:
            engine = postgresql_engine(self._settings)
            single = _Pool(engine.execution_options(isolation_level="AUTOCOMMIT"))
            self._lanes = _Lanes(_Pool(engine), single, single)

    async def aclose(self) -> None:
        """Waits for transactions under way, closes everything."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._lanes is not None:
            for lane in dict.fromkeys(self._lanes):
                await lane.aclose()
        self._lanes = None
        if self._lock is not None:
            self._lock.release()

    async def prepare(self, *, should_migrate: bool) -> tuple[str | None, str | None]:
        """Migrates the tables, or checks them; returns their version before and after. Raises SchemaError."""
        work = partial(schema.prepare, should_migrate=should_migrate)
        if self.is_sqlite:
            return await self._attempt(self._open_lanes.transactions, work)
        # Somebody else's migration, or a long one, may take its time.
        patient = _Pool(postgresql_engine(self._settings, is_patient=True))
        try:
            return await self._attempt(patient, work)
        finally:
            await patient.aclose()

    async def transaction(self, work: Work[T], orphaned: Orphaned[T] | None = None) -> T:
        """Runs `work` in a transaction that is durable when this returns."""
        return await self._run(self._open_lanes.transactions, work, orphaned)

    async def statement(self, work: Work[T], orphaned: Orphaned[T] | None = None) -> T:
        """The same for `work` that is a single statement."""
        return await self._run(self._open_lanes.statements, work, orphaned)

    async def read(self, work: Work[T]) -> T:
        """Runs `work`, a single statement that writes nothing."""
        return await self._run(self._open_lanes.reads, work, None)

    def was_away_within(self, seconds: float) -> bool:
        """Whether the database is away, or has been back for less than that."""
        return self._is_away or time.monotonic() - self._returned_at_s < seconds

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        """A task that `aclose` waits for."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def _open_lanes(self) -> "_Lanes":
        assert self._lanes is not None, "the store is not open: this is a bug"
        return self._lanes

    async def _run(self, lane: "_Lane", work: Work[T], orphaned: Orphaned[T] | None) -> T:
        task = self.spawn(self._attempt(lane, work), "job store transaction")
        try:
            await asyncio.wait({task}, timeout=self._settings.timeout_s)
        except asyncio.CancelledError:
            self._leave(task, orphaned)
            raise
        if task.done():
            return task.result()
        self._leave(task, orphaned)
        self._is_away = True
        raise StoreUnavailable(f"the database gave no answer within {self._settings.timeout_s:g} s")

    def _leave(self, task: "asyncio.Task[T]", orphaned: Orphaned[T] | None) -> None:
        async def end() -> None:
            try:
                result = await task
                if orphaned is not None:
                    await orphaned(result)
            except StoreError as exc:
                logger.info("nobody waits any more for a transaction that failed: %s", exc)

        self.spawn(end(), "job store orphan")

    async def _attempt(self, lane: "_Lane", work: Work[T]) -> T:
        try:
            result = await self._try_twice(lane, work)
        except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as exc:
            if isinstance(exc, _OURS) and _sqlstate(exc) not in _NO_TABLES:
                raise
            self._is_away = True
            raise StoreUnavailable(f"the database failed: {_reason(exc)}") from exc
        if self._is_away:
            self._is_away = False
            self._returned_at_s = time.monotonic()
        return result

    async def _try_twice(self, lane: "_Lane", work: Work[T]) -> T:
        """The second time where a connection had died while nobody used it."""
        try:
            return await lane.run(work)
        except SQLAlchemyError as exc:
            if not _may_mend(exc):
                raise
        return await lane.run(work)


class _Lane(Protocol):
    """Where transactions run."""

    async def run(self, work: Work[T]) -> T:
        """Runs it between BEGIN and COMMIT."""

    async def aclose(self) -> None:
        """Closes the connections."""


class _Lanes(NamedTuple):
    transactions: _Lane
    statements: _Lane  # of one statement that writes
    reads: _Lane  # of one statement that does not


class _Pool:
    """PostgreSQL, on the loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def run(self, work: Work[T]) -> T:
        """See _Lane."""
        async with self._engine.connect() as connection:
            try:
                async with connection.begin():
                    return await connection.run_sync(work)
            except Exception as exc:
                # The driver's own timeout leaves a connection of which nothing is known; a standby's is of no use.
                if isinstance(exc, OSError) or _sqlstate(exc) == "25006":
                    await connection.invalidate(exc)
                raise

    async def aclose(self) -> None:
        """See _Lane."""
        await self._engine.dispose()


class _Threads:
    """SQLite, in threads of its own, each with a connection."""

    def __init__(self, engine: sa.Engine, threads: int) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="job store")

    async def run(self, work: Work[T]) -> T:
        """See _Lane."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, work)

    def _run(self, work: Work[T]) -> T:
        with self._engine.begin() as connection:
            return work(connection)

    async def aclose(self) -> None:
        """See _Lane. The last connection to close writes the log into the database."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._engine.dispose)
        self._executor.shutdown()


def _may_mend(exc: SQLAlchemyError) -> bool:
    is_stale = isinstance(exc, DBAPIError) and exc.connection_invalidated
    # NotSupportedError: a plan made before a migration, which the driver has now forgotten.
    return is_stale or isinstance(exc, sa.exc.NotSupportedError) or _sqlstate(exc) in _AGAIN


def _sqlstate(exc: BaseException) -> str | None:
    return getattr(getattr(exc, "orig", exc), "sqlstate", None)


def _reason(exc: BaseException) -> str:
    """One line without the statement and its parameters, which may be private."""
    original = getattr(exc, "orig", None) or exc
    text = str(original).strip().partition("\n")[0].removeprefix("<class '").replace("'>:", ":")
    return text or type(original).__name__


def is_sqlite(url: str) -> bool:
    """Whether the URL means a SQLite file. Raises ValueError for a URL of neither engine."""
    backend = url.partition("://")[0].partition("+")[0]
    if backend not in ("sqlite", "postgres", "postgresql"):
        raise ValueError("must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")
    if backend == "sqlite":
        sqlite_path(url)
    return backend == "sqlite"


def sqlite_path(url: str) -> Path:
    """The file of a SQLite URL, absolute. Raises ValueError where there is none."""
    try:
        name = make_url(url).database
    except ArgumentError as exc:
        raise ValueError("must be sqlite:///FILE") from exc
    if not name or name == ":memory:" or name.startswith("file:"):
        raise ValueError("must name a file, such as sqlite:///./var/jobs.sqlite3: jobs must survive the process")
    return Path(name).resolve()


def _make_place(path: Path, lock: FileLock) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as exc:
        raise StoreError(f"cannot keep jobs in {path}: {exc.strerror or exc}") from exc


def _sqlite_engine(settings: StoreSettings, *, begin: str, threads: int) -> sa.Engine:
    engine = sa.create_engine(
        f"sqlite:///{sqlite_path(settings.url)}",
        pool_size=threads,
        max_overflow=0,
        # None: the driver begins nothing by itself, `begin` does.
        connect_args={"isolation_level": None, "timeout": settings.timeout_s * _STATEMENT_SHARE},
    )

    def set_up(connection: Any, _record: object) -> None:  # noqa: ANN401 - a driver's
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    def begin_with(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    sa.event.listen(engine, "connect", set_up)
    sa.event.listen(engine, "begin", begin_with)
    return engine


def postgresql_engine(settings: StoreSettings, *, is_patient: bool = False) -> AsyncEngine:
    """The pool. A patient one has no bounds on statements, for migrations. Its use raises ValueError for a bad URL."""
    timeout_s = settings.timeout_s * _STATEMENT_SHARE

    async def connect() -> Any:  # noqa: ANN401 - a driver's
        # The driver reads the URL itself, since it knows what libpq's URLs may hold: sslmode, several hosts, sockets.
        try:
            return await asyncpg.connect(
                f"postgresql://{settings.url.partition('://')[2]}",
                timeout=settings.connect_timeout_s,
                command_timeout=None if is_patient else timeout_s,
                server_settings=_server_settings(settings.url, None if is_patient else timeout_s),
            )
        except (ValueError, OverflowError) as exc:  # the latter for port 99999
            raise ValueError(f"cannot be used: {exc}") from exc

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.connect_timeout_s,
    )


def _server_settings(url: str, timeout_s: float | None) -> dict[str, str]:
    """Bounds on the server's side hold also when this process is frozen or gone, so that no row stays locked."""
    chosen = {"jit": "off"}
    if "application_name=" not in url:
        chosen["application_name"] = "inference-router"
    if timeout_s is not None:
        milliseconds = str(round(timeout_s * 1000))
        limits = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        chosen |= dict.fromkeys(limits, milliseconds)
    return chosen
