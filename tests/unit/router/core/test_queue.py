"""KeyQueue: order, cutting, requeueing, deadlines, bounds; first by example, then against a plain model."""

import gc
import math
import weakref

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from router.core.budget import Budget
from router.core.queue import Bounds, KeyQueue
from router.core.types import Block, Part
from router.errors import InvalidArgument, ResourceExhausted
from tests.builders import make_block, make_key, values_of


def make_queue(max_batch_rows: int = 4, max_rows: int = 100, max_bytes: int = 10_000) -> KeyQueue:
    return KeyQueue(Bounds(max_batch_rows, max_rows), row_bytes=4, budget=Budget(max_bytes))


def test_a_batch_takes_the_oldest_rows_first() -> None:
    queue = make_queue()
    queue.push(make_block(1, 2))
    queue.push(make_block(3))
    assert values_of(queue.pop_batch(0.0)) == [1, 2, 3]
    assert repr(queue) == "<KeyQueue 0 rows in 0 blocks>"


def test_a_full_batch_cuts_a_block_and_the_next_batch_begins_with_its_rest() -> None:
    queue = make_queue(max_batch_rows=4)
    queue.push(make_block(1, 2, 3))
    queue.push(make_block(4, 5, 6))
    assert values_of(queue.pop_batch(0.0)) == [1, 2, 3, 4]
    assert repr(queue) == "<KeyQueue 2 rows in 1 blocks>"
    queue.push(make_block(7, 8, 9))
    assert values_of(queue.pop_batch(0.0)) == [5, 6, 7, 8]
    assert values_of(queue.pop_batch(0.0)) == [9]
    assert queue.pop_batch(0.0) == ()


def test_a_block_larger_than_a_batch_is_spread_over_batches() -> None:
    queue = make_queue(max_batch_rows=8)
    queue.push(make_block(*range(20)))
    assert [len(values_of(queue.pop_batch(0.0))) for _ in range(3)] == [8, 8, 4]


@pytest.mark.parametrize(("rows", "is_full"), [(3, False), (4, True), (5, True)])
def test_full_means_a_whole_batch_waits(rows: int, is_full: bool) -> None:
    queue = make_queue(max_batch_rows=4)
    queue.push(make_block(*range(rows)))
    assert queue.is_full is is_full


def test_of_a_block_only_some_rows_may_be_kept_and_they_keep_their_place() -> None:
    queue = make_queue(max_batch_rows=8)
    block = make_block(1, 2, 3, 4, 5)
    queue.push(block)
    queue.push(make_block(6))
    queue.keep(block, [(1, 2), (4, 1)])
    assert repr(queue) == "<KeyQueue 4 rows in 2 blocks>"
    assert values_of(queue.pop_batch(0.0)) == [2, 3, 5, 6]
    queue.keep(block, [(0, 5)])
    assert repr(queue) == "<KeyQueue 0 rows in 0 blocks>"


def test_of_a_block_that_is_cut_what_waits_is_kept_with_its_attempts() -> None:
    budget = Budget(10_000)
    queue = KeyQueue(Bounds(2, 100), row_bytes=4, budget=budget)
    block = make_block(1, 2, 3, 4)
    queue.push(block)
    taken = queue.pop_batch(0.0)
    queue.requeue([part.tried() for part in taken])
    queue.keep(block, [(1, 2)])
    assert (budget.rows, budget.used_bytes) == (2, 8)
    assert [(part.first, part.rows, part.attempts) for part in queue.pop_batch(0.0)] == [(1, 1, 1), (2, 1, 0)]
    assert (budget.rows, budget.used_bytes) == (0, 0)


def test_a_deadline_that_has_become_later_counts_from_then_on() -> None:
    queue = make_queue()
    block = make_block(1, deadline=5.0)
    queue.push(block)
    block.deadline = 9.0
    assert queue.pop_expired(5.0) == []
    assert queue.wake_at == 9.0
    assert queue.pop_expired(9.0) == [block]


def test_requeued_rows_return_to_the_head_in_their_order() -> None:
    queue = make_queue(max_batch_rows=4)
    queue.push(make_block(1, 2, 3))
    queue.push(make_block(4, 5, 6))
    lost = queue.pop_batch(0.0)
    queue.push(make_block(7))
    queue.requeue([part.tried() for part in lost])
    again = queue.pop_batch(0.0)
    assert values_of(again) == [1, 2, 3, 4]
    assert [part.attempts for part in again] == [1, 1]
    assert values_of(queue.pop_batch(0.0)) == [5, 6, 7]


