"""Jobs under load while processes are killed and frozen and the database is cut off: what was acknowledged is done.

Clients submit texts and agents, each with an Idempotency-Key, and ask again with the same key until a gateway answers,
also when the connection broke after the request was sent. A seeded plan hurts the gateways, the router and the
database. What must hold, by the books of `chaos`:

* every acknowledged job is there and ends; there is no job that nobody asked for, and no second one for a key;
* a job's versions tell one story to whoever looks, and nothing changes after its terminal state;
* a completed job has the result that the mock's documented functions give; a cancel that was acknowledged stands;
* an attempt is run by one process once, and a job is ended by the one that ran its last attempt;
* a job has at most one run more than there were faults in its life;
* after the kill of a gateway its jobs are claimed again within 8 s, unless the database or the router was away then.

JOBS_CHAOS_SECONDS and JOBS_CHAOS_SQLITE_SECONDS lengthen the load, JOBS_CHAOS_SEED varies it.
"""

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias
from uuid import UUID

import pytest

from tests.acceptance.chaos import (
    ABANDONED,
    FENCED,
    Books,
    Client,
    Customers,
    Fault,
    Ledger,
    Order,
    Seat,
    draw_order,
    overlapping,
    too_many_runs,
    wrong_ends,
)
from tests.acceptance.processes import Program, fixed_ports
from tests.postgres import Postgres

pytestmark = pytest.mark.anyio

SECONDS: Final = float(os.environ.get("JOBS_CHAOS_SECONDS", "60"))
SQLITE_SECONDS: Final = float(os.environ.get("JOBS_CHAOS_SQLITE_SECONDS", "20"))
SEED: Final = int(os.environ.get("JOBS_CHAOS_SEED", "20261204"))
SETTLING_S: Final = 40  # all that is left after the last fault ends within this
CUSTOMERS: Final = 40
LONGEST_PAUSE_S: Final = 0.3  # of a customer between two orders
FEWEST_ORDERS_PER_S: Final = 10  # a tenth of what an idle machine with two cores does
# Longer than the lease (6 s), so that the process wakes up as one that has lost its jobs.
FREEZE_S: Final = 7.5
CLAIMED_AGAIN_S: Final = 8.0
# Nobody reaps until 3 s after the last failure of the database, nor within a heartbeat of its return.
MENDING_S: Final = 6.0
CYCLE_S: Final = 20.0
# Seconds into each cycle. A kill is far enough from the database's restarts for its time to be measured, but for the
# late ones, which come in every second cycle.
CYCLE: Final = (
    *((0.7, "router"), (2.7, "database"), (6.0, "kill"), (8.0, "freeze"), (9.8, "kill"), (12.0, "kill")),
    (13.4, "late database"),
)
JITTER_S: Final = 0.3
# After the end of a fault somebody may still not know of it: a client that reconnects, a lease that is found lost.
AFTERMATH_S: Final = 2.0
# Between two looks at the newest jobs.
LOOK_S: Final = 0.5
# How long SQLite's gateway lives each time, and the last one at least while there is load.
ALIVE_S: Final = (0.2, 2.0)
LAST_ALIVE_S: Final = 4.0


# The programs


class Router:
    """A mock and the router in front of it, which may be ended and started again."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        router, mock = (f"127.0.0.1:{port}" for port in fixed_ports(2))
        self.address = router
        self._environment = {
            **environment,
            "ROUTER_LISTEN": router,
            "ROUTER_METRICS": "null",
            "ROUTER_BACKENDS__MOCK__ADDRESSES": f'["{mock}"]',
            "ROUTER_DRAIN_DELAY_S": "0.2",
        }
        latencies = ("--latency", "0.05-0.15", "--latency", "sentiment=0.05-0.3")
        self._mock = Program(["mock_nn", "--listen", mock, *latencies, "--quiet"], environment)
        self._routers: list[Program] = []

    async def start(self) -> None:
        self._routers.append(Program(["router"], self._environment))
        await asyncio.to_thread(self._routers[-1].wait_for, "router listens on")

    async def end_with(self, number: signal.Signals) -> None:
        self._routers[-1].send(number)
        await asyncio.to_thread(self._routers[-1].wait)

    def end(self) -> None:
        for program in (self._mock, *self._routers):
            program.end()


@asynccontextmanager
async def programs(database_url: str, gateways: int, bytecode: Path) -> AsyncIterator[tuple[Router, list[Seat]]]:
    """Everything but the database; at the end nothing of it is left."""
    # Programs that are started again and again must not be compiled each time, where Python may not write beside them.
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode)} if sys.dont_write_bytecode else {}
    with ExitStack() as stack:
        router = Router(kept)
        stack.callback(router.end)
        environment = {
            **kept,
            "DATABASE_URL": database_url,
            "GATEWAY_LISTEN": "127.0.0.1:0",
            "GATEWAY_ROUTER": router.address,
            "GATEWAY_DRAIN_DELAY_S": "0",
            "GATEWAY_LOG_REQUESTS": "errors",
        }
        seats = [Seat(environment) for _ in range(gateways)]
        for seat in seats:
            stack.callback(seat.end)
        # The first of a kind compiles for the others.
        await asyncio.gather(router.start(), seats[0].start())
        await asyncio.gather(*(seat.start() for seat in seats[1:]))
        yield router, seats


@pytest.fixture(scope="module")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for it."""
    return tmp_path_factory.mktemp("bytecode")


