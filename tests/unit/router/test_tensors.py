"""Open Inference Protocol requests to rows and back: what the wire's form does not change, and what it does."""

import struct
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as pb
from router.config import Settings
from router.core.types import Block, Tensor
from router.core.variable import VariableBlock
from router.dispatch.wire import to_request
from router.errors import InvalidArgument, ModelFailed, RouterError
from router.models import Models
from router.servicers.convert import Routes, Terms
from router.servicers.tensors import Rows, Targets, choose, join, read, timeout_s, to_response
from tests.builders import Listener, encode_texts, make_batch


def settings(**model: object) -> Settings:
    return Settings(
        backends={"b": {"addresses": ["b:1"]}},  # type: ignore[dict-item]
        models=[{"backend": "b", **model}],  # type: ignore[list-item]
    )


def tensor(
    name: str, datatype: str, shape: Sequence[int], contents: pb.InferTensorContents | None = None
) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, contents=contents)


def request(*tensors: pb.ModelInferRequest.InferInputTensor, raw: Sequence[bytes] = ()) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(model_name="m", inputs=tensors, raw_input_contents=raw)


def rows_of_request(message: pb.ModelInferRequest, **model: object) -> Rows:
    given = settings(**model)
    return read(message, Targets(given, Models(given)), given.limits)


def refusal(message: pb.ModelInferRequest) -> str:
    with pytest.raises(RouterError) as refused:
        rows_of_request(message)
    assert type(refused.value) is InvalidArgument
    return refused.value.message


@pytest.mark.parametrize(
    ("datatype", "contents", "raw"),
    [
        ("BOOL", pb.InferTensorContents(bool_contents=[True, False]), b"\1\0"),
        ("INT8", pb.InferTensorContents(int_contents=[-128, 127]), struct.pack("<2b", -128, 127)),
        ("INT16", pb.InferTensorContents(int_contents=[-5, 5]), struct.pack("<2h", -5, 5)),
        ("INT32", pb.InferTensorContents(int_contents=[-(2**31), 5]), struct.pack("<2i", -(2**31), 5)),
        ("INT64", pb.InferTensorContents(int64_contents=[-(2**63), 5]), struct.pack("<2q", -(2**63), 5)),
        ("UINT8", pb.InferTensorContents(uint_contents=[0, 255]), b"\0\xff"),
        ("UINT16", pb.InferTensorContents(uint_contents=[0, 65535]), b"\0\0\xff\xff"),
        ("UINT32", pb.InferTensorContents(uint_contents=[0, 2**32 - 1]), struct.pack("<2I", 0, 2**32 - 1)),
        ("UINT64", pb.InferTensorContents(uint64_contents=[0, 2**64 - 1]), struct.pack("<2Q", 0, 2**64 - 1)),
        ("FP32", pb.InferTensorContents(fp32_contents=[1.5, -2]), struct.pack("<2f", 1.5, -2)),
        ("FP64", pb.InferTensorContents(fp64_contents=[0.1, -2]), struct.pack("<2d", 0.1, -2)),
        ("BYTES", pb.InferTensorContents(bytes_contents=[b"", b"abc"]), encode_texts("", "abc")),
    ],
)
def test_typed_contents_are_the_same_rows_as_raw_ones(
    datatype: str, contents: pb.InferTensorContents, raw: bytes
) -> None:
    typed = rows_of_request(request(tensor("x", datatype, [2], contents)))
    same = rows_of_request(request(tensor("x", datatype, [2]), raw=[raw]))
    assert typed.inputs == same.inputs == (raw,)
    assert typed.target.key == same.target.key
    assert typed.offsets == same.offsets


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_halves_travel_raw_only(datatype: str) -> None:
    assert rows_of_request(request(tensor("x", datatype, [2, 3]), raw=[bytes(12)])).rows == 2
    contents = pb.InferTensorContents(fp32_contents=[1, 2])
    message = refusal(request(tensor("x", datatype, [2], contents)))
    assert message == f"input 'x': {datatype} travels in raw_input_contents only"


