"""POST /v2/…/infer: from the body's bytes to tensors, and the faults on the way."""

import json
from typing import Any

import numpy as np
import pytest

from rest_gateway.errors import GatewayError, InvalidRequestError, NotJsonError
from rest_gateway.schemas.json_text import MAX_STRICT_LISTS
from rest_gateway.schemas.open_inference import InferCall, OutputIn, parse_index_request, parse_infer

VECTOR = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
RAW = np.array([1, 2], "<f4").tobytes()


def body_of(*inputs: object, **members: object) -> bytes:
    return json.dumps({"inputs": list(inputs), **members}).encode()


def parse(*inputs: object, tail: bytes | None = None, **members: object) -> InferCall:
    text = body_of(*(inputs or [VECTOR]), **members)
    return parse_infer(text, None) if tail is None else parse_infer(text + tail, str(len(text)))


def binary(size: object, name: str = "x", **members: object) -> dict[str, object]:
    return {"name": name, "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": size}, **members}


def fault(body: bytes, header_length: str | None = None) -> GatewayError:
    with pytest.raises((InvalidRequestError, NotJsonError)) as refused:
        parse_infer(body, header_length)
    return refused.value


# What stands


def test_a_request_in_json() -> None:
    call = parse(id="r-1", outputs=[{"name": "y"}], parameters={"a": True, "b": -1, "c": 0.5, "d": "text"})
    (tensor,) = call.inputs
    assert (tensor.name, tensor.datatype, tensor.shape, tensor.data) == ("x", "FP32", [1, 2], RAW)
    assert (call.id, call.outputs, call.are_outputs_binary) == ("r-1", [OutputIn("y", None, {})], False)
    assert call.parameters == {"a": True, "b": -1, "c": 0.5, "d": "text"}


def test_null_is_the_same_as_leaving_out_and_unknown_members_are_ignored() -> None:
    call = parse(VECTOR | {"parameters": None}, id=None, outputs=None, parameters={"a": None}, what=[1, {"is": "this"}])
    assert (call.id, call.outputs, call.parameters, call.inputs[0].parameters) == ("", [], {}, {})


def test_binary_inputs_take_the_bytes_behind_the_json_in_their_order() -> None:
    call = parse(binary(8), VECTOR | {"name": "between"}, binary(3, "z"), tail=RAW + b"abc")
    assert [tensor.data for tensor in call.inputs] == [RAW, RAW, b"abc"]
    assert call.inputs[0].parameters == {}


def test_a_binary_input_of_nothing_needs_no_bytes() -> None:
    assert parse(binary(0), tail=b"").inputs[0].data == b""


def test_the_header_may_tell_that_all_is_json() -> None:
    assert parse(tail=b"").inputs[0].data == RAW


def test_which_outputs_are_to_be_binary() -> None:
    outputs = [
        {"name": "a", "parameters": {"binary_data": True}},
        {"name": "b", "parameters": {"binary_data": False, "classification": 2}},
        {"name": "c"},
    ]
    call = parse(outputs=outputs, parameters={"binary_data_output": True})
    assert call.outputs == [
        OutputIn("a", True, {}),
        OutputIn("b", False, {"classification": 2}),
        OutputIn("c", None, {}),
    ]
    assert (call.are_outputs_binary, call.parameters) == (True, {})


@pytest.mark.parametrize(
    ("parameters", "timeout_s"),
    [
        ({}, None),
        ({"timeout": 0}, None),
        ({"timeout": 1_500_000}, 1.5),
        ({"timeout": 2**64 - 1}, (2**64 - 1) / 1e6),
        ({"timeout": -1}, None),
        ({"timeout": True}, None),
        ({"timeout": "5"}, None),
        ({"timeout": 1.5}, None),
    ],
)
def test_a_timeout_counts_microseconds_and_stays_for_the_router_to_judge(
    parameters: dict[str, Any], timeout_s: float | None
) -> None:
    call = parse(parameters=parameters)
    assert (call.timeout_s, call.parameters) == (timeout_s, parameters)


