"""Where the elements of a BYTES tensor lie, and every way in which they cannot."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.elements import scan


def encode(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


@given(st.lists(st.lists(st.binary(max_size=9), min_size=3, max_size=3), max_size=9))
def test_each_row_is_found_where_it_was_written(rows: list[list[bytes]]) -> None:
    data = encode(*[element for row in rows for element in row])
    offsets = scan(data, len(rows), 3)
    assert [data[begin:end] for begin, end in itertools.pairwise(offsets)] == [encode(*row) for row in rows]


def test_rows_without_elements_are_empty() -> None:
    assert list(scan(b"", 3, 0)) == [0, 0, 0, 0]
    assert list(scan(b"", 0, 4)) == [0]


@pytest.mark.parametrize(
    ("data", "rows", "message"),
    [
        (b"", 1, "0 bytes are too few for 1 elements"),
        (encode(b"a"), 2, "5 bytes are too few for 2 elements"),
        (encode(b"abcd", b"ef")[:-1], 2, "element 1 is cut off"),
        (encode(b"abcd", b"ef")[:-3], 2, "element 1 is cut off"),
        (encode(b"abcdefg") + b"\0\0\0", 2, "element 1 is cut off"),
        (encode(b"abcdefg"), 2, "element 1 is cut off"),
        (struct.pack("<I", 0xFFFFFFFF) + bytes(20), 2, "element 0 is cut off"),
        (struct.pack("<II", 0, 0xFFFFFFFF), 2, "element 1 is cut off"),
        (encode(b"a", b"b"), 1, "5 bytes follow the last of 1 elements"),
        (b"x", 0, "1 bytes follow the last of 0 elements"),
        (b"", 2**62, "0 bytes are too few"),
    ],
)
def test_bytes_that_are_other_elements_are_told(data: bytes, rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan(data, rows, 1)
