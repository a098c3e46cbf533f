"""The independent ledger: a client that believes nobody and keeps the books of every row.

A row's numbers say which row it is, and the right answer is the mock's documented function of row, model and agent
type, so an answer that went astray shows. `connection.py` asks.

What a call waits beyond its own deadline is the router's fault only as far as this process was there to listen: a
metronome tells by how much the loop was late, and that is taken off.
"""

import asyncio
import itertools
import math
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mock_nn.models import expected
from protos.inference_router.v1 import inference_router_pb2 as pb

Matrix: TypeAlias = npt.NDArray[np.float32]

LATE_S = 0.1  # that an answer may come after its own deadline
TICK_S = 0.005
# The first two numbers of a row are its id, exactly; the third may tell the backend to misbehave.
ID_BASE = 1 << 20


class Key(NamedTuple):
    """Rows of one key may share a batch."""

    model_name: str = "churn"
    agent_type: str = "buyer"
    dim: int = 4


@dataclass(slots=True, eq=False)
class Call:
    """One call of one block; `waiting` tells which of its rows have no end yet."""

    number: int
    key: Key
    matrix: Matrix
    label: str
    sent_at: float
    due_at: float
    waiting: npt.NDArray[np.bool_]
    ended: asyncio.Future[None]
    codes: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    pushback_ms: list[int] = field(default_factory=list)
    explanations: list[pb.Explanation] = field(default_factory=list)
    ended_at: float = math.nan

    @property
    def latency_s(self) -> float:
        """From asking to the last answer."""
        return self.ended_at - self.sent_at


@dataclass(slots=True)
class Samples:
    """Calls of one kind: when each was sent, and how long it took to its end."""

    sent_at: "array[float]" = field(default_factory=lambda: array("d"))
    latency_s: "array[float]" = field(default_factory=lambda: array("d"))

    def since(self, begin: float, end: float = math.inf) -> list[float]:
        """The latencies of the calls sent within a window, ascending."""
        pairs = zip(self.sent_at, self.latency_s, strict=True)
        return sorted(latency for sent, latency in pairs if begin <= sent < end)


