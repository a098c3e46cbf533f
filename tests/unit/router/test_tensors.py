"""Open Inference Protocol requests to rows and back: what the wire's form does not change, and what it does."""

import re
import struct
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as pb
from router.config import Settings
from router.core.model_info import ModelInfo, TensorInfo
from router.core.types import BatchAnswer, Block, Tensor
from router.core.variable import VariableBlock
from router.dispatch.wire import to_request
from router.errors import InvalidArgument, ModelFailed, RouterError
from router.models import Model, Models
from router.servicers.classification import classify
from router.servicers.convert import Routes, Terms
from router.servicers.heads import Head, Heads
from router.servicers.parameters import timeout_s
from router.servicers.responses import Responses, choose, join, of_tensors
from router.servicers.tensors import Message, Rows, read
from tests.builders import Listener, decode_texts, encode_texts, make_batch


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


def one_row() -> pb.ModelInferRequest:
    return request(tensor("x", "FP32", [1]), raw=[bytes(4)])


def rows_of_request(message: pb.ModelInferRequest, **model: object) -> Rows:
    given = settings(**model)
    return read_with(message, Heads(given, Models(given)))


def read_with(message: pb.ModelInferRequest, heads: Heads) -> Rows:
    mine = pb.ModelInferRequest()
    mine.CopyFrom(message)  # which is taken apart
    return read(Message(mine), heads, longest_id=256)


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
    assert typed.head.target.key == same.head.target.key
    assert typed.offsets == same.offsets


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_halves_travel_raw_only(datatype: str) -> None:
    assert rows_of_request(request(tensor("x", datatype, [2, 3]), raw=[bytes(12)])).head.rows == 2
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
    ours = read_with(message, Heads(given, Models(given))).head.target.key
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
    key = rows_of_request(message).head.target.key
    assert [name for name, _ in key.parameters] == ["a", "agent_type", "k", "m", "s", "z"]
    sent = to_request(make_batch(rows_of_request(message).to_block(Terms(0, 1), Listener()).whole()))
    for name in ("a", "z", "k", "m", "s", "agent_type"):
        assert sent.parameters[name] == message.parameters[name]
    assert len(sent.parameters) == 6


def test_a_model_that_wants_no_agent_type_is_not_told() -> None:
    message = request(tensor("x", "FP32", [1]), raw=[bytes(4)])
    message.parameters["agent_type"].string_param = "buyer"
    key = rows_of_request(message, send_agent_type=False).head.target.key
    assert (key.agent_type, key.parameters) == ("buyer", ())


def test_targets_remember_and_still_tell_true_from_one() -> None:
    given = settings()
    heads = Heads(given, Models(given))

    def target(name: str) -> object:
        message = request(tensor("x", "FP32", [1]), raw=[bytes(4)])
        setattr(message.parameters["p"], name, 1)
        return read_with(message, heads).head.target

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


@pytest.mark.parametrize("value", [{"uint64_param": 0}, {"bool_param": False}])
def test_a_sequence_that_is_none_is_no_sequence(value: dict[str, object]) -> None:
    asked = one_row()
    asked.parameters["sequence_id"].CopyFrom(pb.InferParameter(**value))  # type: ignore[arg-type]
    assert head_of(asked).target.key.parameters == ()


def test_parameters_that_the_settings_ignore_are_not_of_the_key() -> None:
    asked = one_row()
    for name in ("trace_id", "trace_parent", "user", "users", "sequence_id"):
        asked.parameters[name].string_param = "x"
    ignored = ["trace_*", "user", "sequence_*"]
    key = rows_of_request(asked, ignore_parameters=ignored).head.target.key
    assert key.parameters == (("users", "x"),)


@pytest.mark.parametrize("owner", ["input", "output"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shared_memory_region", "has the parameter 'shared_memory_region': shared memory is not supported"),
        ("content_type", "has the parameter 'content_type'; only requests may have parameters here"),
    ],
)
def test_parameters_of_single_tensors_are_refused(owner: str, name: str, message: str) -> None:
    asked = one_row()
    asked.outputs.add(name="x")
    parameters = asked.inputs[0].parameters if owner == "input" else asked.outputs[0].parameters
    parameters["binary_data_size"].int64_param = 4
    assert head_of(asked).rows == 1
    parameters[name].string_param = "x"
    assert refusal(asked) == f"{owner} 'x' {message}"