# The faults


class Blow(NamedTuple):
    at_s: float
    kind: str


def plan(rng: random.Random, seconds: float) -> Iterator[Blow]:
    """What happens when, in seconds from the beginning of the load."""
    for cycle in range(round(seconds / CYCLE_S)):
        for at_s, kind in CYCLE:
            if kind != "late database" or cycle % 2:
                yield Blow(cycle * CYCLE_S + at_s + rng.uniform(-JITTER_S, JITTER_S), kind)


class Storm:
    """Does what the plan says, and notes what it did."""

    def __init__(self, seats: Sequence[Seat], router: Router, postgres: Postgres, rng: random.Random) -> None:
        self._seats = seats
        self._router = router
        self._postgres = postgres
        self._rng = rng
        self._signals = itertools.cycle((signal.SIGKILL, signal.SIGTERM))
        self._changed = asyncio.Condition()
        self.faults: list[Fault] = []

    def count(self, kind: str) -> int:
        return sum(fault.kind == kind for fault in self.faults)

    async def rage(self, blows: Iterator[Blow]) -> None:
        """Returns when everybody is back."""
        started_s = time.monotonic()
        strike: dict[str, Callable[[], Coroutine[None, None, None]]] = {
            "kill": self._kill_gateway,
            "freeze": self._freeze_gateway,
            "router": self._restart_router,
            "database": self._restart_database,
            "late database": self._restart_database,
        }
        async with asyncio.TaskGroup() as group:
            for blow in blows:
                await asyncio.sleep(started_s + blow.at_s - time.monotonic())
                group.create_task(strike[blow.kind]())

    async def _kill_gateway(self) -> None:
        seat = await self._victim()
        at_s = time.time()
        await seat.kill()
        self._note("kill", at_s, time.time())
        await seat.start()
        await self._tell()

    async def _freeze_gateway(self) -> None:
        seat = await self._victim()
        at_s = time.time()
        seat.freeze()
        await asyncio.sleep(FREEZE_S)
        seat.thaw()
        self._note("freeze", at_s, time.time() + AFTERMATH_S)
        await self._tell()

    async def _restart_router(self) -> None:
        at_s = time.time()
        await self._router.end_with(next(self._signals))
        await self._router.start()
        self._note("router", at_s, time.time() + AFTERMATH_S)

    async def _restart_database(self) -> None:
        at_s = time.time()
        await asyncio.to_thread(self._postgres.stop_immediately)
        await asyncio.to_thread(self._postgres.start)
        self._note("database", at_s, time.time() + AFTERMATH_S)

    async def _victim(self) -> Seat:
        """One that serves, as soon as there is another one that does."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._serving()) > 1)
        return self._rng.choice(self._serving())

    def _serving(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.state == "serving"]

    def _note(self, kind: str, from_s: float, until_s: float) -> None:
        self.faults.append(Fault(kind, from_s, until_s))

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


# The load


class Load:
    """Customers until `stop`, and those who follow, cancel and look at what was ordered."""

    def __init__(self, seats: Sequence[Seat], ledger: Ledger, seed: str) -> None:
        self._ledger = ledger
        self._seed = seed
        self._numbers = itertools.count(1)
        self._customers = Customers(seats, ledger, random.Random(f"{seed} clients"))
        self._is_over = asyncio.Event()

    def stop(self) -> None:
        """`run` returns when all that was begun is done."""
        self._is_over.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CUSTOMERS):
                group.create_task(self._order(group, random.Random(f"{self._seed} {number}")))
            group.create_task(self._look())

    async def _order(self, group: asyncio.TaskGroup, rng: random.Random) -> None:
        with self._customers.client() as client:
            while not self._is_over.is_set():
                order = draw_order(rng, next(self._numbers))
                if rng.random() < 0.1:
                    job_id = await self._order_twice(order)
                else:
                    job_id = await self._customers.submit(client, order)
                self._do_more(group, rng, order, job_id)
                await asyncio.sleep(rng.uniform(0, LONGEST_PAUSE_S))

    async def _order_twice(self, order: Order) -> str:
        """At the same time, with one key."""
        with self._customers.client() as one, self._customers.client() as other:
            return (await asyncio.gather(*(self._customers.submit(client, order) for client in (one, other))))[0]

    def _do_more(self, group: asyncio.TaskGroup, rng: random.Random, order: Order, job_id: str) -> None:
        match rng.choices(("nothing", "events", "polls", "cancel", "misuse"), (70, 12, 8, 8, 2))[0]:
            case "events":
                group.create_task(self._alone(lambda client: self._customers.follow_events(client, job_id)))
            case "polls":
                group.create_task(self._alone(lambda client: self._customers.follow_polls(client, job_id)))
            case "cancel":
                group.create_task(self._cancel_after(rng.choice((0, rng.uniform(0, 0.5))), order, job_id))
            case "misuse":
                group.create_task(self._alone(lambda client: self._customers.submit_something_else(client, order)))

    async def _cancel_after(self, delay_s: float, order: Order, job_id: str) -> None:
        await asyncio.sleep(delay_s)
        await self._alone(lambda client: self._customers.cancel(client, order, job_id))

    async def _alone(self, do: Callable[[Client], Awaitable[None]]) -> None:
        with self._customers.client() as client:
            await do(client)

    async def _look(self) -> None:
        """At the newest jobs, again and again."""
        with self._customers.client() as client:
            while not self._is_over.is_set():
                await self._customers.look_at_pages(client, pages=2)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._is_over.wait(), LOOK_S)

    async def settle(self) -> set[str]:
        """Waits until every job has been seen to end; returns the ids of all that the pages show then."""
        with self._customers.client() as client:
            await self._customers.look_at_pages(client)
            for job_id in self._ledger.open_ids():
                await self._customers.follow_polls(client, job_id)
            return await self._customers.look_at_pages(client)


# What the database holds when everybody is gone: by id, what a client was shown of it.

SELECT_JOBS: Final = "SELECT id, status, attempt, version FROM jobs"
Rows: TypeAlias = dict[str, tuple[str, int, int]]


def rows_of(records: Iterable[Sequence[object]]) -> Rows:
    return {
        str(UUID(str(job_id))): (str(status), int(str(attempt)), int(str(version)))
        for job_id, status, attempt, version in records
    }


def rows_in_postgres(postgres: Postgres, database: str) -> Rows:
    return rows_of(line.split("|") for line in postgres.run_sql(SELECT_JOBS, database).splitlines())


def rows_in_sqlite(path: Path) -> Rows:
    """Of a file that must be in order."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return rows_of(connection.execute(SELECT_JOBS))


