"""The tensors that a job sends to a model, and their answers."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tensor:
    """Raw little-endian data; BYTES: length-prefixed elements."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class InferError(Exception):
    """A call failed; `code` is a canonical name."""

    def __init__(self, code: str, message: str, retry_pushback_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_pushback_ms = retry_pushback_ms


def bytes_tensor(name: str, values: Sequence[bytes]) -> Tensor:
    """One BYTES tensor of shape (n,)."""
    data = b"".join([struct.pack("<I", len(value)) + value for value in values])
    return Tensor(name, "BYTES", (len(values),), data)


def read_bytes(tensor: Tensor) -> list[bytes]:
    """The elements of a BYTES tensor. Raises ValueError for data that is none."""
    values, start, end = [], 0, len(tensor.data)
    while start < end:
        if end - start < 4:
            raise ValueError("a length is cut off")
        (length,) = struct.unpack_from("<I", tensor.data, start)
        start += 4
        if end - start < length:
            raise ValueError("an element is cut off")
        values.append(tensor.data[start : start + length])
        start += length
    return values