def test_a_head_that_was_read_once_is_remembered_and_rows_and_ids_are_not_part_of_it() -> None:
    given = settings()
    heads = Heads(given, Models(given))
    asked = [request(tensor("x", "FP32", [1]), raw=[data]) for data in (b"1234", b"5678")]
    asked[1].id = "another"
    first, second = (read_with(message, heads) for message in asked)
    assert first.head is second.head
    assert (first.inputs, second.inputs) == ((b"1234",), (b"5678",))
    other = read_with(request(tensor("x", "FP32", [2]), raw=[bytes(8)]), heads).head
    assert other is not first.head
    assert other.target is first.head.target


def test_heads_are_forgotten_the_oldest_first() -> None:
    given = settings()
    given = given.model_copy(update={"limits": given.limits.model_copy(update={"max_keys": 2})})
    heads = Heads(given, Models(given))
    asked = [request(tensor("x", "FP32", [rows]), raw=[bytes(4 * rows)]) for rows in (1, 2, 3)]
    one, two, three = (read_with(message, heads).head for message in asked)
    assert read_with(asked[2], heads).head is three
    assert read_with(asked[1], heads).head is two
    assert read_with(asked[0], heads).head is not one


def test_a_long_head_is_read_each_time() -> None:
    given = settings()
    heads = Heads(given, Models(given))
    asked = one_row()
    asked.parameters["long"].string_param = "x" * 1024
    assert read_with(asked, heads).head is not read_with(asked, heads).head


