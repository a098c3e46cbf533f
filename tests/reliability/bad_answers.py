"""Row 4: a replica that answers in every wrong way, beside good ones and a model that has nothing to do with it.

Two backends: `bad`, of whose two replicas the first strikes batches with a marked row, and `good`. The good key's p99
is taken in windows with strikes and windows without, turn by turn. A machine that does other things as well is unfair
to some windows; how unfair, the windows without strikes tell among themselves. The strikes may cost 10 % of the p99
and what two halves of the quiet windows differ by.
"""

import asyncio
import contextlib
import itertools
import random
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from tests.reliability.cluster import Server, cluster, mock, witness
from tests.reliability.connection import Connection
from tests.reliability.faults import FAULTS
from tests.reliability.ledger import Key, Ledger, percentile
from tests.reliability.load import open_loop
from tests.reliability.report import Report
from tests.reliability.witness import STRIKE, Strikes

GOOD, BAD = Key("good", "buyer", 4), Key("bad", "buyer", 4)
MAX_BATCH_ROWS = 16
BATCH_TIMEOUT_S = 1.0
CALLS_PER_S = 100
EJECTION_S = 0.05
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
TRICKLE_BYTES, TRICKLE_PAUSE_S = 16, 0.02
SETTLE_S, STRIKE_PAUSE_S = 0.3, 0.07
MARKED_PER_STRIKE = 30


class Proxy(Server):
    """A wire in front of a server; while it trickles, its answers come a few bytes at a time."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._target = server.addresses[0].split(":")
        self._listener: asyncio.Server | None = None
        self._wires: set[asyncio.Task[None]] = set()
        self.trickles = False

    async def start(self) -> None:
        """The server, and then the wire."""
        await self._server.start()
        host, port = self.addresses[0].split(":")
        self._listener = await asyncio.start_server(self._connect, host, int(port))

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        for source, sink, may_trickle in ((reader, far_writer, False), (far_reader, writer, True)):
            task = asyncio.create_task(self._carry(source, sink, may_trickle=may_trickle))
            self._wires.add(task)
            task.add_done_callback(self._wires.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, may_trickle: bool) -> None:
        with contextlib.suppress(OSError), contextlib.closing(sink):
            while data := await source.read(65_536):
                while may_trickle and self.trickles and data:
                    sink.write(data[:TRICKLE_BYTES])
                    data = data[TRICKLE_BYTES:]
                    await asyncio.sleep(TRICKLE_PAUSE_S)
                sink.write(data)
                await sink.drain()

    def end(self) -> None:
        """Both."""
        if self._listener:
            self._listener.close()
        for task in self._wires:
            task.cancel()
        self._server.end()


async def bad_answers(seed: int, strikes: int, window_s: float) -> Report:
    """Every kind of wrong answer, `strikes` times."""
    report = Report(4, f"a replica whose answers are wrong in {len(FAULTS)} ways, {strikes} times each", seed)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        record = Path(directory) / "record"
        bad = Proxy(witness(record, "--latency", "0.02-0.05"))
        backends = {"good": [mock("--latency", "0.02-0.05")], "bad": [bad, mock("--latency", "0.02-0.05")]}
        async with cluster(
            backends,
            backend={"max_in_flight": 2, "ejection_s": EJECTION_S},
            models=[_model("good"), {**_model("bad"), "allow_nan": False}],
            batch_timeout_s=BATCH_TIMEOUT_S,
            limits={"max_backend_message_bytes": MAX_MESSAGE_BYTES},
        ) as router:
            report.watch(router, *(server.program.pid for server in (*backends["good"], backends["bad"][1])))
            ledger = Ledger()
            connection = Connection(ledger, router.address)
            windows = Windows()
            struck = Strikes(record)

            def ask() -> None:
                for key in (GOOD, BAD):
                    rows = ledger.make_rows(rng.randint(1, 4), key.dim)
                    connection.ask(key, rows, timeout_s=10, label=key.model_name, explain=True)

            async with ledger.metronome(), connection.running():
                load = asyncio.create_task(open_loop(CALLS_PER_S, 1e9, rng, ask))
                await asyncio.sleep(SETTLE_S)
                for fault in FAULTS:
                    async with windows.one(is_struck=False):
                        await asyncio.sleep(window_s)
                    async with windows.one(is_struck=True):
                        await _strike(connection, bad, struck, fault, strikes)
                    await asyncio.sleep(SETTLE_S)
                load.cancel()
                await asyncio.wait([load])
                await report.close(ledger, router)
        counts = {fault: struck.count(fault) for fault in FAULTS}
    _judge(report, ledger, windows, counts, strikes)
    return report


class Windows:
    """Stretches of time with and without strikes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._spans: dict[bool, list[tuple[float, float]]] = {False: [], True: []}

    @contextlib.asynccontextmanager
    async def one(self, *, is_struck: bool) -> AsyncIterator[None]:
        """For the length of a block."""
        begun_at = self._loop.time()
        yield
        self._spans[is_struck].append((begun_at, self._loop.time()))

    def p99(self, ledger: Ledger, label: str, *, is_struck: bool, part: slice = slice(None)) -> float:
        """Of a label's calls that were sent within such windows, or a part of them."""
        spans = self._spans[is_struck][part]
        latencies = itertools.chain.from_iterable(ledger.latencies(label, *span) for span in spans)
        return percentile(sorted(latencies), 0.99)


async def _strike(connection: Connection, bad: Proxy, struck: Strikes, fault: str, strikes: int) -> None:
    """Send marked rows until as many have met the fault; others are served by the good replica."""
    ledger = connection.ledger
    mark = STRIKE + list(FAULTS).index(fault)
    bad.trickles = fault == "trickle"
    for _ in range(MARKED_PER_STRIKE * strikes):
        if struck.count(fault) >= strikes:
            break
        connection.ask(BAD, ledger.make_rows(1, BAD.dim, mark), timeout_s=10, label="struck", explain=True)
        await asyncio.sleep(STRIKE_PAUSE_S)
    bad.trickles = False


def _judge(report: Report, ledger: Ledger, windows: Windows, struck: Mapping[str, int], strikes: int) -> None:
    alone, beside = (windows.p99(ledger, "good", is_struck=is_struck) for is_struck in (False, True))
    halves = [windows.p99(ledger, "good", is_struck=False, part=slice(half, None, 2)) for half in (0, 1)]
    noise = abs(halves[0] - halves[1]) + ledger.worst_lag_s
    report.tell("strikes", struck)
    report.tell("rows by attempts", dict(sorted(ledger.attempts.items())))
    report.tell("p99 of the other key without and with strikes, noise, s", f"{alone:.4f}, {beside:.4f}, {noise:.4f}")
    # Behind a wire that trickles a replica is slow, so it is ejected, as it should be, and gets little more.
    wanted = dict.fromkeys(FAULTS, strikes) | {"trickle": 1}
    report.claim("every fault struck as often as it should", all(struck[fault] >= n for fault, n in wanted.items()))
    report.claim("every row is answered in the end", ledger.rows[""] == ledger.rows_asked)
    report.timed("the other key's p99 is at most 10 % worse", beside <= 1.1 * alone + noise)


def _model(name: str) -> dict[str, object]:
    match = {"model_name": name}
    return {"match": match, "backend": name, "max_batch_size": MAX_BATCH_ROWS, "max_batch_bytes": 1 << 20}
