"""Every statement of the store, made once; the same for both engines.

INSERT gives a job its first status; after that only `_transition` writes one, by the table of `states`. A status stands
in a statement as a literal, not as a parameter: that is what lets both engines see that a partial index fits.

PostgreSQL runs at READ COMMITTED: whoever waited for a row's lock looks at the row again and finds the status changed.
Statements that lock several rows take them in order of their ids, or skip those that are locked, so that no two wait
for each other.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from rest_gateway.jobs.records import Kind, Status
from rest_gateway.jobs.states import SOURCES, STATUSES, TARGET, TERMINAL, Event
from rest_gateway.jobs.tables import jobs, later, now, records, seconds_until

KINDS: Final[tuple[Kind, ...]] = ("text", "agents")
# What a Job is made of.
JOB: Final = [
    jobs.c[name]
    for name in (
        *("id", "kind", "status", "tenant", "attempt", "version", "created_at", "updated_at", "started_at"),
        *("finished_at", "not_before", "result", "error_code", "error_message"),
    )
]
_LIMIT: Final = sa.bindparam("limit", type_=sa.Integer())
_TENANT: Final = sa.bindparam("of_tenant", type_=sa.Text())
_ID: Final = sa.bindparam("of_id", type_=sa.Uuid())
_LEASE_UNTIL: Final = later(now(), sa.bindparam("lease_s", type_=sa.Double()))


def _literal(text: str) -> sa.ColumnElement[str]:
    return sa.literal_column(f"'{text}'", sa.Text())


def _is(statuses: Iterable[Status]) -> sa.ColumnElement[bool]:
    """In the order of STATUSES, as in the indexes."""
    chosen = [_literal(status) for status in STATUSES if status in set(statuses)]
    return jobs.c.status == chosen[0] if len(chosen) == 1 else jobs.c.status.in_(chosen)


def _picked(
    *where: sa.ColumnElement[bool], order_by: Sequence[sa.ColumnElement[Any]], is_skipping: bool = True
) -> sa.Select[Any]:
    """The rows that a statement is to change, locked; those that somebody else holds are left out, or waited for."""
    return sa.select(jobs.c.id).where(*where).order_by(*order_by).with_for_update(skip_locked=is_skipping, of=jobs)


def _held() -> sa.Select[Any]:
    """The attempts of parameter `held`, as far as they still are the row's present one."""
    held = records("held", "id", "attempt")
    return (
        sa.select(jobs.c.id)
        .join(held, sa.and_(jobs.c.id == held.c.id, jobs.c.attempt == held.c.attempt))
        .order_by(jobs.c.id)
        .with_for_update(of=jobs)
    )


def _among(picked: sa.Select[Any]) -> sa.ColumnElement[bool]:
    """A CTE that locks rows runs exactly once; a subquery might be run again, and pick other rows."""
    return jobs.c.id.in_(sa.select(picked.cte("picked").c.id))


def _transition(event: Event, *where: sa.ColumnElement[bool], **values: Any) -> sa.Update:  # noqa: ANN401 - SQL
    """What the event does to the rows, with all that follows from the status that it leads to."""
    target = TARGET[event]
    entered: dict[str, Any] = {"status": _literal(target), "version": jobs.c.version + 1, "updated_at": now()}
    if target == "processing":
        entered |= {"started_at": now()}
    else:
        entered |= {"worker": sa.null(), "lease_until": sa.null()}
    if target == "pending":
        entered |= {"started_at": sa.null(), "not_before": jobs.c.created_at}
    if target in TERMINAL:
        entered |= {"finished_at": now()}
    return sa.update(jobs).where(_is(SOURCES[event]), *where).values(entered | values)


# --- submit