@pytest.mark.parametrize(
    ("datatype", "contents", "value"),
    [
        ("INT8", pb.InferTensorContents(int_contents=[1, 128]), 128),
        ("INT16", pb.InferTensorContents(int_contents=[-32769, 1]), -32769),
        ("UINT8", pb.InferTensorContents(uint_contents=[256, 1]), 256),
        ("UINT16", pb.InferTensorContents(uint_contents=[65536, 1]), 65536),
    ],
)
def test_a_number_that_its_datatype_cannot_hold_is_told(
    datatype: str, contents: pb.InferTensorContents, value: int
) -> None:
    assert refusal(request(tensor("x", datatype, [2], contents))) == f"input 'x': {value} is no {datatype}"


def test_contents_of_another_kind_are_missing() -> None:
    contents = pb.InferTensorContents(fp64_contents=[1, 2])
    assert refusal(request(tensor("x", "FP32", [2], contents))) == "input 'x' has 0 fp32_contents, which is not FP32[2]"


def test_several_inputs_of_both_kinds_make_one_block() -> None:
    message = request(
        tensor("text", "BYTES", [2, 2]),
        tensor("weight", "INT16", [2, 3]),
        raw=[encode_texts("a", "bb", "ccc", ""), bytes(range(12))],
    )
    rows = rows_of_request(message)
    block = rows.to_block(Terms(1.0, 5.0), Listener())
    assert isinstance(block, VariableBlock)
    assert (block.rows, block.arrived_at, block.deadline) == (2, 1.0, 6.0)
    assert (block.count_bytes(0, 1), block.count_bytes(1, 1)) == (6 + 11, 6 + 11)
    batch = to_request(make_batch(block.whole()))
    assert [(one.name, one.datatype, list(one.shape)) for one in batch.inputs] == [
        ("text", "BYTES", [2, 2]),
        ("weight", "INT16", [2, 3]),
    ]
    assert list(batch.raw_input_contents) == list(message.raw_input_contents)


def test_rows_of_a_fixed_width_make_a_plain_block() -> None:
    block = rows_of_request(request(tensor("x", "FP64", [3, 2]), raw=[bytes(48)])).to_block(Terms(0, 1), Listener())
    assert type(block) is Block
    assert (block.rows, block.row_bytes) == (3, 16)


@pytest.mark.parametrize("agent_type", ["", "buyer"])
def test_a_vector_has_the_key_of_a_native_one(agent_type: str) -> None:
    given = settings()
    message = request(tensor("vector", "FP32", [1, 3]), raw=[bytes(12)])
    if agent_type:
        message.parameters["agent_type"].string_param = agent_type
    ours = read(message, Targets(given, Models(given)), given.limits).target.key
    assert ours == Routes(given).find(agent_type, "m", 3).key


def test_parameters_go_to_the_model_with_their_types_and_agent_type_among_them() -> None:
    message = request(tensor("x", "FP32", [1]), raw=[bytes(4)])
    message.parameters["a"].bool_param = True
    message.parameters["z"].uint64_param = 2**64 - 1
    message.parameters["k"].int64_param = -1
    message.parameters["m"].double_param = 0.5
    message.parameters["s"].string_param = "text"
    message.parameters["agent_type"].string_param = "buyer"
    message.parameters["timeout"].int64_param = 1
    message.parameters["binary_data_output"].bool_param = True
    key = rows_of_request(message).target.key
    assert [name for name, _ in key.parameters] == ["a", "agent_type", "k", "m", "s", "z"]
    sent = to_request(make_batch(rows_of_request(message).to_block(Terms(0, 1), Listener()).whole()))
    for name in ("a", "z", "k", "m", "s", "agent_type"):
        assert sent.parameters[name] == message.parameters[name]
    assert len(sent.parameters) == 6


