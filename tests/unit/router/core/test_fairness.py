"""Who gets the seats: tenants by weight, classes, tenants that are batched only with themselves."""

from collections import Counter
from collections.abc import Mapping

import pytest

from router.core.budget import Budget
from router.core.queue import Bounds, KeyQueue
from router.core.turns import MAX_TENANTS
from router.core.types import Block, Part
from router.core.variable_queue import VariableQueue
from tests.builders import make_block, make_texts, texts_of, values_of

PATIENCE_S = 30.0


def make_queue(max_batch_rows: int = 8, weights: Mapping[str, float] | None = None) -> KeyQueue:
    bounds = Bounds(max_batch_rows, 100_000, weights=weights or {}, patience_s=PATIENCE_S)
    return KeyQueue(bounds, row_bytes=4, budget=Budget(1_000_000))


def of(tenant: str, *values: float, at: float = 0.0, is_batch_class: bool = False) -> Block:
    block = make_block(*values, at=at)
    block.tenant, block.is_batch_class = tenant, is_batch_class
    return block


def offer(queue: KeyQueue, tenant: str, rows: int, *, at: float = 0.0, is_batch_class: bool = False) -> None:
    """So many blocks of one row, with the values 0, 1, 2 and so on."""
    for number in range(rows):
        queue.push(of(tenant, number, at=at, is_batch_class=is_batch_class))


def shares(parts: tuple[Part, ...]) -> dict[str, int]:
    """Rows of a batch by tenant."""
    rows: Counter[str] = Counter()
    for part in parts:
        rows[part.block.tenant] += part.rows
    return dict(rows)


def classes(parts: tuple[Part, ...]) -> tuple[int, int]:
    """Interactive and batch rows of a batch."""
    batch = sum(part.rows for part in parts if part.block.is_batch_class)
    return sum(part.rows for part in parts) - batch, batch


# -- tenants ---------------------------------------------------------------------------------------------------------


def test_tenants_that_offer_ten_to_one_are_served_one_to_one_while_both_wait() -> None:
    queue = make_queue()
    offer(queue, "flood", 100)
    offer(queue, "drop", 10)
    assert shares(queue.pop_batch(0.0)) == {"flood": 4, "drop": 4}
    assert shares(queue.pop_batch(0.0)) == {"flood": 4, "drop": 4}
    assert shares(queue.pop_batch(0.0)) == {"flood": 6, "drop": 2}
    assert shares(queue.pop_batch(0.0)) == {"flood": 8}


def test_weights_of_three_to_one_share_eight_seats_as_six_and_two() -> None:
    queue = make_queue(weights={"gold": 3})
    offer(queue, "other", 20)
    offer(queue, "gold", 20)
    assert shares(queue.pop_batch(0.0)) == {"gold": 6, "other": 2}


def test_a_block_is_cut_where_the_share_ends_and_the_next_batch_goes_on_there() -> None:
    queue = make_queue(max_batch_rows=4)
    queue.push(of("a", 1, 2, 3, 4, 5))
    queue.push(of("b", 11, 12, 13, 14, 15))
    assert values_of(queue.pop_batch(0.0)) == [1, 2, 11, 12]
    assert values_of(queue.pop_batch(0.0)) == [3, 4, 13, 14]
    assert values_of(queue.pop_batch(0.0)) == [5, 15]


def test_what_does_not_divide_evenly_is_made_up_for_in_the_next_batches() -> None:
    queue = make_queue(max_batch_rows=4)
    for tenant in "abc":
        offer(queue, tenant, 40)
    served: Counter[str] = Counter()
    for _ in range(27):
        served.update(shares(queue.pop_batch(0.0)))
        assert max(served.values()) - min(served[tenant] for tenant in "abc") <= 2
    assert served.total() == 108


