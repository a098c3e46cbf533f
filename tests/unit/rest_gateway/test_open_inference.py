"""Requests of /v2 to messages, answers to JSON and bytes."""

import json

import numpy as np
import pytest

from protos.open_inference import open_inference_pb2 as pb
from rest_gateway.errors import InvalidRequestError
from rest_gateway.open_inference import (
    MAX_ELEMENTS,
    TEXT_ELEMENTS,
    config_document,
    index_document,
    metadata_document,
    server_document,
    to_reply,
    to_request,
)
from rest_gateway.schemas import json_text
from rest_gateway.schemas.open_inference import InferCall, InputIn, OutputIn
from router_client import InferError, bytes_tensor

NUMPY = {
    "BOOL": "?",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}


def call_of(*outputs: OutputIn, are_outputs_binary: bool = False) -> InferCall:
    return InferCall("", [], list(outputs), are_outputs_binary, {})


def response_of(*outputs: tuple[str, str, list[int], bytes]) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name="m")
    for name, datatype, shape, raw in outputs:
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(raw)
    return response


def data_of(datatype: str, raw: bytes) -> object:
    reply = to_reply(response_of(("y", datatype, [1], raw)), call_of())
    (output,) = json.loads(json_text.dump(reply.document))["outputs"]
    return output["data"]


def test_a_request_travels_raw_with_its_parameters() -> None:
    tensor = InputIn("x", "FP32", [1, 2], b"12345678", {"p": 1})
    call = InferCall("r-1", [tensor], [OutputIn("y", True, {"q": "text"})], True, {"a": True, "b": 0.5})
    request = to_request(call, "m", "3")
    assert (request.model_name, request.model_version, request.id) == ("m", "3", "r-1")
    (sent,) = request.inputs
    assert (sent.name, sent.datatype, list(sent.shape), sent.parameters["p"].int64_param) == ("x", "FP32", [1, 2], 1)
    assert list(request.raw_input_contents) == [b"12345678"]
    assert [(output.name, output.parameters["q"].string_param) for output in request.outputs] == [("y", "text")]
    assert (request.parameters["a"].bool_param, request.parameters["b"].double_param) == (True, 0.5)


@pytest.mark.parametrize(
    ("value", "choice"),
    [
        (2**63 - 1, "int64_param"),
        (2**63, "uint64_param"),
        (2**64 - 1, "uint64_param"),
        (-(2**63), "int64_param"),
        (True, "bool_param"),
        (1.0, "double_param"),
        ("", "string_param"),
    ],
)
def test_a_parameter_keeps_its_type(value: bool | float | str, choice: str) -> None:
    parameter = to_request(InferCall("", [], [], False, {"p": value}), "m", "").parameters["p"]
    assert (parameter.WhichOneof("parameter_choice"), getattr(parameter, choice)) == (choice, value)


@pytest.mark.parametrize(
    "call",
    [
        InferCall("\ud800", [], [], False, {}),
        InferCall("", [InputIn("\ud800", "FP32", [], b"", {})], [], False, {}),
        InferCall("", [], [OutputIn("\ud800", None, {})], False, {}),
        InferCall("", [], [], False, {"\ud800": 1}),
        InferCall("", [], [], False, {"p": "\ud800"}),
    ],
)
def test_a_lone_surrogate_is_refused_wherever_it_stands(call: InferCall) -> None:
    with pytest.raises(InvalidRequestError, match="a lone surrogate"):
        to_request(call, "m", "")


@pytest.mark.parametrize("datatype", list(NUMPY))
def test_numbers_come_back_as_they_are(datatype: str) -> None:
    values = np.array([0, 1, 1], NUMPY[datatype])
    assert data_of(datatype, values.tobytes()) == values.tolist()


@pytest.mark.parametrize("datatype", [name for name in NUMPY if "INT" in name])
def test_the_least_and_the_greatest_integer_come_back(datatype: str) -> None:
    bounds = np.iinfo(NUMPY[datatype])
    values = np.array([bounds.min, bounds.max], NUMPY[datatype])
    assert data_of(datatype, values.tobytes()) == [bounds.min, bounds.max]


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_a_float_comes_back_to_the_bit_and_what_is_none_as_null(datatype: str) -> None:
    values = np.array([0.1, 1 / 3, np.finfo(NUMPY[datatype]).max], NUMPY[datatype])
    assert np.array(data_of(datatype, values.tobytes()), NUMPY[datatype]).tolist() == values.tolist()
    odd = np.array([np.nan, np.inf, -np.inf], NUMPY[datatype])
    assert data_of(datatype, odd.tobytes()) == [None, None, None]


def test_texts_come_back_as_strings() -> None:
    assert data_of("BYTES", bytes_tensor("y", [b"", "für".encode()]).data) == ["", "für"]


