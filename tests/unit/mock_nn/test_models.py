"""The mock's answer as a function, and the reading of requests."""

import hashlib
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_nn.models import BadInputError, FloatArray, answer, expected, metadata, read_agent_type, read_matrix
from protos.open_inference import open_inference_pb2 as pb

ROWS = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)


def random_rows(seed: int, rows: int, dim: int) -> FloatArray:
    """(rows, dim) float32 of very different sizes, so that every order of summing rounds differently."""
    rng = np.random.default_rng(seed)
    exponents = rng.integers(-10, 10, (rows, dim))
    return (rng.standard_normal((rows, dim)) * 2.0**exponents).astype(np.float32)


def tensor_request(
    shape: tuple[int, ...] = (2, 3),
    datatype: str = "FP32",
    raw: tuple[bytes, ...] = (ROWS.tobytes(),),
    contents: pb.InferTensorContents | None = None,
    inputs: int = 1,
    outputs: tuple[str, ...] = (),
) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=shape, contents=contents)
    requested = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]
    return pb.ModelInferRequest(
        model_name="m", id="7", inputs=[tensor] * inputs, outputs=requested, raw_input_contents=raw
    )


def typed(fp32: tuple[float, ...] = (), fp64: tuple[float, ...] = ()) -> pb.InferTensorContents:
    return pb.InferTensorContents(fp32_contents=fp32, fp64_contents=fp64)


# The answer


def test_the_answer_is_the_documented_formula() -> None:
    def number(position: int) -> float:
        stream = hashlib.shake_256(b"4:iriscat").digest(100)
        (integer,) = struct.unpack_from("<I", stream, 4 * position)
        return float(integer >> 8) / 2**23 - 1

    row = np.array([[1.0, 2.0]], dtype=np.float32)
    bias, weights = number(0), (number(1), number(2))
    wanted = np.float32(np.float32(weights[0]) + np.float32(2 * weights[1])) + np.float32(bias)
    assert expected("iris", "cat", row)[0] == wanted


def test_the_answer_never_changes_between_versions() -> None:
    # Other tests and recorded runs rely on it.
    assert expected("m", "a", ROWS).tolist() == GOLDEN


GOLDEN = [1.463926911354065, 2.8633086681365967]


LAYOUTS: dict[str, Callable[[int, int, int], FloatArray]] = {
    "C": random_rows,
    "Fortran": lambda seed, rows, dim: np.asfortranarray(random_rows(seed, rows, dim)),
    "every other row": lambda seed, rows, dim: random_rows(seed, 2 * rows, dim)[::2],
    "every other column": lambda seed, rows, dim: random_rows(seed, rows, 2 * dim)[:, ::2],
    "reversed": lambda seed, rows, dim: random_rows(seed, rows, dim)[::-1, ::-1],
}


def one_by_one(batch: FloatArray) -> FloatArray:
    return np.concatenate([expected("m", "a", row[np.newaxis].copy()) for row in batch])


@given(
    seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), dim=st.integers(1, 300), layout=st.sampled_from([*LAYOUTS])
)
def test_a_row_is_answered_bit_identically_alone_and_in_any_batch(seed: int, rows: int, dim: int, layout: str) -> None:
    batch = LAYOUTS[layout](seed, rows, dim)
    assert expected("m", "a", batch).tobytes() == one_by_one(batch).tobytes()


@pytest.mark.parametrize("dim", [4096, 8192, 8193, 65_536])
def test_long_rows_are_answered_bit_identically_too(dim: int) -> None:
    batch = random_rows(1, 5, dim)
    assert expected("m", "a", batch).tobytes() == one_by_one(batch).tobytes()


def test_rows_models_and_agent_types_all_show_in_the_answer() -> None:
    answers = [
        float(value)
        for model_name in ("m", "n", "ma")
        for agent_type in ("", "a", "b")
        for value in expected(model_name, agent_type, random_rows(3, 4, 8))
    ]
    assert len(set(answers)) == 36


