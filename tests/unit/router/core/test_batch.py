"""Partition, merge, split and the check of answers."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.batch import MAX_ELEMENTS, check, merge, partition, rows_of, split, split_around, wanted_outputs
from router.core.types import BatchKey, Tensor, TensorSpec
from router.errors import Blame, Malformed, Refused
from tests.builders import decode_texts, encode_texts, make_batch, make_block, make_key, values_of


def test_rows_are_grouped_by_key_in_the_order_in_which_they_came() -> None:
    assert partition([("x", 1), ("y", 2), ("x", 3)]) == {"x": [1, 3], "y": [2]}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_merging_cut_blocks_joins_exactly_their_rows(sizes: list[int], data: st.DataObject) -> None:
    key = make_key(dim=3)
    parts, expected = [], []
    for number, size in enumerate(sizes):
        part = make_block(*range(100 * number, 100 * number + size), key=key).whole()
        if size > 1:
            part = part.cut(data.draw(st.integers(1, size - 1)))[data.draw(st.integers(0, 1))]
        parts.append(part)
        expected += [100 * number + row for row in range(part.first, part.first + part.rows)]
    batch = make_batch(*parts)
    matrix = np.frombuffer(merge(batch)[0], "<f4").reshape(batch.rows, 3)
    assert matrix[:, 0].tolist() == matrix[:, 2].tolist() == expected
    assert [offset for _, offset in split(batch)] == np.cumsum([0, *(part.rows for part in parts[:-1])]).tolist()


def test_single_rows_are_cut_out_of_the_parts_around_them() -> None:
    batch = make_batch(*(make_block(*values).whole() for values in ([0, 1, 2], [3], [4, 5, 6, 7])))
    for rows in ([], [0], [1], [2], [3], [7], [0, 1, 2], [1, 3, 5], range(8)):
        cut = list(split_around(batch, set(rows)))
        assert values_of(tuple(part for part, _ in cut)) == list(range(8))
        assert all(values_of((part,))[0] == offset for part, offset in cut)
        assert {offset for part, offset in cut if offset in rows and part.rows == 1} == set(rows)
        assert len(cut) <= 3 + 2 * len(rows)


def test_a_single_whole_block_is_not_copied() -> None:
    block = make_block(1, 2)
    assert merge(make_batch(block.whole()))[0] is block.inputs[0]


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("output", "FP32", (3,), bytes(12)),
        Tensor("output", "FP64", (3, 2), bytes(48)),
        Tensor("output", "BOOL", (3, 1, 4), bytes(12)),
        Tensor("output", "FP32", (3, 0), b""),
        Tensor("output", "BYTES", (3,), struct.pack("<I1sI0sI2s", 1, b"a", 0, b"", 2, b"bc")),
    ],
)
def test_answers_that_hold_every_row_pass(tensor: Tensor) -> None:
    check((tensor,), 3)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ((), "without any output"),
        ((Tensor("o", "FP32", (2,), bytes(8)),), "shape [2] for a batch of 3 rows"),
        ((Tensor("o", "FP32", (4,), bytes(16)),), "batch of 3 rows; if the model takes no batches, set batching: off"),
        ((Tensor("o", "FP32", (), bytes(4)),), "shape [] for a batch of 3 rows"),
        ((Tensor("o", "FP32", (3,), bytes(8)),), "8 bytes, which is not FP32[3]"),
        ((Tensor("o", "FP32", (3, 2), bytes(12)),), "12 bytes, which is not FP32[3, 2]"),
        ((Tensor("o", "FP32", (3, -1), bytes(12)),), "datatype 'FP32', shape [3, -1]"),
        ((Tensor("o", "FLOAT", (3,), bytes(12)),), "datatype 'FLOAT'"),
        ((Tensor("o", "BYTES", (3,), struct.pack("<II", 0, 0)),), "does not hold the BYTES elements"),
        ((Tensor("o", "BYTES", (3,), struct.pack("<III", 0, 0, 9)),), "does not hold the BYTES elements"),
        ((Tensor("o", "BYTES", (3,), struct.pack("<IIII", 0, 0, 0, 0)),), "4 bytes follow the last of 3 elements"),
        ((Tensor("o", "BYTES", (3, -1), b""),), "datatype 'BYTES', shape [3, -1]"),
        ((Tensor("o", "BYTES", (3, 2**40), b""),), "0 bytes are too few"),
        ((Tensor("o", "FP32", (3,), bytes(12)), Tensor("p", "FP32", (1,), bytes(4))), "'p' has shape [1]"),
    ],
)
def test_answers_that_do_not_fit_are_malformed(outputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(Malformed) as malformed:
        check(outputs, 3)
    assert message in malformed.value.message


def test_texts_of_an_answer_are_bounded_over_all_outputs_before_any_is_scanned() -> None:
    def answer(*elements: int) -> tuple[Tensor, ...]:
        return tuple(Tensor("o", "BYTES", (2, number // 2), bytes(4 * number)) for number in elements)

    check(answer(MAX_ELEMENTS - 2, 2), 2)
    with pytest.raises(Refused) as refused:
        check(answer(MAX_ELEMENTS, 2), 2)
    assert refused.value.blame is Blame.UNCLEAR  # elsewhere, then with fewer rows
    assert f"{MAX_ELEMENTS + 2} BYTES elements, at most {MAX_ELEMENTS} are read" in refused.value.message


@pytest.mark.parametrize(
    ("wishes", "wanted"),
    [
        ([()], ()),
        ([("b", "a")], ("a", "b")),
        ([("b",), ("c", "b"), ("a",)], ("a", "b", "c")),
        ([("b",), (), ("a",)], ()),
    ],
)
def test_a_batch_wants_what_any_of_its_rows_want(wishes: list[tuple[str, ...]], wanted: tuple[str, ...]) -> None:
    blocks = [make_block(1) for _ in wishes]
    for block, outputs in zip(blocks, wishes, strict=True):
        block.outputs = outputs
    assert wanted_outputs(make_batch(*(block.whole() for block in blocks))) == wanted


def test_rows_of_an_output_are_a_slice() -> None:
    tensor = Tensor("output", "FP32", (3, 2), np.arange(6, dtype="<f4").tobytes())
    assert np.frombuffer(tensor.rows(1, 2), "<f4").tolist() == [2, 3, 4, 5]


def test_rows_of_texts_are_a_slice_of_one_scan() -> None:
    tensor = Tensor("label", "BYTES", (3, 2), encode_texts("a", "", "bb", "ü", "c", "dd"))
    assert tensor.scanned() is tensor.scanned()
    rows = rows_of(tensor, 1, 2)
    assert (rows.name, rows.datatype, rows.shape) == ("label", "BYTES", (2, 2))
    assert decode_texts(rows.data) == ["bb", "ü", "c", "dd"]
    assert decode_texts(rows_of(tensor, 0, 1).data) == ["a", ""]


def test_rows_of_numbers_keep_their_shape() -> None:
    tensor = Tensor("output", "INT16", (3, 2), np.arange(6, dtype="<i2").tobytes())
    assert rows_of(tensor, 2, 1) == Tensor("output", "INT16", (1, 2), np.array([4, 5], "<i2").tobytes())


def spec(dim: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec("vector", "FP32", (dim,)),)


@pytest.mark.parametrize(
    "other",
    [
        BatchKey("n", "", "a", spec(1)),
        BatchKey("m", "2", "a", spec(1)),
        BatchKey("m", "", "b", spec(1)),
        BatchKey("m", "", "a", spec(2)),
        BatchKey("m", "", "a", (TensorSpec("x", "FP32", (1,)),)),
        BatchKey("m", "", "a", (TensorSpec("vector", "FP64", (1,)),)),
        BatchKey("m", "", "a", spec(1), (("p", True),)),
    ],
)
def test_keys_that_differ_in_anything_are_different(other: BatchKey) -> None:
    key = BatchKey("m", "", "a", spec(1))
    assert key != other
    assert key == BatchKey("m", "", "a", spec(1))
    assert hash(key) == hash(BatchKey("m", "", "a", spec(1)))


def test_parameters_that_python_calls_equal_are_different_to_a_model() -> None:
    true, one, real = (BatchKey("m", "", "a", spec(1), (("p", value),)) for value in (True, 1, 1.0))
    assert len({true, one, real}) == 3
