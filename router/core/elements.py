"""Elements of BYTES tensors: each is a 4-byte little-endian length and that many bytes, one behind the other.

Where an element begins is known only once all before it are passed, so a tensor is scanned once, from its beginning;
after that every row of it is a slice. A step takes 0.1-0.2 µs.
"""

import struct
from array import array
from typing import TypeAlias

LENGTH = struct.Struct("<I")

Offsets: TypeAlias = "array[int]"
"""Where each row begins, and the end of the last: rows + 1 numbers."""


def scan(data: bytes, rows: int, per_row: int) -> Offsets:
    """The offsets of `rows` rows of `per_row` elements each.

    Raises:
        ValueError: `data` does not hold exactly these elements; the text tells where it goes wrong.
    """
    elements = rows * per_row
    if len(data) < elements * LENGTH.size:  # before anything is done for each of them: a shape costs nothing to write
        raise ValueError(f"{len(data)} bytes are too few for {elements} elements")
    ends = _ends(data, elements)
    if ends[-1] != len(data):
        raise ValueError(f"{len(data) - ends[-1]} bytes follow the last of {elements} elements")
    return ends[::per_row] if per_row else array("Q", bytes(8 * (rows + 1)))


def _ends(data: bytes, elements: int) -> Offsets:
    """0 and the end of each element, all within the data."""
    ends = array("Q", [0])
    position = 0
    unpack, append = LENGTH.unpack_from, ends.append
    try:
        for _ in range(elements):
            position += LENGTH.size + unpack(data, position)[0]
            append(position)
    except struct.error:  # the length itself is cut off, or the element before it was
        pass
    if position > len(data) or len(ends) <= elements:
        raise ValueError(f"element {len(ends) - 1 - (position > len(data))} is cut off")
    return ends
