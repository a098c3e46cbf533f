"""Rows 2 and 3: model servers that are killed, and model servers that freeze, under load."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Mapping

from tests.reliability.cluster import Server, cluster, mock
from tests.reliability.connection import Connection
from tests.reliability.ledger import Call, Key, Ledger, percentile
from tests.reliability.load import open_loop
from tests.reliability.report import Report

REPLICAS = 4
KEYS = [Key("churn", "buyer", 4), Key("churn", "seller", 4), Key("fraud", "buyer", 8), Key("fraud", "", 5)]
REQUEUE_S, BUSY_REQUEUE_S = 0.2, 1.0
# That a suspect needs to be found where probes come every 4 s; here they come more often.
PROBE_S, SUSPECT_S = 0.5, 3.0


async def kills(seed: int, count: int, calls_per_s: float, pause_s: tuple[float, float]) -> Report:
    """Kill -9 one of four again and again; each comes back on its port."""
    report = Report(2, f"kill -9 a model server {count} times", seed)
    rng = random.Random(seed)
    servers = [mock("--latency", "0.02-0.05", "--seed", str(number)) for number in range(REPLICAS)]
    killed_at: list[float] = []

    async def kill() -> None:
        loop = asyncio.get_running_loop()
        returning: set[asyncio.Task[None]] = set()
        while len(killed_at) < count:
            await asyncio.sleep(rng.uniform(*pause_s))
            while sum(server.is_up for server in servers) <= REPLICAS // 2:
                await asyncio.wait(returning, return_when=asyncio.FIRST_COMPLETED)
            victim = rng.choice([server for server in servers if server.is_up])
            killed_at.append(loop.time())
            await victim.kill()
            returning.add(asyncio.create_task(victim.start()))
        await asyncio.gather(*returning)

    async with under_load(report, servers, calls_per_s, rng) as (ledger, calls):
        await kill()
    again = sorted(
        call.sent_at + call.explanations[0].queued_s - max(at for at in killed_at if at < call.sent_at + call.latency_s)
        for call in calls
        if call.explanations and call.explanations[0].attempts > 1 and len(call.explanations) == 1
    )
    asked = ledger.rows_asked
    report.tell("kills", len(killed_at))
    report.tell("rows by attempts", dict(sorted(ledger.attempts.items())))
    report.tell("sent again after the kill, s: p50, p99, max", _spread(again))
    report.claim("at least 99.9 % of the rows succeed", ledger.rows[""] >= 0.999 * asked)
    report.claim("within three attempts", max(ledger.attempts, default=0) <= 3)
    report.claim("kills have hit rows", bool(again))
    p99_s = percentile(again, 0.99) - ledger.worst_lag_s
    report.timed("what a kill hit is sent again within 200 ms", p99_s <= REQUEUE_S)
    report.claim("what a kill hit is sent again within 1 s, on a machine without time, too", p99_s <= BUSY_REQUEUE_S)
    return report


async def freezes(seed: int, count: int, calls_per_s: float, frozen_s: float) -> Report:
    """SIGSTOP one of four, and let it go on later: what it answers then is nobody's."""
    report = Report(3, f"SIGSTOP a model server {count} times for {frozen_s:g} s", seed)
    rng = random.Random(seed)
    servers = [mock("--latency", "0.02-0.05", "--seed", str(number)) for number in range(REPLICAS)]
    settings = {"probe_interval_s": PROBE_S}
    async with under_load(report, servers, calls_per_s, rng, settings) as (ledger, calls):
        loop = asyncio.get_running_loop()
        for _ in range(count):
            await asyncio.sleep(1.0)
            victim = rng.choice(servers)
            victim.program.send(signal.SIGSTOP)
            await asyncio.sleep(frozen_s)
            victim.program.send(signal.SIGCONT)
            await asyncio.sleep(0.5)
        done_at = loop.time()
    slowest = max((call.latency_s for call in calls if call.sent_at < done_at), default=0.0)
    report.tell("rows by attempts", dict(sorted(ledger.attempts.items())))
    report.tell("the slowest call, s", slowest)
    report.claim("every row is answered", ledger.rows[""] == ledger.rows_asked)
    report.claim("rows on the frozen server are run elsewhere", any(attempts > 1 for attempts in ledger.attempts))
    report.timed(f"a frozen server is found within {SUSPECT_S:g} s", slowest < SUSPECT_S)
    report.claim("it was frozen for longer than that", frozen_s > SUSPECT_S)
    return report


@contextlib.asynccontextmanager
async def under_load(
    report: Report,
    servers: list[Server],
    calls_per_s: float,
    rng: random.Random,
    backend: Mapping[str, object] | None = None,
) -> AsyncIterator[tuple[Ledger, list[Call]]]:
    """Poisson calls of 1-20 rows for four keys for the length of a block, and then the end of the books."""
    async with cluster({"nn": servers}, backend={"max_in_flight": 1, **(backend or {})}) as router:
        report.watch(router)
        ledger = Ledger()
        calls: list[Call] = []
        ledger.on_end = calls.append
        connection = Connection(ledger, router.address)

        def ask() -> None:
            key = rng.choice(KEYS)
            rows = ledger.make_rows(rng.randint(1, 20), key.dim)
            connection.ask(key, rows, timeout_s=30, explain=True)

        async with ledger.metronome(), connection.running():
            load = asyncio.create_task(open_loop(calls_per_s, 1e9, rng, ask))
            yield ledger, calls
            load.cancel()
            await asyncio.wait([load])
            await report.close(ledger, router)


def _spread(ascending: list[float]) -> str:
    return ", ".join(f"{percentile(ascending, share):.3f}" for share in (0.5, 0.99, 1.0))
