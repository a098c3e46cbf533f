"""How bad rows are found: calls, order, what leaves while it waits, and the books."""

import gc
import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.budget import Budget
from router.core.isolation import Group, Isolation, Piece, Ruling
from router.core.piece_lane import PieceLane
from router.core.retry import Chances, Failure, Verdict, judge
from router.core.types import Block, Part
from router.errors import BackendError, Blame, InvalidArgument, Refused, ResourceExhausted, StreamLost
from tests.builders import Listener, make_block, make_texts, values_of

REFUSED = Refused("bad row")


class Bench:
    """Isolation, lane and judge in the hands of a model that refuses certain values; counts its calls."""

    def __init__(self, refuses: Callable[[list[float]], bool], *, slots: int = 1, has_other: bool = False) -> None:
        self.budget = Budget(1 << 40)
        self.isolation = Isolation(self.budget)
        self.lane: PieceLane[None] = PieceLane()
        self.calls: list[list[float]] = []
        self.answered: list[float] = []
        self.failed: list[float] = []
        self.in_flight: list[tuple[Piece | None, tuple[Part, ...]]] = []
        self._refuses = refuses
        self._slots = slots
        self._has_other = has_other

    def run(self, *blocks: Block) -> None:
        self.send(None, tuple(block.whole() for block in blocks))
        while self.in_flight:
            self.come_back(*self.in_flight.pop(0))
            self.fill_slots()
        assert len(self.lane) == self.isolation.rows == self.budget.rows == self.budget.used_bytes == 0
        assert self.isolation.wake_at == math.inf

    def fill_slots(self) -> None:
        while len(self.in_flight) < self._slots and (errand := next(self.lane.next(may_split=True), None)):
            self.lane.leave(errand[0])
            self.send(errand[0], self.isolation.take(errand[0]))

    def send(self, piece: Piece | None, parts: tuple[Part, ...]) -> None:
        self.calls.append(values_of(parts))
        self.in_flight.append((piece, parts))

    def come_back(self, piece: Piece | None, parts: tuple[Part, ...]) -> None:
        if self._refuses(values_of(parts)):
            self.fail(piece, parts, REFUSED)
            return
        self.answered += values_of(parts)
        if piece:
            self.carry_out(self.isolation.answered(piece, self._slots))

    def fail(self, piece: Piece | None, parts: tuple[Part, ...], error: BackendError) -> tuple[Part, ...]:
        failure = Failure(parts, error, bool(piece and piece.is_split), bool(piece and piece.avoid))
        verdict = judge(failure, Chances(2, self._has_other, lambda _rows: True))
        rows = sum(part.rows for part in parts)
        ruling = self.isolation.failed(piece, verdict, formed_at=0.0, sent_rows=rows, replica="r", slots=self._slots)
        self.failed += values_of(verdict.failed)
        self.carry_out(ruling)
        return ruling.requeue

    def carry_out(self, ruling: Ruling) -> None:
        for piece in ruling.leave:
            self.lane.leave(piece)
        for piece in ruling.enter:
            self.lane.enter(piece, None)


def poison(*bad: float) -> Callable[[list[float]], bool]:
    return lambda values: bool(set(bad) & set(values))


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("has_other", [False, True])
@pytest.mark.parametrize(("rows", "extra"), [(1, 1), (2, 3), (8, 9), (64, 17)])
def test_one_bad_row_costs_so_many_calls_at_most_and_only_itself(
    rows: int, extra: int, *, has_other: bool, slots: int
) -> None:
    most = 0
    for bad in range(rows):
        bench = Bench(poison(bad), slots=slots, has_other=has_other)
        bench.run(make_block(*range(rows)))
        assert bench.failed == [bad]
        assert sorted(bench.answered) == [row for row in range(rows) if row != bad]
        most = max(most, len(bench.calls) - 1)
    assert most <= extra


