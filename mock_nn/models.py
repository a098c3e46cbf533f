"""What the mock answers: a pure function of a row, the model's name and the agent type.

    answer(row) = (row[0] * weight[0] + row[1] * weight[1] + …) + bias        all in float32

`bias, weight[0], weight[1], …` are the numbers of one endless stream per model and agent type: SHAKE-256 of
"<characters of the model's name>:<model's name><agent type>", read as little-endian uint32 u, each taken as
(u >> 8) / 2**23 - 1. So every number is exact in float32, -1 <= number < 1, and longer rows use more of the same
stream. The bias lets a row of zeros, too, tell which model and agent type answered.

With an output width of K the answer of a row is `[answer, 2 * answer, …, K * answer]`.

An answer is bit-identical whatever rows stand around it: the products are summed along each row, which numpy does row
by row in a fixed order. A BLAS product over the matrix is not: its rounding depends on the matrix's shape. (FP64
inputs are rounded to float32 first.)

This module reads requests as data. It must not know the loop, the clock, gRPC, faults or settings.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from protos.open_inference import open_inference_pb2 as pb

FloatArray: TypeAlias = npt.NDArray[np.float32]

INPUT_NAME = "vector"
OUTPUT_NAME = "output"
OUTPUT_DATATYPE = "FP32"

# 256 keys of the router's longest vectors (65,536 numbers) are 64 MiB.
_CACHED_WEIGHTS = 256


class BadInputError(ValueError):
    """The request cannot be computed; the text tells its sender why."""


def expected(model_name: str, agent_type: str, rows: FloatArray, width: int = 0) -> FloatArray:
    """The mock's answer to a matrix.

    `rows` is (rows, dim) float32; the answer is (rows,) float32, or (rows, width) when `width` is not 0.
    Rows that are not finite, or too large, give inf or NaN like any float arithmetic.
    """
    numbers = _numbers(model_name, agent_type, 1 + rows.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        # order="C": in another order numpy would sum column by column, which rounds differently.
        answers: FloatArray = np.multiply(rows, numbers[1:], order="C").sum(axis=1) + numbers[0]
        return answers if width == 0 else np.multiply.outer(answers, np.arange(1, width + 1, dtype=np.float32))


@lru_cache(maxsize=_CACHED_WEIGHTS)
def _numbers(model_name: str, agent_type: str, count: int) -> FloatArray:
    """The first `count` numbers of the stream, (count,) float32."""
    # The length in front keeps ("ab", "c") apart from ("a", "bc").
    stream = hashlib.shake_256(f"{len(model_name)}:{model_name}{agent_type}".encode())
    integers = np.frombuffer(stream.digest(4 * count), dtype="<u4") >> 8
    numbers = integers.astype(np.float32) / np.float32(2**23) - np.float32(1)
    numbers.flags.writeable = False
    return numbers


def read_agent_type(request: pb.ModelInferRequest) -> str:
    """The request parameter `agent_type`, "" when there is none. Raises BadInputError when it is no string."""
    parameter = request.parameters.get("agent_type")
    if parameter is None:
        return ""
    if parameter.WhichOneof("parameter_choice") != "string_param":
        raise BadInputError("parameter 'agent_type' must be a string_param")
    return parameter.string_param


def read_matrix(
    request: pb.ModelInferRequest, input_name: str = "", datatype: str = "", output_name: str = OUTPUT_NAME
) -> FloatArray:
    """The request's only input as (rows, dim) float32, at least 1 x 1; a view of its bytes where possible.

    Raises BadInputError for everything else than one FP32 or FP64 tensor of that shape, raw or typed, and one requested
    output at most. `input_name`, `datatype`: only this one.
    """
    tensor = _only_input(request)
    if input_name not in ("", tensor.name):
        raise BadInputError(f"unexpected inference input '{tensor.name}' for model '{request.model_name}'")
    _check_requested_outputs(request, output_name)
    rows, dim = _read_shape(tensor)
    datatypes = [datatype] if datatype else list(_DATATYPES)
    if tensor.datatype not in datatypes:
        raise BadInputError(f"input '{tensor.name}' has datatype '{tensor.datatype}', must be one of {datatypes}")
    read = _read_raw if request.raw_input_contents else _read_typed
    return read(request, tensor, rows * dim).reshape(rows, dim)


_Tensor: TypeAlias = pb.ModelInferRequest.InferInputTensor

_FP32 = np.dtype("<f4")
_FP64 = np.dtype("<f8")


@dataclass(frozen=True, slots=True)
class _Datatype:
    """How the numbers of a datatype lie in raw contents, where typed contents keep them; both given as float32."""

    item_bytes: int
    from_raw: Callable[[bytes], FloatArray]
    from_typed: Callable[[pb.InferTensorContents], FloatArray]


def _round_to_fp32(numbers: npt.NDArray[np.float64]) -> FloatArray:
    with np.errstate(over="ignore", invalid="ignore"):
        return numbers.astype(np.float32)


_DATATYPES = {
    "FP32": _Datatype(
        item_bytes=4,
        from_raw=lambda raw: np.frombuffer(raw, _FP32),
        from_typed=lambda typed: np.array(typed.fp32_contents, _FP32),
    ),
    "FP64": _Datatype(
        item_bytes=8,
        from_raw=lambda raw: _round_to_fp32(np.frombuffer(raw, _FP64)),
        from_typed=lambda typed: _round_to_fp32(np.array(typed.fp64_contents, _FP64)),
    ),
}


def _only_input(request: pb.ModelInferRequest) -> _Tensor:
    if len(request.inputs) != 1:
        raise BadInputError(f"expected 1 input but got {len(request.inputs)} inputs for model '{request.model_name}'")
    return request.inputs[0]


def _check_requested_outputs(request: pb.ModelInferRequest, output_name: str) -> None:
    for output in request.outputs:
        if output.name != output_name:
            raise BadInputError(f"unexpected inference output '{output.name}' for model '{request.model_name}'")


def _read_shape(tensor: _Tensor) -> tuple[int, int]:
    shape = list(tensor.shape)
    if len(shape) != 2 or min(shape) < 1:
        raise BadInputError(f"input '{tensor.name}' has shape {shape}, must be [rows, dim] with at least 1 each")
    return shape[0], shape[1]


def _read_raw(request: pb.ModelInferRequest, tensor: _Tensor, elements: int) -> FloatArray:
    if len(request.raw_input_contents) != 1:
        raise BadInputError(f"expected 1 entry of raw_input_contents but got {len(request.raw_input_contents)}")
    if tensor.HasField("contents"):
        raise BadInputError(f"input '{tensor.name}' has both raw_input_contents and contents")
    raw = request.raw_input_contents[0]
    datatype = _DATATYPES[tensor.datatype]
    if len(raw) != elements * datatype.item_bytes:
        wanted = f"shape {list(tensor.shape)} of {tensor.datatype} takes {elements * datatype.item_bytes} bytes"
        raise BadInputError(f"input '{tensor.name}': {wanted}, got {len(raw)}")
    return datatype.from_raw(raw)


def _read_typed(_request: pb.ModelInferRequest, tensor: _Tensor, elements: int) -> FloatArray:
    numbers = _DATATYPES[tensor.datatype].from_typed(tensor.contents)
    if len(numbers) != elements:
        wanted = f"shape {list(tensor.shape)} takes {elements} {tensor.datatype} numbers"
        raise BadInputError(f"input '{tensor.name}': {wanted}, got {len(numbers)}")
    return numbers


def answer(
    request: pb.ModelInferRequest, values: FloatArray, output_name: str = OUTPUT_NAME
) -> pb.ModelStreamInferResponse:
    """The response to a request; raw contents always, since tritonclient reads nothing else.

    A stream's message holds the unary one, so this form serves both; filled in place because joining two finished
    messages copies (3.3 µs instead of 6.1).
    """
    message = pb.ModelStreamInferResponse()
    response = message.infer_response
    response.model_name = request.model_name
    response.model_version = request.model_version or "1"
    response.id = request.id
    response.outputs.add(name=output_name, datatype=OUTPUT_DATATYPE, shape=values.shape)
    response.raw_output_contents.append(values.tobytes())
    return message


def metadata(
    model_name: str, output_width: int, input_name: str = "", datatype: str = "", output_name: str = OUTPUT_NAME
) -> pb.ModelMetadataResponse:
    """What every model takes and gives; -1 is any size. Where it takes more than that tells, the usual."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    output_shape = (-1, output_width) if output_width else (-1,)
    return pb.ModelMetadataResponse(
        name=model_name,
        versions=["1"],
        platform="mock_nn",
        inputs=[tensor(name=input_name or INPUT_NAME, datatype=datatype or "FP32", shape=(-1, -1))],
        outputs=[tensor(name=output_name, datatype=OUTPUT_DATATYPE, shape=output_shape)],
    )