def test_a_head_that_is_remembered_still_asks_for_the_right_bytes() -> None:
    given = settings()
    heads = Heads(given, Models(given))
    read_with(one_row(), heads)
    for data, message in (
        ([bytes(3)], "input 'x' has 3 bytes, which is not FP32[1]"),
        ([bytes(4)] * 2, "the request has 2 raw contents for 1 inputs"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            read_with(request(tensor("x", "FP32", [1]), raw=data), heads)
        assert refused.value.message == message


class Told(Models):
    """All models have these outputs."""

    def __init__(self, settings: Settings, *names: str) -> None:
        super().__init__(settings)
        self._info = ModelInfo("m", outputs=tuple(TensorInfo(name, "FP32", (-1,)) for name in names))

    def find(self, model_name: str, model_version: str, agent_type: str) -> Model:
        return replace(super().find(model_name, model_version, agent_type), info=self._info)


def wanting(*names: str) -> pb.ModelInferRequest:
    message = one_row()
    for name in names:
        message.outputs.add(name=name)
    return message


def test_where_outputs_are_told_all_requests_share_a_key_and_who_names_none_asks_for_all() -> None:
    given = settings()
    heads = Heads(given, Told(given, "a", "b"))
    none, one, both = (read_with(wanting(*names), heads).head for names in ((), ("b",), ("b", "a")))
    assert none.target is one.target is both.target
    assert (none.asked, one.asked, both.asked) == (("a", "b"), ("b",), ("b", "a"))
    assert (none.outputs, one.outputs, both.outputs) == ((), ("b",), ("b", "a"))
    assert none.target.key.outputs == ()


def test_where_outputs_are_not_told_requests_that_want_others_share_no_key() -> None:
    given = settings()
    heads = Heads(given, Models(given))
    none, one, both, same = (read_with(wanting(*names), heads).head for names in ((), ("b",), ("b", "a"), ("a", "b")))
    assert len({none.target.key, one.target.key, both.target.key}) == 3
    assert both.target.key == same.target.key
    assert (none.asked, one.asked, both.asked, same.asked) == ((), ("b",), ("b", "a"), ("a", "b"))
    sent = to_request(make_batch(read_with(wanting("b", "a"), heads).to_block(Terms(0, 1), Listener()).whole()))
    assert [output.name for output in sent.outputs] == ["a", "b"]
    assert not sent.parameters


# Models without batches


def whole(*tensors: pb.ModelInferRequest.InferInputTensor, raw: Sequence[bytes]) -> Rows:
    return rows_of_request(request(*tensors, raw=raw), batching="off")


@pytest.mark.parametrize(("shape", "nbytes"), [([], 4), ([1], 4), ([3, 2], 24), ([0, 7], 0)])
def test_a_request_for_a_model_without_batches_is_one_row_of_any_shape(shape: list[int], nbytes: int) -> None:
    rows = whole(tensor("x", "FP32", shape), raw=[bytes(nbytes)])
    key = rows.head.target.key
    assert (rows.head.rows, key.is_batched, key.inputs[0].row_shape) == (1, False, tuple(shape))
    block = rows.to_block(Terms(0, 1), Listener())
    assert (block.rows, block.row_bytes) == (1, nbytes)


def test_its_inputs_need_not_have_as_many_rows_as_one_another() -> None:
    rows = whole(tensor("x", "FP32", [2]), tensor("t", "BYTES", [3]), raw=[bytes(8), encode_texts("a", "b", "c")])
    block = rows.to_block(Terms(0, 1), Listener())
    assert isinstance(block, VariableBlock)
    assert block.count_bytes(0, 1) == 8 + 15


def test_errors_tell_its_shapes_as_they_came() -> None:
    for shape, message in (([2, 3], "which is not FP32[2, 3]"), ([], "which is not FP32[]")):
        with pytest.raises(InvalidArgument, match=re.escape(message)):
            whole(tensor("x", "FP32", shape), raw=[bytes(5)])
    with pytest.raises(InvalidArgument, match=r"^input 'x' has shape \[-1\]$"):
        whole(tensor("x", "FP32", [-1]), raw=[bytes(5)])


def test_its_answer_has_no_dimension_of_rows() -> None:
    head = whole(tensor("x", "FP32", [2]), raw=[bytes(8)]).head
    outputs = (Tensor("o", "FP32", (1, 3), bytes(12)), Tensor("s", "FP32", (1,), bytes(4)))
    for response in (
        of_tensors(head, "7", outputs, ""),
        Responses().of_batch(head, "7", BatchAnswer(outputs, "b", 1, "r", 0.0, 1.0), 0),
    ):
        assert [list(output.shape) for output in response.outputs] == [[3], []]


# Answers


def test_a_head_that_is_too_long_is_refused_whatever_it_is_made_of() -> None:
    assert "at most 8192 are allowed" in refusal(request(tensor("x", "FP32", [1] * 1100), raw=[bytes(4)]))
    many = [tensor(str(number), "FP32", [1]) for number in range(1000)]
    assert "at most 8192 are allowed" in refusal(request(*many, raw=[bytes(4)] * 1000))
    long_outputs = one_row()
    for number in range(33):
        long_outputs.outputs.add(name=f"{number:0256}")
    assert "at most 8192 are allowed" in refusal(long_outputs)


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
    assert rows_of_request(many_outputs).head.rows == 1


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
        assert rows_of_request(message).head.rows == len(data)
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
    assert [one.name for one in choose(outputs, [], ["b", "d", "a"])] == ["b", "a", "c"]
    with pytest.raises(InvalidArgument, match="the model has no output 'd', only 'a', 'b', 'c'"):
        choose(outputs, ["d"])


def head_of(message: pb.ModelInferRequest) -> Head:
    return rows_of_request(message).head


def test_an_answer_is_raw_and_names_its_request() -> None:
    response = of_tensors(head_of(one_row()), "7", [Tensor("o", "FP32", (1, 1), bytes(4))], "")
    assert (response.model_name, response.id, list(response.outputs[0].shape)) == ("m", "7", [1, 1])
    assert list(response.raw_output_contents) == [bytes(4)]


@pytest.mark.parametrize(("asked", "told", "found"), [("", "", ""), ("1", "", "1"), ("", "2", "2"), ("1", "1", "1")])
def test_the_version_is_the_backends_else_the_one_that_was_asked_for(asked: str, told: str, found: str) -> None:
    message = one_row()
    message.model_version = asked
    head = head_of(message)
    tensors = (Tensor("o", "FP32", (1,), bytes(4)),)
    batch = BatchAnswer(tensors, "b", 1, "replica:1", 0.0, 1.0, model_version=told)
    assert Responses().of_batch(head, "", batch, 0).model_version == found
    assert of_tensors(head, "", tensors, told).model_version == found


def answer(*outputs: Tensor) -> BatchAnswer:
    return BatchAnswer(outputs, "b", outputs[0].shape[0], "replica:1", 0.0, 1.0)


def test_each_request_of_a_batch_has_its_rows_and_the_outputs_it_wants() -> None:
    plain, asked = one_row(), wanting("t")
    given = settings()
    heads = Heads(given, Models(given))
    batch = answer(
        Tensor("o", "FP32", (3, 1), np.arange(3, dtype="<f4").tobytes()),
        Tensor("t", "BYTES", (3,), encode_texts("a", "bb", "ccc")),
    )
    responses = Responses()
    found = [
        responses.of_batch(read_with(message, heads).head, str(row), batch, row)
        for row, message in enumerate((plain, asked, plain))
    ]
    assert [list(one.raw_output_contents) for one in found] == [
        [np.float32(0).tobytes(), encode_texts("a")],
        [encode_texts("bb")],
        [np.float32(2).tobytes(), encode_texts("ccc")],
    ]
    assert [one.id for one in found] == ["0", "1", "2"]
    assert [[output.name for output in one.outputs] for one in found] == [["o", "t"], ["t"], ["o", "t"]]
    assert list(found[0].outputs[0].shape) == [1, 1]


def test_an_output_that_the_answer_lacks_fails_who_wants_it_and_no_other() -> None:
    asked = wanting("t")
    batch = answer(Tensor("o", "FP32", (2,), bytes(8)))
    responses = Responses()
    with pytest.raises(InvalidArgument, match="the model has no output 't', only 'o'"):
        responses.of_batch(head_of(asked), "", batch, 0)
    assert responses.of_batch(head_of(one_row()), "", batch, 1).outputs[0].name == "o"


def test_an_output_can_be_told_as_its_highest_classes_beside_others_as_they_are() -> None:
    message = request(tensor("x", "FP32", [2]), raw=[bytes(8)])
    message.outputs.add(name="o").parameters["classification"].int64_param = 2
    message.outputs.add(name="p")
    values = np.array([[9, 9, 9], [0.5, 3, -1], [7, 7, 8]], "<f4")
    batch = answer(Tensor("o", "FP32", (3, 3), values.tobytes()), Tensor("p", "FP32", (3,), bytes(12)))
    response = Responses().of_batch(head_of(message), "", batch, 1)
    assert [(one.name, one.datatype, list(one.shape)) for one in response.outputs] == [
        ("o", "BYTES", [2, 2]),
        ("p", "FP32", [2]),
    ]
    told = encode_texts("3.000000:1", "0.500000:0", "8.000000:2", "7.000000:0")
    assert list(response.raw_output_contents) == [told, bytes(8)]


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "classes", "told"),
    [
        ("UINT8", (1, 3), [0, 2, 1], 2, ["2:1", "1:2"]),
        ("INT64", (1, 3), [-(2**63), 2**62, 0], 5, [f"{2**62}:1", "0:2", f"{-(2**63)}:0"]),
        ("UINT64", (1, 2), [2**64 - 1, 0], 1, [f"{2**64 - 1}:0"]),
        ("FP64", (2,), [1, 2], 1, ["1.000000:0", "2.000000:0"]),
        ("INT32", (1, 2, 2), [1, 2, 4, 3], 2, ["4:2", "3:3"]),
        ("FP32", (1, 0), [], 2, []),
        ("FP32", (2, 3), [1, 5, 5, 7, 2, 7], 1, ["5.000000:1", "7.000000:0"]),
        ("FP32", (1, 4), [1, float("nan"), 3, 2], 2, ["nan:1", "3.000000:2"]),
    ],
)
def test_classes_are_values_with_their_places(
    datatype: str, shape: tuple[int, ...], values: list[float], classes: int, told: list[str]
) -> None:
    types = {"UINT8": "u1", "INT64": "<i8", "UINT64": "<u8", "FP64": "<f8", "INT32": "<i4", "FP32": "<f4"}
    data = np.array(values, types[datatype]).tobytes()
    found = classify(Tensor("o", datatype, shape, data), classes, is_batched=True)
    assert (found.datatype, found.shape) == ("BYTES", (shape[0], len(told) // shape[0]))
    assert found.data == encode_texts(*told)


@pytest.mark.parametrize("most", range(6))
def test_the_highest_few_are_the_first_of_all_in_order(most: int) -> None:
    """Bug: all were put in order for the sake of a few, and 16 MB of them held everybody up for two seconds."""
    values = np.random.default_rng(1).integers(0, 4, (200, 5))
    every = classify(Tensor("o", "INT64", (200, 5), values.tobytes()), 5, is_batched=True)
    few = classify(Tensor("o", "INT64", (200, 5), values.tobytes()), most, is_batched=True)
    told = np.array(decode_texts(every.data)).reshape(200, 5)[:, :most].ravel().tolist()
    assert decode_texts(few.data) == told


def test_what_has_no_order_or_no_end_is_no_class() -> None:
    with pytest.raises(InvalidArgument, match=re.escape("output 'o', BYTES[1], cannot be told as classes")):
        classify(Tensor("o", "BYTES", (1,), encode_texts("a")), 1, is_batched=True)
    with pytest.raises(InvalidArgument, match=re.escape("output 'o', FP16[2], cannot be told as classes")):
        classify(Tensor("o", "FP16", (1, 2), bytes(4)), 1, is_batched=False)
    with pytest.raises(InvalidArgument, match="output 'o': 131073 classes, at most 131072 are told at once"):
        classify(Tensor("o", "INT8", (1, 131_073), bytes(131_073)), 2**40, is_batched=True)
    with pytest.raises(InvalidArgument, match="output 'o': classes of 4194305 elements, of at most 4194304 they are"):
        classify(Tensor("o", "INT8", (1, 4_194_305), bytes(4_194_305)), 1, is_batched=True)
