"""Classification: an output's highest values with their places, as Triton tells them for an output's `classification`.

Each becomes a BYTES element `value:index`, the highest first, of equal ones the first. (Triton adds a label where the
model's configuration has labels; nobody tells us those.)
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from router.core.elements import LENGTH
from router.core.types import BYTES, NUMPY_TYPES, Tensor
from router.errors import InvalidArgument

# Elements told in one output: each is a text, and the others wait meanwhile.
MAX_CLASSES = 131_072
# Elements looked at for that, 0.02 µs each.
MAX_VALUES = 4_194_304

# Triton classifies neither.
_TYPES = {name: numpy_type for name, numpy_type in NUMPY_TYPES.items() if name not in ("BOOL", "FP16")}


def classify(tensor: Tensor, classes: int, *, is_batched: bool) -> Tensor:
    """(rows, …) to (rows, classes) BYTES, fewer where a row has fewer elements; `is_batched`: for the error's text.

    Raises InvalidArgument for a datatype that Triton does not classify either, and when it would take too long.
    """
    if tensor.datatype not in _TYPES:
        shape = list(tensor.shape if is_batched else tensor.shape[1:])
        raise InvalidArgument(f"output {tensor.name!r}, {tensor.datatype}{shape}, cannot be told as classes")
    rows, elements = tensor.shape[0], math.prod(tensor.shape[1:])
    most = min(classes, elements)
    if rows * most > MAX_CLASSES:
        raise InvalidArgument(f"output {tensor.name!r}: {rows * most} classes, at most {MAX_CLASSES} are told at once")
    if rows * elements > MAX_VALUES:
        what = f"classes of {rows * elements} elements, of at most {MAX_VALUES} they are told at once"
        raise InvalidArgument(f"output {tensor.name!r}: {what}")
    values = np.frombuffer(tensor.data, _TYPES[tensor.datatype]).reshape(rows, elements)
    places = _highest(values, most)
    pattern = "{:f}:{}" if tensor.datatype.startswith("FP") else "{}:{}"
    chosen = np.take_along_axis(values, places, axis=1)
    texts = [
        pattern.format(*pair).encode() for pair in zip(chosen.ravel().tolist(), places.ravel().tolist(), strict=True)
    ]
    return Tensor(tensor.name, BYTES, (rows, most), b"".join([LENGTH.pack(len(text)) + text for text in texts]))


def _highest(values: npt.NDArray[Any], most: int) -> npt.NDArray[np.intp]:
    """The places of each row's highest values. Only these are sorted: to sort all would take twenty times as long."""
    rows, elements = values.shape
    if values.dtype.kind == "f":  # a NaN has no place in any order
        values = np.where(np.isnan(values), np.inf, values)
    if not most or most == elements:
        return _sorted_places(values)[:, :most]
    least = np.partition(values, elements - most, axis=1)[:, elements - most, np.newaxis]
    is_chosen, is_least = values > least, values == least
    room = most - np.count_nonzero(is_chosen, axis=1, keepdims=True)
    is_chosen |= is_least & (np.cumsum(is_least, axis=1, dtype=np.int32) <= room)
    chosen = np.nonzero(is_chosen)[1].reshape(rows, most)
    return np.take_along_axis(chosen, _sorted_places(np.take_along_axis(values, chosen, axis=1)), axis=1)


def _sorted_places(values: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Backwards and stable: so of equal ones the first comes first, whatever the type (a negated 0 of UINT8 is 0)."""
    places: npt.NDArray[np.intp] = values.shape[1] - 1 - np.argsort(values[:, ::-1], axis=1, kind="stable")[:, ::-1]
    return places
