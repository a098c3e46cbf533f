"""When faults strike and what they make of an answer."""

import json
from random import Random

import numpy as np
import pytest

from mock_nn.config import Fault, FaultKind, parse_fault
from mock_nn.faults import FaultPlan, Message, disturb, name_rows
from mock_nn.models import answer
from protos.open_inference import open_inference_pb2 as pb

MATRIX = np.array([[1, 2], [666, 3]], dtype=np.float32)


def kinds_struck(plan: FaultPlan, batches: int, model_name: str = "m") -> list[str]:
    struck = (plan.strike(model_name, MATRIX) for _ in range(batches))
    return ["" if fault is None else fault.kind.value for fault in struck]


def plan_of(*texts: str, seed: int = 0) -> FaultPlan:
    return FaultPlan([parse_fault(text) for text in texts], Random(seed))


def good_answer(batch_id: str = "7", width: int = 0) -> Message:
    values = np.array([1.5, 2.5], dtype=np.float32)
    return answer(pb.ModelInferRequest(model_name="m", id=batch_id), values[:, np.newaxis] if width else values)


# When


@pytest.mark.parametrize(
    ("text", "struck"),
    [
        ("nan", [1, 2, 3, 4, 5, 6]),
        ("nan:every=1", [1, 2, 3, 4, 5, 6]),
        ("nan:every=3", [3, 6]),
        ("nan:first=2", [1, 2]),
        ("nan:value=666", [1, 2, 3, 4, 5, 6]),
        ("nan:value=3", []),  # only a row's first number counts
        ("nan:model=m,every=2", [2, 4, 6]),
        ("nan:model=other", []),
    ],
)
def test_a_trigger_strikes_these_of_six_batches(text: str, struck: list[int]) -> None:
    kinds = kinds_struck(plan_of(text), 6)
    assert [number for number, kind in enumerate(kinds, start=1) if kind] == struck


def test_a_value_is_compared_as_float32() -> None:
    matrix = np.array([[0.1]], dtype=np.float32)
    assert plan_of("poison:value=0.1").strike("m", matrix) is not None


def test_a_rate_is_met_and_seeded() -> None:
    struck = [kinds_struck(plan_of("error:rate=0.1", seed=seed), 10_000) for seed in (1, 1, 2)]
    assert struck[0] == struck[1]
    assert struck[0] != struck[2]
    assert 900 < struck[0].count("error") < 1100


def test_no_faults_strike_nothing() -> None:
    assert kinds_struck(plan_of(), 3) == ["", "", ""]


def test_the_first_fault_of_the_list_wins_and_the_others_count_on() -> None:
    assert kinds_struck(plan_of("short:first=2", "nan:every=2"), 4) == ["short", "short", "", "nan"]


def test_batches_of_other_models_do_not_count() -> None:
    plan = plan_of("nan:model=m,every=2")
    assert kinds_struck(plan, 1) == [""]
    assert kinds_struck(plan, 3, model_name="other") == ["", "", ""]
    assert kinds_struck(plan, 1) == ["nan"]


# What


def only(kind: FaultKind, good: Message) -> pb.ModelInferResponse:
    (message,) = disturb(kind, good, None)
    return message.infer_response


def values(response: pb.ModelInferResponse) -> list[float]:
    numbers: list[float] = np.frombuffer(response.raw_output_contents[0], dtype=np.float32).tolist()
    return numbers


@pytest.mark.parametrize(("width", "shape"), [(0, [1]), (1, [1, 1])])
def test_a_short_answer_lacks_its_last_row(width: int, shape: list[int]) -> None:
    response = only(FaultKind.SHORT, good_answer(width=width))
    assert list(response.outputs[0].shape) == shape
    assert values(response) == [1.5]


@pytest.mark.parametrize("width", [0, 1])
def test_a_nan_answer_has_it_in_the_first_row_only(width: int) -> None:
    first, second = values(only(FaultKind.NAN, good_answer(width=width)))
    assert np.isnan(first)
    assert second == 2.5


def test_a_wrong_shape_claims_a_row_more() -> None:
    response = only(FaultKind.WRONG_SHAPE, good_answer())
    assert list(response.outputs[0].shape) == [3]
    assert values(response) == [1.5, 2.5]


def test_a_wrong_datatype_does_not_fit_the_bytes() -> None:
    response = only(FaultKind.WRONG_DATATYPE, good_answer())
    assert response.outputs[0].datatype == "FP64"
    assert values(response) == [1.5, 2.5]


def test_a_missing_output_leaves_the_id() -> None:
    response = only(FaultKind.MISSING_OUTPUT, good_answer())
    assert (response.id, len(response.outputs), len(response.raw_output_contents)) == ("7", 0, 0)


def test_a_foreign_id_comes_with_the_right_values() -> None:
    response = only(FaultKind.FOREIGN_ID, good_answer())
    assert (response.id, values(response)) == ("7-foreign", [1.5, 2.5])


def ids(messages: list[Message]) -> list[str]:
    return [message.infer_response.id for message in messages]


def test_a_duplicate_comes_twice() -> None:
    assert ids(disturb(FaultKind.DUPLICATE, good_answer(), None)) == ["7", "7"]


def test_out_of_order_puts_the_previous_answer_in_front() -> None:
    assert ids(disturb(FaultKind.OUT_OF_ORDER, good_answer(), good_answer("6"))) == ["6", "7"]


def test_out_of_order_on_a_fresh_stream_invents_a_previous_answer() -> None:
    assert ids(disturb(FaultKind.OUT_OF_ORDER, good_answer(), None)) == ["7-foreign", "7"]


@pytest.mark.parametrize(
    ("text", "rows"), [("row_errors", ["1"]), ("row_errors:value=1", ["0"]), ("row_errors:first=1", ["0"])]
)
def test_row_errors_name_the_rows_with_the_value_or_the_first(text: str, rows: list[str]) -> None:
    good = good_answer()
    named = name_rows(parse_fault(text), good, MATRIX).infer_response
    assert list(json.loads(named.parameters["row_errors"].string_param)) == rows
    assert values(named) == [1.5, 2.5]
    assert good == good_answer()


WITHOUT_AN_ANSWER = {FaultKind.ERROR, FaultKind.POISON, FaultKind.STALL, FaultKind.DROP, FaultKind.CRASH}
BY_ROWS = {FaultKind.ROW_ERRORS}


@pytest.mark.parametrize("kind", sorted(set(FaultKind) - WITHOUT_AN_ANSWER - BY_ROWS))
def test_no_fault_touches_the_good_answer(kind: FaultKind) -> None:
    good, previous = good_answer(), good_answer("6")
    assert disturb(kind, good, previous) != [good]
    assert (good, previous) == (good_answer(), good_answer("6"))


def test_faults_are_values() -> None:
    assert {parse_fault("nan"), parse_fault("nan")} == {Fault(FaultKind.NAN)}
