"""A call's answers, the line and the alarms, without any stream."""

import struct
from math import inf

import pytest

from protos.inference_router.v1 import inference_router_pb2 as pb
from router_client.calls import MIN_SWEEP, Alarms, Call, Line
from router_client.errors import ProtocolError, failure, unavailable


class Nowhere:
    """A place that keeps nothing."""

    def forget(self, call: Call) -> None:
        """Nothing to forget."""


def call(*rows: int) -> Call:
    """A call with one block of each number of rows."""
    return Call(pb.Call(blocks=[pb.Block(rows=n) for n in rows]))


def answer(block: int, first_row: int, *values: float, done: bool = False) -> pb.Answer:
    """One value a row."""
    outputs = struct.pack(f"<{len(values)}f", *values)
    return pb.Answer(block=block, first_row=first_row, rows=len(values), outputs=outputs, done=done)


def test_one_answer_with_every_row_ends_a_call() -> None:
    one = call(2)
    whole = answer(0, 0, 1, 2, done=True)
    one.accept(whole)
    assert (one.answers, one.is_over) == ([whole], True)


def test_a_call_is_over_with_its_last_row() -> None:
    one = call(2, 1)
    one.accept(answer(0, 0, 1))
    one.accept(answer(1, 0, 3))
    assert not one.is_over
    one.accept(answer(0, 1, 2))
    assert one.is_over
    assert [part.done for part in one.answers] == [False, False, True]


def test_after_another_sending_rows_that_were_delivered_are_left_out() -> None:
    one = call(4)
    one.accept(answer(0, 1, 11, 12))
    one.renew(Nowhere(), 2)
    assert not one.has_answers
    one.accept(answer(0, 0, 20, 21, 22, 23, done=True))
    assert one.answers == [answer(0, 1, 11, 12), answer(0, 0, 20), answer(0, 3, 23, done=True)]


def test_within_one_sending_a_row_is_answered_once() -> None:
    one = call(4)
    one.accept(answer(0, 1, 11))
    with pytest.raises(ProtocolError, match="twice"):
        one.accept(answer(0, 0, 20, 21))
    one.renew(Nowhere(), 2)
    one.accept(answer(0, 1, 31))
    with pytest.raises(ProtocolError, match="twice"):
        one.accept(answer(0, 1, 31))
    assert one.answers == [answer(0, 1, 11)]


def test_the_last_answer_may_not_leave_rows_out() -> None:
    one = call(3)
    with pytest.raises(ProtocolError, match="2 rows"):
        one.accept(answer(0, 1, 1, done=True))
    assert not one.is_over


def test_a_failure_says_so_and_ends_the_call() -> None:
    one = call(2)
    one.accept(answer(0, 0, 1))
    one.accept(failure("UNKNOWN", "why"))
    assert one.is_over
    assert unavailable("away").error.retry_pushback_ms == 1000
    assert not failure("UNKNOWN", "why").error.HasField("retry_pushback_ms")


def test_the_line_is_first_come_first_sent() -> None:
    line, calls = Line(), [call(1) for _ in range(4)]
    for each in calls:
        line.add(each)
    line.forget(calls[1])
    assert line.pop() is calls[0]
    assert line.take_back() == calls[2:]
    assert len(line) == 0


def test_an_alarm_rings_at_its_time_and_not_before() -> None:
    alarms, early, late = Alarms(), call(1), call(1)
    alarms.set(20.0, late)
    alarms.set(10.0, early)
    alarms.set(inf, early)
    assert alarms.wake_at() == 10.0
    assert list(alarms.pop_due(9.999)) == []
    assert list(alarms.pop_due(10.0)) == [early]
    assert list(alarms.pop_due(10.0)) == []
    assert alarms.wake_at() == 20.0


def test_a_call_that_is_over_rings_no_alarm() -> None:
    alarms, over, open_ = Alarms(), call(1), call(1)
    alarms.set(10.0, over)
    alarms.set(20.0, open_)
    over.end(failure("UNKNOWN", ""))
    assert alarms.wake_at() == 20.0
    assert list(alarms.pop_due(30.0)) == [open_]
    assert alarms.wake_at() == inf


def test_alarms_of_calls_that_are_over_do_not_pile_up() -> None:
    alarms = Alarms()
    open_ = [call(1) for _ in range(10)]
    for each in open_:
        alarms.set(5.0, each)
    for _ in range(10 * MIN_SWEEP):
        over = call(1)
        alarms.set(10.0, over)
        over.end(failure("UNKNOWN", ""))
    assert len(alarms) <= MIN_SWEEP
    assert list(alarms.pop_due(5.0)) == open_


def test_open_calls_may_have_any_number_of_alarms() -> None:
    alarms = Alarms()
    calls = [call(1) for _ in range(3 * MIN_SWEEP)]
    for at, each in enumerate(calls):
        alarms.set(float(at), each)
    assert list(alarms.pop_due(1e9)) == calls


def test_a_call_that_is_let_go_holds_neither_its_message_nor_its_answers() -> None:
    """Its alarm stays in the heap until a deadline that may be far away; 60 calls of 10 MB once stayed with it."""
    call = Call(pb.Call(blocks=[pb.Block(rows=1, dim=1, vectors=bytes(4))]), deadline=500.0)
    answer = pb.Answer(rows=1, outputs=bytes(4), done=True)
    call.accept(answer)
    assert call.let_go() == [answer]
    assert call.message == pb.Call()
    assert call.answers == []