@pytest.mark.parametrize(
    ("datatype", "raw", "message"),
    [
        ("BYTES", bytes_tensor("y", [b"ok", b"\xff"]).data, "holds bytes that are not UTF-8"),
        ("BF16", b"\0\0", "is BF16"),
    ],
)
def test_what_json_does_not_carry_is_to_be_asked_for_in_binary(datatype: str, raw: bytes, message: str) -> None:
    told = f"output 'y' {message}, which JSON does not carry; ask for it with its parameter binary_data: true"
    with pytest.raises(InvalidRequestError) as refused:
        data_of(datatype, raw)
    assert refused.value.detail == told
    reply = to_reply(response_of(("y", datatype, [1], raw)), call_of(OutputIn("y", True, {})))
    assert reply.tail == [raw]


def test_outputs_are_binary_where_they_or_all_are_asked_for_so() -> None:
    response = response_of(("a", "INT8", [2], b"\1\2"), ("b", "INT8", [1], b"\3"), ("c", "INT8", [1], b"\4"))
    call = call_of(OutputIn("a", None, {}), OutputIn("b", False, {}), OutputIn("c", True, {}), are_outputs_binary=True)
    reply = to_reply(response, call)
    assert (reply.tail, reply.is_binary) == ([b"\1\2", b"\4"], True)
    outputs = json.loads(json_text.dump(reply.document))["outputs"]
    assert outputs == [
        {"name": "a", "datatype": "INT8", "shape": [2], "parameters": {"binary_data_size": 2}},
        {"name": "b", "datatype": "INT8", "shape": [1], "data": [3]},
        {"name": "c", "datatype": "INT8", "shape": [1], "parameters": {"binary_data_size": 1}},
    ]
    assert not to_reply(response, call_of()).is_binary


def test_an_answer_of_too_many_elements_is_to_be_asked_for_in_binary() -> None:
    """64 MiB of FP16 took the loop two seconds in JSON, texts over several outputs eight."""
    half, texts = MAX_ELEMENTS // 2, MAX_ELEMENTS // 2 // TEXT_ELEMENTS
    numbers = ("y", "INT8", [half], bytes(half))
    assert to_reply(response_of(numbers, ("z", "BYTES", [texts], bytes(4 * texts))), call_of()).tail == []
    over = response_of(numbers, ("z", "BYTES", [texts + 1], bytes(4 * texts + 4)))
    with pytest.raises(InvalidRequestError, match="output 'z' makes an answer of too many elements, which JSON"):
        to_reply(over, call_of())
    assert len(to_reply(over, call_of(OutputIn("y", True, {}))).tail) == 1


def test_an_empty_binary_output_is_binary() -> None:
    reply = to_reply(response_of(("y", "FP32", [0], b"")), call_of(are_outputs_binary=True))
    assert (reply.is_binary, reply.tail) == (True, [b""])


def test_what_the_router_says_beside_the_outputs_stays() -> None:
    response = response_of(("y", "BOOL", [1], b"\1"))
    response.model_version, response.id = "3", "r-1"
    response.parameters["p"].uint64_param = 2**64 - 1
    response.outputs[0].parameters["q"].bool_param = False
    document = json.loads(json_text.dump(to_reply(response, call_of()).document))
    assert document == {
        "model_name": "m",
        "model_version": "3",
        "id": "r-1",
        "parameters": {"p": 2**64 - 1},
        "outputs": [{"name": "y", "datatype": "BOOL", "shape": [1], "parameters": {"q": False}, "data": [True]}],
    }


def test_an_answer_that_is_cut_off_is_the_routers_fault() -> None:
    with pytest.raises(InferError, match="INTERNAL"):
        to_reply(response_of(("y", "BYTES", [1], b"\x09\0\0\0a")), call_of())
    response = response_of(("y", "INT8", [1], b"\1"))
    del response.raw_output_contents[:]
    with pytest.raises(InferError, match="INTERNAL: the answer has 1 outputs and 0 raw contents"):
        to_reply(response, call_of())


def test_metadata_in_json() -> None:
    tensor = pb.ModelMetadataResponse.TensorMetadata(name="x", datatype="FP32", shape=[-1, 4])
    told = pb.ModelMetadataResponse(name="m", versions=["1"], platform="p", inputs=[tensor])
    document = metadata_document(told)
    assert document == {
        "name": "m",
        "versions": ["1"],
        "platform": "p",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [],
    }
    told.properties["a"] = "b"
    assert metadata_document(told) == document | {"properties": {"a": "b"}}
    server = pb.ServerMetadataResponse(name="n", version="v", extensions=["e"])
    assert server_document(server) == {"name": "n", "version": "v", "extensions": ["e"]}


def test_a_config_has_the_names_of_triton_and_always_its_batch_size() -> None:
    config = pb.ModelConfig(name="m", model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True))
    document = config_document(config)
    assert document == {"name": "m", "max_batch_size": 0, "model_transaction_policy": {"decoupled": True}}


def test_an_index_leaves_out_what_a_model_has_not() -> None:
    entry = pb.RepositoryIndexResponse.ModelIndex
    told = pb.RepositoryIndexResponse(models=[entry(name="a"), entry(name="b", version="1", state="READY", reason="r")])
    assert index_document(told) == [{"name": "a"}, {"name": "b", "version": "1", "state": "READY", "reason": "r"}]
