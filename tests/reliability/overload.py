"""Rows 10 and 11: more than the model can do, from everybody and from one tenant.

The times are a hundredth of what models take that compute for seconds: U(3, 7) s and deadlines of 12 s are here
U(0.03, 0.07) and 0.12, so each millisecond that the router itself needs counts for a tenth of a second there.

What the model can do is measured under the same router with more callers than it needs. In a window of seconds chance
makes its times longer or shorter by several per cent, so each window is held against its own times: slots x rows of a
batch / mean time of a call, and what the router made of that when it could not run dry.
"""

import asyncio
import random
from collections.abc import Mapping

from tests.reliability.cluster import Router, cluster, mock, total
from tests.reliability.connection import Connection
from tests.reliability.ledger import Key, Ledger, percentile
from tests.reliability.load import closed_loop, open_loop
from tests.reliability.report import Report

KEY = Key("churn", "buyer", 4)
LOW_S, HIGH_S, DEADLINE_S = 0.03, 0.07, 0.12
SLOTS = 4
MAX_BATCH_ROWS = 16
ROWS_PER_CALL = 8
# What the model can do at most, by its settings.
CAPACITY = SLOTS * MAX_BATCH_ROWS / ((LOW_S + HIGH_S) / 2)
REFUSED_S = 0.05
MODEL = {"backend": "nn", "max_batch_size": MAX_BATCH_ROWS}
SETTLE_S = 0.5
TENANTS = 9


async def overload(seed: int, levels: tuple[float, ...], seconds: float) -> Report:
    """Poisson calls with deadlines at several times the capacity, which is measured first in the same run."""
    report = Report(10, f"overload at {', '.join(f'{level:g}' for level in levels)} times the capacity", seed)
    rng = random.Random(seed)
    server = mock("--latency", f"{LOW_S}-{HIGH_S}", "--seed", f"{seed}")
    async with cluster({"nn": [server]}, backend={"max_in_flight": SLOTS}, models=[MODEL]) as router:
        report.watch(router, server.program.pid)
        ledger = Ledger()
        connection = Connection(ledger, router.address)
        async with ledger.metronome(), connection.running():
            capacity, share = await _capacity(connection, router, seconds)
            report.tell("capacity, rows/s", f"{capacity:,.0f}, {share:.1%} of slots x rows / time")
            resident_bytes = router.resident_bytes()
            for level in levels:
                await _overload(report, connection, router, level, share, seconds, rng)
            await ledger.wait_until_closed(5)
            begun_at = asyncio.get_running_loop().time()
            await _offer(connection, "after", 0.3 * capacity, max(seconds / 2, 1.0), rng)
            await report.close(ledger, router)
        after = ledger.latencies("after", begun_at)
        grown_bytes = router.resident_bytes() - resident_bytes
    report.tell("afterwards, at 0.3 times: p99, s", percentile(after, 0.99))
    report.timed("afterwards p99 is at most two service times", percentile(after, 0.99) <= 2 * HIGH_S)
    report.tell("the router has grown by, bytes", grown_bytes)
    report.claim("the router's memory is bounded", grown_bytes < 30_000_000)
    return report


async def _capacity(connection: Connection, router: Router, seconds: float) -> tuple[float, float]:
    """What is answered when there is always more than enough: rows a second, and as a share of what its times allow."""
    ledger = connection.ledger
    callers = 4 * SLOTS * MAX_BATCH_ROWS // ROWS_PER_CALL
    await closed_loop(callers, SETTLE_S, lambda: connection.ask(KEY, ledger.make_rows(ROWS_PER_CALL, KEY.dim)))
    before, metrics = ledger.rows[""], await router.metrics()
    loop = asyncio.get_running_loop()
    begun_at = loop.time()
    await closed_loop(callers, seconds, lambda: connection.ask(KEY, ledger.make_rows(ROWS_PER_CALL, KEY.dim)))
    capacity = (ledger.rows[""] - before) / (loop.time() - begun_at)
    return capacity, capacity / _possible(metrics, await router.metrics())