_IS_CLAIMED: Final = sa.bindparam("is_claimed", type_=sa.Boolean())
_NEW: Final = {
    "lost_leases": sa.literal_column("0"),
    "version": sa.literal_column("1"),
    "created_at": now(),
    "updated_at": now(),
    "not_before": now(),
    "deadline_at": later(now(), sa.bindparam("timeout_s", type_=sa.Double())),
    "started_at": sa.case((_IS_CLAIMED, now()), else_=sa.null()),
    "lease_until": sa.case((_IS_CLAIMED, _LEASE_UNTIL), else_=sa.null()),
}
# A row whose id is there is one of ours whose acknowledgement was lost; a key that is there is a repetition. Neither is
# an error, and what stands in the table afterwards tells them apart.
INSERT: Final = {
    "postgresql": postgresql.insert(jobs).values(_NEW).on_conflict_do_nothing(),
    "sqlite": sqlite.insert(jobs).values(_NEW).on_conflict_do_nothing(),
}
_ids = records("ids", "id")
BY_ID: Final = sa.select(*JOB).join(_ids, jobs.c.id == _ids.c.id)
_keys = records("keys", "tenant", "idempotency_key")
BY_KEY: Final = sa.select(*JOB, jobs.c.idempotency_key, jobs.c.fingerprint).join(
    _keys, sa.and_(jobs.c.tenant == _keys.c.tenant, jobs.c.idempotency_key == _keys.c.idempotency_key)
)
# Counted only as far as it matters. Without the order SQLite would count in `jobs_page`, past every finished job.
COUNT_WAITING: Final = sa.select(sa.func.count()).select_from(
    sa.select(jobs.c.id).where(_is(SOURCES[Event.CLAIM])).order_by(jobs.c.not_before).limit(_LIMIT).subquery()
)

# --- workers

# As an expression no index fits it. As a column PostgreSQL goes through `jobs_deadlines` once a claim is large, past
# every waiting job, and sorts them all, instead of taking the first of `jobs_pending`.
_NOT_EXPIRED: Final = later(jobs.c.deadline_at, sa.literal_column("0.0")) > now()
_queue: Final = (
    _picked(
        _is(SOURCES[Event.CLAIM]),
        jobs.c.not_before <= now(),
        _NOT_EXPIRED,
        order_by=(jobs.c.not_before, jobs.c.id),
    )
    .add_columns(jobs.c.not_before, sa.func.length(jobs.c.input).label("bytes"))
    .limit(_LIMIT)
    .cte("queue")
)
# The first always, others as long as those before them have not filled the claim. Sizes are known without reading.
_BEFORE: Final = sa.func.sum(_queue.c.bytes).over(order_by=(_queue.c.not_before, _queue.c.id), rows=(None, -1))
_sized: Final = sa.select(_queue.c.id, sa.func.coalesce(_BEFORE, 0).label("bytes_before")).subquery()
_FITTING: Final = sa.select(_sized.c.id).where(_sized.c.bytes_before < sa.bindparam("max_bytes", type_=sa.BigInteger()))
CLAIM: Final = _transition(
    Event.CLAIM,
    jobs.c.id.in_(_FITTING),
    attempt=jobs.c.attempt + 1,
    worker=sa.bindparam("of_worker", type_=sa.Text()),
    lease_until=_LEASE_UNTIL,
).returning(
    jobs.c.id,
    jobs.c.kind,
    jobs.c.tenant,
    jobs.c.attempt,
    jobs.c.input,
    seconds_until(jobs.c.deadline_at).label("expires_in_s"),
    jobs.c.not_before,
)
# A lease that ran out but was not reaped yet is still the worker's.
RENEW: Final = (
    sa.update(jobs)
    .where(
        _is(SOURCES[Event.COMPLETE]),
        jobs.c.worker == sa.bindparam("of_worker", type_=sa.Text()),
        _among(_held()),
    )
    .values(lease_until=_LEASE_UNTIL)
    .returning(jobs.c.id, jobs.c.attempt)
)
_finished = records("held", "id", "attempt")
FINISHING: Final = (
    sa.select(jobs.c.id, jobs.c.attempt, jobs.c.status)
    .join(_finished, sa.and_(jobs.c.id == _finished.c.id, jobs.c.attempt == _finished.c.attempt))
    .order_by(jobs.c.id)
    .with_for_update(of=jobs)
)
_ATTEMPT: Final = jobs.c.attempt == sa.bindparam("of_attempt", type_=sa.Integer())
_RESULT: Final = sa.bindparam("its_result", type_=sa.LargeBinary())
COMPLETE: Final = _transition(
    Event.COMPLETE, jobs.c.id == _ID, _ATTEMPT, result=_RESULT, error_code=sa.null(), error_message=sa.null()
)
FAIL: Final = _transition(
    Event.FAIL,
    jobs.c.id == _ID,
    _ATTEMPT,
    result=_RESULT,
    error_code=sa.bindparam("its_code", type_=sa.Text()),
    error_message=sa.bindparam("its_message", type_=sa.Text()),
)
_DELAY: Final[sa.BindParameter[float]] = sa.bindparam("delay_s", type_=sa.Double())
RELEASE: Final = _transition(
    Event.RELEASE,
    _among(_held()),
    # Its old place, or one behind those that may go sooner.
    not_before=sa.case((_DELAY > 0, later(now(), _DELAY)), else_=jobs.c.created_at),
    error_message=sa.bindparam("reason", type_=sa.Text()),
).returning(jobs.c.id)

