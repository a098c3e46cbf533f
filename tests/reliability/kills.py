"""Row 2: model servers that are killed under load."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping

from tests.reliability.cluster import Server, cluster, mock
from tests.reliability.ledger import Call, Connection, Key, Ledger, percentile
from tests.reliability.load import open_loop
from tests.reliability.report import Report

REPLICAS = 4
KEYS = [Key("churn", "buyer", 4), Key("churn", "seller", 4), Key("fraud", "buyer", 8), Key("fraud", "", 5)]
REQUEUE_S = 0.2


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
    report.claim(
        "what a kill hit is sent again within 200 ms", percentile(again, 0.99) <= REQUEUE_S + ledger.worst_lag_s
    )
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
