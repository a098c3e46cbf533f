"""What a backend tells of a model, and what follows from it."""

import re
from dataclasses import replace
from typing import Any

import pytest

from router.core import model_rules as rules
from router.core.model_info import ModelInfo, ModelReport, ModelState, TensorInfo
from router.core.types import TensorSpec
from router.errors import InvalidArgument


def told(*inputs: tuple[str, str, tuple[int, ...]], outputs: Any = (), **more: Any) -> ModelInfo:  # noqa: ANN401
    return ModelInfo(
        "m",
        inputs=tuple(TensorInfo(*one) for one in inputs),
        outputs=tuple(TensorInfo(*one) for one in outputs),
        **more,
    )


ROWS = told(("x", "FP32", (-1, 4)))
WHOLE = told(("x", "FP32", (1, 4)))


@pytest.mark.parametrize(
    ("batching", "info", "is_batched"),
    [
        ("auto", None, True),
        ("auto", told(), True),
        ("auto", ROWS, True),
        ("auto", WHOLE, False),
        ("auto", told(("x", "FP32", (-1, 4)), ("y", "FP32", (4,))), False),
        ("auto", told(("x", "FP32", ())), True),
        ("auto", told(("x", "FP32", (-1, 4)), max_batch_size=0), False),
        ("auto", told(("x", "FP32", (4,)), max_batch_size=1), True),
        ("on", WHOLE, True),
        ("on", told(max_batch_size=0), True),
        ("off", ROWS, False),
        ("off", None, False),
    ],
)
def test_whether_rows_share_calls(batching: rules.Batching, info: ModelInfo | None, is_batched: bool) -> None:
    assert rules.takes_batches(batching, info) is is_batched


@pytest.mark.parametrize(
    ("info", "is_batched", "rows"),
    [
        (None, True, 64),
        (None, False, 1),
        (told(max_batch_size=8), True, 8),
        (told(max_batch_size=128), True, 64),
        (told(max_batch_size=0), True, 64),
        (told(max_batch_size=-1), True, 64),
    ],
)
def test_a_call_has_as_many_rows_as_settings_and_backend_allow(
    info: ModelInfo | None, is_batched: bool, rows: int
) -> None:
    assert rules.most_rows(info, 64, is_batched=is_batched) == rows


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (told(is_decoupled=True), "it is decoupled .*; turn that off in its configuration"),
        (told(is_sequence=True), "its requests belong to sequences"),
        (
            told(outputs=[("y", "FP32", (-1, 2)), ("z", "FP32", (3,))]),
            r"its output 'z' has shape \[3\], without a dimension of rows, .*; set batching: off",
        ),
    ],
)
def test_why_a_model_cannot_be_served(info: ModelInfo, words: str) -> None:
    why = rules.why_unsupported(info, is_batched=True)
    assert why is not None
    assert re.match(words, why)


def test_a_model_that_takes_no_batches_may_have_any_outputs() -> None:
    info = told(outputs=[("y", "FP32", (3,))])
    assert rules.why_unsupported(info, is_batched=False) is None
    assert rules.why_unsupported(None, is_batched=True) is None
    assert rules.why_unsupported(told(outputs=[("y", "FP32", ()), ("z", "FP32", (-1,))]), is_batched=True) is None


TWO = ModelInfo(
    "m",
    inputs=(
        TensorInfo("x", "FP32", (-1, 4)),
        TensorInfo("text", "BYTES", (-1,)),
        TensorInfo("mask", "BOOL", (-1, -1), is_optional=True),
    ),
)
X, TEXT = TensorSpec("x", "FP32", (4,)), TensorSpec("text", "BYTES", ())