def test_a_row_of_zeros_tells_its_model_and_agent_type() -> None:
    zeros = np.zeros((1, 3), dtype=np.float32)
    names = [("m", "a"), ("m", "b"), ("n", "a"), ("ma", "")]
    assert len({float(expected(*name, zeros)[0]) for name in names}) == 4


def test_swapped_columns_show() -> None:
    assert expected("m", "a", ROWS[:, ::-1])[0] != expected("m", "a", ROWS)[0]


def test_a_width_gives_that_many_multiples() -> None:
    answers = expected("m", "a", ROWS)
    assert np.array_equal(expected("m", "a", ROWS, width=3), np.stack([answers, 2 * answers, 3 * answers], axis=1))
    assert expected("m", "a", ROWS, width=1).shape == (2, 1)


def test_infinite_rows_are_arithmetic_not_warnings() -> None:
    rows = np.array([[np.inf, -np.inf], [3e38, 3e38], [np.nan, 0]], dtype=np.float32)
    assert expected("m", "a", rows).shape == (3,)


# Reading requests


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(tensor_request(), id="raw FP32"),
        pytest.param(tensor_request(datatype="FP64", raw=(ROWS.astype("<f8").tobytes(),)), id="raw FP64"),
        pytest.param(tensor_request(raw=(), contents=typed(fp32=(1, 2, 3, 4, 5, 6))), id="typed FP32"),
        pytest.param(tensor_request(raw=(), datatype="FP64", contents=typed(fp64=(1, 2, 3, 4, 5, 6))), id="typed FP64"),
        pytest.param(tensor_request(outputs=("output",)), id="the output named"),
    ],
)
def test_every_form_of_a_matrix_is_read(request_: pb.ModelInferRequest) -> None:
    matrix = read_matrix(request_)
    assert matrix.dtype == np.float32
    assert matrix.tolist() == ROWS.tolist()


def test_an_fp64_too_large_for_fp32_becomes_infinite() -> None:
    request = tensor_request(shape=(1, 1), datatype="FP64", raw=(struct.pack("<d", 1e300),))
    assert read_matrix(request).tolist() == [[np.inf]]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (tensor_request(inputs=0, raw=()), "expected 1 input but got 0 inputs for model 'm'"),
        (tensor_request(inputs=2), "expected 1 input but got 2 inputs for model 'm'"),
        (tensor_request(shape=()), "input 'x' has shape [], must be [rows, dim] with at least 1 each"),
        (tensor_request(shape=(6,)), "input 'x' has shape [6], must be [rows, dim] with at least 1 each"),
        (tensor_request(shape=(2, 3, 1)), "input 'x' has shape [2, 3, 1], must be [rows, dim] with at least 1 each"),
        (tensor_request(shape=(-2, -3)), "input 'x' has shape [-2, -3], must be [rows, dim] with at least 1 each"),
        (tensor_request(shape=(0, 3)), "input 'x' has shape [0, 3], must be [rows, dim] with at least 1 each"),
        (tensor_request(shape=(2, 0)), "input 'x' has shape [2, 0], must be [rows, dim] with at least 1 each"),
        (tensor_request(datatype="INT32"), "input 'x' has datatype 'INT32', must be one of ['FP32', 'FP64']"),
        (tensor_request(datatype=""), "input 'x' has datatype '', must be one of ['FP32', 'FP64']"),
        (tensor_request(shape=(3, 3)), "input 'x': shape [3, 3] of FP32 takes 36 bytes, got 24"),
        (tensor_request(datatype="FP64"), "input 'x': shape [2, 3] of FP64 takes 48 bytes, got 24"),
        (tensor_request(raw=(b"123",)), "input 'x': shape [2, 3] of FP32 takes 24 bytes, got 3"),
        (
            tensor_request(shape=(2**62, 2**62)),
            f"input 'x': shape [{2**62}, {2**62}] of FP32 takes {2**126} bytes, got 24",
        ),
        (tensor_request(raw=(b"", b"")), "expected 1 entry of raw_input_contents but got 2"),
        (tensor_request(contents=typed(fp32=(1,))), "input 'x' has both raw_input_contents and contents"),
        (tensor_request(raw=()), "input 'x': shape [2, 3] takes 6 FP32 numbers, got 0"),
        (
            tensor_request(raw=(), contents=typed(fp64=(1, 2, 3, 4, 5, 6))),
            "input 'x': shape [2, 3] takes 6 FP32 numbers, got 0",
        ),
        (tensor_request(outputs=("output", "other")), "unexpected inference output 'other' for model 'm'"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(request_: pb.ModelInferRequest, message: str) -> None:
    with pytest.raises(BadInputError) as refused:
        read_matrix(request_)
    assert str(refused.value) == message


@given(
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 4), max_size=3),
    datatype=st.sampled_from(["FP32", "FP64", "BYTES", ""]),
    raw=st.lists(st.binary(max_size=64), max_size=2),
    fp32=st.lists(st.floats(width=32), max_size=9),
)
def test_any_request_is_read_or_refused(shape: list[int], datatype: str, raw: list[bytes], fp32: list[float]) -> None:
    request = tensor_request(tuple(shape), datatype, tuple(raw), typed(fp32=tuple(fp32)) if fp32 else None)
    try:
        matrix = read_matrix(request)
    except BadInputError:
        return
    assert list(matrix.shape) == shape