def shown(ledger: Ledger) -> Rows:
    """What the clients were shown at last."""
    ends = ((job_id, history.end) for job_id, history in ledger.histories.items() if history.end is not None)
    return {job_id: (end["status"], end["attempt"], end["version"]) for job_id, end in ends}


def check(ledger: Ledger, books: Books, faults: Sequence[Fault]) -> None:
    """All but the database and the times."""
    problems = [*ledger.problems, *wrong_ends(ledger), *books.runs_twice(), *too_many_runs(ledger, faults)]
    problems += books.ends_of_others(ledger)
    told = [f"{len(problems)} problems and {len(books.complaints)} lines that tell of a bug:"]
    assert not problems + books.complaints, "\n".join(told + problems[:20] + books.complaints[:20])


def describe(ledger: Ledger) -> str:
    retried = sum(count for name, count in ledger.counts.items() if name.startswith("submits "))
    counts = {name: ledger.counts[name] for name in sorted(ledger.counts)}
    return f"jobs {len(ledger.histories)} {dict(ledger.ends())}, submits retried {retried}\nrequests {counts}"


def missing(ledger: Ledger, ids: AbstractSet[str]) -> int:
    return len(ledger.acknowledged_ids() - ids)


def doubled(ledger: Ledger, ids: AbstractSet[str]) -> int:
    return len(ids) - len(ledger.orders)


# PostgreSQL


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """Durable, as it comes: what is killed here must not rest on `fsync=off`."""
    cluster = Postgres()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def longest_allowed_s(killed_at_s: float, faults: Sequence[Fault]) -> float:
    """Until a killed gateway's jobs are claimed again: longer only where the database or the router was away then."""
    away = [fault for fault in faults if fault.kind in ("database", "router")]
    met = overlapping(away, killed_at_s, killed_at_s + CLAIMED_AGAIN_S)
    return CLAIMED_AGAIN_S + sum(fault.until_s - fault.from_s + MENDING_S for fault in met)


