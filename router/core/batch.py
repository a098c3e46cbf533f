"""Partition, merge, split: from rows of a request to blocks, from blocks to a matrix, from outputs to blocks.

Everything is bytes: merge is a join, split is a slice (of BYTES after one scan of the whole answer). An answer is
checked as a whole before any row of it is handed out, so a backend that answers a row too few can never shift the
others.
"""

import math
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from router.core.elements import LENGTH
from router.core.types import BYTES, ITEM_SIZE, Batch, Outputs, Part, Tensor
from router.errors import Malformed, Refused

# BYTES elements of an answer: each takes 0.1-0.2 µs to pass, and everybody waits meanwhile (64 MiB of empty ones: 2 s).
MAX_ELEMENTS = 131_072

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def partition(rows: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Split a request's rows by key; keys and rows keep the order in which they came."""
    groups: dict[K, list[V]] = {}
    for key, row in rows:
        groups.setdefault(key, []).append(row)
    return groups


def merge(batch: Batch) -> tuple[bytes, ...]:
    """The batch's matrix per input tensor: raw bytes of shape (batch.rows, *row_shape)."""
    return tuple(_merge_input(batch.parts, number) for number in range(len(batch.key.inputs)))


def _merge_input(parts: tuple[Part, ...], number: int) -> bytes:
    if len(parts) == 1 and parts[0].rows == parts[0].block.rows:
        return parts[0].block.inputs[number]
    return b"".join([_rows_of(part, number) for part in parts])


def _rows_of(part: Part, number: int) -> bytes | memoryview:
    if part.rows == part.block.rows:
        return part.block.inputs[number]
    return part.block.slice(number, part.first, part.rows)


def wanted_outputs(batch: Batch) -> tuple[str, ...]:
    """The names of all outputs that somebody wants, sorted; none when somebody wants all.

    Of native rows, and where nobody names outputs, the first part tells.
    """
    names: set[str] = set()
    for part in batch.parts:
        if not part.block.outputs:
            return ()
        names.update(part.block.outputs)
    return tuple(sorted(names))


def split(batch: Batch) -> Iterator[tuple[Part, int]]:
    """Each part of the batch and the row of the batch at which it begins."""
    offset = 0
    for part in batch.parts:
        yield part, offset
        offset += part.rows


def cut(parts: Iterable[Part], rows: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The first `rows` rows of some parts, and the rest; either may be none."""
    head: list[Part] = []
    rest: list[Part] = []
    for part in parts:
        if rows <= 0:
            rest.append(part)
        elif part.rows <= rows:
            head.append(part)
        else:
            first, second = part.cut(rows)
            head.append(first)
            rest.append(second)
        rows -= part.rows
    return tuple(head), tuple(rest)


def split_around(batch: Batch, rows: Container[int]) -> Iterator[tuple[Part, int]]:
    """As `split`, but each of these rows of the batch is a part by itself."""
    for part, offset in split(batch):
        begin = 0
        for row in range(part.rows):
            if offset + row in rows:
                yield from _runs(part, offset, begin, row)
                yield from _runs(part, offset, row, row + 1)
                begin = row + 1
        yield from _runs(part, offset, begin, part.rows)


def _runs(part: Part, offset: int, begin: int, end: int) -> Iterator[tuple[Part, int]]:
    """Rows begin .. end - 1 of a part, if there are any."""
    if begin < end:
        tail = part.cut(begin)[1] if begin else part
        yield (tail.cut(end - begin)[0] if end - begin < tail.rows else tail), offset + begin


def check(outputs: Outputs, rows: int) -> None:
    """Refuse outputs that do not hold exactly `rows` rows each; BYTES are scanned here, and then never again.

    Raises:
        Malformed: no output, a leading dimension other than `rows`, or bytes that do not fit shape and datatype.
        Refused: too many BYTES elements to be scanned at once; with fewer rows there may be less.
    """
    if not outputs:
        raise Malformed("the backend answered without any output")
    for tensor in outputs:
        _check_tensor(tensor, rows)
    texts = [tensor for tensor in outputs if tensor.datatype == BYTES]
    if texts:
        _check_texts(texts)


def _check_tensor(tensor: Tensor, rows: int) -> None:
    if not tensor.shape or tensor.shape[0] != rows:
        found = f"output {tensor.name!r} has shape {list(tensor.shape)} for a batch of {rows} rows"
        raise Malformed(f"{found}; if the model takes no batches, set batching: off")
    if (tensor.datatype != BYTES and tensor.datatype not in ITEM_SIZE) or min(tensor.shape) < 0:
        raise Malformed(f"output {tensor.name!r} has datatype {tensor.datatype!r}, shape {list(tensor.shape)}")
    if tensor.datatype != BYTES and len(tensor.data) != math.prod(tensor.shape) * ITEM_SIZE[tensor.datatype]:
        expected = f"{tensor.datatype}{list(tensor.shape)}"
        raise Malformed(f"output {tensor.name!r} has {len(tensor.data)} bytes, which is not {expected}")


def _check_texts(texts: Sequence[Tensor]) -> None:
    elements = sum(min(math.prod(tensor.shape), len(tensor.data) // LENGTH.size) for tensor in texts)
    if elements > MAX_ELEMENTS:
        found = f"the answer has {elements} BYTES elements, at most {MAX_ELEMENTS} are read at once"
        raise Refused(f"{found}; a smaller max_batch_size makes them fewer")
    for tensor in texts:
        _check_elements(tensor)


def _check_elements(tensor: Tensor) -> None:
    try:
        tensor.scanned()
    except ValueError as error:
        shape = list(tensor.shape)
        raise Malformed(f"output {tensor.name!r} does not hold the BYTES elements of shape {shape}: {error}") from error


def rows_of(tensor: Tensor, first: int, rows: int) -> Tensor:
    """Rows first .. first + rows - 1 of a checked output, whatever its datatype."""
    cut = tensor.variable_rows if tensor.datatype == BYTES else tensor.rows
    return Tensor(tensor.name, tensor.datatype, (rows, *tensor.shape[1:]), cut(first, rows))
