"""The one table of jobs, and the few words of SQL in which SQLite and PostgreSQL differ.

Times are `timestamptz` on PostgreSQL and integer microseconds since 1970 on SQLite, always by the database's own clock.
Text that came from outside lives in bytes columns (`input`, `result`): PostgreSQL's text cannot hold U+0000.
Migrations build the table (`migrations/versions`); a test holds the two together.

What the indexes are for:

    jobs_page        a page of `GET /jobs`: a filter that is not given is a merge over its few values, so one index
                     serves all filters, whatever a million finished rows look like
    jobs_key         one job per tenant and idempotency key
    jobs_pending     claims, in order; also the count of waiting jobs
    jobs_leases, jobs_deadlines, jobs_finished   the rows that reaping and retention look for, and no others
"""

import datetime as dt
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND: Final = dt.timedelta(microseconds=1)


class Instant(TypeDecorator[dt.datetime]):
    """A point in time, aware UTC in Python."""

    impl = sa.BigInteger
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """The column's type."""
        postgresql = dialect.name == "postgresql"
        return dialect.type_descriptor(sa.TIMESTAMP(timezone=True) if postgresql else sa.BigInteger())

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> Any:  # noqa: ANN401
        """To the driver."""
        return value if value is None or dialect.name == "postgresql" else (value - _EPOCH) // _MICROSECOND

    def process_result_value(
        self,
        value: dt.datetime | int | None,
        dialect: sa.Dialect,  # noqa: ARG002 - the base class's
    ) -> dt.datetime | None:
        """From the driver."""
        return _EPOCH + value * _MICROSECOND if isinstance(value, int) else value


metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Uuid(), primary_key=True),
    sa.Column("tenant", sa.Text(), nullable=False),
    sa.Column("kind", sa.Text(), nullable=False),
    sa.Column("status", sa.Text(), nullable=False),
    sa.Column("attempt", sa.Integer(), nullable=False),
    sa.Column("lost_leases", sa.Integer(), nullable=False),
    sa.Column("version", sa.Integer(), nullable=False),
    sa.Column("created_at", Instant(), nullable=False),
    sa.Column("updated_at", Instant(), nullable=False),
    sa.Column("started_at", Instant()),
    sa.Column("finished_at", Instant()),
    # Its place in the queue: created_at, or when a released job may be claimed again.
    sa.Column("not_before", Instant(), nullable=False),
    sa.Column("deadline_at", Instant(), nullable=False),
    sa.Column("worker", sa.Text()),
    sa.Column("lease_until", Instant()),
    sa.Column("idempotency_key", sa.Text()),
    sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
    sa.Column("error_code", sa.Text()),
    # Why it failed; of a live job, why it was last released.
    sa.Column("error_message", sa.Text()),
    sa.Column("input", sa.LargeBinary(), nullable=False),
    sa.Column("result", sa.LargeBinary()),
)


def _index(name: str, *columns: str, where: str | None = None, unique: bool = False) -> sa.Index:
    condition = None if where is None else sa.text(where)
    return sa.Index(
        name,
        *(jobs.c[column] for column in columns),
        unique=unique,
        postgresql_where=condition,
        sqlite_where=condition,
    )


_index("jobs_page", "tenant", "status", "kind", "created_at", "id")
_index("jobs_key", "tenant", "idempotency_key", where="idempotency_key IS NOT NULL", unique=True)
_index("jobs_pending", "not_before", "id", "status", where="status = 'pending'")
_index("jobs_leases", "lease_until", where="status = 'processing'")
_index("jobs_deadlines", "deadline_at", where="status IN ('pending', 'processing')")
_index("jobs_finished", "finished_at", where="finished_at IS NOT NULL")


class now(FunctionElement[dt.datetime]):  # noqa: N801 - reads as the function that it is
    """The database's clock, the same throughout a statement."""

    type = Instant()
    inherit_cache = True


@compiles(now, "postgresql")
def _now_postgresql(_element: now, _compiler: SQLCompiler, **_kw: object) -> str:
    return "statement_timestamp()"


@compiles(now, "sqlite")
def _now_sqlite(_element: now, _compiler: SQLCompiler, **_kw: object) -> str:
    # julianday is exact to 0.05 ms; strftime would give text, and unixepoch('subsec') needs SQLite 3.42.
    return "(CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000)"


class later(FunctionElement[dt.datetime]):  # noqa: N801
    """`later(instant, seconds)`."""

    type = Instant()
    inherit_cache = True


@compiles(later, "postgresql")
def _later_postgresql(element: later, compiler: SQLCompiler, **kw: object) -> str:
    instant, seconds = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({instant} + make_interval(secs => {seconds}))"


@compiles(later, "sqlite")
def _later_sqlite(element: later, compiler: SQLCompiler, **kw: object) -> str:
    instant, seconds = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({instant} + CAST(round({seconds} * 1000000) AS INTEGER))"


class seconds_until(FunctionElement[float]):  # noqa: N801
    """`seconds_until(instant)`: from now; negative when it is past."""

    type = sa.Double()
    inherit_cache = True


@compiles(seconds_until, "postgresql")
def _seconds_until_postgresql(element: seconds_until, compiler: SQLCompiler, **kw: object) -> str:
    instant = compiler.process(element.clauses, **kw)
    return f"CAST(extract(epoch FROM {instant} - statement_timestamp()) AS double precision)"


@compiles(seconds_until, "sqlite")
def _seconds_until_sqlite(element: seconds_until, compiler: SQLCompiler, **kw: object) -> str:
    return f"(({compiler.process(element.clauses, **kw)} - {compiler.process(now(), **kw)}) / 1000000.0)"


class _Records(FunctionElement[Any]):
    """A parameter of many rows as a relation: one JSON text, so that the statement's own text stays the same."""

    name = "records"
    inherit_cache = True


# Each column that a relation of parameters may have, with PostgreSQL's type for it.
_RECORD_TYPES: Final[Mapping[str, str]] = {
    "id": "uuid",
    "attempt": "integer",
    "tenant": "text",
    "idempotency_key": "text",
}


@compiles(_Records, "postgresql")
def _records_postgresql(element: _Records, compiler: SQLCompiler, **kw: object) -> str:
    value, *names = (compiler.process(clause, **kw) for clause in element.clauses)
    columns = ", ".join(f"{name} {_RECORD_TYPES[name]}" for name in names)
    return f"(SELECT * FROM jsonb_to_recordset(CAST({value} AS jsonb)) AS r({columns}))"  # noqa: S608 - names of ours


@compiles(_Records, "sqlite")
def _records_sqlite(element: _Records, compiler: SQLCompiler, **kw: object) -> str:
    value, *names = (compiler.process(clause, **kw) for clause in element.clauses)
    columns = ", ".join(f"json_extract(value, '$.{name}') AS {name}" for name in names)
    return f"(SELECT {columns} FROM json_each({value}))"  # noqa: S608


def records(parameter: str, *columns: str) -> sa.TableValuedAlias:
    """The relation of these columns that the parameter holds, as `json_records` writes it."""
    names = [sa.literal_column(column, sa.Text()) for column in columns]
    relation = _Records(sa.bindparam(parameter, type_=sa.Text()), *names)
    return relation.table_valued(*(sa.column(column, jobs.c[column].type) for column in columns), name=parameter)


def json_records(rows: Iterable[Mapping[str, UUID | str | int]]) -> str:
    """The value of a `records` parameter."""
    return json.dumps([{key: _plain(value) for key, value in row.items()} for row in rows])


def _plain(value: UUID | str | int) -> str | int:
    return value.hex if isinstance(value, UUID) else value
