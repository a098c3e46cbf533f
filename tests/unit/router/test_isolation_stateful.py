"""Whatever rows are bad and however replicas fail: every good row is answered, every bad one fails, each once.

A model that refuses bad rows stands behind two replicas that lose batches, refuse good ones for no reason, go and come
back, while callers come, give up and run out of time. Answers are checked by value, so no row can get another's.
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.errors import Blame, DeadlineExceeded, InvalidArgument, ModelFailed, Refused, StreamLost
from tests.unit.router.fakes import FakeBackend, Sent
from tests.unit.router.test_dataplane import Caller, Plane, settle
from tests.virtual_time import VirtualTimeLoop

T = TypeVar("T")

MAX_BATCH = 8
# Of one bad row in a batch of eight: once elsewhere, and eight pieces.
EXTRA_CALLS = 9
# A batch, once elsewhere, and halves down to a row.
SENDS = 5
# Losses that no row may fail by.
MAX_LOSSES = 2
LONG_S, SHORT_S = 100_000.0, 20.0


class Isolation(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.bad: set[float] = set()
        self.callers: list[tuple[Caller, list[float], float]] = []
        self.cancelled: set[Caller] = set()
        self.next_value = 0
        self.seen: set[Sent] = set()
        self.sends: Counter[float] = Counter()
        self.losses: Counter[float] = Counter()
        self.fresh = self.lost = self.false_alarms = 0

    @initialize(slots=st.integers(0, 9), is_callers_fault=st.booleans())
    def start(self, slots: int, *, is_callers_fault: bool) -> None:
        self.error = Refused("bad", InvalidArgument, Blame.ROWS) if is_callers_fault else Refused("bad")
        self.backends = [FakeBackend("a:1"), FakeBackend("b:1")]
        self.plane = self.run(self.make(slots))

    async def make(self, slots: int) -> Plane:
        return Plane(self.backends, {"max_batch_size": MAX_BATCH}, {}, slots)

    def run(self, work: Coroutine[object, object, T]) -> T:
        return self.loop.run_until_complete(self.and_settle(work))

    async def and_settle(self, work: Coroutine[object, object, T]) -> T:
        result = await work
        await settle()
        return result

    @property
    def in_flight(self) -> list[Sent]:
        return [sent for backend in self.backends for sent in backend.sent if not sent.future.done()]

    # -- what callers do ---------------------------------------------------------------------------------------------

    @rule(bad=st.lists(st.sampled_from([False] * 9 + [True]), min_size=1, max_size=20), is_hasty=st.booleans())
    def call(self, bad: list[bool], *, is_hasty: bool) -> None:
        values = [float(self.next_value + number) for number in range(len(bad))]
        self.next_value += len(bad)
        self.bad |= {value for value, is_bad in zip(values, bad, strict=True) if is_bad}
        self.run(self.add(values, SHORT_S if is_hasty else LONG_S))

    async def add(self, values: list[float], timeout_s: float) -> None:
        self.callers.append((self.plane.call(values, timeout_s=timeout_s), values, timeout_s))

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        caller, _, _ = data.draw(st.sampled_from(self.callers))
        if caller.reply.ended_at is None:
            self.cancelled.add(caller)
            caller.call.cancel()
            self.run(settle())

    @rule(seconds=st.sampled_from([0.01, 0.06, 1.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    # -- what the model and its replicas do --------------------------------------------------------------------------

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def respond(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from(self.in_flight)))

    def finish(self, sent: Sent) -> None:
        if self.bad & set(sent.values):
            sent.fail(self.error)
        else:
            sent.answer()
        self.run(settle())

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        sent = data.draw(st.sampled_from(self.in_flight))
        if all(part.attempts < MAX_LOSSES for part in sent.batch.parts):
            self.losses.update(sent.values)
            self.lost += 1
            sent.fail(StreamLost("gone"))
            self.run(settle())

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def refuse_for_no_reason(self, data: st.DataObject) -> None:
        sent = data.draw(st.sampled_from(self.in_flight))
        if len(sent.values) > 1:
            self.false_alarms += 1
            sent.fail(self.error)
            self.run(settle())

    @rule(number=st.integers(0, 1), is_ready=st.booleans())
    def go_or_come(self, number: int, *, is_ready: bool) -> None:
        self.run(self.set_ready(number, is_ready=is_ready))

    async def set_ready(self, number: int, *, is_ready: bool) -> None:
        self.backends[number].set_ready(is_ready=is_ready)

    # -- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def calls_are_bounded(self) -> None:
        for backend in getattr(self, "backends", []):
            for sent in backend.sent:
                if sent not in self.seen:
                    self.seen.add(sent)
                    self.fresh += any(not self.sends[value] for value in sent.values)
                    self.sends.update(sent.values)
        alarms = self.false_alarms + len(self.bad)
        assert len(self.seen) - self.fresh <= EXTRA_CALLS * alarms + MAX_BATCH * self.lost
        for value, sends in self.sends.items():
            assert sends <= SENDS * (1 + self.losses[value])

    @invariant()
    def nobody_hears_of_a_row_that_is_not_his(self) -> None:
        for caller, values, _ in self.callers:
            for (_, row), answer in caller.reply.values.items():
                assert answer == 2 * values[row]
                assert values[row] not in self.bad
            for (_, row), error in caller.reply.failures.items():
                assert values[row] in self.bad, f"an innocent row failed: {error!r}"
                assert isinstance(error, InvalidArgument | ModelFailed)
                assert (0, row) not in caller.reply.values

    def teardown(self) -> None:
        if hasattr(self, "plane"):
            self.end()
        self.loop.close()

    def end(self) -> None:
        """Let everything come to its end, and see that nobody was forgotten."""
        for number in range(len(self.backends)):
            self.run(self.set_ready(number, is_ready=True))
        while self.in_flight or "<DataPlane 0 open calls" not in repr(self.plane.plane):
            for sent in self.in_flight:
                if not sent.future.done():
                    self.finish(sent)
            self.run(asyncio.sleep(0.5))
        self.calls_are_bounded()
        self.nobody_hears_of_a_row_that_is_not_his()
        for caller, values, timeout_s in self.callers:
            told = len(caller.reply.values) + len(caller.reply.failures)
            if caller.reply.closed_by is not None:
                assert isinstance(caller.reply.closed_by, DeadlineExceeded)
                assert timeout_s == SHORT_S
            elif caller not in self.cancelled:
                assert told == len(values)
        assert " 0 rows queued" in repr(self.plane.plane)
        assert all(not backend.in_flight for backend in self.backends)
        self.run(self.plane.plane.aclose())
        self.run(self.plane.pool.aclose())


Isolation.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIsolation = Isolation.TestCase
