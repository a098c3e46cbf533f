"""Rows of Open Inference requests: raw bytes as they are, typed contents to the same bytes. Pure.

The protocol knows no errors of single rows, so whatever is wrong is the request's error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protos.open_inference import open_inference_pb2 as pb
from router.core.contents import FIELDS, MAX_TYPED, to_raw
from router.core.elements import Offsets, scan
from router.core.types import Block, Recipient, TensorSpec
from router.core.variable import VariableBlock
from router.errors import InvalidArgument
from router.servicers.convert import Terms, check_name
from router.servicers.heads import MAX_THINGS, Head, Heads, Target, too_wide

# BYTES elements of a request: each takes 0.1-0.2 µs to pass, and the others wait meanwhile.
MAX_ELEMENTS = 131_072


_NOTHING = pb.ModelInferRequest()


class Message:
    """A request off the wire, taken apart: its id, its raw contents, and the rest of it."""

    __slots__ = ("id", "raw", "rest")

    def __init__(self, message: pb.ModelInferRequest) -> None:
        self.id = message.id
        raw = message.raw_input_contents
        # Of what is too many one more will do to tell so: a message has room for millions.
        self.raw: tuple[bytes, ...] = tuple(raw if len(raw) <= MAX_THINGS else raw[: MAX_THINGS + 1])
        self.rest = message
        message.ClearField("id")
        message.ClearField("raw_input_contents")

    def let_go(self) -> None:
        """All but the id is read: a request that waits would keep typed contents beside the rows made of them."""
        self.raw, self.rest = (), _NOTHING

    @property
    def nbytes(self) -> int:
        """What it takes to keep it, about."""
        return self.rest.ByteSize() + sum(map(len, self.raw))


@dataclass(slots=True)
class Rows:
    """A request's rows: raw bytes per input, and where the rows of BYTES inputs begin (empty without BYTES)."""

    head: Head
    inputs: tuple[bytes, ...]
    offsets: "tuple[Offsets | None, ...]"

    def to_block(self, terms: Terms, recipient: Recipient) -> Block:
        """All of them as one block."""
        head = self.head
        key = head.target.key
        times = terms.arrived_at, terms.deadline
        whose = terms.tenant, terms.is_batch_class
        given = key, 0, 0, head.rows, self.inputs, key.row_bytes, *times, recipient, *whose, head.asked
        return VariableBlock(*given, self.offsets) if key.is_variable else Block(*given)


def read(message: Message, heads: Heads, longest_id: int) -> Rows:
    """Check the request and take its rows. Raises RouterError, and Unlearned."""
    if len(message.id) > longest_id:
        check_name("id", message.id, longest_id)
    raw = message.raw
    if not raw:
        return _read_typed(message, heads)
    head = heads.find(message.rest)
    if tuple(map(len, raw)) != head.sizes:
        _check_raw(raw, head)
    if not head.target.key.is_variable:
        return Rows(head, raw, ())
    return _scanned(head, raw)


def _check_raw(raw: Sequence[bytes], head: Head) -> None:
    specs = head.target.key.inputs
    if len(raw) != len(specs):
        raise InvalidArgument(f"the request has {len(raw)} raw contents for {len(specs)} inputs")
    for spec, data, size in zip(specs, raw, head.sizes, strict=True):
        if not spec.is_variable and len(data) != size:
            what = _described(spec, head)
            raise InvalidArgument(f"input {spec.name!r} has {len(data)} bytes, which is not {what}")


def _read_typed(message: Message, heads: Heads) -> Rows:
    head = heads.read(message.rest)
    specs, rows = head.target.key.inputs, head.rows
    _check_elements(head)
    elements = sum(rows * spec.row_elements for spec in specs)
    if elements > MAX_TYPED:
        what = f"{elements} elements in typed contents, at most {MAX_TYPED} are allowed"
        raise InvalidArgument(f"{what}; raw_input_contents may hold more")
    typed = zip(message.rest.inputs, specs, strict=True)
    inputs = tuple(_from_typed(tensor.contents, spec, head) for tensor, spec in typed)
    return _scanned(head, inputs) if head.target.key.is_variable else Rows(head, inputs, ())


def _scanned(head: Head, inputs: tuple[bytes, ...]) -> Rows:
    """The same with the offsets of BYTES; a row that no batch could hold is refused."""
    _check_elements(head)
    specs = head.target.key.inputs
    offsets = tuple(_offsets(spec, data, head) for spec, data in zip(specs, inputs, strict=True))
    _check_widest(head, offsets)
    return Rows(head, inputs, offsets)


def _described(spec: TensorSpec, head: Head) -> str:
    rows = [head.rows] if head.target.key.is_batched else []
    return f"{spec.datatype}{[*rows, *spec.row_shape]}"


def _check_elements(head: Head) -> None:
    elements = sum(head.rows * spec.row_elements for spec in head.target.key.inputs if spec.is_variable)
    if elements > MAX_ELEMENTS:
        raise InvalidArgument(f"{elements} BYTES elements, at most {MAX_ELEMENTS} are allowed in one request")


def _from_typed(contents: pb.InferTensorContents, spec: TensorSpec, head: Head) -> bytes:
    if spec.datatype not in FIELDS:
        raise InvalidArgument(f"input {spec.name!r}: {spec.datatype} travels in raw_input_contents only")
    field = FIELDS[spec.datatype][0]
    elements = getattr(contents, field)
    if len(elements) != head.rows * spec.row_elements:
        what = _described(spec, head)
        raise InvalidArgument(f"input {spec.name!r} has {len(elements)} {field}, which is not {what}")
    try:
        return to_raw(spec.datatype, elements)
    except ValueError as error:
        raise InvalidArgument(f"input {spec.name!r}: {error}") from error


def _offsets(spec: TensorSpec, data: bytes, head: Head) -> "Offsets | None":
    if not spec.is_variable:
        return None
    try:
        return scan(data, head.rows, spec.row_elements)
    except ValueError as error:
        raise InvalidArgument(f"input {spec.name!r} is not {_described(spec, head)}: {error}") from error


def _check_widest(head: Head, all_offsets: "Sequence[Offsets | None]") -> None:
    target: Target = head.target
    widths = np.full(head.rows, target.key.row_bytes)
    for offsets in all_offsets:
        if offsets is not None:
            ends = np.frombuffer(offsets, np.int64)
            widths += ends[1:] - ends[:-1]
    if (widest := int(widths.max())) > target.max_row_bytes:
        raise too_wide(widest, target)
