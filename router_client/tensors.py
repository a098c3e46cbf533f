"""Tensors as a client holds them, and their way to the Open Inference Protocol's messages and back. Pure."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from protos.inference_router.v1 import inference_router_pb2 as native_pb
from protos.open_inference import open_inference_pb2 as pb

LENGTH = struct.Struct("<I")

# The protocol's priorities: 0 and 1 are interactive, 2 and more batch.
_PRIORITIES = {native_pb.PRIORITY_CLASS_INTERACTIVE: 1, native_pb.PRIORITY_CLASS_BATCH: 2}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Rows along the first dimension of ``shape``; ``data`` is little-endian and row-major.

    An element of datatype BYTES is a 4-byte length and its bytes: see `bytes_tensor` and `read_bytes`.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class InferError(Exception):
    """Why `RouterClient.infer_tensors` has no answer.

    ``code`` is a canonical gRPC code by name, ``retry_pushback_ms`` when a retry may succeed, if that is known.
    """

    def __init__(self, code: str, message: str, retry_pushback_ms: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_pushback_ms = retry_pushback_ms

    def __reduce__(self) -> tuple[type["InferError"], tuple[str, str, int | None]]:
        """Pickle what it was made of, not the text."""
        return InferError, (self.code, self.message, self.retry_pushback_ms)


def bytes_tensor(name: str, values: Sequence[bytes]) -> Tensor:
    """Return a BYTES tensor of shape ``[len(values)]``."""
    data = b"".join([part for value in values for part in (LENGTH.pack(len(value)), value)])
    return Tensor(name, "BYTES", (len(values),), data)


def read_bytes(tensor: Tensor) -> list[bytes]:
    """Return the elements of a BYTES tensor, row-major.

    Raises:
        ValueError: it is of another datatype, or its data is cut off.
    """
    if tensor.datatype != "BYTES":
        raise ValueError(f"tensor {tensor.name!r} is {tensor.datatype}, not BYTES")
    data = tensor.data
    elements: list[bytes] = []
    end = 0
    while end < len(data):
        begin = end + LENGTH.size
        end = begin + LENGTH.unpack_from(data, end)[0] if begin <= len(data) else begin
        if end > len(data):
            raise ValueError(f"element {len(elements)} of tensor {tensor.name!r} is cut off")
        elements.append(data[begin:end])
    return elements


def to_request(
    model_name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[str],
    priority_class: native_pb.PriorityClass.ValueType,
    request_id: str,
    agent_type: str,
) -> pb.ModelInferRequest:
    """Return the message of a request, raw.

    Raises:
        ValueError: a text cannot be encoded as UTF-8, or a number is out of range.
    """
    request = pb.ModelInferRequest(model_name=model_name, id=request_id)
    for tensor in inputs:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        request.raw_input_contents.append(tensor.data)
    for name in outputs:
        request.outputs.add(name=name)
    if priority_class in _PRIORITIES:
        request.parameters["priority"].uint64_param = _PRIORITIES[priority_class]
    if agent_type:
        request.parameters["agent_type"].string_param = agent_type
    return request


def from_response(response: pb.ModelInferResponse) -> list[Tensor]:
    """Return the outputs of an answer.

    Raises:
        InferError: INTERNAL; there is not one raw entry for each.
    """
    count = len(response.outputs), len(response.raw_output_contents)
    if count[0] != count[1]:
        raise InferError("INTERNAL", f"the answer has {count[0]} outputs and {count[1]} raw contents")
    return [
        Tensor(output.name, output.datatype, tuple(output.shape), data)
        for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
    ]