def test_batches_lost_out_of_order_still_go_back_by_age() -> None:
    queue = make_queue(max_batch_rows=1)
    for at in range(4):
        queue.push(make_block(at, at=at))
    first, second, third = queue.pop_batch(0.0), queue.pop_batch(0.0), queue.pop_batch(0.0)
    queue.requeue(second)
    queue.requeue(third)
    queue.requeue(first)
    assert [values_of(queue.pop_batch(0.0)) for _ in range(4)] == [[0], [1], [2], [3]]


def test_batches_lost_out_of_order_still_put_a_blocks_rows_in_order() -> None:
    queue = make_queue(max_batch_rows=2)
    queue.push(make_block(1, 2, 3, 4, 5))
    first, second = queue.pop_batch(0.0), queue.pop_batch(0.0)
    queue.requeue(second)
    queue.requeue(first)
    assert [values_of(queue.pop_batch(0.0)) for _ in range(3)] == [[1, 2], [3, 4], [5]]


def test_discarding_a_block_forgets_all_its_waiting_parts_and_no_others() -> None:
    queue = make_queue(max_batch_rows=2)
    block = make_block(1, 2, 3, 4, 5)
    queue.push(block)
    queue.push(make_block(6))
    queue.requeue(queue.pop_batch(0.0))
    assert queue.discard(block) == 5
    assert queue.discard(block) == 0
    assert values_of(queue.pop_batch(0.0)) == [6]


def test_a_block_expires_at_its_deadline_and_not_before() -> None:
    queue = make_queue()
    late, early = make_block(1, deadline=10.0), make_block(2, deadline=5.0)
    queue.push(late)
    queue.push(early)
    assert queue.wake_at == 5.0
    assert queue.pop_expired(math.nextafter(5.0, 0)) == []
    assert queue.pop_expired(5.0) == [early]
    assert queue.wake_at == 10.0
    assert values_of(queue.pop_batch(0.0)) == [1]
    assert queue.wake_at == math.inf


def test_requeued_rows_expire_too() -> None:
    queue = make_queue()
    block = make_block(1, deadline=5.0)
    queue.push(block)
    lost = queue.pop_batch(0.0)
    assert queue.wake_at == math.inf
    queue.requeue(lost)
    assert queue.wake_at == 5.0
    assert queue.pop_expired(6.0) == [block]


def test_rows_are_infeasible_from_the_moment_on_that_a_call_would_end_at_their_deadline() -> None:
    queue = make_queue()
    late, early = make_block(1, 2, deadline=10.0), make_block(3, 4, deadline=5.0)
    queue.push(late)
    queue.push(early)
    assert queue.pop_infeasible(math.nextafter(3.0, 0), 2.0) == []
    parts = queue.pop_infeasible(3.0, 2.0)
    assert [(part.block, part.first, part.rows) for part in parts] == [(early, 0, 2)]
    assert (queue.rows, queue.wake_at) == (2, 10.0)


def test_of_infeasible_rows_so_many_are_taken_as_asked_for_the_most_urgent_block_first_and_of_a_block_its_end() -> None:
    queue = make_queue()
    late, early = make_block(1, 2, 3, deadline=10.0), make_block(4, 5, deadline=5.0)
    queue.push(late)
    queue.push(early)
    assert queue.pop_infeasible(9.0, 2.0, most=0) == []
    parts = queue.pop_infeasible(9.0, 2.0, most=3)
    assert [(part.block, part.first, part.rows) for part in parts] == [(early, 0, 2), (late, 2, 1)]
    assert queue.wake_at == 10.0
    assert values_of(queue.pop_batch(0.0)) == [1, 2]


def test_infeasible_rows_of_a_block_that_came_back_in_pieces_are_found_in_all_of_them() -> None:
    queue = make_queue(max_batch_rows=2)
    block = make_block(1, 2, 3, 4, 5, deadline=5.0)
    queue.push(block)
    first, _, third = queue.pop_batch(0.0), queue.pop_batch(0.0), queue.pop_batch(0.0)
    queue.requeue(first)
    queue.requeue(third)
    parts = queue.pop_infeasible(4.0, 2.0)
    assert [(part.first, part.rows) for part in parts] == [(0, 2), (4, 1)]
    assert repr(queue) == "<KeyQueue 0 rows in 0 blocks>"


def test_the_bound_in_rows_refuses_one_row_past_it_and_takes_nothing() -> None:
    queue = make_queue(max_rows=5)
    queue.push(make_block(1, 2, 3))
    with pytest.raises(ResourceExhausted) as refused:
        queue.push(make_block(4, 5, 6))
    assert refused.value.reason == "queue_rows"
    queue.push(make_block(4, 5))
    assert queue.rows == 5


def test_rows_that_could_never_wait_are_the_callers_fault() -> None:
    with pytest.raises(InvalidArgument, match="6 rows at once; at most 5"):
        make_queue(max_rows=5).push(make_block(*range(6)))