def test_more_tenants_than_seats_have_their_turn_one_after_the_other() -> None:
    queue = make_queue(max_batch_rows=2)
    for tenant in "abcde":
        offer(queue, tenant, 4)
    assert [list(shares(queue.pop_batch(0.0))) for _ in range(5)] == [
        list(pair) for pair in ("ab", "cd", "ea", "bc", "de")
    ]


def test_a_light_tenant_among_heavy_ones_has_its_row_in_proportion() -> None:
    queue = make_queue(max_batch_rows=1, weights={"heavy": 4})
    offer(queue, "heavy", 40)
    offer(queue, "light", 40)
    served = [next(iter(shares(queue.pop_batch(0.0)))) for _ in range(20)]
    assert Counter(served) == {"heavy": 16, "light": 4}
    assert "light" in served[:5]


def test_a_tenant_keeps_no_credit_while_it_has_nothing_waiting() -> None:
    queue = make_queue(max_batch_rows=2)
    offer(queue, "a", 40)
    for _ in range(10):
        queue.push(of("b", 1))
        assert shares(queue.pop_batch(0.0)) == {"a": 1, "b": 1}
        assert shares(queue.pop_batch(0.0)) == {"a": 2}
    offer(queue, "b", 4)
    assert shares(queue.pop_batch(0.0)) == {"a": 1, "b": 1}


def test_the_order_within_a_tenant_is_kept() -> None:
    queue = make_queue(max_batch_rows=3)
    offer(queue, "a", 5)
    offer(queue, "b", 5)
    order: dict[str, list[float]] = {"a": [], "b": []}
    while queue.rows:
        for part in queue.pop_batch(0.0):
            order[part.block.tenant] += values_of((part,))
    assert order == {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 3, 4]}


def test_requeued_rows_return_to_the_heads_of_their_lanes_by_age() -> None:
    queue = make_queue(max_batch_rows=4)
    for at in range(4):
        queue.push(of("a", 10 + at, at=at))
        queue.push(of("b", 20 + at, at=at))
    first, second = queue.pop_batch(0.0), queue.pop_batch(0.0)
    queue.push(of("a", 14, at=4))
    queue.requeue(first)
    queue.requeue(second)
    assert queue.oldest_at == 0
    order: dict[str, list[float]] = {"a": [], "b": []}
    while queue.rows:
        for part in queue.pop_batch(0.0):
            order[part.block.tenant] += values_of((part,))
    assert order == {"a": [10, 11, 12, 13, 14], "b": [20, 21, 22, 23]}


def test_the_oldest_row_is_known_over_all_lanes() -> None:
    queue = make_queue()
    queue.push(of("a", 1, at=3.0))
    queue.push(of("b", 2, at=1.0))
    queue.push(of("b", 3, at=2.0, is_batch_class=True))
    assert queue.oldest_at == 1.0


def test_tenants_beyond_the_lanes_share_one_seat_and_get_lanes_as_those_become_free() -> None:
    queue = make_queue(max_batch_rows=MAX_TENANTS + 1)
    for number in range(MAX_TENANTS + 10):
        offer(queue, f"t{number}", 2)
    served = shares(queue.pop_batch(0.0))
    assert len(served) == MAX_TENANTS + 1
    assert set(served.values()) == {1}
    queue.pop_batch(0.0)
    offer(queue, "new", 20)
    assert shares(queue.pop_batch(0.0)) == {f"t{MAX_TENANTS + number}": 2 for number in range(1, 10)} | {"new": 20}


def test_a_tenant_in_the_shared_lane_keeps_its_order_when_lanes_become_free() -> None:
    queue = make_queue(max_batch_rows=MAX_TENANTS + 1)
    for number in range(MAX_TENANTS):
        offer(queue, f"t{number}", 1)
    offer(queue, "x", 1)
    offer(queue, "y", 2)
    queue.pop_batch(0.0)  # all lanes but the shared one are free now
    queue.push(of("y", 2))
    assert values_of(queue.pop_batch(0.0)) == [0, 1, 2]


