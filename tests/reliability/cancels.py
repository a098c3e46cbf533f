"""Row 8: callers who give up and deadlines that pass, at random instants: in the queue, in a batch, being answered."""

import asyncio
import random

from tests.reliability.cluster import cluster, mock
from tests.reliability.connection import Connection
from tests.reliability.ledger import Call, Key, Ledger, percentile
from tests.reliability.load import open_loop
from tests.reliability.report import Report

KEY = Key("churn", "buyer", 4)
LOW_S, HIGH_S = 0.02, 0.05
SLOTS = 4
MAX_BATCH_ROWS = 16
FREED_S = 0.05
# In the middle of a flood that is cancelled, a caller who comes then waits for a batch that is out and for his own.
AFTER_FLOOD_S = 2 * HIGH_S + FREED_S
CALLS_PER_S = 400
LATEST_S = 0.15  # after its beginning a caller gives up by then
GROWTH_BYTES_PER_CANCEL = 1.0
GROWTH_NOISE_BYTES = 2_000_000


async def cancels(seed: int, count: int, floods: int) -> Report:
    """Every third call is cancelled, every third has a deadline it may miss, one in three is innocent."""
    report = Report(8, f"{count:,} calls that are cancelled or expire at random instants", seed)
    rng = random.Random(seed)
    server = mock("--latency", f"{LOW_S}-{HIGH_S}")
    async with cluster({"nn": [server]}, backend={"max_in_flight": SLOTS}) as router:
        report.watch(router, server.program.pid)
        ledger = Ledger()
        connection = Connection(ledger, router.address)
        loop = asyncio.get_running_loop()

        def ask() -> None:
            rows = ledger.make_rows(rng.randint(1, 8), KEY.dim)
            match rng.randrange(3):
                case 0:
                    call = connection.ask(KEY, rows, timeout_s=30, label="cancelled")
                    loop.call_later(rng.uniform(0, LATEST_S), connection.cancel, call)
                case 1:
                    connection.ask(KEY, rows, timeout_s=rng.uniform(0.001, LATEST_S), label="hasty")
                case _:
                    connection.ask(KEY, rows, timeout_s=30, label="innocent")

        async with ledger.metronome(), connection.running():
            await open_loop(CALLS_PER_S, count / 10 / CALLS_PER_S, rng, ask)  # the router comes to its size
            resident_bytes = router.resident_bytes()
            await open_loop(CALLS_PER_S, count / CALLS_PER_S, rng, ask)
            await ledger.wait_until_closed(10)
            grown_bytes = router.resident_bytes() - resident_bytes
            freed_s = sorted([await _flood(connection, rng) for _ in range(floods)])
            await report.close(ledger, router)
    innocent = {code: len(samples.sent_at) for (label, code), samples in ledger.samples.items() if label == "innocent"}
    p50_s, most_s = percentile(freed_s, 0.5), freed_s[-1]
    report.tell("calls", dict(ledger.calls))
    report.tell(f"a caller after {floods} cancelled floods, s: p50, max", f"{p50_s:.3f}, {most_s:.3f}")
    report.tell("the router has grown by, bytes", grown_bytes)
    # Whose deadline cannot be met, as far as the router knows by then, is refused on arrival.
    only_ends = {"", "given up", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    report.claim("calls are answered, cancelled, refused or expire", set(ledger.rows) <= only_ends)
    report.claim(f"no innocent call fails: {innocent}", set(innocent) == {""})
    report.timed("rows of cancelled calls are gone within 50 ms", most_s <= AFTER_FLOOD_S + ledger.worst_lag_s)
    growth = GROWTH_NOISE_BYTES + GROWTH_BYTES_PER_CANCEL * count
    report.claim(f"the router has not grown by more than {growth:,.0f} bytes", grown_bytes <= growth)
    return report


async def _flood(connection: Connection, rng: random.Random) -> float:
    """A queue of a second and a half is cancelled at a random instant; how long does the next caller wait then?"""
    ledger = connection.ledger
    flood = [connection.ask(KEY, ledger.make_rows(MAX_BATCH_ROWS, KEY.dim), label="flood") for _ in range(150)]
    await asyncio.sleep(rng.uniform(0, 0.2))
    for call in flood:
        connection.cancel(call)
    after: Call = connection.ask(KEY, ledger.make_rows(1, KEY.dim), label="after the flood")
    await after.ended
    return after.latency_s
