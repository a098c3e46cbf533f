"""The body of POST /v2/models/…/infer: from JSON, perhaps with binary tensors behind it, to tensors that can travel.

The binary extension (Triton's): the header Inference-Header-Content-Length tells where the JSON ends; an input with the
parameter `binary_data_size` has no `data` and as many of the bytes that follow, in the inputs' order. An output comes
back so where its parameter `binary_data` says so, else where the request's `binary_data_output` does.

What concerns the model (rows, datatypes of raw tensors, parameters that exist) is the router's to judge. null is the
same as leaving a member out, and members without a meaning are ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from rest_gateway.errors import InvalidRequestError, NotJsonError
from rest_gateway.schemas import json_text
from rest_gateway.schemas.tensor_data import MAX_DIMENSIONS, TensorDataError, to_raw

# The router's bound is 1,024 of all of them together; here it keeps a body of a million inputs from taking a second.
MAX_THINGS = 1024
MAX_DIMENSION = 2**63 - 1
MICROSECONDS = 1_000_000

ParameterValue: TypeAlias = bool | int | float | str
Json: TypeAlias = dict[str, object]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InputIn:
    """One input; `data` is little-endian and row-major."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes
    parameters: dict[str, ParameterValue]


@dataclass(frozen=True, slots=True)
class OutputIn:
    """One output that is asked for; `is_binary` None: as the request says of all."""

    name: str
    is_binary: bool | None
    parameters: dict[str, ParameterValue]


@dataclass(frozen=True, slots=True)
class InferCall:
    """A request whose form is right. `are_outputs_binary`: those of which it says nothing else."""

    id: str
    inputs: list[InputIn]
    outputs: list[OutputIn]
    are_outputs_binary: bool
    parameters: dict[str, ParameterValue]

    @property
    def timeout_s(self) -> float | None:
        """What the parameter `timeout` says; None where it says none (0), or what the router will refuse."""
        microseconds = self.parameters.get("timeout")
        if isinstance(microseconds, bool) or not isinstance(microseconds, int) or microseconds <= 0:
            return None
        return microseconds / MICROSECONDS


def parse_infer(body: bytes, header_length: str | None) -> InferCall:
    """The request in `body`. Raises NotJsonError and InvalidRequestError.

    `header_length`: the header Inference-Header-Content-Length, if there is one; without it all of the body is JSON.
    """
    json_bytes = len(body) if header_length is None else _read_header_length(header_length, len(body))
    document = json_text.load_strictly(body if json_bytes == len(body) else body[:json_bytes], _objects_in)
    if not isinstance(document, dict):
        raise InvalidRequestError(f"the body must be a JSON object, not {json_text.kind_of(document)}")
    parameters = _read_parameters("the request", document)
    tail = _Tail(memoryview(body)[json_bytes:])
    call = InferCall(
        id=_read_id(document.get("id")),
        inputs=[_read_input(index, tensor, tail) for index, tensor in enumerate(_read_list("inputs", document))],
        outputs=[_read_output(index, tensor) for index, tensor in enumerate(_read_list("outputs", document))],
        are_outputs_binary=bool(_pop("the request", parameters, "binary_data_output", bool, "true or false")),
        parameters=parameters,
    )
    if not call.inputs:
        raise InvalidRequestError("the request has no inputs")
    tail.check_end()
    return call


def parse_index_request(body: bytes) -> bool:
    """Whether POST /v2/repository/index asks only for models that are ready; an empty body asks for all."""
    if not body.strip():
        return False
    document = json_text.load_strictly(body, lambda document: (document,))
    if not isinstance(document, dict):
        raise InvalidRequestError(f"the body must be a JSON object, not {json_text.kind_of(document)}")
    is_ready = document.get("ready")
    if is_ready is not None and not isinstance(is_ready, bool):
        raise InvalidRequestError(f"ready must be true or false, not {json_text.kind_of(is_ready)}")
    return bool(is_ready)


def _read_header_length(text: str, body_bytes: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= body_bytes):
        raise NotJsonError(f"Inference-Header-Content-Length is no number of at most the body's {body_bytes:,} bytes")
    return int(text)


class _Tail:
    """The bytes behind the JSON, taken from the front."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._taken = 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes; the one copy between the body and the message."""
        begin, self._taken = self._taken, self._taken + size
        if self._taken > len(self._data):
            raise InvalidRequestError(
                f"the inputs' binary_data_size is over the {len(self._data):,} bytes that follow the JSON"
            )
        return bytes(self._data[begin : self._taken])

    def check_end(self) -> None:
        """Refuses bytes that belong to no input: sizes that are wrong would shift tensors silently."""
        if left := len(self._data) - self._taken:
            raise InvalidRequestError(f"{left:,} bytes follow the JSON that are no input's binary_data_size")