def test_rows_of_a_shared_lane_can_be_discarded_requeued_and_counted() -> None:
    queue = make_queue(max_batch_rows=MAX_TENANTS + 1)
    for number in range(MAX_TENANTS):
        offer(queue, f"t{number}", 1)
    gone, stays = of("x", 1, 2), of("y", 3, 4)
    queue.push(gone)
    queue.push(stays)
    assert queue.discard(gone) == 2
    batch = queue.pop_batch(0.0)
    queue.requeue(batch)
    assert (queue.rows, queue.discard(stays)) == (MAX_TENANTS + 2, 2)
    assert shares(queue.pop_batch(0.0)) == {f"t{number}": 1 for number in range(MAX_TENANTS)}
    assert repr(queue) == "<KeyQueue 0 rows in 0 blocks>"


def test_a_batch_that_is_full_of_bytes_is_followed_by_the_tenant_whose_text_did_not_fit() -> None:
    queue = VariableQueue(Bounds(4, 100, 29), budget=Budget(10_000))
    for tenant, texts in (("a", ["a1", "a2", "a3"]), ("b", ["b" * 20, "b2"]), ("c", ["c1"])):
        block = make_texts(*texts)
        block.tenant = tenant
        queue.push(block)
    assert texts_of(queue.pop_batch(0.0)) == ["a1"]
    assert texts_of(queue.pop_batch(0.0)) == ["b" * 20]
    assert texts_of(queue.pop_batch(0.0)) == ["c1", "a2", "b2", "a3"]


# -- classes ---------------------------------------------------------------------------------------------------------


def test_batch_rows_fill_the_seats_that_interactive_rows_leave() -> None:
    queue = make_queue()
    offer(queue, "a", 20, is_batch_class=True)
    offer(queue, "a", 10)
    assert classes(queue.pop_batch(0.0)) == (8, 0)
    assert classes(queue.pop_batch(0.0)) == (2, 6)
    assert classes(queue.pop_batch(0.0)) == (0, 8)


def test_batch_rows_are_due_after_the_patience_and_not_before() -> None:
    queue = make_queue()
    offer(queue, "a", 2, at=1.0, is_batch_class=True)
    offer(queue, "a", 20)
    assert classes(queue.pop_batch(PATIENCE_S + 0.999)) == (8, 0)
    assert classes(queue.pop_batch(PATIENCE_S + 1.0)) == (7, 1)


def test_due_rows_take_an_eighth_of_the_seats_and_one_at_least() -> None:
    queue = make_queue(max_batch_rows=16)
    offer(queue, "a", 20, is_batch_class=True)
    offer(queue, "a", 20)
    assert classes(queue.pop_batch(PATIENCE_S)) == (14, 2)
    small = make_queue(max_batch_rows=4)
    offer(small, "a", 20, is_batch_class=True)
    offer(small, "a", 20)
    assert classes(small.pop_batch(PATIENCE_S)) == (3, 1)


def test_batch_rows_that_are_not_due_take_no_seat_of_those_that_are() -> None:
    queue = make_queue(max_batch_rows=16)
    queue.push(of("a", 1, at=0.0, is_batch_class=True))
    queue.push(of("a", 2, at=5.0, is_batch_class=True))
    offer(queue, "b", 5, at=5.0, is_batch_class=True)
    offer(queue, "a", 20)
    assert classes(queue.pop_batch(PATIENCE_S)) == (15, 1)


def test_tenants_take_turns_within_the_batch_class_due_or_not() -> None:
    queue = make_queue(max_batch_rows=16)
    offer(queue, "a", 20, is_batch_class=True)
    offer(queue, "b", 20, is_batch_class=True)
    offer(queue, "c", 14)
    assert shares(queue.pop_batch(PATIENCE_S)) == {"a": 1, "b": 1, "c": 14}
    assert shares(queue.pop_batch(PATIENCE_S)) == {"a": 8, "b": 8}


