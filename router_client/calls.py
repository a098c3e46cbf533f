"""One caller's call and the points in time at which calls need attention. Pure but for the caller's future.

Must not know streams or gRPC: a `Call` takes answers and hands rows to its caller, each row once, however often the
call was sent; which stream it travels on is the client's and the stream's business.

A call's life, as its client moves it (every state may end in ``is_over``):

    waiting ──► queued on a stream ──► written ──► over: last answer, failure, deadline, or nobody waits any more
       ▲               │                  │
       └───────────────┴──────────────────┘  stream lost (at most once when written), or refused while draining
"""

import asyncio
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import Protocol

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client.blocks import Coverage, check_shape, cut
from router_client.errors import ProtocolError

DEADLINE_GRACE_S = 0.05
"""The router answers a call at its deadline; its answer is waited for this long, since it knows more than we do."""

ENVELOPE_BYTES = 32
"""What a call's message grows by on its way: 16 at most for id and length, 9 for the time that is left."""

MIN_SWEEP = 1024
"""Alarms below which it is not worth looking for those of calls that are over."""


_NOTHING = pb.Call()


class Place(Protocol):
    """Where a call is: in line or on a stream, in exactly one place until it is over."""

    def forget(self, call: "Call") -> None:
        """Let go of a call that nobody waits for."""


class Call:
    """A call from its caller's first word to the last answer."""

    __slots__ = (
        "_delivered",
        "_rows",
        "_seen",
        "_waiter",
        "_wakes_each",
        "answers",
        "call_id",
        "deadline",
        "gives_up_at",
        "is_over",
        "is_written",
        "losses",
        "message",
        "place",
        "size",
        "waits_until",
    )

    def __init__(self, message: pb.Call, *, deadline: float = inf, wakes_each: bool = False) -> None:
        self.message = message
        self.size = message.ByteSize() + ENVELOPE_BYTES
        self.deadline = deadline  # loop time in seconds, as are the next two
        self.gives_up_at = deadline + DEADLINE_GRACE_S
        self.waits_until = 0.0  # for a stream, while none has the call
        self.place: Place  # set with the first one
        self.call_id = 0  # of the latest sending
        self.is_written = False  # in the latest sending: handed to the transport
        self.losses = 0  # streams lost with this call written on them
        self.is_over = False
        self.answers: list[pb.Answer] = []  # for the caller to take
        self._rows = [block.rows for block in message.blocks]
        self._delivered: Coverage | None = None  # rows handed to the caller; None before the first
        self._seen: Coverage | None = None  # rows answered in the latest sending
        self._wakes_each = wakes_each  # wake the caller at each answer, not only at the last
        self._waiter: asyncio.Future[None] | None = None

    @property
    def has_answers(self) -> bool:
        """True when the latest sending has brought rows."""
        return self._seen is not None

    def renew(self, place: Place, call_id: int) -> None:
        """Begin a sending: its answers may repeat rows of an earlier one, but no row of their own."""
        self.place = place
        self.call_id = call_id
        self.is_written = False
        self._seen = None

    def accept(self, answer: pb.Answer) -> None:
        """Hand those rows of ``answer`` to the caller that it does not have yet. The last row ends the call.

        Raises:
            ProtocolError: the answer does not fit the call, or is the last and leaves rows out. The call is not over.
        """
        check_shape(answer)
        if not answer.rows or (answer.done and self._is_whole(answer)):
            self.end(answer)
        else:
            self._accept_part(answer)

    def let_go(self) -> list[pb.Answer]:
        """Return what its caller has not taken, and hold nothing large any more.

        The alarm of a call that is over stays in the heap, possibly until a deadline far away.
        """
        answers, self.answers = self.answers, []
        self.message = _NOTHING
        self._waiter = None
        return answers

    def end(self, answer: pb.Answer) -> None:
        """Hand over ``answer`` as the last one."""
        self.answers.append(answer)
        self.is_over = True
        self._wake()

    def arrival(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
        """Return a future that is done when the caller has something to take: the end, or any answer (wakes_each)."""
        self._waiter = loop.create_future()
        if self.is_over or (self.answers and self._wakes_each):
            self._waiter.set_result(None)
        return self._waiter

    def _is_whole(self, answer: pb.Answer) -> bool:
        """True for the one answer of a call of one block: the usual case, which needs no books."""
        return self._delivered is None and self._rows == [answer.rows] and not answer.block and not answer.first_row

    def _accept_part(self, answer: pb.Answer) -> None:
        seen = self._seen = self._seen or Coverage(self._rows)
        delivered = self._delivered = self._delivered or seen  # one and the same until an answer comes after a loss
        block, first, stop = answer.block, answer.first_row, answer.first_row + answer.rows
        seen.mark(block, first, stop - first)
        if seen is delivered:
            self._deliver(answer, first, stop)
        else:
            for one_first, one_stop in list(delivered.gaps(block, first, stop)):
                delivered.mark(block, one_first, one_stop - one_first)
                self._deliver(answer, one_first, one_stop)
        if self.answers:
            self.answers[-1].done = not delivered.rows_left
        self.is_over = not delivered.rows_left
        if answer.done and not self.is_over:
            raise ProtocolError(f"the call was ended with {delivered.rows_left} rows unanswered")
        if self.is_over or self._wakes_each:
            self._wake()

    def _deliver(self, answer: pb.Answer, first: int, stop: int) -> None:
        """A copy: an answer waits for its siblings, and must not keep a message with everybody's answers alive."""
        piece = cut(answer, first, stop)
        piece.done = False
        self.answers.append(piece)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Line:
    """The calls that wait for a stream, first come first sent."""

    def __init__(self) -> None:
        self._calls: dict[Call, None] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> None:
        """Put ``call`` at the end."""
        call.place = self
        self._calls[call] = None

    def pop(self) -> Call:
        """Take out the first call; there must be one."""
        call = next(iter(self._calls))
        del self._calls[call]
        return call

    def forget(self, call: Call) -> None:
        """Let go of a call that nobody waits for."""
        del self._calls[call]

    def take_back(self) -> list[Call]:
        """Return all calls, in their order, and let go of them."""
        calls = list(self._calls)
        self._calls.clear()
        return calls


class Alarms:
    """When to look at which call: a heap that forgets calls which are over.

    A call nearly always ends long before its deadline, so one timer of the loop per call would mostly be set to be
    cancelled (2.8 µs each; this: 0.6). Entries of calls that are over stay until they come to the top or make up half
    of the heap, as asyncio does with cancelled timers.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Call]] = []
        self._number = 0  # breaks ties: calls have no order
        self._sweep_at = MIN_SWEEP

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, when: float, call: Call) -> None:
        """Have ``call`` looked at at ``when`` (seconds, loop time); infinity is never."""
        if when == inf:
            return
        self._number += 1
        heappush(self._heap, (when, self._number, call))
        if len(self._heap) > self._sweep_at:
            self._sweep()

    def wake_at(self) -> float:
        """Return the next alarm of a call that is not over, or infinity."""
        while self._heap and self._heap[0][2].is_over:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else inf

    def pop_due(self, now: float) -> Iterator[Call]:
        """Yield the calls whose alarm is at ``now`` or before, each alarm once."""
        while self.wake_at() <= now:
            yield heappop(self._heap)[2]

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if not entry[2].is_over]
        heapify(self._heap)
        self._sweep_at = max(MIN_SWEEP, 2 * len(self._heap))