def _objects_in(document: object) -> Iterator[object]:
    """All objects of a request of the right form; where there are too many, that is told later."""
    if not isinstance(document, dict):
        return
    yield document
    yield document.get("parameters")
    for member in ("inputs", "outputs"):
        tensors = document.get(member)
        for tensor in tensors[:MAX_THINGS] if isinstance(tensors, list) else ():
            if isinstance(tensor, dict):
                yield tensor
                yield tensor.get("parameters")


def _read_id(value: object) -> str:
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"id must be a string, not {json_text.kind_of(value)}")
    return value or ""


def _read_list(member: str, document: Json) -> list[object]:
    tensors = document.get(member)
    if tensors is None:
        return []
    if not isinstance(tensors, list):
        raise InvalidRequestError(f"{member} must be a list, not {json_text.kind_of(tensors)}")
    if len(tensors) > MAX_THINGS:
        raise InvalidRequestError(f"{member} has {len(tensors):,} entries, at most {MAX_THINGS:,} are allowed")
    return tensors


def _read_input(index: int, value: object, tail: _Tail) -> InputIn:
    owner, tensor = _read_tensor("inputs", index, value)
    datatype = tensor.get("datatype")
    if not isinstance(datatype, str):
        raise InvalidRequestError(f"{owner}: datatype must be a string")
    shape = _read_shape(owner, tensor.get("shape"))
    parameters = _read_parameters(owner, tensor)
    size = _pop(owner, parameters, "binary_data_size", int, "a number of bytes")
    if "shared_memory_region" in parameters:
        raise InvalidRequestError(f"{owner}: shared memory is not supported; send the data with the request")
    data = tensor.get("data")
    if (size is None) == (data is None):
        raise InvalidRequestError(f"{owner} must have exactly one of data and the parameter binary_data_size")
    raw = _read_data(owner, data, datatype, shape) if size is None else _read_binary(owner, size, tail)
    return InputIn(_name_of(tensor), datatype, shape, raw, parameters)


def _read_data(owner: str, data: object, datatype: str, shape: list[int]) -> bytes:
    try:
        return to_raw(data, datatype, shape)
    except TensorDataError as exc:
        raise InvalidRequestError(f"{owner}: {exc}") from exc


def _read_binary(owner: str, size: int, tail: _Tail) -> bytes:
    if size < 0:
        raise InvalidRequestError(f"{owner}: binary_data_size must be a number of bytes")
    return tail.take(size)


def _read_output(index: int, value: object) -> OutputIn:
    owner, tensor = _read_tensor("outputs", index, value)
    parameters = _read_parameters(owner, tensor)
    return OutputIn(_name_of(tensor), _pop(owner, parameters, "binary_data", bool, "true or false"), parameters)


def _read_tensor(member: str, index: int, value: object) -> tuple[str, Json]:
    """How the tensor is called in messages, and the object, which has a name."""
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{member}[{index}] must be an object, not {json_text.kind_of(value)}")
    name = value.get("name")
    if not isinstance(name, str):
        raise InvalidRequestError(f"{member}[{index}]: name must be a string")
    return f"{member.removesuffix('s')} {json_text.quote(name)}", value


def _name_of(tensor: Json) -> str:
    return str(tensor["name"])


def _read_shape(owner: str, value: object) -> list[int]:
    if not isinstance(value, list):
        raise InvalidRequestError(f"{owner}: shape must be a list of whole numbers")
    if len(value) > MAX_DIMENSIONS:
        raise InvalidRequestError(f"{owner}: shape has {len(value):,} dimensions, at most {MAX_DIMENSIONS} are allowed")
    for size in value:
        if type(size) is not int or not 0 <= size <= MAX_DIMENSION:
            raise InvalidRequestError(f"{owner}: shape must be a list of whole numbers from 0 to {MAX_DIMENSION}")
    return value


def _read_parameters(owner: str, document: Json) -> dict[str, ParameterValue]:
    value = document.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{owner}: parameters must be an object, not {json_text.kind_of(value)}")
    if len(value) > MAX_THINGS:
        raise InvalidRequestError(f"{owner}: parameters has more than {MAX_THINGS:,} entries")
    return {name: _read_parameter(owner, name, entry) for name, entry in value.items() if entry is not None}


def _read_parameter(owner: str, name: str, value: object) -> ParameterValue:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise InvalidRequestError(f"{owner}: parameter {json_text.quote(name)} is out of range of 64 bits")
    if not isinstance(value, bool | int | float | str):
        kind = json_text.kind_of(value)
        raise InvalidRequestError(
            f"{owner}: parameter {json_text.quote(name)} must be a string, a number or a boolean, not {kind}"
        )
    return value


def _pop(owner: str, parameters: dict[str, ParameterValue], name: str, kind: type[T], wanted: str) -> T | None:
    """Takes out a parameter that is the transport's."""
    value = parameters.pop(name, None)
    if value is None:
        return None
    if type(value) is not kind:
        raise InvalidRequestError(f"{owner}: {name} must be {wanted}")
    return value