def test_the_agent_type_is_a_string_parameter_or_empty() -> None:
    request = tensor_request()
    assert read_agent_type(request) == ""
    request.parameters["agent_type"].string_param = "cat"
    assert read_agent_type(request) == "cat"
    request.parameters["agent_type"].int64_param = 1
    with pytest.raises(BadInputError, match="'agent_type' must be a string_param"):
        read_agent_type(request)


# Writing answers


@pytest.mark.parametrize(("version", "answered"), [("", "1"), ("3", "3")])
def test_an_answer_echoes_its_request_and_is_raw(version: str, answered: str) -> None:
    request = tensor_request()
    request.model_version = version
    values = np.array([[1.5], [2.5]], dtype=np.float32)
    response = answer(request, values).infer_response
    assert (response.model_name, response.model_version, response.id) == ("m", answered, "7")
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("output", "FP32", [2, 1])
    assert list(response.raw_output_contents) == [values.tobytes()]


@pytest.mark.parametrize(("width", "shape"), [(0, [-1]), (3, [-1, 3])])
def test_metadata_tell_the_tensors(width: int, shape: list[int]) -> None:
    described = metadata("m", width)
    assert [(t.name, t.datatype, list(t.shape)) for t in described.inputs] == [("vector", "FP32", [-1, -1])]
    assert [(t.name, t.datatype, list(t.shape)) for t in described.outputs] == [("output", "FP32", shape)]


def test_named_tensors_are_told_and_taken_and_no_others() -> None:
    described = metadata("m", 0, "x", "FP64", "y")
    assert [(t.name, t.datatype, list(t.shape)) for t in described.inputs] == [("x", "FP64", [-1, -1])]
    assert [t.name for t in described.outputs] == ["y"]
    doubles = tensor_request(datatype="FP64", raw=(bytes(48),), outputs=("y",))
    assert read_matrix(doubles, "x", "FP64", "y").shape == (2, 3)
    assert answer(doubles, np.zeros(2, np.float32), "y").infer_response.outputs[0].name == "y"
    for names, message in (
        (("z", "FP64", "y"), "unexpected inference input 'x' for model 'm'"),
        (("x", "FP32", "y"), "input 'x' has datatype 'FP64', must be one of ['FP32']"),
        (("x", "FP64", "output"), "unexpected inference output 'y' for model 'm'"),
    ):
        with pytest.raises(BadInputError) as refused:
            read_matrix(doubles, *names)
        assert str(refused.value) == message