@pytest.mark.parametrize(("rows", "slots", "most"), [(64, 1, 12), (64, 3, 12), (64, 4, 16), (8, 1, 6), (8, 4, 8)])
def test_the_worst_place_of_one_bad_row_costs_exactly(rows: int, slots: int, most: int) -> None:
    def calls(bad: int) -> int:
        bench = Bench(poison(bad), slots=slots)
        bench.run(make_block(*range(rows)))
        return len(bench.calls) - 1

    assert max(calls(bad) for bad in range(rows)) == most


def test_the_half_that_must_hold_the_bad_row_is_cut_without_being_sent() -> None:
    bench = Bench(poison(7))
    bench.run(make_block(*range(8)))
    assert bench.calls == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3], [4, 5], [6], [7]]


def test_pieces_and_groups_are_free_when_they_are_done_without_a_search_for_cycles() -> None:
    gc.collect()
    gc.disable()
    try:
        for slots in (1, 4):
            Bench(poison(7, 12), slots=slots).run(make_block(*range(16)))
        assert not [one for one in gc.get_objects() if isinstance(one, Piece | Group)]
    finally:
        gc.enable()


def test_after_a_bad_half_the_other_is_sent_for_it_may_be_bad_too() -> None:
    bench = Bench(poison(0, 6))
    bench.run(make_block(*range(8)))
    assert sorted(bench.failed) == [0, 6]
    assert [4, 5, 6, 7] in bench.calls


def test_the_largest_pieces_go_first() -> None:
    bench = Bench(poison(0))
    bench.run(make_block(*range(8)))
    assert [len(call) for call in bench.calls] == [8, 4, 4, 2, 2, 1, 1]


def test_eighths_differ_by_one_row_at_most() -> None:
    bench = Bench(poison(0), slots=4)
    bench.run(make_block(*range(12)))
    assert sorted(len(call) for call in bench.calls[1:9]) == [1, 1, 1, 1, 2, 2, 2, 2]


def test_a_model_that_refuses_without_a_reason_costs_no_row_its_answer() -> None:
    """The last row of a group is known to be bad only if the model means what it says."""
    refusals = itertools.chain([True], itertools.repeat(False))
    bench = Bench(lambda _values: next(refusals))
    bench.run(make_block(*range(8)))
    assert sorted(bench.answered) == list(range(8))
    assert bench.failed == []


def test_if_all_rows_are_bad_each_fails_once() -> None:
    for slots in (1, 4):
        bench = Bench(lambda _values: True, slots=slots)
        bench.run(make_block(*range(16)))
        assert sorted(bench.failed) == list(range(16))
        assert len(bench.calls) <= 31


def test_rows_of_several_blocks_and_texts_are_cut_where_they_are() -> None:
    bench = Bench(poison(3))
    bench.run(make_block(0, 1), make_block(2, 3, 4), make_block(5))
    assert (sorted(bench.answered), bench.failed) == ([0, 1, 2, 4, 5], [3])
    isolation = Isolation(budget := Budget(1 << 40))
    text = make_texts("a", "bb", "ccc").whole()
    ruling = isolation.failed(None, Verdict(split=(text,)), formed_at=0, sent_rows=3, replica="r", slots=1)
    assert [piece.rows for piece in ruling.enter] == [2, 1]
    assert (budget.rows, budget.used_bytes) == (3, text.nbytes)


@given(st.sets(st.integers(0, 40), max_size=41), st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 6))
def test_any_bad_rows_fail_once_each_and_all_others_are_answered(bad: set[int], sizes: list[int], slots: int) -> None:
    begins = [0, *itertools.accumulate(sizes)]
    bench = Bench(poison(*bad), slots=slots)
    bench.run(*(make_block(*range(begin, begin + size)) for begin, size in zip(begins, sizes, strict=False)))
    rows = set(range(sum(sizes)))
    assert sorted(bench.failed) == sorted(rows & bad)
    assert sorted(bench.answered) == sorted(rows - bad)
    assert len(bench.calls) - 1 <= max(1, len(rows & bad)) * 17