@pytest.mark.parametrize(
    "specs", [(X, TEXT), (TEXT, X), (X, TEXT, TensorSpec("mask", "BOOL", (7,)))], ids=["both", "any order", "optional"]
)
def test_inputs_that_fit(specs: tuple[TensorSpec, ...]) -> None:
    rules.check_inputs(TWO, specs, is_batched=True)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((X, TEXT, TensorSpec("z", "FP32", ())), "the model has no input 'z', only 'x', 'text', 'mask'"),
        ((X,), "input 'text' is missing; the model wants 'x', 'text', 'mask'"),
        ((TensorSpec("x", "FP64", (4,)), TEXT), "input 'x' is FP64; the model wants FP32"),
        ((TensorSpec("x", "FP32", (3,)), TEXT), "input 'x' has rows of shape [3]; the model wants [4]"),
        ((TensorSpec("x", "FP32", (4, 1)), TEXT), "input 'x' has rows of shape [4, 1]; the model wants [4]"),
        ((TensorSpec("x", "FP32", ()), TEXT), "input 'x' has rows of shape []; the model wants [4]"),
    ],
)
def test_inputs_that_do_not_fit(specs: tuple[TensorSpec, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        rules.check_inputs(TWO, specs, is_batched=True)


def test_a_request_for_a_model_without_batches_has_the_whole_shape() -> None:
    rules.check_inputs(WHOLE, (TensorSpec("x", "FP32", (1, 4)),), is_batched=False)
    with pytest.raises(InvalidArgument, match=r"^input 'x' has shape \[2, 4\]; the model wants \[1, 4\]$"):
        rules.check_inputs(WHOLE, (TensorSpec("x", "FP32", (2, 4)),), is_batched=False)


def test_what_nobody_tells_is_not_checked() -> None:
    odd = TensorSpec("z", "INT8", (9, 9))
    for info in (None, told(), told(("z", "", ())), told(("z", "float32", ()))):
        rules.check_inputs(info, (odd,), is_batched=True)
        rules.check_outputs(info, ["anything"])


def test_unknown_outputs_are_told_with_the_known_ones() -> None:
    info = told(outputs=[(f"y{number}", "FP32", (-1,)) for number in range(9)])
    rules.check_outputs(info, ["y8", "y0"])
    with pytest.raises(InvalidArgument, match=r"^the model has no output 'z', only 'y0', .*'y7', \.\.\.$"):
        rules.check_outputs(info, ["y0", "z"])


@pytest.mark.parametrize(
    ("info", "name", "datatype", "dim", "is_batched", "spec"),
    [
        (None, None, None, 3, True, ("vector", "FP32", (3,))),
        (None, "x", "FP64", 3, True, ("x", "FP64", (3,))),
        (None, None, None, 3, False, ("vector", "FP32", (1, 3))),
        (told(), None, None, 3, True, ("vector", "FP32", (3,))),
        (ROWS, None, None, 4, True, ("x", "FP32", (4,))),
        (told(("x", "FP64", (-1, -1))), None, None, 4, True, ("x", "FP64", (4,))),
        (told(("x", "FP16", (-1, -1))), None, None, 4, True, ("x", "FP16", (4,))),
        (told(("x", "FP32", (-1,))), None, None, 1, True, ("x", "FP32", ())),
        (told(("x", "?", (-1, -1))), None, None, 4, True, ("x", "FP32", (4,))),
        (told(("x", "FP32", ())), None, None, 4, True, ("x", "FP32", (4,))),
        (told(("x", "FP32", (4,))), None, None, 4, False, ("x", "FP32", (4,))),
        (WHOLE, None, None, 4, False, ("x", "FP32", (1, 4))),
        (told(("x", "FP32", (-1, -1))), None, None, 4, False, ("x", "FP32", (1, 4))),
    ],
)
def test_what_a_vector_is_sent_as(
    info: ModelInfo | None,
    name: str | None,
    datatype: str | None,
    dim: int,
    is_batched: bool,
    spec: tuple[str, str, tuple[int, ...]],
) -> None:
    assert rules.native_spec(info, name, datatype, dim, is_batched=is_batched) == TensorSpec(*spec)


def test_an_optional_input_is_not_the_one_for_vectors() -> None:
    info = ModelInfo(
        "m", inputs=(TensorInfo("mask", "BOOL", (-1,), is_optional=True), TensorInfo("x", "FP32", (-1, 2)))
    )
    assert rules.native_spec(info, None, None, 2, is_batched=True).name == "x"
    lone = ModelInfo("m", inputs=(TensorInfo("x", "FP32", (-1, 2), is_optional=True),))
    assert rules.native_spec(lone, None, None, 2, is_batched=True).name == "x"


@pytest.mark.parametrize(
    ("info", "name", "datatype", "is_batched", "message"),
    [
        (ROWS, None, None, True, "vector has 3 values; the model's input 'x' takes 4"),
        (told(("x", "FP32", (-1,))), None, None, True, "vector has 3 values; the model's input 'x' takes 1"),
        (WHOLE, None, None, False, "vector has 3 values; the model's input 'x' takes 4"),
        (ROWS, "y", None, True, "the model has no input 'y', only 'x'"),
        (ROWS, None, "FP64", True, "vector has 3 values; the model's input 'x' takes 4"),
        (told(("x", "FP32", (-1, 3))), None, "FP64", True, "input 'x' is FP64; the model wants FP32"),
        (TWO, "x", None, True, "vector has 3 values; the model's input 'x' takes 4"),
        (
            told(("x", "FP32", (-1, 3)), ("y", "FP32", (-1, 3))),
            "x",
            None,
            True,
            "input 'y' is missing; the model wants 'x', 'y'",
        ),
        (
            TWO,
            None,
            None,
            True,
            "the model has the inputs 'x', 'text'; vector_input must name the one for vectors",
        ),
        (
            told(("t", "BYTES", (-1,))),
            None,
            None,
            True,
            "the model's input 't' is BYTES; vectors can be sent as FP32, FP64, FP16",
        ),
        (
            told(("x", "FP32", (-1, 1, 3))),
            None,
            None,
            True,
            "the model's input 'x' takes rows of shape [1, 3]; a vector has one dimension",
        ),
        (
            told(("x", "FP32", (1, 1, 3))),
            None,
            None,
            False,
            "the model's input 'x' takes shape [1, 1, 3]; a vector has one dimension",
        ),
        (told(("x", "FP32", (8, 3))), None, None, False, "input 'x' has shape [1, 3]; the model wants [8, 3]"),
    ],
)
def test_vectors_that_the_model_does_not_take(
    info: ModelInfo, name: str | None, datatype: str | None, is_batched: bool, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        rules.native_spec(info, name, datatype, 3, is_batched=is_batched)


@pytest.mark.parametrize(
    ("outputs", "name", "found", "asked"),
    [
        ([], None, None, ()),
        ([], "y", "y", ()),
        (["a"], None, "a", ()),
        (["a", "b"], None, "a", ("a",)),
        (["a", "output"], None, "output", ("output",)),
        (["a", "b"], "b", "b", ("b",)),
    ],
)
def test_where_a_native_row_is_answered_from(
    outputs: list[str], name: str | None, found: str | None, asked: tuple[str, ...]
) -> None:
    info = told(outputs=[(one, "FP32", (-1,)) for one in outputs])
    assert rules.native_output(info, name) == found
    assert rules.to_ask_for(info, found) == asked


def test_a_vector_output_that_is_not_there_is_told_by_its_setting() -> None:
    info = told(outputs=[("a", "FP32", (-1,))])
    with pytest.raises(InvalidArgument, match=r"^the model has no output 'b', as vector_output says, only 'a'$"):
        rules.native_output(info, "b")


ONE, OTHER = told(("x", "FP32", (-1,))), told(("x", "FP64", (-1,)))


def ready(info: ModelInfo | None = None) -> ModelReport:
    return ModelReport(ModelState.READY, info)


def unready(info: ModelInfo | None = None) -> ModelReport:
    return ModelReport(ModelState.UNREADY, info)


ABSENT = ModelReport(ModelState.ABSENT)


@pytest.mark.parametrize(
    ("reports", "agreed"),
    [
        ([], None),
        ([None], None),
        ([ABSENT], ABSENT),
        ([ABSENT, ABSENT], ABSENT),
        ([ABSENT, None], None),
        ([ABSENT, unready(ONE)], unready(ONE)),
        ([unready(ONE), None, ready(OTHER)], ready(OTHER)),
        ([ready(ONE), ready(OTHER)], ready(ONE)),
        ([ready(), ready(OTHER)], ready(OTHER)),
        ([None, ready()], ready()),
    ],
)
def test_what_replicas_agree_on(reports: list[ModelReport | None], agreed: ModelReport | None) -> None:
    assert rules.agree(reports) == agreed


def test_replicas_differ_only_where_two_of_them_tell() -> None:
    assert rules.differ([ready(ONE), None, unready(OTHER)])
    assert not rules.differ([ready(ONE), ready(), None, ready(ONE), ABSENT])


def test_what_was_told_once_stays_known_until_something_else_is_told() -> None:
    triton = told(("x", "FP32", (-1,)), max_batch_size=8, is_sequence=True)
    assert rules.remember(None, ready()) == ready()
    assert rules.remember(ready(ONE), unready()) == unready(ONE)
    assert rules.remember(ready(ONE), ready(OTHER)) == ready(OTHER)
    assert rules.remember(ready(triton), ready(ONE)) == ready(triton)
    assert rules.remember(ready(ONE), ABSENT) == ABSENT
    assert rules.remember(ABSENT, ready()) == ready()


def test_an_input_that_was_optional_is_so_when_the_configuration_is_not_told_any_more() -> None:
    x, mask = TensorInfo("x", "FP32", (-1,)), TensorInfo("mask", "BOOL", (-1,))
    triton = ModelInfo("m", inputs=(x, replace(mask, is_optional=True)), max_batch_size=8)
    assert rules.remember(ready(triton), ready(ModelInfo("m", inputs=(x, mask)))) == ready(triton)