# What does not


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"inputs": []}, "the request has no inputs"),
        ({"inputs": None}, "the request has no inputs"),
        ({"inputs": {}}, "inputs must be a list, not an object"),
        ({"inputs": [1]}, "inputs[0] must be an object, not a number"),
        ({"inputs": [VECTOR, {"name": 1}]}, "inputs[1]: name must be a string"),
        ({"inputs": [VECTOR | {"datatype": None}]}, 'input "x": datatype must be a string'),
        ({"inputs": [VECTOR | {"shape": None}]}, 'input "x": shape must be a list of whole numbers'),
        ({"inputs": [VECTOR | {"shape": [-1]}]}, 'input "x": shape must be a list of whole numbers from 0 to'),
        ({"inputs": [VECTOR | {"shape": [1.0]}]}, 'input "x": shape must be a list of whole numbers from 0 to'),
        ({"inputs": [VECTOR | {"shape": [True]}]}, 'input "x": shape must be a list of whole numbers from 0 to'),
        ({"inputs": [VECTOR | {"shape": [2**63]}]}, 'input "x": shape must be a list of whole numbers from 0 to'),
        ({"inputs": [VECTOR | {"shape": [1] * 65}]}, 'input "x": shape has 65 dimensions, at most 64 are allowed'),
        ({"inputs": [VECTOR | {"shape": [2**62] * 3}]}, 'input "x": data has 2 elements, which is not FP32[46116'),
        ({"inputs": [VECTOR | {"data": [1]}]}, 'input "x": data has 1 elements, which is not FP32[1, 2]'),
        ({"inputs": [VECTOR | {"data": None}]}, 'input "x" must have exactly one of data and the parameter binary'),
        ({"inputs": [VECTOR | binary(8)]}, 'input "x" must have exactly one of data and the parameter binary'),
        (
            {"inputs": [VECTOR | {"data": None, "parameters": {"shared_memory_region": "r"}}]},
            'input "x": shared memory is not supported',
        ),
        ({"inputs": [binary(True)]}, 'input "x": binary_data_size must be a number of bytes'),
        ({"inputs": [binary(-1)]}, 'input "x": binary_data_size must be a number of bytes'),
        ({"inputs": [binary(1.0)]}, 'input "x": binary_data_size must be a number of bytes'),
        ({"inputs": [binary(8)]}, "the inputs' binary_data_size is over the 0 bytes that follow the JSON"),
        ({"inputs": [VECTOR] * 1025}, "inputs has 1,025 entries, at most 1,024 are allowed"),
        ({"outputs": [{}]}, "outputs[0]: name must be a string"),
        (
            {"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
            'output "y": binary_data must be true or false',
        ),
        ({"parameters": {"binary_data_output": "yes"}}, "the request: binary_data_output must be true or false"),
        ({"parameters": [1]}, "the request: parameters must be an object, not a list"),
        ({"parameters": {"p": [1]}}, 'the request: parameter "p" must be a string, a number or a boolean, not a list'),
        ({"parameters": {"p": {}}}, 'the request: parameter "p" must be a string, a number or a boolean, not an'),
        ({"parameters": {str(n): 1 for n in range(1025)}}, "the request: parameters has more than 1,024 entries"),
        ({"id": 7}, "id must be a string, not a number"),
    ],
)
def test_what_is_no_request_is_told(members: dict[str, object], message: str) -> None:
    error = fault(json.dumps({"inputs": [VECTOR], **members}).encode())
    assert isinstance(error, InvalidRequestError)
    assert error.detail.startswith(message)


@pytest.mark.parametrize("value", [2**63 - 1, 2**63, 2**64 - 1, -(2**63)])
def test_parameters_of_64_bits_keep_every_digit(value: int) -> None:
    assert parse(parameters={"p": value}).parameters == {"p": value}


@pytest.mark.parametrize("value", [10**5, -(10**400)])
def test_an_integer_beyond_64_bits_is_refused_whichever_parser_reads_it(value: int) -> None:
    """orjson reads it as a double, the standard library keeps it."""
    body = body_of(VECTOR, parameters={"p": value}, x={"a:b": 1})
    assert value == 10**5 or fault(body).detail == 'the request: parameter "p" is out of range of 64 bits'


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (RAW[:-1], "the inputs' binary_data_size is over the 7 bytes that follow the JSON"),
        (RAW + b"!", "1 bytes follow the JSON that are no input's binary_data_size"),
        (b"", "the inputs' binary_data_size is over the 0 bytes that follow the JSON"),
    ],
)
def test_sizes_add_up_exactly(tail: bytes, message: str) -> None:
    text = body_of(binary(8))
    assert fault(text + tail, str(len(text))).detail == message