# -- while pieces wait -----------------------------------------------------------------------------------------------


def split_of(isolation: Isolation, *blocks: Block, slots: int = 1) -> list[Piece]:
    parts = tuple(block.whole() for block in blocks)
    rows = sum(part.rows for part in parts)
    verdict = Verdict(split=parts)
    return isolation.failed(None, verdict, formed_at=0.0, sent_rows=rows, replica="r", slots=slots).enter


def test_a_block_that_is_discarded_leaves_its_pieces_and_the_books_at_once() -> None:
    isolation = Isolation(budget := Budget(1 << 40))
    first, second = make_block(0), make_block(1, 2, 3)
    left, right = split_of(isolation, first, second)
    assert (isolation.rows, budget.rows, budget.used_bytes) == (4, 4, 16)
    assert isolation.discard(second) == [right]
    assert (isolation.rows, budget.rows, budget.used_bytes) == (1, 1, 4)
    assert values_of(isolation.take(left)) == [0]
    assert isolation.discard(first) == []
    assert (isolation.rows, budget.rows) == (0, 0)


def test_pieces_are_counted_anew_when_tenants_get_bounds() -> None:
    isolation = Isolation(budget := Budget(1 << 40))
    block = make_block(0, 1, 2, 3)
    split_of(isolation, block)
    budget.set_bounds(1 << 40, max_rows=None, max_tenant_rows=4, max_tenant_bytes=None)
    isolation.recount()
    refusal = budget.refusal(block.tenant, 1, 4)
    assert isinstance(refusal, ResourceExhausted)
    assert refusal.reason == "tenant_rows"
    isolation.discard(block)
    assert budget.refusal(block.tenant, 4, 16) is None


def test_nothing_is_concluded_from_a_good_piece_when_rows_have_left() -> None:
    """The rows that left may have been the bad ones: the others must not be cut to pieces for nothing."""
    isolation = Isolation(Budget(1 << 40))
    first, second, third = make_block(0), make_block(1), make_block(2, 3)
    left, right = split_of(isolation, first, second, third)
    isolation.discard(second)
    isolation.take(left)
    ruling = isolation.answered(left, 1)
    assert (ruling.enter, ruling.leave) == ([], [])
    assert right.rows == 2


def test_nothing_is_concluded_from_good_pieces_when_a_bad_one_was_found() -> None:
    isolation = Isolation(Budget(1 << 40))
    first, *others = split_of(isolation, make_block(*range(16)), slots=4)
    isolation.failed(first, Verdict(failed=isolation.take(first)), formed_at=0.0, sent_rows=2, replica="r", slots=4)
    for piece in others[:-1]:
        isolation.take(piece)
        assert isolation.answered(piece, 4) == Ruling()
    assert others[-1].rows == 2


def test_deadlines_are_seen_one_step_before_and_one_step_on() -> None:
    isolation = Isolation(Budget(1 << 40))
    early, late = make_block(0, deadline=5.0), make_block(1, deadline=7.0)
    split_of(isolation, late, early)
    assert isolation.wake_at == 5.0
    assert isolation.expired(4.999) == []
    assert isolation.expired(5.0) == [early]
    isolation.discard(early)
    assert isolation.wake_at == 7.0
    assert isolation.expired(7.0) == [late]


def test_a_piece_that_is_lost_keeps_its_rows_and_goes_behind_its_like() -> None:
    bench = Bench(poison(7))
    bench.send(None, (make_block(*range(8)).whole(),))
    bench.come_back(*bench.in_flight.pop())
    bench.fill_slots()
    piece, parts = bench.in_flight.pop()
    assert bench.fail(piece, parts, StreamLost("gone")) == ()
    for _ in range(2):
        bench.fill_slots()
        bench.come_back(*bench.in_flight.pop())
    assert bench.calls[1:] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert bench.answered == [0, 1, 2, 3]


