"""Typed contents: a tensor's elements as numbers and texts of a message, and the raw bytes they stand for.

The slow form of a tensor: it costs 0.1 µs for each number and 0.5 µs for each text, where raw bytes cost nothing. So it
is bounded (`MAX_TYPED`), or one message would hold everybody up.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from router.core.elements import LENGTH
from router.core.types import BYTES

# Elements of one message.
MAX_TYPED = 1_048_576
MAX_TYPED_TEXTS = 131_072

# Where typed contents keep a datatype's elements, and its form as raw bytes. What is missing travels raw only.
FIELDS = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    BYTES: ("bytes_contents", ""),
}
_NARROW = frozenset({"INT8", "INT16", "UINT8", "UINT16"})


def to_raw(datatype: str, elements: Sequence[Any]) -> bytes:
    """The raw bytes of elements of a datatype in FIELDS. Raises ValueError when one does not fit it."""
    if datatype == BYTES:
        return b"".join([part for element in elements for part in (LENGTH.pack(len(element)), element)])
    form = np.dtype(FIELDS[datatype][1])
    if datatype in _NARROW:
        return _narrowed(elements, datatype, form)
    return np.fromiter(elements, form, len(elements)).tobytes()


def _narrowed(elements: Sequence[int], datatype: str, form: np.dtype[Any]) -> bytes:
    """Typed contents know no integers below 32 bits."""
    wide = np.fromiter(elements, np.int64, len(elements))
    narrow = wide.astype(form)
    if (wrong := np.flatnonzero(narrow != wide)).size:
        raise ValueError(f"{wide[wrong[0]]} is no {datatype}")
    return narrow.tobytes()
