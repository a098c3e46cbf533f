"""Stand-ins at the router's seams: a backend that answers when the test says so, and a reply that remembers."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from router.core.answer import read_answer
from router.core.batch import merge
from router.core.model_info import IndexEntry, ModelReport, ModelState
from router.core.pulse import Sign
from router.core.types import Batch, BatchAnswer, Outputs, Part, Tensor
from router.dispatch.pool import ReplicaPool, Rules
from router.errors import BackendError, RouterError, StreamLost


def double(batch: Batch) -> Outputs:
    """The fake model: twice the first value of each row."""
    matrix = np.frombuffer(merge(batch)[0], "<f4").reshape(batch.rows, -1)
    return (Tensor("output", "FP32", (batch.rows,), (2 * matrix[:, 0]).astype("<f4").tobytes()),)


@dataclass(eq=False)
class Sent:
    """One batch at the backend; it hangs until the test answers or fails it."""

    batch: Batch
    at: float
    future: asyncio.Future[Outputs]
    row_errors: str | None = None

    @property
    def values(self) -> list[float]:
        matrix = np.frombuffer(merge(self.batch)[0], "<f4").reshape(self.batch.rows, -1)
        return [float(value) for value in matrix[:, 0]]

    def answer(self, outputs: Outputs | None = None, row_errors: str | None = None) -> None:
        self.row_errors = row_errors
        self.future.set_result(double(self.batch) if outputs is None else outputs)

    def fail(self, error: BackendError) -> None:
        self.future.set_exception(error)

    def end(self, error: BackendError | None) -> None:
        """Answer or fail, unless nobody waits any more."""
        if self.future.done():
            return
        if error:
            self.fail(error)
        else:
            self.answer()


class FakeBackend:
    """A member.Backend. `service_s`: answer by itself after so many virtual seconds; None: hang.

    `error`: fail then instead of answering.
    """

    def __init__(self, address: str = "fake:1", *, service_s: float | None = None, is_ready: bool = True) -> None:
        self.address = address
        self.in_flight = 0
        self.most_in_flight = 0
        self.sent: list[Sent] = []
        self.is_closed = False
        self.service_s = service_s
        self.error: BackendError | None = None
        # What probes find, after how long, and when they came; frozen: nothing is answered from now on.
        self.sign = Sign.READY
        self.probe_s = 0.01
        self.probed_at: list[float] = []
        self.is_frozen = False
        # What it tells of models by name, and which it was asked about.
        self.reports: dict[str, ModelReport] = {}
        self.described: list[tuple[str, str]] = []
        self._lost = asyncio.Event()
        self._is_ready = is_ready
        self._on_change: Callable[[], None] = lambda: None

    @property
    def is_connected(self) -> bool:
        return self._is_ready

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    def set_ready(self, *, is_ready: bool) -> None:
        self._is_ready = is_ready
        self._lost.set()
        self._lost = asyncio.Event()
        self._on_change()

    def reserve(self) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def free(self) -> None:
        self.in_flight -= 1

    def start(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    async def aclose(self) -> None:
        self.is_closed = True

    def respond(self, sent: Sent) -> None:
        """What it does by itself after `service_s`."""
        if not self.is_frozen:
            sent.end(self.error)

    def abandon(self) -> None:
        for sent in self.sent:
            sent.end(StreamLost("abandoned"))

    def close_idle(self) -> None:
        """It has nothing between batches."""

    async def probe(self) -> Sign:
        self.probed_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.probe_s)
        for _ in range(5):  # an answer that has come takes some turns of the loop to be read
            await asyncio.sleep(0)
        if self.is_frozen:
            await self._lost.wait()
            return Sign.NONE
        return self.sign

    async def describe(self, model: tuple[str, str]) -> ModelReport:
        self.described.append(model)
        return self.reports.get(model[0], ModelReport(ModelState.READY))

    async def index(self) -> tuple[IndexEntry, ...]:
        return tuple(IndexEntry(name, "", report.state.name) for name, report in self.reports.items())

    async def infer(self, batch: Batch) -> BatchAnswer:
        loop = asyncio.get_running_loop()
        sent = Sent(batch, loop.time(), loop.create_future())
        self.sent.append(sent)
        if self.service_s is not None:
            loop.call_later(self.service_s, self.respond, sent)
        outputs = await sent.future
        return read_answer(
            batch,
            outputs,
            row_errors=sent.row_errors,
            replica=self.address,
            dispatched_at=sent.at,
            answered_at=loop.time(),
        )


class Picky(FakeBackend):
    """Fails the batches that hold one of the `bad` values, with `error`."""

    def __init__(
        self, address: str = "fake:1", *, bad: Collection[float], error: BackendError, service_s: float = 1.0
    ) -> None:
        super().__init__(address, service_s=service_s)
        self.bad = frozenset(bad)
        self.refusal = error

    def respond(self, sent: Sent) -> None:
        sent.end(self.refusal if self.bad & set(sent.values) else None)


def pool_of(
    *replicas: FakeBackend,
    later: Sequence[FakeBackend] = (),
    max_in_flight: int = 1,
    ejection_s: float = 30.0,
    probe_interval_s: float = 0.0,
    max_in_flight_total: int = 1024,
) -> ReplicaPool:
    """A pool of fakes, not started; those of `later` join when their addresses are set. Batches time out after 60 s."""
    by_address = {replica.address: replica for replica in (*replicas, *later)}
    addresses = [replica.address for replica in replicas]
    rules = Rules(
        max_in_flight,
        ejection_s,
        probe_interval_s,
        batch_timeout_s=60.0,
        resolve_interval_s=5.0,
        max_in_flight_total=max_in_flight_total,
    )
    return ReplicaPool(by_address.__getitem__, addresses, rules)


@dataclass(eq=False)
class RecordingReply:
    """A dataplane.Reply: values by (block, row), failures by (block, row), the error that closed the call."""

    values: dict[tuple[int, int], float] = field(default_factory=dict)
    failures: dict[tuple[int, int], RouterError] = field(default_factory=dict)
    closed_by: RouterError | None = None
    ended_at: float | None = None

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        rows = np.frombuffer(answer.outputs[0].rows(offset, part.rows), "<f4").tolist()
        first = part.block.first_row + part.first
        for number, value in enumerate(rows):
            assert (part.block.index, first + number) not in self.values
            self.values[part.block.index, first + number] = value
        self._end(is_last=is_last)

    def failed(self, index: int, first_row: int, rows: int, error: RouterError, *, is_last: bool) -> None:
        for number in range(rows):
            self.failures[index, first_row + number] = error
        self._end(is_last=is_last)

    def closed(self, error: RouterError) -> None:
        self.closed_by = error
        self._end(is_last=True)

    def _end(self, *, is_last: bool) -> None:
        assert self.ended_at is None, "told after the end"
        if is_last:
            self.ended_at = asyncio.get_running_loop().time()