def test_rows_that_were_lost_twice_travel_alone() -> None:
    bench = Bench(poison())
    block = make_block(1, 2, 3)
    (part,) = bench.fail(None, (block.whole(),), StreamLost("gone"))
    assert bench.fail(None, (part,), StreamLost("gone")) == ()
    for _ in range(3):
        bench.fill_slots()
        bench.come_back(*bench.in_flight.pop())
    assert bench.calls == [[1], [2], [3]]
    assert bench.answered == [1, 2, 3]


def test_what_goes_elsewhere_keeps_its_rows_and_avoids_the_replica_that_had_them() -> None:
    isolation = Isolation(Budget(1 << 40))
    part = make_block(1, 2).whole()
    ruling = isolation.failed(None, Verdict(elsewhere=(part,)), formed_at=3.0, sent_rows=2, replica="a:1", slots=1)
    (piece,) = ruling.enter
    assert (piece.parts, piece.avoid, piece.is_split, piece.born_at) == ((part,), "a:1", False, 3.0)


def test_a_lost_batch_that_had_gone_elsewhere_is_a_batch_of_the_queue_again() -> None:
    bench = Bench(poison(), has_other=True)
    bench.fail(None, (make_block(1, 2).whole(),), REFUSED)
    bench.fill_slots()
    piece, parts = bench.in_flight.pop()
    (part,) = bench.fail(piece, parts, StreamLost("gone"))
    assert (part.rows, part.attempts) == (2, 2)
    assert len(bench.lane) == 0


def test_a_row_that_was_refused_by_name_is_told_so() -> None:
    error = Refused("no", InvalidArgument, Blame.ROWS)
    assert judge(Failure((make_block(1).whole(),), error), Chances(2, True, lambda _: True)).is_poison


# -- the order -------------------------------------------------------------------------------------------------------


def piece_of(rows: int, born_at: float = 0.0, avoid: str | None = None, *, is_split: bool = True) -> Piece:
    parts = (Part(make_block(*range(rows), recipient=Listener()), 0, rows, 0),)
    return Piece(parts, born_at, is_split, avoid=avoid)


def order_of(lane: PieceLane[str], *, may_split: bool = True) -> list[str]:
    names = []
    while errand := next(lane.next(may_split=may_split), None):
        lane.leave(errand[0])
        names.append(errand[1])
    return names


def test_batches_for_another_replica_go_first_then_the_oldest_and_of_these_the_largest_splits() -> None:
    lane: PieceLane[str] = PieceLane()
    lane.enter(piece_of(1, 1.0), "old small")
    lane.enter(piece_of(9, 2.0), "new large")
    lane.enter(piece_of(2, 1.0), "old large")
    lane.enter(piece_of(1, 1.0), "old small too")
    lane.enter(piece_of(8, 3.0, "a", is_split=False), "elsewhere")
    assert len(lane) == 5
    assert order_of(lane) == ["elsewhere", "old large", "old small", "old small too", "new large"]


def test_a_piece_keeps_its_turn_when_rows_leave_it() -> None:
    lane: PieceLane[str] = PieceLane()
    large, small = piece_of(4), piece_of(2)
    lane.enter(large, "large")
    lane.enter(small, "small")
    large.parts = large.parts[0].cut(1)[:1]
    assert order_of(lane) == ["large", "small"]


def test_where_splits_have_had_their_share_other_batches_still_go() -> None:
    lane: PieceLane[str] = PieceLane()
    lane.enter(piece_of(4), "split")
    lane.enter(piece_of(4, 0.0, "a"), "split for another replica")
    lane.enter(piece_of(4, 0.0, "a", is_split=False), "batch for another replica")
    assert order_of(lane, may_split=False) == ["batch for another replica"]
    assert order_of(lane) == ["split for another replica", "split"]
