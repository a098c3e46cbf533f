"""Rows that differ in width: blocks, batches that close by bytes, bounds in real bytes."""

import functools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from router.core.batch import merge
from router.core.budget import Budget
from router.core.queue import Bounds, KeyQueue
from router.core.types import BatchKey, Part, TensorSpec
from router.core.variable import VariableBlock
from router.core.variable_queue import VariableQueue, make_queue
from router.errors import InvalidArgument, ResourceExhausted
from tests.builders import TEXT_KEY, make_batch, make_key, make_texts, texts_of


def make(max_batch_rows: int = 4, max_batch_bytes: int = 1000, max_bytes: int = 10_000) -> VariableQueue:
    budget = Budget(max_bytes)
    return VariableQueue(Bounds(max_batch_rows, 100, max_batch_bytes), budget=budget)


def test_a_key_gets_the_queue_that_fits_its_rows() -> None:
    make_one = functools.partial(make_queue, bounds=Bounds(64, 100, 16), budget=Budget(1000))
    assert isinstance(make_one(TEXT_KEY), VariableQueue)
    assert type(make_one(make_key(dim=4))) is KeyQueue


def test_a_batch_closes_at_its_rows() -> None:
    queue = make(max_batch_rows=3)
    queue.push(make_texts("a", "b"))
    queue.push(make_texts("c", "d"))
    assert texts_of(queue.pop_batch(0.0)) == ["a", "b", "c"]
    assert texts_of(queue.pop_batch(0.0)) == ["d"]


@pytest.mark.parametrize(("max_batch_bytes", "first"), [(19, ["aaaa"]), (20, ["aaaa", "bbbbbbbb"])])
def test_a_batch_closes_at_its_bytes_length_prefixes_included(max_batch_bytes: int, first: list[str]) -> None:
    queue = make(max_batch_bytes=max_batch_bytes)
    queue.push(make_texts("aaaa"))
    queue.push(make_texts("bbbbbbbb", "c"))
    assert texts_of(queue.pop_batch(0.0)) == first
    assert texts_of(queue.pop_batch(0.0)) == ["aaaa", "bbbbbbbb", "c"][len(first) :]


def test_a_block_is_cut_where_the_bytes_end_and_its_rest_leads_the_next_batch() -> None:
    queue = make(max_batch_rows=10, max_batch_bytes=30)
    queue.push(make_texts("1" * 10, "2" * 10, "3" * 20, "4"))
    assert [texts_of(queue.pop_batch(0.0)) for _ in range(3)] == [["1" * 10, "2" * 10], ["3" * 20, "4"], []]


def test_a_row_wider_than_a_batch_goes_alone() -> None:
    """It is refused on arrival; should one ever get here, it must not stay for ever."""
    queue = make(max_batch_bytes=10)
    queue.push(make_texts("a" * 50, "b"))
    assert texts_of(queue.pop_batch(0.0)) == ["a" * 50]
    assert texts_of(queue.pop_batch(0.0)) == ["b"]


@pytest.mark.parametrize(("texts", "is_full"), [("ab", False), ("abcd", True)])
def test_full_by_rows(texts: str, is_full: bool) -> None:
    queue = make(max_batch_rows=4)
    queue.push(make_texts(*texts))
    assert queue.is_full is is_full


@pytest.mark.parametrize(("width", "is_full"), [(15, False), (16, True)])
def test_full_by_bytes(width: int, is_full: bool) -> None:
    queue = make(max_batch_bytes=20)
    queue.push(make_texts("x" * width))
    assert queue.is_full is is_full


def test_bounds_count_real_bytes_and_whoever_leaves_frees_them() -> None:
    queue = make(max_bytes=40)
    with pytest.raises(InvalidArgument, match="41 bytes at once; at most 40 may wait in all"):
        queue.push(make_texts("x" * 37))
    waiting = make_texts("x" * 16, "")
    queue.push(waiting)
    assert queue.nbytes == 24
    with pytest.raises(ResourceExhausted) as refused:
        queue.push(make_texts("x" * 13))
    assert refused.value.reason == "queue_bytes"
    queue.discard(waiting)
    assert queue.nbytes == 0
    queue.push(make_texts("x" * 36))
    assert texts_of(queue.pop_batch(0.0)) == ["x" * 36]
    assert queue.nbytes == 0


def test_a_cut_block_that_is_discarded_gives_back_only_what_still_waited() -> None:
    queue = make(max_batch_rows=1)
    block = make_texts("long one", "x", "yy")
    queue.push(block)
    queue.pop_batch(0.0)
    assert queue.nbytes == 11
    assert queue.discard(block) == 2
    assert queue.nbytes == 0


def test_infeasible_texts_give_their_bytes_back() -> None:
    queue = make()
    queue.push(make_texts("a", "bb", "ccc", deadline=5.0))
    assert texts_of(tuple(queue.pop_infeasible(4.0, 1.0, most=2))) == ["bb", "ccc"]
    assert (queue.rows, queue.nbytes) == (1, 5)