class Ledger:
    """The books. Rows by their end: `""` is a right answer, else the code of the error."""

    def __init__(self) -> None:
        self._call_numbers = itertools.count(1)
        self._next_row = 1
        self._open: dict[int, Call] = {}
        self._given_up: set[int] = set()
        self._last_call = 0
        self._loop = asyncio.get_running_loop()
        self._lags: deque[tuple[float, float]] = deque()
        self.worst_lag_s = 0.0
        self.rows_asked = 0
        self.rows: Counter[str] = Counter()
        self.good_rows: Counter[str] = Counter()  # by label
        self.calls: Counter[str] = Counter()
        self.attempts: Counter[int] = Counter()
        self.samples: dict[tuple[str, str], Samples] = {}  # by label and code
        self.late: list[str] = []
        self.problems: list[str] = []
        self.on_end: Callable[[Call], None] = lambda _: None

    def make_rows(self, count: int, dim: int, marker: float = 0.0) -> Matrix:
        """Rows that nobody had before; all with the marker."""
        ids = np.arange(self._next_row, self._next_row + count)
        self._next_row += count
        matrix = np.zeros((count, dim), "<f4")
        matrix[:, 0], matrix[:, 1], matrix[:, 2] = ids % ID_BASE, ids // ID_BASE, marker
        matrix[:, 3:] = (ids % 97)[:, None] / 8
        return matrix

    def open_call(self, key: Key, matrix: Matrix, timeout_s: float, label: str) -> Call:
        """Begin an account."""
        now = self._loop.time()
        number = self._last_call = next(self._call_numbers)
        waiting = np.ones(len(matrix), np.bool_)
        call = Call(number, key, matrix, label, now, now + timeout_s, waiting, self._loop.create_future())
        self._open[number] = call
        self.rows_asked += len(matrix)
        self.calls["asked"] += 1
        return call

    def give_up(self, call: Call) -> bool:
        """The caller cancels; False when it is over already."""
        if self._open.pop(call.number, None) is None:
            return False
        self._given_up.add(call.number)
        self.rows["given up"] += int(call.waiting.sum())
        self._end(call, "given up")
        return True

    def take(self, answer: pb.Answer) -> None:
        """Enter one answer."""
        call = self._open.get(answer.call_id)
        if call is None:
            # An answer and the cancel may cross.
            if answer.call_id not in self._given_up:
                self._complain(
                    f"call {answer.call_id}, which is closed or was never asked, is answered: {_brief(answer)}"
                )
            return
        if answer.HasField("error"):
            self._take_error(call, answer)
        else:
            self._take_outputs(call, answer)
        if answer.HasField("explanation"):
            call.explanations.append(answer.explanation)
            self.attempts[answer.explanation.attempts] += answer.rows
        if answer.done:
            self._close(call)
        elif not call.waiting.any():
            self._complain(f"call {call.number}: all rows have ended, and the call goes on: {_brief(answer)}")

    def lost(self) -> list[Call]:
        """Calls without an end."""
        return list(self._open.values())

    async def wait_until_closed(self, patience_s: float) -> None:
        """Until every call has ended; what has not is a problem."""
        ends = [call.ended for call in self._open.values()]
        if ends:
            await asyncio.wait(ends, timeout=patience_s)
        for call in self.lost()[:5]:
            self._complain(
                f"lost: {call.waiting.sum()} rows of call {call.number}, {self._loop.time() - call.sent_at:.1f} s old"
            )

    @asynccontextmanager
    async def metronome(self) -> AsyncIterator[None]:
        """Know how late this process is itself."""
        task = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            task.cancel()

    async def _tick(self) -> None:
        while True:
            due = self._loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            now = self._loop.time()
            self._lags.append((now, now - due))
            self.worst_lag_s = max(self.worst_lag_s, now - due)
            while self._lags[0][0] < now - 1:
                self._lags.popleft()

    def _lag_s(self) -> float:
        """Of the last second, and of the tick that is due now."""
        last_tick = self._lags[-1][0] if self._lags else self._loop.time()
        return max([self._loop.time() - last_tick - TICK_S, 0.0, *(lag for _, lag in self._lags)])

    def _take_error(self, call: Call, answer: pb.Answer) -> None:
        rows = slice(answer.first_row, answer.first_row + answer.rows) if answer.rows else slice(None)
        if answer.rows:
            self._mark(call, answer)
            failed = answer.rows
        else:
            failed = int(call.waiting.sum())
            call.waiting[rows] = False
        call.codes[answer.error.code] += failed
        call.messages.append(answer.error.message)
        if answer.error.HasField("retry_pushback_ms"):
            call.pushback_ms.append(answer.error.retry_pushback_ms)
        self.rows[answer.error.code] += failed

    def _take_outputs(self, call: Call, answer: pb.Answer) -> None:
        self._mark(call, answer)
        rows = call.matrix[answer.first_row : answer.first_row + answer.rows]
        right = expected(call.key.model_name, call.key.agent_type, rows)
        if answer.outputs != right.tobytes():
            given = np.frombuffer(answer.outputs, "<f4")
            wrong = len(right) if given.shape != right.shape else int((given != right).sum())
            self.rows["wrong"] += wrong
            self._complain(f"call {call.number}: {wrong} wrong answers: {given[:4]} instead of {right[:4]}")
        self.rows[""] += answer.rows
        call.codes[""] += answer.rows

    def _mark(self, call: Call, answer: pb.Answer) -> None:
        first, stop = answer.first_row, answer.first_row + answer.rows
        if answer.block or stop > len(call.waiting) or not call.waiting[first:stop].all():
            self.rows["twice"] += 1
            self._complain(f"call {call.number}: no such rows, or answered before: {_brief(answer)}")
        call.waiting[first:stop] = False

    def _close(self, call: Call) -> None:
        del self._open[call.number]
        if call.waiting.any():
            self.rows["lost"] += int(call.waiting.sum())
            self._complain(f"call {call.number} is done, and {call.waiting.sum()} rows have no answer")
        late_s = self._loop.time() - call.due_at
        if late_s > LATE_S and late_s > LATE_S + self._lag_s():
            self.late.append(f"{late_s:.3f} s, {dict(call.codes)}")
        code = next(iter(call.codes)) if len(call.codes) == 1 else "mixed"
        self.good_rows[call.label] += call.codes[""]
        self._end(call, code)

    def _end(self, call: Call, code: str) -> None:
        call.ended_at = self._loop.time()
        samples = self.samples.setdefault((call.label, code), Samples())
        samples.sent_at.append(call.sent_at)
        samples.latency_s.append(call.latency_s)
        self.calls[code] += 1
        if not call.ended.done():
            call.ended.set_result(None)
        self.on_end(call)

    def _complain(self, problem: str) -> None:
        if len(self.problems) < 50:
            self.problems.append(problem)

    def latencies(self, label: str, begin: float = -math.inf, end: float = math.inf, code: str = "") -> list[float]:
        """Of the calls of a label that ended so, ascending."""
        samples = self.samples.get((label, code))
        return samples.since(begin, end) if samples else []


def _brief(answer: pb.Answer) -> str:
    rows = f"rows {answer.first_row}+{answer.rows} of block {answer.block}"
    return f"{rows}, {answer.error.code or 'outputs'}, {'done' if answer.done else 'not done'}"


def row_ids(matrix: Matrix) -> list[int]:
    """Whose rows these are."""
    ids: list[int] = (matrix[:, 0].astype(np.int64) + matrix[:, 1].astype(np.int64) * ID_BASE).tolist()
    return ids


def percentile(ascending: list[float], share: float) -> float:
    """NaN of nothing."""
    return ascending[min(int(share * len(ascending)), len(ascending) - 1)] if ascending else math.nan