@pytest.mark.parametrize("header_length", ["-1", "", "x", "1e2", "٣", "99999", "9" * 5000])
def test_a_header_length_that_is_none_is_a_body_that_cannot_be_read(header_length: str) -> None:
    error = fault(body_of(VECTOR), header_length)
    assert isinstance(error, NotJsonError)
    assert error.detail.startswith("Inference-Header-Content-Length is no number of at most the body's")


def test_a_header_length_that_cuts_the_json_is_told() -> None:
    assert isinstance(fault(body_of(VECTOR), "5"), NotJsonError)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"[", "the body is not JSON"),
        (b"\xff", "the body is not JSON: it is not UTF-8"),
        (b'{"inputs": [{"data": [NaN]}]}', "the body is not JSON: NaN is not a JSON number"),
        (b'{"inputs": [{"data": [Infinity]}]}', "the body is not JSON: Infinity is not a JSON number"),
        (b'{"inputs": [%s' % (b"[" * 100_000), "the body is nested too deeply"),
        (b'{"inputs": %s%s}' % (b"[" * 100_000, b"]" * 100_000), "the body is nested too deeply"),
        (b'{"p": %s}' % (b"9" * 5000), "the body has a number of thousands of digits"),
    ],
)
def test_what_is_no_json_is_told(body: bytes, message: str) -> None:
    error = fault(body)
    assert isinstance(error, NotJsonError)
    assert error.detail.startswith(message)


@pytest.mark.parametrize("body", [b"1", b"[]", b'"x"', b"null"])
def test_json_that_is_no_object_is_no_request(body: bytes) -> None:
    assert fault(body).detail.startswith("the body must be a JSON object, not ")


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [], "inputs": []}',
        b'{"inputs": [{"name": "x", "name": "y"}]}',
        b'{"inputs": [{"name": "a:b", "shape": [], "shape": []}]}',
        b'{"parameters": {"name": 1, "name": 1}, "inputs": []}',
        b'{"outputs": [{"name": "x", "parameters": {"x": 1, "x": 1}}]}',
        b'{"what": [{"ever": {"x": 1, "x": 1}}]}',
    ],
)
def test_a_repeated_key_is_refused_wherever_it_stands(body: bytes) -> None:
    error = fault(body)
    assert isinstance(error, InvalidRequestError)
    assert error.detail.endswith("more than once")


def test_colons_in_texts_do_no_harm() -> None:
    call = parse({"name": "t", "datatype": "BYTES", "shape": [2], "data": ["http://a", '{"b": "c"}']})
    assert call.inputs[0].data == b"\x08\0\0\0http://a\x0a\0\0\0" + b'{"b": "c"}'


def test_a_number_beyond_a_double_is_its_tensors_fault() -> None:
    body = b'{"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [1e400]}]}'
    assert fault(body).detail == 'input "x": data[0] is not finite as FP64'


def test_a_body_of_objects_is_given_up_early() -> None:
    """The standard library takes a microsecond for each: 4 s for 8 MiB of them, in which nobody else is served."""
    assert fault(b'{"a:": [%s]}' % b",".join([b"{}"] * 10_001)).detail == "the body has more than 10,000 objects"


def test_a_body_of_lists_is_given_up_before_it_is_parsed() -> None:
    """Sixty deep, 8 MiB of them took four seconds, in which nobody else was served."""
    body = b'{"inputs": [%s]}'
    most = b",".join([b"[]"] * (MAX_STRICT_LISTS - 1))
    assert fault(body % most).detail == "inputs has 524,287 entries, at most 1,024 are allowed"
    assert fault(body % (most + b",[]")).detail.startswith("the body has more than 524,288 lists; ")


def test_brackets_in_strings_are_no_lists() -> None:
    texts = ["[" * 600_000, '[\\"', "\\", '"[[']
    assert len(parse({**VECTOR, "datatype": "BYTES", "shape": [4], "data": texts}).inputs[0].data) > 600_000


@pytest.mark.parametrize(
    ("body", "is_ready"),
    [(b"", False), (b" \n", False), (b"{}", False), (b'{"ready": true}', True), (b'{"ready":null}', False)],
)
def test_an_index_may_ask_for_models_that_are_ready(body: bytes, is_ready: bool) -> None:
    assert parse_index_request(body) is is_ready


@pytest.mark.parametrize("body", [b"[]", b'{"ready": 1}'])
def test_an_index_request_of_another_form_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_index_request(body)