def test_a_model_that_wants_no_agent_type_is_not_told() -> None:
    message = request(tensor("x", "FP32", [1]), raw=[bytes(4)])
    message.parameters["agent_type"].string_param = "buyer"
    key = rows_of_request(message, send_agent_type=False).target.key
    assert (key.agent_type, key.parameters) == ("buyer", ())


def test_targets_remember_and_still_tell_true_from_one() -> None:
    given = settings()
    targets = Targets(given, Models(given))

    def target(name: str) -> object:
        message = request(tensor("x", "FP32", [1]), raw=[bytes(4)])
        setattr(message.parameters["p"], name, 1)
        return read(message, targets, given.limits).target

    assert target("int64_param") is target("int64_param")
    assert target("int64_param") != target("bool_param")
    assert target("int64_param") != target("double_param")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("p", {"double_param": float("nan")}, "parameter 'p' is not a number"),
        ("p", {}, "parameter 'p' has no value"),
        ("p" * 257, {"bool_param": True}, "a parameter's name has 257 characters"),
        ("sequence_start", {"bool_param": True}, "sequences of requests are not supported"),
    ],
)
def test_parameters_that_no_key_can_hold_are_refused(name: str, value: dict[str, object], message: str) -> None:
    asked = request(tensor("x", "FP32", [1]), raw=[bytes(4)])
    asked.parameters[name].CopyFrom(pb.InferParameter(**value))  # type: ignore[arg-type]
    assert message in refusal(asked)


def test_a_head_that_is_too_long_is_refused_whatever_it_is_made_of() -> None:
    assert "at most 8192 are allowed" in refusal(request(tensor("x", "FP32", [1] * 1100), raw=[bytes(4)]))
    many = [tensor(str(number), "FP32", [1]) for number in range(1000)]
    assert "at most 8192 are allowed" in refusal(request(*many, raw=[bytes(4)] * 1000))


def test_what_a_request_lists_is_counted_before_it_is_looked_at() -> None:
    """Bug: a million inputs, outputs or parameters, 10 MB, held everybody up for seconds before they were refused, and
    parameters that are not of the key were not refused at all."""
    many_outputs = request(tensor("x", "FP32", [1]), raw=[bytes(4)])
    for number in range(1024):
        many_outputs.outputs.add(name=str(number))
    many_parameters = request(tensor("x", "FP32", [1]), raw=[bytes(4)])
    of_an_input = request(tensor("x", "FP32", [1]), raw=[bytes(4)])
    for number in range(1024):
        many_parameters.parameters[f"triton_{number}"].bool_param = True
        of_an_input.inputs[0].parameters[f"binary_data_{number}"].bool_param = True
    message = "inputs, outputs, dimensions and parameters take 8208 characters or more, at most 8192 are allowed"
    assert refusal(many_outputs) == refusal(many_parameters) == refusal(of_an_input) == message
    del many_outputs.outputs[-2:]
    assert rows_of_request(many_outputs).rows == 1


@pytest.mark.parametrize("datatype", ["BYTES", "FP32"])
def test_a_shape_beyond_counting_is_its_senders_fault(datatype: str) -> None:
    """Bug: the number of its elements had too many digits to be printed, and the error became one of ours."""
    message = refusal(request(tensor("x", datatype, [1, *[2**62] * 500]), raw=[b""]))
    assert message == "input 'x' has a shape of more than 9223372036854775807 elements"


@pytest.mark.parametrize(("elements", "is_refused"), [(1_048_576, False), (1_048_577, True)])
def test_typed_contents_of_megabytes_are_refused(elements: int, *, is_refused: bool) -> None:
    """Bug: 15 million typed elements, 16 MiB, held everybody up for a second while they were made raw ones."""
    message = request(tensor("x", "BOOL", [1, elements], pb.InferTensorContents(bool_contents=[True] * elements)))
    if is_refused:
        what = "1048577 elements in typed contents, at most 1048576 are allowed; raw_input_contents may hold more"
        assert refusal(message) == what
    else:
        assert rows_of_request(message).inputs == (b"\1" * elements,)


