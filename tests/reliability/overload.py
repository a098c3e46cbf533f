"""Row 11: more than the model can do, from one tenant.

The times are a hundredth of what models take that compute for seconds: U(3, 7) s and deadlines of 12 s are here
U(0.03, 0.07) and 0.12, so each millisecond that the router itself needs counts for a tenth of a second there.
"""

import asyncio
import random

from tests.reliability.cluster import cluster, mock
from tests.reliability.connection import Connection
from tests.reliability.ledger import Key, Ledger, percentile
from tests.reliability.load import open_loop
from tests.reliability.report import Report

KEY = Key("churn", "buyer", 4)
LOW_S, HIGH_S, DEADLINE_S = 0.03, 0.07, 0.12
SLOTS = 4
MAX_BATCH_ROWS = 16
ROWS_PER_CALL = 8
# What the model can do at most, by its settings; what it does is measured.
CAPACITY = SLOTS * MAX_BATCH_ROWS / ((LOW_S + HIGH_S) / 2)
REFUSED_S = 0.05
MODEL = {"backend": "nn", "max_batch_size": MAX_BATCH_ROWS}
SETTLE_S = 0.5
TENANTS = 9


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
