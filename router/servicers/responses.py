"""Rows out: outputs of batches to the response of an Open Inference request, raw for every output. Pure.

tritonclient reads nothing but raw contents. A request has the outputs that it asked for, in its order.
"""

from collections.abc import Mapping, Sequence

from protos.open_inference import open_inference_pb2 as pb
from router.core.batch import rows_of
from router.core.types import BYTES, BatchAnswer, Tensor
from router.errors import InvalidArgument, ModelFailed
from router.servicers.classification import classify
from router.servicers.heads import Head


class Responses:
    """Makes responses; what they have in common is made once for the requests of a batch that have the same head."""

    def __init__(self) -> None:
        # State: the answer and the head of the last request, what is chosen of the answer for it, and what its response
        # has beside an id and rows.
        self._answer: BatchAnswer | None = None
        self._head: Head | None = None
        self._chosen: Sequence[Tensor] = ()
        self._form = pb.ModelInferResponse()

    def of_batch(self, head: Head, request_id: str, answer: BatchAnswer, first: int) -> pb.ModelInferResponse:
        """The response to a request whose rows are rows first .. of one batch.

        Raises RouterError when the model's answer has no such outputs.
        """
        if answer is not self._answer or head is not self._head:
            self._prepare(head, answer)
        if head.classes:
            rows = [rows_of(tensor, first, head.rows) for tensor in self._chosen]
            return of_tensors(head, request_id, rows, answer.model_version)
        response = pb.ModelInferResponse()
        response.CopyFrom(self._form)
        response.id = request_id
        append = response.raw_output_contents.append
        for tensor in self._chosen:
            cut = tensor.variable_rows if tensor.datatype == BYTES else tensor.rows
            append(cut(first, head.rows))
        return response

    def _prepare(self, head: Head, answer: BatchAnswer) -> None:
        self._answer = None  # what follows may raise
        self._chosen = choose(answer.outputs, head.outputs, head.asked)
        shapes = [(tensor, (head.rows, *tensor.shape[1:])) for tensor in self._chosen]
        self._form = _form(head, shapes, answer.model_version)
        self._answer, self._head = answer, head


def of_tensors(head: Head, request_id: str, outputs: Sequence[Tensor], model_version: str) -> pb.ModelInferResponse:
    """The response with these outputs of all its rows. Raises InvalidArgument when one cannot be told as classes."""
    if head.classes:
        pairs = zip(outputs, head.classes, strict=True)
        is_batched = head.target.key.is_batched
        outputs = [classify(tensor, classes, is_batched=is_batched) if classes else tensor for tensor, classes in pairs]
    response = _form(head, [(tensor, tensor.shape) for tensor in outputs], model_version)
    response.id = request_id
    response.raw_output_contents.extend([tensor.data for tensor in outputs])
    return response


def _form(head: Head, outputs: Sequence[tuple[Tensor, tuple[int, ...]]], model_version: str) -> pb.ModelInferResponse:
    """Without id and contents. Where there are no batches the one row is all, and has no dimension of its own.

    `model_version`: as the backend tells it; if it does not, the one that was asked for.
    """
    key = head.target.key
    response = pb.ModelInferResponse(model_name=key.model_name, model_version=model_version or key.model_version)
    for tensor, shape in outputs:
        whole = shape if key.is_batched else shape[1:]
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=whole)
    return response


def choose(outputs: Sequence[Tensor], wanted: Sequence[str], order: Sequence[str] = ()) -> list[Tensor]:
    """The outputs that a request wants, in its order. Raises InvalidArgument when one is not there.

    All of them when it names none; `order`: the names of those whose order is known, whatever the backend makes of it.
    """
    if not wanted:
        rank = {name: number for number, name in enumerate(order)}
        return sorted(outputs, key=lambda tensor: rank.get(tensor.name, len(rank)))
    by_name = {tensor.name: tensor for tensor in outputs}
    for name in wanted:
        if name not in by_name:
            raise InvalidArgument(f"the model has no output {name!r}, only {', '.join(map(repr, by_name))}")
    return [by_name[name] for name in wanted]


def cut(answer: BatchAnswer, head: Head, first: int, rows: int) -> list[Tensor]:
    """Some rows of a batch, of the outputs that a request wants. Raises InvalidArgument."""
    return [rows_of(tensor, first, rows) for tensor in choose(answer.outputs, head.outputs, head.asked)]


def join(pieces: Mapping[int, Sequence[Tensor]]) -> list[Tensor]:
    """Outputs of all rows from those of parts, by the first row of each. Raises ModelFailed when their kinds differ."""
    ordered = [list(pieces[first]) for first in sorted(pieces)]
    kinds = {tuple((tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in piece) for piece in ordered}
    if len(kinds) > 1:
        raise ModelFailed("the model answered the batches of this request with different outputs")
    return ordered[0] if len(ordered) == 1 else [_join_one(parts) for parts in zip(*ordered, strict=True)]


def _join_one(parts: Sequence[Tensor]) -> Tensor:
    rows = sum(part.shape[0] for part in parts)
    data = b"".join([part.data for part in parts])
    return Tensor(parts[0].name, parts[0].datatype, (rows, *parts[0].shape[1:]), data)
