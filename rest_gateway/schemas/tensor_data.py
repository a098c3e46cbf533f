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
# The least numbers that round to infinity: half a step above the greatest that is finite.
_BEYOND = {"FP16": 2**16 - 2**4, "FP32": 2**128 - 2**103, "FP64": 2**1024 - 2**970}
_RANGES = {
    name: (-(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1) if name.startswith("INT") else (0, 2 ** (8 * size) - 1)
    for name, code in _CODES.items()
    if name not in _FLOATS
    for size in [struct.calcsize(f"<{code}")]
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
        index = _first_wrong(elements, lambda part: types.issuperset(map(type, part)))
        raise TensorDataError(f"data[{index}] must be {wanted}, not {json_text.kind_of(elements[index])}")


def _first_wrong(elements: list[Any], are_right: Callable[[list[Any]], bool]) -> int:
    """Where the first wrong element stands, if there is one; by halves: one by one, millions would take seconds."""
    first, end = 0, len(elements)
    while end - first > 1:
        middle = (first + end) // 2
        if are_right(elements[first:middle]):
            first = middle
        else:
            end = middle
    return first


def _pack_floats(elements: list[Any], datatype: str) -> bytes:
    _check_types(elements, _NUMBER, "a number")
    try:
        raw = _packer(_CODES[datatype], len(elements))(*elements)
        is_finite = bool(np.isfinite(np.frombuffer(raw, _FLOATS[datatype])).all())  # 1e400 is read as infinity
    except (OverflowError, struct.error):  # the latter for an int that no double holds
        is_finite = False
    if not is_finite:
        beyond = _BEYOND[datatype]
        index = _first_wrong(elements, lambda part: -beyond < min(part) and max(part) < beyond)
        raise TensorDataError(f"data[{index}] is not finite as {datatype}")
    return raw


def _pack_integers(elements: list[Any], datatype: str) -> bytes:
    try:
        if _INTEGER.issuperset(map(type, elements)):
            return _packer(_CODES[datatype], len(elements))(*elements)
    except struct.error:
        pass
    least, greatest = _RANGES[datatype]
    index = _first_wrong(
        elements,
        lambda part: _INTEGER.issuperset(map(type, part)) and least <= min(part) and max(part) <= greatest,
    )
    raise TensorDataError(f"data[{index}] must be a whole number within {datatype}")


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