def test_rows_of_one_width_cost_nothing_each() -> None:
    """Bug: the width of each row was made a number of eight bytes, although all are equal."""
    data = bytes(1024 * 1024)
    message = request(tensor("x", "BOOL", [len(data)]), raw=[data])
    tracemalloc.start()
    try:
        assert rows_of_request(message).rows == len(data)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data)
    finally:
        tracemalloc.stop()


def test_what_an_error_quotes_is_short() -> None:
    """Bug: errors quoted names and values of megabytes, 160 ms of work for a text that nobody would see the end of."""
    named = request(tensor("\x01" * 257, "FP32", [1]), raw=[bytes(4)])
    named.inputs[0].parameters["p"].bool_param = True
    assert refusal(named) == "an input's name has 257 characters, at most 256 are allowed"
    assert refusal(request(tensor("x", "D" * 257, [1]))) == "a datatype has 257 characters, at most 256 are allowed"
    valued = {"timeout": pb.InferParameter(string_param="x" * 1000)}
    with pytest.raises(InvalidArgument) as refused:
        timeout_s(valued)
    assert refused.value.message == f"parameter 'timeout' is '{'x' * 100}'; it must be a whole number from 0"


@pytest.mark.parametrize(("microseconds", "seconds"), [(0, None), (1, 1e-6), (2_500_000, 2.5)])
def test_a_timeout_is_in_microseconds_and_zero_is_none(microseconds: int, seconds: float | None) -> None:
    assert timeout_s({"timeout": pb.InferParameter(int64_param=microseconds)}) == seconds
    assert timeout_s({"timeout": pb.InferParameter(uint64_param=microseconds)}) == seconds
    assert timeout_s({}) is None


def test_parts_are_joined_by_their_rows_however_they_came() -> None:
    first = [Tensor("o", "FP32", (2, 1), bytes(8)), Tensor("l", "BYTES", (2,), encode_texts("a", "b"))]
    second = [Tensor("o", "FP32", (1, 1), b"\1\1\1\1"), Tensor("l", "BYTES", (1,), encode_texts("ccc"))]
    joined = join({2: second, 0: first})
    assert joined == [
        Tensor("o", "FP32", (3, 1), bytes(8) + b"\1\1\1\1"),
        Tensor("l", "BYTES", (3,), encode_texts("a", "b", "ccc")),
    ]
    assert join({0: first})[0].data is first[0].data


@pytest.mark.parametrize(
    "other",
    [Tensor("o", "FP32", (1, 2), bytes(8)), Tensor("o", "FP64", (1, 1), bytes(8)), Tensor("p", "FP32", (1, 1), b"")],
)
def test_parts_of_different_kinds_are_never_joined(other: Tensor) -> None:
    with pytest.raises(ModelFailed, match="with different outputs"):
        join({0: [Tensor("o", "FP32", (1, 1), bytes(4))], 1: [other]})


def test_outputs_are_chosen_in_the_order_asked_for() -> None:
    outputs = [Tensor(name, "FP32", (1,), np.float32(0).tobytes()) for name in "abc"]
    assert [one.name for one in choose(outputs, ["c", "a"])] == ["c", "a"]
    assert choose(outputs, []) == outputs
    with pytest.raises(InvalidArgument, match="the model has no output 'd', only 'a', 'b', 'c'"):
        choose(outputs, ["d"])


def test_an_answer_is_raw_and_names_its_request() -> None:
    response = to_response(pb.ModelInferRequest(model_name="m", id="7"), [Tensor("o", "FP32", (1, 1), bytes(4))])
    assert (response.model_name, response.id, list(response.outputs[0].shape)) == ("m", "7", [1, 1])
    assert list(response.raw_output_contents) == [bytes(4)]
