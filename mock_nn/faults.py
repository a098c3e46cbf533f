"""When to misbehave and what a bad answer looks like.

Two tables: triggers decide which batches a fault strikes, disturbances turn a good answer into a bad one. The kinds
without an answer (error, poison, stall, drop, crash) are only decided here; the runner carries them out. Nothing here
knows the loop, the clock or gRPC; chance comes in as a seeded `Random`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mock_nn.config import Fault, FaultKind, Trigger
from protos.open_inference import open_inference_pb2 as pb

Message: TypeAlias = pb.ModelStreamInferResponse

_ROW_ERROR = "the model cannot compute this row (a fault on demand)"


@dataclass(slots=True)
class _Armed:
    """A fault and the batches that it has seen."""

    fault: Fault
    batches: int = 0


class FaultPlan:
    """Says for each batch, in order of arrival, which fault strikes it."""

    def __init__(self, faults: Sequence[Fault], rng: Random) -> None:
        # State: how many batches each fault has seen, and the place in the random sequence.
        self._armed = [_Armed(fault) for fault in faults]
        self._rng = rng

    def strike(self, model_name: str, matrix: npt.NDArray[np.float32]) -> Fault | None:
        """The fault for this (rows, dim) batch, the first of the list when several strike; None: behave.

        Every fault sees every batch of its models, struck by another one or not, so that adding a fault does not
        move the others.
        """
        struck = [armed.fault for armed in self._armed if self._strikes(armed, model_name, matrix)]
        return struck[0] if struck else None

    def _strikes(self, armed: _Armed, model_name: str, matrix: npt.NDArray[np.float32]) -> bool:
        fault = armed.fault
        if fault.model_name not in ("", model_name):
            return False
        armed.batches += 1
        return _TRIGGERS[fault.trigger](fault.amount, armed.batches, matrix, self._rng)


_TRIGGERS: Mapping[Trigger, Callable[[float, int, npt.NDArray[np.float32], Random], bool]] = {
    Trigger.RATE: lambda amount, _batch, _matrix, rng: rng.random() < amount,
    Trigger.EVERY: lambda amount, batch, _matrix, _rng: batch % int(amount) == 0,
    Trigger.FIRST: lambda amount, batch, _matrix, _rng: batch <= amount,
    Trigger.VALUE: lambda amount, _batch, matrix, _rng: bool(_has_value(amount, matrix).any()),
}


def _has_value(amount: float, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return np.equal(matrix[:, 0], np.float32(amount))


def name_rows(fault: Fault, answer: Message, matrix: npt.NDArray[np.float32]) -> Message:
    """The answer with errors of single rows: of those with the fault's value, by another trigger of the first."""
    has_value = fault.trigger is Trigger.VALUE
    rows = np.flatnonzero(_has_value(fault.amount, matrix)).tolist() if has_value else [0]
    bad, _ = _copy(answer)
    bad.infer_response.parameters["row_errors"].string_param = json.dumps({str(row): _ROW_ERROR for row in rows})
    return bad


def disturb(kind: FaultKind, answer: Message, previous: Message | None) -> list[Message]:
    """The messages that a fault makes of a good answer, in order; the arguments stay as they are.

    `previous` is the last message of the same stream, None when there is none.
    """
    return _DISTURBANCES[kind](answer, previous)


def _short(answer: Message, _previous: Message | None) -> list[Message]:
    bad, _ = _copy(answer)
    response = bad.infer_response
    for number, output in enumerate(response.outputs):
        raw = response.raw_output_contents[number]
        last = _last_element(raw) if output.datatype == "BYTES" else len(raw) - len(raw) // output.shape[0]
        output.shape[0] -= 1
        response.raw_output_contents[number] = raw[:last]
    return [bad]


def _last_element(raw: bytes) -> int:
    """Where the last of some length-prefixed elements begins."""
    begin = position = 0
    while position < len(raw):
        begin = position
        position += 4 + int.from_bytes(raw[position : position + 4], "little")
    return begin


def _nan(answer: Message, _previous: Message | None) -> list[Message]:
    bad, _ = _copy(answer)
    response = bad.infer_response
    for number, output in enumerate(response.outputs):
        if output.datatype == "FP32":
            values = np.frombuffer(response.raw_output_contents[number], dtype="<f4").copy()
            values.reshape(tuple(output.shape))[0] = np.nan
            response.raw_output_contents[number] = values.tobytes()
    return [bad]


def _duplicate(answer: Message, _previous: Message | None) -> list[Message]:
    return [answer, answer]


def _out_of_order(answer: Message, previous: Message | None) -> list[Message]:
    stale = _foreign_id(answer, None)[0] if previous is None else previous
    return [stale, answer]


def _foreign_id(answer: Message, _previous: Message | None) -> list[Message]:
    bad, _ = _copy(answer)
    bad.infer_response.id = f"{answer.infer_response.id}-foreign"
    return [bad]


def _wrong_shape(answer: Message, _previous: Message | None) -> list[Message]:
    bad, output = _copy(answer)
    output.shape[0] += 1
    return [bad]


def _wrong_datatype(answer: Message, _previous: Message | None) -> list[Message]:
    bad, _ = _copy(answer)
    for output in bad.infer_response.outputs:
        output.datatype = "FP64"
    return [bad]


def _missing_output(answer: Message, _previous: Message | None) -> list[Message]:
    bad, _ = _copy(answer)
    del bad.infer_response.outputs[:]
    del bad.infer_response.raw_output_contents[:]
    return [bad]


_DISTURBANCES: Mapping[FaultKind, Callable[[Message, Message | None], list[Message]]] = {
    FaultKind.SHORT: _short,
    FaultKind.NAN: _nan,
    FaultKind.DUPLICATE: _duplicate,
    FaultKind.OUT_OF_ORDER: _out_of_order,
    FaultKind.FOREIGN_ID: _foreign_id,
    FaultKind.WRONG_SHAPE: _wrong_shape,
    FaultKind.WRONG_DATATYPE: _wrong_datatype,
    FaultKind.MISSING_OUTPUT: _missing_output,
}


def _copy(answer: Message) -> tuple[Message, pb.ModelInferResponse.InferOutputTensor]:
    copy = Message()
    copy.CopyFrom(answer)
    return copy, copy.infer_response.outputs[0]