@pytest.mark.timeout(SECONDS + 120)
async def test_three_gateways_on_postgresql_lose_no_job_and_double_none(postgres: Postgres, bytecode: Path) -> None:
    ledger, rng = Ledger(), random.Random(SEED)
    url = postgres.create_database("chaos")
    async with programs(url, gateways=3, bytecode=bytecode) as (router, seats):
        storm = Storm(seats, router, postgres, rng)
        load = Load(seats, ledger, f"{SEED} postgresql")
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            await storm.rage(plan(rng, SECONDS))
            await asyncio.sleep(started_s + SECONDS - time.monotonic())
            load.stop()
        async with asyncio.timeout(SETTLING_S):
            on_pages = await load.settle()
        assert await asyncio.gather(*(seat.stop() for seat in seats)) == [0, 0, 0]
        stored = rows_in_postgres(postgres, "chaos")

    books = Books(life for seat in seats for life in seat.lives)
    again = list(books.claimed_again(ledger))
    undisturbed = [s for killed_at_s, s in again if longest_allowed_s(killed_at_s, storm.faults) == CLAIMED_AGAIN_S]
    print(
        f"\nseed {SEED}, {SECONDS:g} s on PostgreSQL: {describe(ledger)}"
        f"\nkills {storm.count('kill')}, freezes {storm.count('freeze')}, database restarts {storm.count('database')}, "
        f"router restarts {storm.count('router')}"
        f"\nfenced finishes {books.notes[FENCED]}, abandoned runs {books.notes[ABANDONED]}, "
        f"claimed again after a kill {len(again)}, at most {max(undisturbed, default=0):.2f} s later "
        f"({max((s for _, s in again), default=0):.2f} s with the database or the router away)"
        f"\nlost={missing(ledger, stored.keys())}, duplicated={doubled(ledger, stored.keys())}"
    )
    check(ledger, books, storm.faults)
    assert stored == shown(ledger)
    assert on_pages == ledger.acknowledged_ids() == stored.keys()
    late = [(at_s, s) for at_s, s in again if s > longest_allowed_s(at_s, storm.faults)]
    assert late == []
    assert len(ledger.orders) >= FEWEST_ORDERS_PER_S * SECONDS
    assert again, "no kill met a run"


# SQLite


def copy_of(database: Path, directory: Path) -> Path:
    """The files as a dead process left them, without what only a living one needs."""
    directory.mkdir()
    for path in (database, database.with_name(f"{database.name}-wal")):
        if path.exists():
            shutil.copy(path, directory)
    return directory / database.name


async def kill_again_and_again(
    seat: Seat, ledger: Ledger, database: Path, rng: random.Random, seconds: float
) -> list[Fault]:
    """Each time what was acknowledged must be in the files, before anybody mends them."""
    faults: list[Fault] = []
    ends_s = time.monotonic() + seconds
    while time.monotonic() < ends_s - LAST_ALIVE_S:
        await asyncio.sleep(rng.uniform(*ALIVE_S))
        at_s, acknowledged = time.time(), ledger.acknowledged_ids()
        await seat.kill()
        files = copy_of(database, database.parent / f"killed-{len(faults)}")
        stored = await asyncio.to_thread(rows_in_sqlite, files)
        assert acknowledged <= stored.keys(), f"lost: {acknowledged - stored.keys()}"
        await seat.start()
        faults.append(Fault("kill", at_s, time.time()))
    await asyncio.sleep(ends_s - time.monotonic())
    return faults


@pytest.mark.timeout(SQLITE_SECONDS + 100)
async def test_a_gateway_on_sqlite_that_is_killed_over_and_over_loses_no_job(tmp_path: Path, bytecode: Path) -> None:
    ledger, rng = Ledger(), random.Random(SEED)
    database = tmp_path / "jobs.sqlite3"
    async with programs(f"sqlite:///{database}", gateways=1, bytecode=bytecode) as (_, seats):
        (seat,) = seats
        load = Load(seats, ledger, f"{SEED} sqlite")
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            faults = await kill_again_and_again(seat, ledger, database, rng, SQLITE_SECONDS)
            load.stop()
        async with asyncio.timeout(SETTLING_S):
            on_pages = await load.settle()
        assert await seat.stop() == 0
        stored = rows_in_sqlite(database)

    books = Books(seat.lives)
    print(
        f"\nseed {SEED}, {SQLITE_SECONDS:g} s on SQLite: {describe(ledger)}"
        f"\nkills {len(faults)}, fenced finishes {books.notes[FENCED]}, integrity_check ok {len(faults) + 1} times"
        f"\nlost={missing(ledger, stored.keys())}, duplicated={doubled(ledger, stored.keys())}"
    )
    check(ledger, books, faults)
    assert stored == shown(ledger)
    assert on_pages == ledger.acknowledged_ids() == stored.keys()
    assert len(ledger.orders) >= FEWEST_ORDERS_PER_S * SQLITE_SECONDS / 5  # it is down for most of the time
