"""What an answer must hold, and which of its rows failed by themselves."""

import json
from dataclasses import replace

import numpy as np
import pytest

from router.core.answer import MODEL_TEXT_MAX, read_answer, read_row_errors
from router.core.types import ANY_ANSWER, Batch, BatchAnswer, Contract, Outputs, Tensor
from router.errors import Malformed
from tests.builders import make_batch, make_block

STRICT = Contract(allow_nan=False)
NAN, INF = float("nan"), float("inf")


def batch_of(rows: int, contract: Contract = ANY_ANSWER) -> Batch:
    plain = make_batch(make_block(*range(rows)).whole())
    return Batch(plain.id, plain.key, plain.parts, rows, 0.0, contract)


def output(*values: float, name: str = "output", datatype: str = "FP32", width: int = 1) -> Tensor:
    form = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT32": "<i4"}[datatype]
    shape = (len(values) // width, *([width] if width > 1 else []))
    return Tensor(name, datatype, shape, np.array(values, form).tobytes())


def read(batch: Batch, outputs: Outputs, row_errors: str | None = None) -> BatchAnswer:
    return read_answer(batch, outputs, row_errors=row_errors, replica="r", dispatched_at=1.0, answered_at=2.0)


def refused(batch: Batch, outputs: Outputs, row_errors: str | None = None) -> str:
    with pytest.raises(Malformed) as malformed:
        read(batch, outputs, row_errors)
    return malformed.value.message


def test_a_good_answer_has_no_errors() -> None:
    answer = read(batch_of(2), (output(1, 2),))
    assert (answer.batch_id, answer.batch_rows, answer.replica) == ("b-1", 2, "r")
    assert (answer.dispatched_at, answer.answered_at) == (1.0, 2.0)
    assert (answer.row_errors, answer.fault) == (None, None)


def test_an_answer_that_does_not_fit_its_batch_is_malformed() -> None:
    assert "shape [1] for a batch of 2 rows" in refused(batch_of(2), (output(1),))


def test_the_models_output_may_not_be_missing() -> None:
    batch = batch_of(1, Contract(output="score"))
    assert "no output 'score', only 'a', 'b'" in refused(batch, (output(1, name="a"), output(1, name="b")))
    assert read(batch, (output(1, name="a"), output(1, name="score"))).fault is None


def wanting(*outputs: str, contract: Contract = ANY_ANSWER) -> Batch:
    batch = batch_of(1, contract)
    batch.parts[0].block.outputs = outputs
    return batch


def test_an_answer_may_hold_some_of_the_wanted_outputs_and_others_but_not_others_only() -> None:
    assert len(read(wanting("a", "b"), (output(1, name="b"), output(1, name="c"))).outputs) == 2
    assert "no output 'a', 'b', only 'c'" in refused(wanting("a", "b"), (output(1, name="c"),))


def test_names_that_only_callers_tell_are_not_the_replicas_fault() -> None:
    """Bug: three requests for a misspelt output had a healthy replica ejected."""
    batch = wanting("a")
    made_up = replace(batch, key=replace(batch.key, outputs=("a",)))
    assert read(made_up, (output(1, name="c"),)).outputs[0].name == "c"


def test_the_models_output_may_be_missing_where_nobody_wants_it() -> None:
    contract = Contract(output="score")
    assert read(wanting("a", contract=contract), (output(1, name="a"),)).fault is None
    assert "no output 'score', only 'a'" in refused(wanting("a", "score", contract=contract), (output(1, name="a"),))


# -- rows with errors of their own -----------------------------------------------------------------------------------


def test_named_rows_have_failed_and_the_others_are_fine() -> None:
    answer = read(batch_of(3), (output(1, 2, 3),), '{"1": "too large"}')
    assert (answer.row_errors, answer.fault) == ({1: "too large"}, None)


def test_no_named_rows_are_no_errors() -> None:
    assert read(batch_of(3), (output(1, 2, 3),), "{}").row_errors is None


def test_messages_are_cut_in_the_middle_since_tracebacks_say_at_their_end_what_it_is() -> None:
    (message,) = read_row_errors(json.dumps({"0": "begins" + "x" * (MODEL_TEXT_MAX - 9) + "ends"}), 1).values()
    assert len(message) == MODEL_TEXT_MAX
    assert (message[:6], " ... " in message, message[-4:]) == ("begins", True, "ends")
    assert read_row_errors(json.dumps({"0": "x" * MODEL_TEXT_MAX}), 1) == {0: "x" * MODEL_TEXT_MAX}


def test_half_a_surrogate_pair_in_a_rows_error_is_told_as_what_can_be_sent() -> None:
    assert read_row_errors(r'{"0": "bad \ud800 row"}', 1) == {0: "bad ? row"}
    assert read_row_errors(r'{"0": "\ud83d\ude00"}', 1) == {0: "\N{GRINNING FACE}"}


def test_the_first_and_the_last_row_can_be_named() -> None:
    assert read_row_errors('{"2": "c", "0": "a"}', 3) == {2: "c", 0: "a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]x", "not JSON"),
        ('["a"]', "not an object"),
        ("3", "not an object"),
        ("null", "not an object"),
        ('{"3": "beyond the last"}', "not an object of row numbers below 3"),
        ('{"-1": "x"}', "not an object"),
        ('{"01": "x"}', "not an object"),
        ('{"one": "x"}', "not an object"),
        ('{"1": null}', "not an object"),
        ('{"1": {"0": "x"}}', "not an object"),
        ('{"1": "x", "1": "y"}', "more than once"),
    ],
)
def test_other_row_errors_are_malformed(text: str, message: str) -> None:
    assert message in refused(batch_of(3), (output(1, 2, 3),), text)


# -- values that may not be ------------------------------------------------------------------------------------------


def test_nan_is_a_value_like_any_other_unless_it_is_forbidden() -> None:
    assert read(batch_of(2), (output(NAN, INF),)).row_errors is None


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rows_that_hold_nan_or_infinity_fail_where_that_is_forbidden(datatype: str, bad: float) -> None:
    answer = read(batch_of(3, STRICT), (output(0, 0, 0, 0, 0, bad, datatype=datatype, width=2),))
    assert answer.row_errors == {2: "the model's output 'output' holds NaN or infinity"}
    assert answer.fault is not None
    assert "1 of 3 rows" in answer.fault.message


def test_numbers_without_nan_pass_where_it_is_forbidden() -> None:
    largest = float(np.finfo("<f4").max)
    answer = read(batch_of(2, STRICT), (output(largest, -largest), output(1, 2, datatype="INT32")))
    assert (answer.row_errors, answer.fault) == (None, None)


def test_an_output_without_values_holds_no_nan() -> None:
    assert read(batch_of(2, STRICT), (Tensor("o", "FP32", (2, 0), b""),)).fault is None


def test_each_output_is_looked_at_and_a_row_fails_once() -> None:
    outputs = (output(NAN, 1, 2, name="a"), output(NAN, NAN, 2, name="b"))
    assert read(batch_of(3, STRICT), outputs).row_errors == {
        0: "the model's output 'a' holds NaN or infinity",
        1: "the model's output 'b' holds NaN or infinity",
    }


def test_what_a_named_row_holds_does_not_matter() -> None:
    answer = read(batch_of(2, STRICT), (output(NAN, 1),), '{"0": "no idea"}')
    assert (answer.row_errors, answer.fault) == ({0: "no idea"}, None)
