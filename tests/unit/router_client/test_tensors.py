"""Tensors of bytes, and the messages they travel in."""

import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.inference_router.v1 import inference_router_pb2 as native_pb
from protos.open_inference import open_inference_pb2 as pb
from router_client import InferError, Tensor, bytes_tensor, read_bytes
from router_client.tensors import from_response, to_request


@given(st.lists(st.binary(max_size=20)))
def test_what_is_packed_is_read_again(values: list[bytes]) -> None:
    tensor = bytes_tensor("text", values)
    assert (tensor.name, tensor.datatype, tensor.shape) == ("text", "BYTES", (len(values),))
    assert read_bytes(tensor) == values


def test_the_length_stands_in_front_little_endian() -> None:
    assert bytes_tensor("text", [b"abc", b""]).data == b"\3\0\0\0abc\0\0\0\0"


@pytest.mark.parametrize(
    ("datatype", "data", "message"),
    [
        ("FP32", b"", "tensor 'x' is FP32, not BYTES"),
        ("BYTES", b"\1\0\0\0a\5", "element 1 of tensor 'x' is cut off"),
        ("BYTES", struct.pack("<I", 9) + b"abc", "element 0 of tensor 'x' is cut off"),
    ],
)
def test_what_holds_no_elements_is_told(datatype: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_bytes(Tensor("x", datatype, (1,), data))


def test_a_request_says_what_its_caller_says() -> None:
    inputs = [bytes_tensor("text", [b"a"]), Tensor("weight", "FP64", (1, 2), bytes(16))]
    request = to_request("m", inputs, ("label",), native_pb.PRIORITY_CLASS_BATCH, "r-1", "buyer")
    assert (request.model_name, request.id) == ("m", "r-1")
    assert [(one.name, one.datatype, list(one.shape)) for one in request.inputs] == [
        ("text", "BYTES", [1]),
        ("weight", "FP64", [1, 2]),
    ]
    assert list(request.raw_input_contents) == [b"\1\0\0\0a", bytes(16)]
    assert [output.name for output in request.outputs] == ["label"]
    assert request.parameters["priority"].uint64_param == 2
    assert request.parameters["agent_type"].string_param == "buyer"


def test_what_nobody_says_is_left_out() -> None:
    request = to_request("m", [], (), native_pb.PRIORITY_CLASS_UNSPECIFIED, "", "")
    assert request == pb.ModelInferRequest(model_name="m")


def test_an_answer_without_its_raw_contents_is_no_answer() -> None:
    response = pb.ModelInferResponse(outputs=[pb.ModelInferResponse.InferOutputTensor(name="o")])
    with pytest.raises(InferError, match="INTERNAL: the answer has 1 outputs and 0 raw contents"):
        from_response(response)


def test_an_error_can_be_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(InferError("UNAVAILABLE", "later", 1000)))
    assert (error.code, error.message, error.retry_pushback_ms, str(error)) == (
        "UNAVAILABLE",
        "later",
        1000,
        "UNAVAILABLE: later",
    )