def test_the_bound_in_bytes_is_shared_by_all_queues_and_freed_by_whoever_leaves() -> None:
    budget = Budget(max_bytes=16)
    one, two = (KeyQueue(Bounds(4, 100), row_bytes=4, budget=budget) for _ in range(2))
    waiting = make_block(1, 2, key=make_key(dim=1))
    one.push(waiting)
    two.push(make_block(3, 4))
    with pytest.raises(ResourceExhausted) as refused:
        two.push(make_block(5))
    assert refused.value.reason == "queue_bytes"
    one.discard(waiting)
    two.push(make_block(5))
    two.pop_batch(0.0)
    assert (budget.used_bytes, budget.rows) == (0, 0)


def test_requeueing_ignores_the_bounds_because_the_rows_were_accepted() -> None:
    queue = make_queue(max_rows=2)
    queue.push(make_block(1, 2))
    lost = queue.pop_batch(0.0)
    queue.push(make_block(3, 4))
    queue.requeue(lost)
    assert queue.rows == 4


def test_blocks_that_left_are_not_kept_by_their_deadlines() -> None:
    """Entries in the heap of deadlines once kept a gigabyte of rows that had been answered long ago."""
    queue = make_queue(max_rows=10_000)
    queue.push(make_block(0, deadline=1.0))
    alive: weakref.WeakSet[Block] = weakref.WeakSet()
    for number in range(50):
        block = make_block(number, deadline=600.0)
        alive.add(block)
        queue.push(block)
        queue.discard(block)
        del block
    gc.collect()
    assert len(alive) == 0
    assert queue.wake_at == 1.0


def test_a_block_over_the_processs_bytes_could_never_wait_and_is_the_callers_fault() -> None:
    with pytest.raises(InvalidArgument, match="24 bytes at once; at most 16 may wait in all"):
        make_queue(max_bytes=16).push(make_block(*range(6)))


class QueueAgainstModel(RuleBasedStateMachine):
    """Any sequence of events, against a list of (block, row) in the order in which they must leave."""

    batches: Bundle[tuple[Part, ...]] = Bundle("batches")

    @initialize(max_batch_rows=st.integers(1, 5))
    def start(self, max_batch_rows: int) -> None:
        self.max_batch_rows = max_batch_rows
        self.budget = Budget(4 * 60)
        self.queue = KeyQueue(Bounds(max_batch_rows, 40), row_bytes=4, budget=self.budget)
        self.model: list[tuple[Block, int]] = []
        self.now = 0.0

    @rule(rows=st.integers(1, 12), patience=st.integers(1, 20))
    def push(self, rows: int, patience: int) -> None:
        block = make_block(*range(rows), at=self.now, deadline=self.now + patience)
        if len(self.model) + rows > 40:
            with pytest.raises(ResourceExhausted):
                self.queue.push(block)
        else:
            self.queue.push(block)
            self.model += [(block, row) for row in range(rows)]

    @rule(target=batches)
    def pop(self) -> tuple[Part, ...]:
        parts = self.queue.pop_batch(0.0)
        taken = [(part.block, row) for part in parts for row in range(part.first, part.first + part.rows)]
        assert taken == self.model[: self.max_batch_rows]
        del self.model[: self.max_batch_rows]
        return parts

    @rule(parts=consumes(batches))
    def requeue(self, parts: tuple[Part, ...]) -> None:
        blocks = list(dict.fromkeys(part.block for part in parts))
        back = [(part.block, row) for part in parts for row in range(part.first, part.first + part.rows)]
        together = sorted(
            back + [entry for entry in self.model if entry[0] in blocks],
            key=lambda entry: (blocks.index(entry[0]), entry[1]),
        )
        self.model = together + [entry for entry in self.model if entry[0] not in blocks]
        self.model.sort(key=lambda entry: entry[0].arrived_at)
        self.queue.requeue(parts)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        if self.model:
            block = data.draw(st.sampled_from(list(dict.fromkeys(entry[0] for entry in self.model))))
            assert self.queue.discard(block) == sum(entry[0] is block for entry in self.model)
            self.model = [entry for entry in self.model if entry[0] is not block]

    @rule(seconds=st.integers(0, 8))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        expired = self.queue.pop_expired(self.now)
        assert set(expired) == {block for block, _ in self.model if block.deadline <= self.now}
        self.model = [entry for entry in self.model if entry[0].deadline > self.now]

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.rows == self.budget.rows == len(self.model)
            assert self.budget.used_bytes == 4 * len(self.model)
            assert self.queue.wake_at == min((block.deadline for block, _ in self.model), default=math.inf)


TestQueueAgainstModel = QueueAgainstModel.TestCase
TestQueueAgainstModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
