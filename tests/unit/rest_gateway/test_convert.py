"""Rows to blocks and outcomes back to names."""

import struct

import numpy as np

from protos.inference_router.v1 import inference_router_pb2 as pb
from rest_gateway.convert import OpenCall
from rest_gateway.errors import Fault


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


ROWS = [
    ("alice", "t", "m1", floats(1, 2)),
    ("bob", "t", "m2", floats(3, 4)),
    ("carol", "t", "m1", floats(5, 6)),
    ("dave", "t", "m1", floats(7)),
    ("erin", "u", "m1", floats(8, 9)),
]


def test_rows_of_one_type_model_and_length_share_a_block() -> None:
    blocks = OpenCall(ROWS).blocks
    assert [(b.agent_type, b.model_name, b.rows, b.dim, b.vectors) for b in blocks] == [
        ("t", "m1", 2, 2, floats(1, 2, 5, 6)),
        ("t", "m2", 1, 2, floats(3, 4)),
        ("t", "m1", 1, 1, floats(7)),
        ("u", "m1", 1, 2, floats(8, 9)),
    ]


def test_answers_in_any_order_and_size_find_their_names() -> None:
    call = OpenCall(ROWS)
    ((name, outcome),) = call.take(pb.Answer(block=0, first_row=1, rows=1, outputs=floats(50, 60)))
    assert name == "carol"
    assert isinstance(outcome, dict)
    np.testing.assert_array_equal(outcome["output"], np.array([50, 60], "<f4"))
    assert [name for name, _ in call.take(pb.Answer(block=1, rows=1, outputs=floats(2)))] == ["bob"]
    assert [name for name, _ in call.take(pb.Answer(block=0, rows=1, outputs=floats(1)))] == ["alice"]
    assert [name for name, _ in call.fail_rest(Fault("UNAVAILABLE", "gone"))] == ["dave", "erin"]
    assert call.fail_rest(Fault("UNAVAILABLE", "gone")) == []


def test_an_error_names_its_rows_and_the_time_of_a_retry() -> None:
    error = pb.Error(code="RESOURCE_EXHAUSTED", message="full", retry_pushback_ms=1500)
    call = OpenCall(ROWS)
    fault = Fault("RESOURCE_EXHAUSTED", "full", 1.5)
    assert call.take(pb.Answer(block=0, rows=2, error=error)) == [("alice", fault), ("carol", fault)]


def test_a_whole_calls_failure_is_for_those_who_still_wait() -> None:
    call = OpenCall(ROWS)
    call.take(pb.Answer(block=0, rows=2, outputs=floats(1, 2)))
    failure = pb.Answer(error=pb.Error(code="UNAVAILABLE", message="no router"), done=True)
    fault = Fault("UNAVAILABLE", "no router")
    assert call.take(failure) == [("bob", fault), ("dave", fault), ("erin", fault)]


def test_an_answer_that_fits_no_row_fails_everyone_instead_of_shifting_them() -> None:
    call = OpenCall(ROWS)
    outcomes = call.take(pb.Answer(block=0, first_row=1, rows=2, outputs=floats(1, 2)))
    assert len(outcomes) == 5
    assert {outcome.code for _, outcome in outcomes if isinstance(outcome, Fault)} == {"INTERNAL"}


def test_an_explanation_comes_with_each_row_that_it_explains() -> None:
    explanation = pb.Explanation(
        queued_s=0.5, backend_s=4, batch_id="7", batch_rows=9, replica="127.0.0.1:50061", attempts=1
    )
    ((_, outcome),) = OpenCall(ROWS[:1]).take(pb.Answer(rows=1, outputs=floats(1), explanation=explanation, done=True))
    assert isinstance(outcome, dict)
    assert outcome["explanation"] == {
        "queued_s": 0.5,
        "backend_s": 4.0,
        "batch_id": "7",
        "batch_rows": 9,
        "replica": "127.0.0.1:50061",
        "attempts": 1,
    }
