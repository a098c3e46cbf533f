"""The ledger itself: what it must not let pass."""

import asyncio

import numpy as np
import pytest

from mock_nn.models import expected
from protos.inference_router.v1 import inference_router_pb2 as pb
from tests.reliability.ledger import Call, Key, Ledger

pytestmark = pytest.mark.anyio

KEY = Key()


def asked(ledger: Ledger, rows: int = 3) -> Call:
    return ledger.open_call(KEY, ledger.make_rows(rows, KEY.dim), 10.0, "")


def right(call: Call, first: int, rows: int, *, done: bool = False) -> pb.Answer:
    outputs = expected(KEY.model_name, KEY.agent_type, call.matrix[first : first + rows]).tobytes()
    return pb.Answer(call_id=call.number, first_row=first, rows=rows, outputs=outputs, done=done)


async def test_a_call_whose_rows_are_all_answered_is_closed() -> None:
    ledger = Ledger()
    call = asked(ledger)
    ledger.take(right(call, 1, 2))
    assert not call.ended.done()
    ledger.take(right(call, 0, 1, done=True))
    assert call.ended.done()
    assert (ledger.rows, ledger.problems, ledger.lost()) == ({"": 3}, [], [])


async def test_an_answer_of_another_row_is_wrong() -> None:
    ledger = Ledger()
    one, other = asked(ledger), asked(ledger)
    answer = right(other, 0, 3, done=True)
    answer.call_id = one.number
    ledger.take(answer)
    assert ledger.rows["wrong"] == 3
    assert len(ledger.problems) == 1


async def test_rows_that_are_shifted_by_one_are_wrong() -> None:
    ledger = Ledger()
    call = asked(ledger)
    answer = right(call, 0, 3, done=True)
    answer.outputs = np.roll(np.frombuffer(answer.outputs, "<f4"), 1).tobytes()
    ledger.take(answer)
    assert ledger.rows["wrong"] == 3


async def test_a_row_that_is_answered_twice_is_a_problem() -> None:
    ledger = Ledger()
    call = asked(ledger)
    ledger.take(right(call, 0, 2))
    ledger.take(right(call, 1, 2, done=True))
    assert ledger.rows["twice"] == 1
    assert len(ledger.problems) == 1


async def test_an_answer_to_a_closed_call_is_a_problem_and_one_to_a_call_that_was_given_up_is_none() -> None:
    ledger = Ledger()
    closed, given_up = asked(ledger), asked(ledger)
    ledger.take(right(closed, 0, 3, done=True))
    ledger.give_up(given_up)
    ledger.take(right(given_up, 0, 3, done=True))
    assert ledger.problems == []
    ledger.take(right(closed, 0, 3, done=True))
    assert len(ledger.problems) == 1


async def test_a_call_that_is_done_before_all_of_its_rows_is_a_problem() -> None:
    ledger = Ledger()
    ledger.take(right(asked(ledger), 0, 2, done=True))
    assert ledger.rows["lost"] == 1
    assert len(ledger.problems) == 1


async def test_an_error_without_rows_ends_those_that_are_open() -> None:
    ledger = Ledger()
    call = asked(ledger)
    ledger.take(right(call, 1, 1))
    ledger.take(pb.Answer(call_id=call.number, error=pb.Error(code="UNAVAILABLE", retry_pushback_ms=7), done=True))
    assert call.codes == {"": 1, "UNAVAILABLE": 2}
    assert call.pushback_ms == [7]
    assert ledger.problems == []


async def test_a_call_without_an_end_is_lost() -> None:
    ledger = Ledger()
    asked(ledger)
    await ledger.wait_until_closed(0.01)
    assert len(ledger.lost()) == len(ledger.problems) == 1


@pytest.mark.parametrize(("late_s", "is_late"), [(0.05, False), (0.5, True)])
async def test_an_end_long_after_the_deadline_is_late(late_s: float, is_late: bool) -> None:
    ledger = Ledger()
    call = asked(ledger)
    call.due_at = asyncio.get_running_loop().time() - late_s
    ledger._lags.append((asyncio.get_running_loop().time(), 0.0))  # noqa: SLF001 -- the metronome has just been on time
    ledger.take(right(call, 0, 3, done=True))
    assert bool(ledger.late) is is_late
