"""Requests of /v2 to the router's messages, and its answers to JSON, with binary tensors behind. Pure: no HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.json_format import MessageToDict

from protos.open_inference import open_inference_pb2 as pb
from rest_gateway.errors import InvalidRequestError
from rest_gateway.schemas.open_inference import InferCall, ParameterValue
from router_client import InferError, Tensor, from_response, read_bytes

# Of an answer's elements in JSON, over all of its outputs: 0.06 µs each, and others wait meanwhile. A text takes 0.5.
MAX_ELEMENTS = 4_194_304
TEXT_ELEMENTS = 8

_NUMPY = {
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

Parameters: TypeAlias = Mapping[str, pb.InferParameter]


@dataclass(frozen=True, slots=True)
class Reply:
    """`document`, ready for `json_text.dump`, and the bytes of its binary outputs, in order."""

    document: dict[str, object]
    tail: list[bytes] = field(default_factory=list)
    is_binary: bool = False


def to_request(call: InferCall, model_name: str, model_version: str) -> pb.ModelInferRequest:
    """The message, raw for every input. Raises InvalidRequestError."""
    try:
        request = pb.ModelInferRequest(model_name=model_name, model_version=model_version, id=call.id)
        _put(call.parameters, request.parameters)
        for tensor in call.inputs:
            added = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            _put(tensor.parameters, added.parameters)
            request.raw_input_contents.append(tensor.data)
        for output in call.outputs:
            _put(output.parameters, request.outputs.add(name=output.name).parameters)
    except UnicodeEncodeError as exc:
        raise InvalidRequestError("a name or a parameter holds a lone surrogate, which UTF-8 has no form for") from exc
    return request


def _put(parameters: Mapping[str, ParameterValue], message: Any) -> None:  # noqa: ANN401 -- protobuf's map has no type
    for name, value in parameters.items():
        parameter = message[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            _put_integer(parameter, value)
        elif isinstance(value, float):
            parameter.double_param = value
        else:
            parameter.string_param = value


def _put_integer(parameter: pb.InferParameter, value: int) -> None:
    if value < 2**63:
        parameter.int64_param = value
    else:
        parameter.uint64_param = value


def to_reply(response: pb.ModelInferResponse, call: InferCall) -> Reply:
    """The answer in the forms that `call` asks for. Raises InvalidRequestError where JSON has none, and InferError."""
    binary = {output.name: output.is_binary for output in call.outputs if output.is_binary is not None}
    outputs: list[dict[str, object]] = []
    tail: list[bytes] = []
    room = MAX_ELEMENTS
    for tensor, told in zip(from_response(response), response.outputs, strict=True):
        parameters = _taken(told.parameters)
        head: dict[str, object] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if is_binary := binary.get(tensor.name, call.are_outputs_binary):
            parameters["binary_data_size"] = len(tensor.data)
            tail.append(tensor.data)
        elif (room := room - _room_of(tensor)) < 0:
            raise _only_binary(tensor, "makes an answer of too many elements")
        if parameters:
            head["parameters"] = parameters
        outputs.append(head if is_binary else head | {"data": _to_json(tensor)})
    return Reply(_document(response, outputs), tail, is_binary=bool(tail))


def _document(response: pb.ModelInferResponse, outputs: list[dict[str, object]]) -> dict[str, object]:
    document: dict[str, object] = {"model_name": response.model_name}
    if response.model_version:
        document["model_version"] = response.model_version
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = _taken(response.parameters)
    return document | {"outputs": outputs}


def _taken(parameters: Parameters) -> dict[str, ParameterValue]:
    values = {name: parameter.WhichOneof("parameter_choice") for name, parameter in parameters.items()}
    return {name: getattr(parameters[name], choice) for name, choice in values.items() if choice is not None}


def _to_json(tensor: Tensor) -> object:
    """The elements, flat, as `json_text.dump` takes them: NaN and infinities become null."""
    if tensor.datatype == "BYTES":
        return _texts_of(tensor)
    if tensor.datatype not in _NUMPY:
        raise _only_binary(tensor, f"is {tensor.datatype}")
    return np.frombuffer(tensor.data, _NUMPY[tensor.datatype])


def _texts_of(tensor: Tensor) -> list[str]:
    try:
        return [element.decode() for element in read_bytes(tensor)]
    except UnicodeDecodeError as exc:
        raise _only_binary(tensor, "holds bytes that are not UTF-8") from exc
    except ValueError as exc:
        raise InferError("INTERNAL", str(exc)) from exc


def _room_of(tensor: Tensor) -> int:
    """What it takes of MAX_ELEMENTS. The router has made sure that its data are of its shape."""
    return prod(tensor.shape) * (TEXT_ELEMENTS if tensor.datatype == "BYTES" else 1)


def _only_binary(tensor: Tensor, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"output {tensor.name!r} {reason}, which JSON does not carry; ask for it with its parameter binary_data: true"
    )


def server_document(told: pb.ServerMetadataResponse) -> dict[str, object]:
    """GET /v2."""
    return {"name": told.name, "version": told.version, "extensions": list(told.extensions)}


def metadata_document(told: pb.ModelMetadataResponse) -> dict[str, object]:
    """GET /v2/models/…; `properties` only where there are any."""
    document: dict[str, object] = {
        "name": told.name,
        "versions": list(told.versions),
        "platform": told.platform,
        "inputs": [_tensor_document(tensor) for tensor in told.inputs],
        "outputs": [_tensor_document(tensor) for tensor in told.outputs],
    }
    return document | {"properties": dict(told.properties)} if told.properties else document


def _tensor_document(tensor: pb.ModelMetadataResponse.TensorMetadata) -> dict[str, object]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def config_document(told: pb.ModelConfig) -> dict[str, object]:
    """GET /v2/models/…/config, in the field names of Triton; `max_batch_size` stands there also when it is 0."""
    document: dict[str, object] = MessageToDict(told, preserving_proto_field_name=True)
    return document | {"max_batch_size": told.max_batch_size}


def index_document(told: pb.RepositoryIndexResponse) -> list[dict[str, str]]:
    """POST /v2/repository/index; what a model has not is left out."""
    return [
        {
            member: value
            for member, value in (
                ("name", model.name),
                ("version", model.version),
                ("state", model.state),
                ("reason", model.reason),
            )
            if value
        }
        for model in told.models
    ]