def _possible(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Rows a second if full batches had taken all slots for as long as the batches of this window took."""
    seconds, batches = (
        total(after, f"router_batch_seconds_{what}") - total(before, f"router_batch_seconds_{what}")
        for what in ("sum", "count")
    )
    return SLOTS * MAX_BATCH_ROWS * batches / seconds


async def _overload(
    report: Report,
    connection: Connection,
    router: Router,
    level: float,
    share: float,
    seconds: float,
    rng: random.Random,
) -> None:
    label = f"{level:g} times"
    ledger, loop = connection.ledger, asyncio.get_running_loop()
    await _offer(connection, label, level * CAPACITY, SETTLE_S, rng)
    metrics = await router.metrics()
    cpu_s, begun_at, good, asked = router.cpu_s(), loop.time(), ledger.good_rows[label], ledger.rows_asked
    await _offer(connection, label, level * CAPACITY, seconds, rng)
    took_s = loop.time() - begun_at
    capacity = share * _possible(metrics, await router.metrics())
    goodput = (ledger.good_rows[label] - good) / took_s
    refused = ledger.latencies(label, begun_at, code="RESOURCE_EXHAUSTED")
    expired = ledger.latencies(label, begun_at, code="DEADLINE_EXCEEDED")
    report.tell(
        f"at {label}, rows/s",
        f"{(ledger.rows_asked - asked) / took_s:,.0f} offered, {goodput:,.0f} answered in time "
        f"({goodput / capacity:.1%} of the capacity); {len(refused):,} calls refused, p99 "
        f"{percentile(refused, 0.99):.4f} s; {len(expired):,} expired; "
        f"router at {(router.cpu_s() - cpu_s) / took_s:.0%} of a core",
    )
    report.timed(f"at {label} the goodput is at least 95 % of the capacity", goodput >= 0.95 * capacity)
    report.timed(f"at {label} refusals take less than 50 ms, p99", not refused or percentile(refused, 0.99) < REFUSED_S)


async def _offer(connection: Connection, label: str, rows_per_s: float, seconds: float, rng: random.Random) -> None:
    ledger = connection.ledger

    def ask() -> None:
        connection.ask(KEY, ledger.make_rows(ROWS_PER_CALL, KEY.dim), timeout_s=DEADLINE_S, label=label)

    await open_loop(rows_per_s / ROWS_PER_CALL, seconds, rng, ask)


async def flood(seed: int, seconds: float, times: float) -> Report:
    """One tenant asks for a hundred times as much as each of nine others, far more than the model can do."""
    report = Report(11, f"one tenant floods, {times:g} times the others", seed)
    rng = random.Random(seed)
    quiet = 0.15 * CAPACITY / TENANTS
    server = mock("--latency", f"{LOW_S}-{HIGH_S}", "--seed", f"{seed}")
    settings = {"trust_tenant": True}
    async with cluster({"nn": [server]}, backend={"max_in_flight": SLOTS}, models=[MODEL], **settings) as router:
        report.watch(router, server.program.pid)
        ledger = Ledger()
        connection = Connection(ledger, router.address)

        def ask(tenant: str, label: str, rows: int, timeout_s: float) -> None:
            connection.ask(KEY, ledger.make_rows(rows, KEY.dim), timeout_s=timeout_s, label=label, tenant=tenant)

        async def others(label: str) -> None:
            def one() -> None:
                ask(f"tenant {rng.randrange(TENANTS)}", label, 1, 30)

            await open_loop(quiet * TENANTS, seconds, rng, one)

        async with ledger.metronome(), connection.running():
            await others("warm-up")
            await others("alone")
            flooding = asyncio.create_task(
                open_loop(quiet * times / 10, 1e9, rng, lambda: ask("flooder", "flood", 10, 0.5))
            )
            await asyncio.sleep(SETTLE_S)
            await others("flooded")
            flooding.cancel()
            await asyncio.wait([flooding])
            await report.close(ledger, router)
    alone, flooded = (percentile(ledger.latencies(label), 0.99) for label in ("alone", "flooded"))
    failed = sum(ledger.rows.values()) - ledger.rows[""]
    report.tell(
        "rows/s of each of the others, and of the flood",
        f"{quiet:.0f}, {quiet * times:,.0f} ({quiet * times / CAPACITY:.1f} times the capacity)",
    )
    report.tell("p99 of the others alone, flooded, s", f"{alone:.4f}, {flooded:.4f}: {flooded / alone:.2f} times")
    report.tell("rows of the flood that were turned away", f"{failed:,}")
    report.timed("the others' p99 is at most 1.5 times of alone", flooded <= 1.5 * alone)
    served = sum(len(ledger.latencies(label)) for label in ("warm-up", "alone", "flooded"))
    asked = sum(len(samples.sent_at) for (label, _), samples in ledger.samples.items() if label != "flood")
    report.claim("none of the others' rows fails", served == asked)
    return report
