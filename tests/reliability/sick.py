"""Row 14: one of four replicas is slow, or fails half of its batches, and recovers."""

import asyncio
import random
import signal
import tempfile
from pathlib import Path

from tests.reliability.cluster import Router, cluster, total, witness
from tests.reliability.connection import Connection
from tests.reliability.ledger import Key, Ledger, percentile
from tests.reliability.load import open_loop
from tests.reliability.report import Report

KEY = Key("churn", "buyer", 4)
REPLICAS = 4
MAX_BATCH_ROWS = 64
CALLS_PER_S = 250
EJECTED_S, BACK_S = 10.0, 60.0


async def slow(seed: int, seconds: float, ejection_s: float) -> Report:
    """Five times as slow as its peers."""
    report = Report(14, "one of four replicas takes five times as long", seed)
    await _fall_sick(report, ("--slow", "5"), seed, seconds, ejection_s)
    return report


async def flapping(seed: int, seconds: float, ejection_s: float) -> Report:
    """Every second batch ends in UNAVAILABLE."""
    report = Report(14, "one of four replicas fails half of its batches", seed)
    await _fall_sick(report, ("--errors", "0.5"), seed, seconds, ejection_s)
    return report


async def _fall_sick(report: Report, flags: tuple[str, ...], seed: int, seconds: float, ejection_s: float) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        record = Path(directory) / "record"
        common = ("--latency", "0.02-0.05", "--seed", f"{seed}")
        well = witness(record, *common, ports=REPLICAS - 1)
        patient = witness(record, *common, *flags)
        model = {"backend": "nn", "max_batch_size": MAX_BATCH_ROWS}
        backend = {"max_in_flight": 1, "ejection_s": ejection_s}
        async with cluster({"nn": [well, patient]}, backend=backend, models=[model]) as router:
            report.watch(router, well.program.pid, patient.program.pid)
            ledger = Ledger()
            connection = Connection(ledger, router.address)

            def ask() -> None:
                connection.ask(KEY, ledger.make_rows(rng.randint(1, 4), KEY.dim), timeout_s=30, explain=True)

            async with ledger.metronome(), connection.running():
                load = asyncio.create_task(open_loop(CALLS_PER_S, 1e9, rng, ask))
                loop = asyncio.get_running_loop()
                await asyncio.sleep(1.0)
                healthy_from = loop.time()
                await asyncio.sleep(seconds)
                patient.program.send(signal.SIGUSR1)
                await asyncio.to_thread(patient.program.wait_for, "sick")
                sick_at = loop.time()
                ejected_s = await _until(router, 1, EJECTED_S)
                ejected_at = loop.time()
                await asyncio.sleep(seconds)
                patient.program.send(signal.SIGUSR1)
                await asyncio.to_thread(patient.program.wait_for, "well")
                cured_at = loop.time()
                back_s = await _until(router, 0, BACK_S)
                await asyncio.sleep(seconds / 2)
                load.cancel()
                await asyncio.wait([load])
                await report.close(ledger, router)
    healthy = percentile(ledger.latencies("", healthy_from, sick_at - 0.2), 0.99)
    ejected = percentile(ledger.latencies("", ejected_at, cured_at), 0.99)
    report.tell("ejected after, s; back after, s", f"{ejected_s:.2f}, {back_s:.2f}")
    report.tell("p99 before and while ejected, s", f"{healthy:.4f}, {ejected:.4f}: {ejected / healthy:.2f} times")
    report.tell("rows by attempts", dict(sorted(ledger.attempts.items())))
    report.claim("every row is answered", ledger.rows[""] == ledger.rows_asked)
    report.claim(f"it is ejected within {EJECTED_S:g} s", ejected_s < EJECTED_S)
    report.timed("the key's p99 is at most 1.3 times the healthy one", ejected <= 1.3 * healthy)
    report.claim(f"it is back within {BACK_S:g} s of its cure", back_s < BACK_S)


async def _until(router: Router, ejected: int, patience_s: float) -> float:
    """The seconds until so many replicas are ejected; infinity when that does not happen."""
    loop = asyncio.get_running_loop()
    begun_at = loop.time()
    while loop.time() < begun_at + patience_s:
        if total(await router.metrics(), "router_ejected_replicas") == ejected:
            return loop.time() - begun_at
        await asyncio.sleep(0.02)
    return float("inf")