def test_a_tenant_without_further_due_rows_keeps_no_credit_for_those_to_come() -> None:
    queue = make_queue(max_batch_rows=16)
    offer(queue, "c", 100)
    offer(queue, "a", 1, is_batch_class=True)
    offer(queue, "a", 20, at=1.0, is_batch_class=True)
    assert shares(queue.pop_batch(PATIENCE_S)) == {"a": 1, "c": 15}
    offer(queue, "b", 20, at=1.0, is_batch_class=True)
    assert shares(queue.pop_batch(PATIENCE_S + 1.0)) == {"a": 1, "b": 1, "c": 14}


def test_where_one_row_is_a_batch_due_and_interactive_rows_take_turns() -> None:
    queue = make_queue(max_batch_rows=1)
    offer(queue, "a", 20, is_batch_class=True)
    offer(queue, "a", 20)
    assert [classes(queue.pop_batch(PATIENCE_S)) for _ in range(4)] == [(0, 1), (1, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("width", "due_first"), [(6, [(7, 1), (7, 1)]), (15, [(3, 1), (3, 1)]), (76, [(0, 1), (1, 0)])]
)
def test_due_texts_take_an_eighth_of_the_bytes_and_one_text_at_least(
    width: int, due_first: list[tuple[int, int]]
) -> None:
    queue = VariableQueue(Bounds(64, 1000, 80, patience_s=PATIENCE_S), budget=Budget(100_000))
    for is_batch_class in (True, False):
        for _ in range(100):
            block = make_texts("x" * width)
            block.is_batch_class = is_batch_class
            queue.push(block)
    assert [classes(queue.pop_batch(PATIENCE_S)) for _ in due_first] == due_first


def test_due_rows_of_a_light_tenant_go_in_proportion_to_a_heavy_ones() -> None:
    queue = make_queue(max_batch_rows=16, weights={"gold": 3})
    offer(queue, "gold", 200, is_batch_class=True)
    offer(queue, "other", 200, is_batch_class=True)
    offer(queue, "c", 1000)
    served: Counter[str] = Counter()
    for _ in range(40):
        served.update(shares(queue.pop_batch(PATIENCE_S)))
    assert served == {"gold": 60, "other": 20, "c": 560}


# -- tenants apart ---------------------------------------------------------------------------------------------------


def test_a_separated_tenant_shares_no_batch_and_gets_its_share_of_the_batches() -> None:
    queue = make_queue()
    for tenant in "abs":
        offer(queue, tenant, 100)
    queue.separate("s")
    batches = [shares(queue.pop_batch(0.0)) for _ in range(6)]
    assert Counter(tuple(sorted(batch)) for batch in batches) == {("s",): 2, ("a", "b"): 4}


def test_a_batch_of_one_row_is_charged_to_a_separated_tenant_like_a_full_one() -> None:
    queue = make_queue()
    queue.separate("s")
    offer(queue, "a", 200)
    served: list[str] = []
    for _ in range(20):
        if "s" in served[-1:] or not served:
            queue.push(of("s", 1))
        served.append(next(iter(shares(queue.pop_batch(0.0)))))
    assert 8 <= Counter(served)["s"] <= 10


def test_a_separated_tenant_alone_goes_at_once() -> None:
    queue = make_queue()
    queue.separate("s")
    offer(queue, "s", 20)
    assert [shares(queue.pop_batch(0.0)) for _ in range(3)] == [{"s": 8}, {"s": 8}, {"s": 4}]


def test_two_separated_tenants_do_not_meet_and_none_starves() -> None:
    queue = make_queue(weights={"s": 2})
    for tenant in "st":
        queue.separate(tenant)
        offer(queue, tenant, 100)
    batches = [shares(queue.pop_batch(0.0)) for _ in range(9)]
    assert Counter(tuple(batch) for batch in batches) == {("s",): 6, ("t",): 3}


def test_rows_that_wait_already_are_separated_and_rejoined_with_the_others() -> None:
    queue = make_queue()
    for tenant in "ab":
        offer(queue, tenant, 2)
    offer(queue, "b", 2, is_batch_class=True)
    queue.separate("b")
    queue.separate("b")
    assert [shares(queue.pop_batch(0.0)) for _ in range(2)] == [{"a": 2}, {"b": 4}]
    for tenant in "ab":
        offer(queue, tenant, 2)
    queue.rejoin("b")
    queue.rejoin("b")
    assert shares(queue.pop_batch(0.0)) == {"a": 2, "b": 2}


def test_a_tenant_is_separated_from_the_shared_lane() -> None:
    queue = make_queue(max_batch_rows=MAX_TENANTS + 1)
    for number in range(MAX_TENANTS):
        offer(queue, f"t{number}", 1)
    offer(queue, "x", 2)
    offer(queue, "y", 2)
    queue.separate("x")
    assert "x" not in shares(queue.pop_batch(0.0))
    assert [shares(queue.pop_batch(0.0)) for _ in range(2)] == [{"x": 2}, {"y": 1}]


def test_batch_rows_of_a_separated_tenant_do_not_displace_interactive_rows() -> None:
    queue = make_queue()
    queue.separate("s")
    offer(queue, "s", 100, is_batch_class=True)
    offer(queue, "a", 200)
    assert [next(iter(shares(queue.pop_batch(0.0)))) for _ in range(4)] == ["a"] * 4
    served = Counter(next(iter(shares(queue.pop_batch(PATIENCE_S)))) for _ in range(18))
    assert served == {"a": 16, "s": 2}


@pytest.mark.parametrize(("rows", "is_full"), [(7, False), (8, True)])
def test_full_with_separated_tenants_means_that_one_section_fills_a_batch(rows: int, is_full: bool) -> None:
    queue = make_queue()
    queue.separate("s")
    offer(queue, "s", rows)
    offer(queue, "a", 5)
    assert queue.is_full is is_full


# -- what a new row has ahead ------------------------------------------------------------------------------------------


def test_in_a_lane_alone_everything_is_ahead() -> None:
    queue = make_queue()
    assert queue.rows_ahead("a", is_batch_class=False, rows=3) == 0
    offer(queue, "a", 20)
    assert queue.rows_ahead("a", is_batch_class=False, rows=3) == 20


def test_of_other_tenants_as_much_is_ahead_as_their_share_brings() -> None:
    queue = make_queue(weights={"gold": 4})
    offer(queue, "a", 100)
    assert queue.rows_ahead("b", is_batch_class=False, rows=3) == 3
    offer(queue, "gold", 100)
    assert queue.rows_ahead("b", is_batch_class=False, rows=3) == 3 + 12
    assert queue.rows_ahead("gold", is_batch_class=False, rows=20) == 100 + 30
    offer(queue, "b", 2)
    assert queue.rows_ahead("b", is_batch_class=False, rows=3) == 2 + 5 + 20
    assert queue.rows_ahead("b", is_batch_class=False, rows=1000) == 2 + 100 + 100


def test_every_interactive_row_is_ahead_of_a_batch_row_and_no_batch_row_ahead_of_an_interactive_one() -> None:
    queue = make_queue()
    offer(queue, "a", 50)
    offer(queue, "a", 20, is_batch_class=True)
    assert queue.rows_ahead("b", is_batch_class=True, rows=1) == 50 + 1
    assert queue.rows_ahead("b", is_batch_class=False, rows=1) == 1
    assert queue.rows_ahead("a", is_batch_class=True, rows=1) == 50 + 20


def test_batches_of_separated_tenants_count_as_full() -> None:
    queue = make_queue()
    queue.separate("s")
    offer(queue, "s", 9)
    offer(queue, "a", 100)
    assert queue.rows_ahead("a", is_batch_class=False, rows=1) == 100 + 16
    assert queue.rows_ahead("s", is_batch_class=False, rows=1) == 9 + 16
