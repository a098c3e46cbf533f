"""The wire to a backend: a batch as a message, a message as a checked answer, a status as a failure.

Pure: it knows messages and statuses of the Open Inference Protocol, no connection and no time.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc
import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from router.core.answer import ROW_ERRORS, model_text, read_answer
from router.core.batch import merge, wanted_outputs
from router.core.contents import FIELDS, MAX_TYPED, MAX_TYPED_TEXTS, to_raw
from router.core.types import Batch, BatchAnswer, Outputs, ParameterValue, Tensor
from router.errors import (
    BackendError,
    BackendExhausted,
    Blame,
    InvalidArgument,
    Malformed,
    ModelFailed,
    NotFound,
    Refused,
    RouterError,
    StreamLost,
)

OutputTensor: TypeAlias = pb.ModelInferResponse.InferOutputTensor

INT64_MAX = 2**63 - 1

# The server, or the way to it, is gone; so is one that gives up a call by itself.
LOST = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})
# What the caller is told, and who is to blame; of every other refusal that is unclear, and the model has failed.
_REFUSALS: dict[grpc.StatusCode, tuple[type[RouterError], Blame]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (InvalidArgument, Blame.ROWS),
    grpc.StatusCode.NOT_FOUND: (NotFound, Blame.MODEL),
    grpc.StatusCode.UNIMPLEMENTED: (ModelFailed, Blame.MODEL),
    grpc.StatusCode.FAILED_PRECONDITION: (ModelFailed, Blame.MODEL),
    # The credential is ours, not the caller's.
    grpc.StatusCode.UNAUTHENTICATED: (ModelFailed, Blame.MODEL),
    grpc.StatusCode.PERMISSION_DENIED: (ModelFailed, Blame.MODEL),
}
# Triton's status for a full queue is the one of a server that is gone.
_FULL = "Exceeds maximum queue size"
# What Triton tells on a stream by these words alone, it tells on a call by a status as well.
_WORDS = {
    re.compile(f"Server is stopping|Server not ready|{_FULL}"): grpc.StatusCode.UNAVAILABLE,
    re.compile("Request for unknown model: .* is not at ready state"): grpc.StatusCode.UNAVAILABLE,
    re.compile("Request for unknown model"): grpc.StatusCode.NOT_FOUND,
}
# Of a message over a limit, in the words of gRPC's C core and Go, of Java, of .NET.
_TOO_LARGE = re.compile("larger than max|message exceeds maximum size|message exceeds the maximum configured")


def to_request(batch: Batch) -> pb.ModelInferRequest:
    """The batch as one OIP request with raw contents; where the model takes no batches, its only row as it stands."""
    key = batch.key
    assert key.is_batched or batch.rows == 1, "a batch for a model that takes none: this is a bug"
    request = pb.ModelInferRequest(
        model_name=key.model_name, model_version=key.model_version, id=batch.id, raw_input_contents=merge(batch)
    )
    rows = (batch.rows,) if key.is_batched else ()
    for spec in key.inputs:
        request.inputs.add(name=spec.name, datatype=spec.datatype, shape=(*rows, *spec.row_shape))
    for name in wanted_outputs(batch):
        request.outputs.add(name=name)
    for name, value in key.parameters:
        _set_parameter(request.parameters[name], value)
    return request


def _set_parameter(parameter: pb.InferParameter, value: ParameterValue) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int) and value > INT64_MAX:
        parameter.uint64_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def to_answer(
    batch: Batch, response: pb.ModelInferResponse, address: str, dispatched_at: float, answered_at: float
) -> BatchAnswer:
    """The checked answer. Raises Malformed."""
    return read_answer(
        batch,
        to_outputs(response, is_batched=batch.key.is_batched),
        row_errors=response.parameters[ROW_ERRORS].string_param if ROW_ERRORS in response.parameters else None,
        replica=address,
        dispatched_at=dispatched_at,
        answered_at=answered_at,
        model_version=response.model_version,
    )


def to_outputs(response: pb.ModelInferResponse, *, is_batched: bool = True) -> Outputs:
    """The answer's tensors. Raises Malformed when they are neither all raw nor all typed, and well so.

    Of a model that takes no batches each is as a whole the answer to one row: whatever its shape, 1 is put before it.
    """
    rows = () if is_batched else (1,)
    contents: Sequence[bytes] = response.raw_output_contents
    if len(contents) != len(response.outputs):
        contents = _read_typed(response)
    return tuple(
        Tensor(output.name, output.datatype, (*rows, *output.shape), data)
        for output, data in zip(response.outputs, contents, strict=True)
    )


def _read_typed(response: pb.ModelInferResponse) -> list[bytes]:
    """Raw bytes of typed outputs, which is how MLServer answers."""
    if response.raw_output_contents:
        count = f"{len(response.outputs)} outputs and {len(response.raw_output_contents)} raw contents"
        raise Malformed(f"the backend answered with {count}")
    _check_typed(response.outputs)
    return [_to_raw(output) for output in response.outputs]


def _check_typed(outputs: Sequence[OutputTensor]) -> None:
    """Each element takes time, and the others wait meanwhile; of fewer rows there are less."""
    texts = sum(len(output.contents.bytes_contents) for output in outputs)
    numbers = sum(len(_elements(output)) for output in outputs) - texts
    for count, most, what in ((texts, MAX_TYPED_TEXTS, "BYTES"), (numbers, MAX_TYPED, "number")):
        if count > most:
            raise Refused(f"the answer has {count} {what} elements in typed contents, at most {most} are read")


def _elements(output: OutputTensor) -> Sequence[Any]:
    if output.datatype not in FIELDS:
        raise Malformed(f"output {output.name!r} has datatype {output.datatype!r} and no raw contents")
    elements: Sequence[Any] = getattr(output.contents, FIELDS[output.datatype][0])
    return elements


def _to_raw(output: OutputTensor) -> bytes:
    try:
        return to_raw(output.datatype, _elements(output))
    except ValueError as error:
        raise Malformed(f"output {output.name!r}: {error}") from error


def translate(error: grpc.aio.AioRpcError, address: str) -> BackendError:
    """A failed read as the pool understands it."""
    return translate_status(error.code(), error.details(), address)


def translate_status(code: grpc.StatusCode, details: str | None, address: str) -> BackendError:
    """A stream's end by status. A message over a limit comes as RESOURCE_EXHAUSTED, but is less with fewer rows.

    A batch that the server does not read has too many rows. An answer that we do not read may be the replica's fault.
    """
    text = details or code.name
    if code is grpc.StatusCode.UNAVAILABLE and _FULL in text:
        return BackendExhausted(f"{address}: {model_text(text)}")
    if code in LOST:
        return StreamLost(f"{address}: {model_text(text)}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE.search(text):
        blame = Blame.UNCLEAR if "CLIENT: Received" in text else Blame.ROWS
        return Refused(f"{address}: {model_text(text)}", blame=blame)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return BackendExhausted(f"{address}: {model_text(text)}")
    return Refused(model_text(text), *_REFUSALS.get(code, (ModelFailed, Blame.UNCLEAR)))


def translate_message(text: str, address: str) -> BackendError:
    """An error on a stream, without its request's id. It has no status: but for known words it is the model's."""
    code = next((code for words, code in _WORDS.items() if words.match(text)), None)
    return Refused(model_text(text)) if code is None else translate_status(code, text, address)