# --- reaping

_IS_LAST_LEASE: Final = jobs.c.lost_leases + 1 >= sa.bindparam("max_lost_leases", type_=sa.Integer())


def _overdue(*where: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    processing = _is(SOURCES[Event.LOSE])
    return _among(
        _picked(processing, jobs.c.lease_until <= now(), *where, order_by=(jobs.c.lease_until,)).limit(_LIMIT)
    )


EXPIRE: Final = _transition(
    Event.EXPIRE,
    _among(
        _picked(_is(SOURCES[Event.EXPIRE]), jobs.c.deadline_at <= now(), order_by=(jobs.c.deadline_at,)).limit(_LIMIT)
    ),
    error_code=_literal("DEADLINE_EXCEEDED"),
    error_message=sa.case(
        (jobs.c.error_message.is_(None), _literal("not done within the time that a job has")),
        else_=_literal("not done within the time that a job has; it last waited because: ") + jobs.c.error_message,
    ),
).returning(jobs.c.id)
ABANDON: Final = _transition(
    Event.ABANDON,
    _overdue(_IS_LAST_LEASE),
    lost_leases=jobs.c.lost_leases + 1,
    error_code=_literal("INTERNAL"),
    error_message=_literal("too many processes ended or froze while they worked on it"),
).returning(jobs.c.id)
LOSE: Final = _transition(Event.LOSE, _overdue(sa.not_(_IS_LAST_LEASE)), lost_leases=jobs.c.lost_leases + 1).returning(
    jobs.c.id
)
PURGE: Final = (
    sa.delete(jobs)
    .where(
        _among(
            _picked(
                jobs.c.finished_at <= later(now(), -sa.bindparam("retention_s", type_=sa.Double())),
                order_by=(jobs.c.finished_at,),
            ).limit(_LIMIT)
        )
    )
    .returning(jobs.c.id)
)

# --- owners

_MINE: Final = sa.and_(jobs.c.id == _ID, jobs.c.tenant == _TENANT)
GET: Final = sa.select(*JOB).where(_MINE)
CANCEL: Final = _transition(Event.CANCEL, _MINE).returning(*JOB)
DELETE: Final = sa.delete(jobs).where(_MINE, _is(TERMINAL)).returning(jobs.c.id)
VERSIONS: Final = sa.select(jobs.c.id, jobs.c.version).join(_ids, jobs.c.id == _ids.c.id)
PING: Final = sa.select(sa.literal_column("1", sa.Integer()))

_NEWEST: Final = (jobs.c.created_at.desc(), jobs.c.id.desc())
_AFTER: Final = sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(
    sa.bindparam("after_created_at", type_=jobs.c.created_at.type), sa.bindparam("after_id", type_=sa.Uuid())
)


def _page(statuses: Iterable[Status], kinds: Iterable[Kind], *, is_first: bool) -> sa.Select[Any]:
    """The newest of each status and kind, each found at one place of the index; and of those the newest."""
    runs = [
        sa.select(jobs.c.id)
        .where(jobs.c.tenant == _TENANT, _is([status]), jobs.c.kind == _literal(kind))
        .where(*(() if is_first else (_AFTER,)))
        .order_by(*_NEWEST)
        .limit(_LIMIT)
        .subquery()
        for status in statuses
        for kind in kinds
    ]
    newest = sa.union_all(*(sa.select(run.c.id) for run in runs))
    return sa.select(*JOB).where(jobs.c.id.in_(newest)).order_by(*_NEWEST).limit(_LIMIT)


PAGES: Final = {
    (status, kind, is_first): _page([status] if status else STATUSES, [kind] if kind else KINDS, is_first=is_first)
    for status in (None, *STATUSES)
    for kind in (None, *KINDS)
    for is_first in (True, False)
}
