"""Row 6: rows that a model cannot compute, and rows that kill it."""

import asyncio
import contextlib
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.reliability.cluster import Server, cluster, witness
from tests.reliability.connection import Connection
from tests.reliability.ledger import Call, Key, Ledger, row_ids
from tests.reliability.load import open_loop
from tests.reliability.report import Report
from tests.reliability.witness import CRASH, CRASHED, NAMED, NAMING, POISON, POISONED, Executed, read_record

KEY = Key("churn", "buyer", 4)
REPLICAS = 4
MAX_BATCH_ROWS = 64
# Extra calls that one poison row may cost in a batch of so many rows.
MOST_EXTRA_CALLS = {8: 9, 64: 17}
MAX_CRASHES = 3


async def poison(
    seed: int, rows: int, share: float, latency: str, rows_per_s: float, *, is_named: bool = False
) -> Report:
    """A share of the rows cannot be computed; offered is at most 8 % of what the clean rows would allow.

    `is_named`: the model tells which rows they are.
    """
    report = Report(6, f"{share:.1%} of the rows are poison{', and named by the model' * is_named}", seed)
    marker, outcome = (NAMED, NAMING) if is_named else (POISON, POISONED)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        record = Path(directory) / "record"
        server = witness(record, "--latency", latency, "--seed", f"{seed}", ports=REPLICAS)
        calls = await _offer(report, [server], rows, marker, share, rows_per_s, rng)
        executed = read_record(record)
    bad = _ids(calls, marker)
    _tell_of_innocents(report, calls, marker)
    report.claim("every poison row fails", all(call.codes[""] == 0 for call in calls if call.matrix[0, 2] == marker))
    report.tell("calls of the model", Counter(batch.outcome for batch in executed))
    for most_rows, most_unnamed in MOST_EXTRA_CALLS.items():
        extra = sorted(_extra_calls(executed, bad, most_rows, outcome))
        if extra:
            mean = sum(extra) / len(extra)
            what = f"extra calls for a poison row alone in a batch of at most {most_rows}"
            report.tell(what, f"mean {mean:.1f}, most {extra[-1]}, {len(extra)} cases")
            most_calls = 0 if is_named else most_unnamed
            report.claim(f"at most {most_calls} extra calls", extra[-1] <= most_calls)
    return report


async def crashes(seed: int, rows: int, share: float, latency: str, rows_per_s: float) -> Report:
    """A share of the rows kills the process that computes them; it comes back at once."""
    report = Report(6, f"{share:.2%} of the rows kill the model server", seed)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        record = Path(directory) / "record"
        servers = [witness(record, "--latency", latency, "--seed", f"{seed} {number}") for number in range(REPLICAS)]
        calls = await _offer(report, servers, rows, CRASH, share, rows_per_s, rng)
        executed = read_record(record)
    deadly = _ids(calls, CRASH)
    deaths = Counter(row for batch in executed if batch.outcome == CRASHED for row in batch.ids if row in deadly)
    report.tell("rows that kill, and how often each did", f"{len(deadly)}: {sorted(deaths.values())}")
    _tell_of_innocents(report, calls, CRASH)
    report.claim("each of them kills at most 3 times", max(deaths.values(), default=0) <= MAX_CRASHES)
    report.claim("each of them fails", all(call.codes[""] == 0 for call in calls if call.matrix[0, 2] == CRASH))
    report.claim("there were some", bool(deadly))
    return report


async def _offer(
    report: Report,
    servers: Sequence[Server],
    rows: int,
    marker: float,
    share: float,
    rows_per_s: float,
    rng: random.Random,
) -> list[Call]:
    """Calls of one row, Poisson; a share of them is marked. Servers that are gone come back."""
    model = {"backend": "nn", "max_batch_size": MAX_BATCH_ROWS, "max_queue_delay_s": 0.01}
    async with cluster({"nn": servers}, backend={"max_in_flight": 1}, models=[model]) as router:
        report.watch(router)
        ledger = Ledger()
        calls: list[Call] = []
        ledger.on_end = calls.append
        connection = Connection(ledger, router.address)

        def ask() -> None:
            rows = ledger.make_rows(1, KEY.dim, marker if rng.random() < share else 0.0)
            connection.ask(KEY, rows, timeout_s=30)

        async with ledger.metronome(), connection.running(), _kept_up(servers):
            await open_loop(rows_per_s, rows / rows_per_s, rng, ask)
            await report.close(ledger, router)
    return calls


@contextlib.asynccontextmanager
async def _kept_up(servers: Sequence[Server]) -> AsyncIterator[None]:
    """As an orchestrator does it: one that is gone is started again."""
    keepers = [asyncio.create_task(_keep_up(server)) for server in servers]
    try:
        yield
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.wait(keepers)


async def _keep_up(server: Server) -> None:
    while True:
        await asyncio.to_thread(server.program.wait_long)
        await server.start()


def _tell_of_innocents(report: Report, calls: Sequence[Call], marker: float) -> None:
    innocent = [call for call in calls if call.matrix[0, 2] != marker]
    failed = [call for call in innocent if not call.codes[""]]
    report.tell("innocent rows, and those that failed", f"{len(innocent):,}, {len(failed)}")
    report.claim("less than 0.01 % of the innocent rows fail", len(failed) < max(0.0001 * len(innocent), 1))
    report.problems += [f"an innocent row failed: {call.messages}" for call in failed[:3]]


def _ids(calls: Sequence[Call], marker: float) -> set[int]:
    return {row for call in calls if call.matrix[0, 2] == marker for row in row_ids(call.matrix)}


def _extra_calls(executed: Sequence[Executed], bad: set[int], most_rows: int, outcome: str) -> list[int]:
    """Per poison row that was the only one of its first batch: how many more calls had rows of that batch."""
    calls_of: dict[int, list[Executed]] = {}
    for batch in executed:
        for row in batch.ids:
            calls_of.setdefault(row, []).append(batch)
    first = {row: min(calls_of[row], key=lambda batch: batch.began_at) for row in bad if row in calls_of}
    return [
        len({id(later) for row in batch.ids for later in calls_of[row]}) - 1
        for batch in first.values()
        if batch.outcome == outcome and len(bad.intersection(batch.ids)) == 1 and len(batch.ids) <= most_rows
    ]
