"""The `data` of a tensor in JSON, nested or flat, to its raw bytes: little-endian, row-major. Pure.

Types are looked at before anything is converted: numpy would take "1" and true for numbers and 1.5 for an integer. All
of it runs at C speed, since a body may hold millions of numbers: about 50 ns each.
"""

import struct
from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any

import numpy as np

from rest_gateway.schemas import json_text

# As deep as numpy nests, on the other side of the wire.
MAX_DIMENSIONS = 64
# What the router takes of BYTES elements in one request.
MAX_TEXTS = 131_072

_LENGTH = struct.Struct("<I")
# How `struct` calls the elements. Its packing refuses what is out of range, infinity made of a finite number included.
_CODES = {
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
_FLOATS: dict[str, np.dtype[np.floating[Any]]] = {
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_INTEGER, _NUMBER = frozenset({int}), frozenset({int, float})


class TensorDataError(ValueError):
    """The data are not those of such a tensor; the text says why."""


def to_raw(data: object, datatype: str, shape: list[int]) -> bytes:
    """The bytes of a tensor. Raises TensorDataError."""
    elements = _flatten(data)
    if len(elements) != prod(shape):
        raise TensorDataError(f"data has {len(elements):,} elements, which is not {datatype}{shape}")
    if datatype == "BOOL":
        _check_types(elements, frozenset({bool}), "true or false")
        return bytes(elements)
    if datatype == "BYTES":
        return _pack_texts(elements)
    if datatype in _FLOATS:
        return _pack_floats(elements, datatype)
    if datatype in _CODES:
        return _pack_integers(elements, datatype)
    if datatype == "BF16":
        raise TensorDataError("BF16 has no form in JSON; send it binary, with binary_data_size")
    raise TensorDataError(f"there is no datatype {json_text.quote(datatype)}")


def _flatten(data: object) -> list[Any]:
    """The elements in row-major order. Lists of one depth must be equally long; elements may still be anything."""
    if not isinstance(data, list):
        raise TensorDataError(f"data must be a list, not {json_text.kind_of(data)}")
    level = data
    for _ in range(MAX_DIMENSIONS):
        if not level or type(level[0]) is not list:
            return level
        if set(map(type, level)) != {list} or len(set(map(len, level))) != 1:
            raise TensorDataError("data is ragged: lists of one depth differ in length")
        level = list(chain.from_iterable(level))
    raise TensorDataError(f"data is nested more than {MAX_DIMENSIONS} times")


def _check_types(elements: list[Any], types: frozenset[type], wanted: str) -> None:
    if not types.issuperset(map(type, elements)):
        index = next(index for index, value in enumerate(elements) if type(value) not in types)
        raise TensorDataError(f"data[{index}] must be {wanted}, not {json_text.kind_of(elements[index])}")


def _pack_floats(elements: list[Any], datatype: str) -> bytes:
    _check_types(elements, _NUMBER, "a number")
    try:
        raw = _packer(_CODES[datatype], len(elements))(*elements)
    except OverflowError:
        raise _not_finite(elements, datatype) from None
    if not np.isfinite(np.frombuffer(raw, _FLOATS[datatype])).all():  # 1e400 is read as infinity, which packs
        raise _not_finite(elements, datatype)
    return raw


def _pack_integers(elements: list[Any], datatype: str) -> bytes:
    try:
        _check_types(elements, _INTEGER, "")
        return _packer(_CODES[datatype], len(elements))(*elements)
    except (struct.error, TensorDataError):
        index = next(index for index, value in enumerate(elements) if not _fits(value, datatype))
        raise TensorDataError(f"data[{index}] must be a whole number within {datatype}") from None


def _fits(value: object, datatype: str) -> bool:
    if type(value) is not int:
        return False
    try:
        _packer(_CODES[datatype], 1)(value)
    except struct.error:
        return False
    return True


def _not_finite(elements: list[float], datatype: str) -> TensorDataError:
    index = next(index for index, value in enumerate(elements) if not _is_finite(value, datatype))
    return TensorDataError(f"data[{index}] is not finite as {datatype}")


def _is_finite(value: float, datatype: str) -> bool:
    try:
        return bool(np.isfinite(np.frombuffer(_packer(_CODES[datatype], 1)(value), _FLOATS[datatype])[0]))
    except OverflowError:
        return False


@lru_cache(maxsize=1024)
def _packer(code: str, elements: int) -> Callable[..., bytes]:
    return struct.Struct(f"<{elements}{code}").pack


def _pack_texts(elements: list[Any]) -> bytes:
    """Each as UTF-8 behind its length."""
    if len(elements) > MAX_TEXTS:
        raise TensorDataError(f"{len(elements):,} BYTES elements, at most {MAX_TEXTS:,} are allowed in one request")
    _check_types(elements, frozenset({str}), "a string")
    try:
        texts = [text.encode() for text in elements]
    except UnicodeEncodeError:
        raise TensorDataError("data holds a lone surrogate, which UTF-8 has no form for") from None
    return b"".join([part for text in texts for part in (_LENGTH.pack(len(text)), text)])
