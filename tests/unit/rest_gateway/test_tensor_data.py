"""The data of tensors in JSON, and what they are as bytes: every datatype, its bounds, and what is refused."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_gateway.schemas.tensor_data import MAX_TEXTS, TensorDataError, to_raw

NUMPY = {
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
INTEGERS = [name for name in NUMPY if "INT" in name]
FLOATS = {"FP16": 65_504.0, "FP32": 3.4028234663852886e38, "FP64": 1.7976931348623157e308}


def texts(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


@pytest.mark.parametrize("datatype", list(NUMPY))
def test_numbers_become_little_endian_bytes(datatype: str) -> None:
    assert to_raw([0, 1, 100], datatype, [3]) == np.array([0, 1, 100], NUMPY[datatype]).tobytes()


@pytest.mark.parametrize("datatype", INTEGERS)
def test_integers_may_be_the_least_and_the_greatest_and_no_more(datatype: str) -> None:
    bounds = np.iinfo(NUMPY[datatype])
    least, greatest = int(bounds.min), int(bounds.max)
    assert to_raw([least, greatest], datatype, [2]) == np.array([least, greatest], NUMPY[datatype]).tobytes()
    for beyond in (least - 1, greatest + 1, 10**40):
        with pytest.raises(TensorDataError, match=rf"^data\[1\] must be a whole number within {datatype}$"):
            to_raw([0, beyond], datatype, [2])


@pytest.mark.parametrize(
    ("datatype", "least_beyond"), [("FP16", 65_520.0), ("FP32", 3.4028235677973366e38), ("FP64", 2**1024 - 2**970)]
)
def test_a_float_may_be_beyond_the_greatest_where_it_rounds_to_it(datatype: str, least_beyond: float) -> None:
    below = np.nextafter(least_beyond, 0.0).item() if datatype != "FP64" else 2**1024 - 2**970 - 1
    assert to_raw([below], datatype, [1]) == np.array([FLOATS[datatype]], NUMPY[datatype]).tobytes()
    with pytest.raises(TensorDataError, match=rf"^data\[1\] is not finite as {datatype}$"):
        to_raw([below, least_beyond, below], datatype, [3])
    with pytest.raises(TensorDataError, match=rf"^data\[1\] is not finite as {datatype}$"):
        to_raw([-below, -least_beyond, -below, -below], datatype, [4])


@pytest.mark.parametrize("index", range(9))
@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [
        ("INT8", -128, -129),
        ("UINT64", 2**64 - 1, 2**64),
        ("INT32", 1, 1.0),
        ("FP32", 1, -float("inf")),
        ("FP64", 0.5, None),
        ("BYTES", "a", 1),
        ("BOOL", True, 1),
    ],
)
def test_a_wrong_element_is_found_wherever_it_stands(datatype: str, good: object, bad: object, index: int) -> None:
    data = [good] * 9
    data[index] = bad
    with pytest.raises(TensorDataError, match=rf"^data\[{index}\] "):
        to_raw(data, datatype, [9])


@pytest.mark.parametrize(("datatype", "greatest"), FLOATS.items())
def test_floats_may_be_the_greatest_and_no_more(datatype: str, greatest: float) -> None:
    assert to_raw([greatest, -greatest], datatype, [2]) == np.array([greatest, -greatest], NUMPY[datatype]).tobytes()
    for beyond in (greatest * 1.01, float("inf"), -float("inf"), 10**400):
        with pytest.raises(TensorDataError, match=rf"^data\[1\] is not finite as {datatype}$"):
            to_raw([0, beyond], datatype, [2])


def test_floats_are_rounded_to_the_nearest() -> None:
    values = [0.1, 1 / 3, 1e-45, 16_777_217]
    assert to_raw(values, "FP32", [4]) == np.array(values, "<f4").tobytes()
    assert to_raw([0.1, 2049], "FP16", [2]) == np.array([0.1, 2049], "<f2").tobytes()


def test_booleans_are_one_byte_each() -> None:
    assert to_raw([True, False, True], "BOOL", [3]) == b"\1\0\1"


def test_texts_stand_behind_their_lengths() -> None:
    assert to_raw(["", "abc", "für"], "BYTES", [3]) == texts(b"", b"abc", "für".encode())


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ([1, 2, 3, 4, 5, 6], [2, 3]),
        ([[1, 2, 3], [4, 5, 6]], [2, 3]),
        ([[[1], [2], [3]], [[4], [5], [6]]], [2, 3, 1]),
        ([[1, 2, 3, 4, 5, 6]], [1, 6]),
        ([[[1, 2, 3], [4, 5, 6]]], [2, 3]),  # Triton counts elements, too
    ],
)
def test_nested_and_flat_lists_are_the_same_tensor(data: list[Any], shape: list[int]) -> None:
    assert to_raw(data, "INT32", shape) == np.arange(1, 7, dtype="<i4").tobytes()
    assert to_raw([[str(value) for value in range(3)]], "BYTES", [1, 3]) == texts(b"0", b"1", b"2")


@pytest.mark.parametrize(("data", "shape"), [([], [0]), ([[], []], [2, 0]), ([7], [])])
def test_empty_and_scalar_tensors_have_their_own_number_of_elements(data: list[Any], shape: list[int]) -> None:
    assert len(to_raw(data, "INT8", shape)) == len(data) * (shape == [])


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "message"),
    [
        ([1, 2], "FP32", [3], "data has 2 elements, which is not FP32[3]"),
        ([1, 2], "FP32", [2**62, 2**62], "data has 2 elements, which is not FP32["),
        ([[1, 2], [3]], "FP32", [3], "data is ragged: lists of one depth differ in length"),
        ([[1, 2], 3], "FP32", [3], "data is ragged"),
        ([1, [2, 3]], "FP32", [2], "data[1] must be a number, not a list"),
        ({"a": 1}, "FP32", [1], "data must be a list, not an object"),
        ("abc", "BYTES", [1], "data must be a list, not a string"),
        ([1, True], "FP32", [2], "data[1] must be a number, not a boolean"),
        ([1, "2"], "FP64", [2], "data[1] must be a number, not a string"),
        ([None], "FP16", [1], "data[0] must be a number, not null"),
        ([1, 2.0], "INT32", [2], "data[1] must be a whole number within INT32"),
        ([1, True], "INT8", [2], "data[1] must be a whole number within INT8"),
        (["1"], "UINT8", [1], "data[0] must be a whole number within UINT8"),
        ([True, 1], "BOOL", [2], "data[1] must be true or false, not a number"),
        (["a", 1], "BYTES", [2], "data[1] must be a string, not a number"),
        (["\ud800"], "BYTES", [1], "data holds a lone surrogate"),
        ([1], "BF16", [1], "BF16 has no form in JSON; send it binary, with binary_data_size"),
        ([1], "FP8", [1], 'there is no datatype "FP8"'),
    ],
)
def test_what_is_no_such_tensor_is_told(data: object, datatype: str, shape: list[int], message: str) -> None:
    with pytest.raises(TensorDataError) as refused:
        to_raw(data, datatype, shape)
    assert str(refused.value).startswith(message)


def test_lists_may_be_nested_as_deep_as_numpy_nests_them() -> None:
    data: list[Any] = [1]
    for _ in range(63):
        data = [data]
    assert to_raw(data, "INT8", [1]) == b"\1"
    with pytest.raises(TensorDataError, match="nested more than 64 times"):
        to_raw([data], "INT8", [1])


def test_texts_may_be_as_many_as_the_router_takes() -> None:
    assert len(to_raw([""] * MAX_TEXTS, "BYTES", [MAX_TEXTS])) == 4 * MAX_TEXTS
    with pytest.raises(TensorDataError, match="131,073 BYTES elements, at most 131,072 are allowed"):
        to_raw([""] * (MAX_TEXTS + 1), "BYTES", [MAX_TEXTS + 1])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_every_float32_survives(values: list[float]) -> None:
    assert np.frombuffer(to_raw(values, "FP32", [len(values)]), "<f4").tolist() == values