@pytest.mark.parametrize(("width", "seats"), [(6, 4), (16, 2), (36, 1), (96, 1)])
def test_a_batch_has_as_many_seats_as_rows_of_the_common_width_fit(width: int, seats: int) -> None:
    queue = make(max_batch_rows=4, max_batch_bytes=40)
    queue.push(make_texts(*["x" * width] * 3))
    assert queue.seats == seats


def test_requeued_rows_keep_their_texts_and_count_their_attempts() -> None:
    queue = make(max_batch_rows=2)
    queue.push(make_texts("a", "bb", "ccc"))
    lost = queue.pop_batch(0.0)
    queue.requeue([part.tried() for part in lost])
    again = queue.pop_batch(0.0)
    assert (texts_of(again), again[0].attempts) == (["a", "bb"], 1)
    assert texts_of(queue.pop_batch(0.0)) == ["ccc"]


def test_texts_of_many_blocks_merge_to_one_tensor() -> None:
    first, second = make_texts("", "ü").whole(), make_texts("x", "yy", "z").whole()
    (merged,) = merge(make_batch(first, second.cut(2)[0]))
    assert merged == b"".join(make_texts("", "ü", "x", "yy").inputs)
    assert merge(make_batch(first))[0] is first.block.inputs[0]


def test_inputs_of_both_kinds_stand_side_by_side() -> None:
    specs = (TensorSpec("text", "BYTES", (2,)), TensorSpec("weight", "INT16", (3,)))
    key = BatchKey("m", "", "", specs)
    assert (key.row_bytes, key.is_variable) == (6, True)
    texts = make_texts("a", "bb", "ccc", "dddd")
    offsets = texts.offsets[0]
    assert offsets is not None
    block = VariableBlock(
        key, 0, 0, 2, (texts.inputs[0], bytes(range(12))), 6, 0.0, 9.0, texts.recipient, offsets=(offsets[::2], None)
    )
    head, rest = block.whole().cut(1)
    assert (head.nbytes, rest.nbytes) == (6 + 11, 6 + 15)
    assert merge(make_batch(rest)) == (make_texts("ccc", "dddd").inputs[0], bytes(range(6, 12)))


class QueueAgainstModel(RuleBasedStateMachine):
    """Any sequence of events, against a list of texts in the order in which they must leave."""

    batches: Bundle[tuple[Part, ...]] = Bundle("batches")

    @initialize(max_batch_rows=st.integers(1, 5), max_batch_bytes=st.integers(1, 60))
    def start(self, max_batch_rows: int, max_batch_bytes: int) -> None:
        self.max_batch_rows, self.max_batch_bytes = max_batch_rows, max_batch_bytes
        self.queue = make(max_batch_rows, max_batch_bytes)
        self.model: list[tuple[VariableBlock, int, int]] = []

    @rule(widths=st.lists(st.integers(0, 30), min_size=1, max_size=8))
    def push(self, widths: list[int]) -> None:
        if len(self.model) + len(widths) <= 100:
            block = make_texts(*["x" * width for width in widths])
            self.queue.push(block)
            self.model += [(block, row, 4 + width) for row, width in enumerate(widths)]

    @rule(target=batches)
    def pop(self) -> tuple[Part, ...]:
        parts = self.queue.pop_batch(0.0)
        taken = [(part.block, row) for part in parts for row in range(part.first, part.first + part.rows)]
        rows, room = 0, self.max_batch_bytes
        for _, _, width in self.model[: self.max_batch_rows]:
            if rows and width > room:
                break
            rows, room = rows + 1, room - width
        assert taken == [(block, row) for block, row, _ in self.model[:rows]]
        del self.model[:rows]
        return parts

    @rule(parts=consumes(batches))
    def requeue(self, parts: tuple[Part, ...]) -> None:
        blocks = list(dict.fromkeys(part.block for part in parts))
        back = []
        for part in parts:
            assert isinstance(part.block, VariableBlock)
            rows = range(part.first, part.first + part.rows)
            back += [(part.block, row, part.block.count_bytes(row, 1)) for row in rows]
        together = sorted(
            back + [entry for entry in self.model if entry[0] in blocks],
            key=lambda entry: (blocks.index(entry[0]), entry[1]),
        )
        self.model = together + [entry for entry in self.model if entry[0] not in blocks]
        self.queue.requeue(parts)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        if self.model:
            block = data.draw(st.sampled_from(list(dict.fromkeys(entry[0] for entry in self.model))))
            assert self.queue.discard(block) == sum(entry[0] is block for entry in self.model)
            self.model = [entry for entry in self.model if entry[0] is not block]

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.rows == len(self.model)
            assert self.queue.nbytes == sum(width for _, _, width in self.model)


TestQueueAgainstModel = QueueAgainstModel.TestCase
TestQueueAgainstModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
