"""Flights: which rows lead, which follow, and who is told of what."""

import gc
import math
import weakref

import pytest

from router.core.batch import merge
from router.core.single_flight import Flight, Flights, begin, digests_of, gather, runs_of
from router.core.types import BatchKey, Block, TensorSpec
from tests.builders import Listener, decode_texts, make_batch, make_block, make_texts, values_of


def offer(
    flights: Flights, *values: float, tenant: str = "t", is_batch_class: bool = False, deadline: float = 60.0
) -> tuple[Block, Flight | None]:
    """A caller's block, and the flight of those of its rows that lead."""
    block = make_block(*values, deadline=deadline)
    block.tenant, block.is_batch_class = tenant, is_batch_class
    boarding = flights.board(block, list(enumerate(digests_of(block))))
    flight = None
    if boarding.leads:
        flight = begin(block, boarding)
        flight.block = gather(block, [rows[0] for rows in boarding.leads.values()], Listener())
    flights.seat(block, boarding, flight)
    return block, flight


def led(flight: Flight | None) -> list[float]:
    """The rows of a flight, as they are queued."""
    return values_of((flight.block.whole(),)) if flight and flight.block else []


def land(
    flights: Flights, flight: Flight | None, first: int, rows: int, offset: int = 0
) -> list[tuple[Block, int, int, int]]:
    assert flight is not None
    return [(one.block, one.first, one.rows, one.offset) for one in flights.land(flight, first, rows, offset)]


def test_rows_with_equal_bits_have_equal_digests_and_others_do_not() -> None:
    one, same, zero, minus_zero, nan, same_nan = digests_of(make_block(1, 1, 0.0, -0.0, math.nan, math.nan))
    assert one == same
    assert zero != minus_zero
    assert nan == same_nan
    assert len({one, zero, minus_zero, nan}) == 4


def test_rows_are_compared_over_all_inputs_and_texts_by_their_elements() -> None:
    key = BatchKey("m", "", "", (TensorSpec("a", "UINT8", ()), TensorSpec("b", "UINT8", ())))
    two = Block(key, 0, 0, 3, (b"\1\2\1", b"\7\7\7"), 2, 0.0, 60.0, Listener())
    first, second, third = digests_of(two)
    assert first == third != second
    ab, other, again = digests_of(make_texts("ab", "a", "ab"))
    assert ab == again != other


@pytest.mark.parametrize(
    ("rows", "runs"),
    [([], []), ([3], [(3, 1)]), ([0, 1, 2], [(0, 3)]), ([1, 2, 3, 7, 9, 10], [(1, 3), (7, 1), (9, 2)])],
)
def test_rows_become_as_few_runs_as_can_be(rows: list[int], runs: list[tuple[int, int]]) -> None:
    assert runs_of(rows) == runs


def test_all_rows_of_a_block_are_gathered_without_a_copy_and_some_as_one_block() -> None:
    block = make_block(1, 2, 3, 4)
    assert gather(block, [0, 1, 2, 3], Listener()).inputs[0] is block.inputs[0]
    assert values_of((gather(block, [0, 2, 3], Listener()).whole(),)) == [1, 3, 4]


@pytest.mark.parametrize("rows", [[0], [0, 1]])
@pytest.mark.parametrize("block", [make_block(1, 2), make_texts("one", "two")])
def test_rows_that_lead_want_every_output_as_those_who_follow_may_want_others(block: Block, rows: list[int]) -> None:
    block.outputs = ("y",)
    assert gather(block, rows, Listener()).outputs == ()
    assert gather(block, rows, Listener(), ("y", "z")).outputs == ("y", "z")
    assert block.outputs == ("y",)


def test_texts_are_gathered_with_their_offsets() -> None:
    some = gather(make_texts("one", "two", "three", "four"), [0, 2, 3], Listener())
    _, rest = some.whole().cut(1)
    assert decode_texts(merge(make_batch(some.whole()))[0]) == ["one", "three", "four"]
    assert decode_texts(merge(make_batch(rest))[0]) == ["three", "four"]
    assert some.whole().nbytes == len(some.inputs[0])


def test_a_row_follows_an_equal_one_that_waits_and_both_are_told() -> None:
    flights = Flights()
    first, flight = offer(flights, 1, 2, 3)
    second, own = offer(flights, 2, 3, 4)
    assert (led(flight), led(own)) == ([1, 2, 3], [4])
    assert flights.following == 2
    assert land(flights, flight, 0, 3, offset=10) == [(first, 0, 3, 10), (second, 0, 2, 11)]
    assert land(flights, own, 0, 1) == [(second, 2, 1, 0)]
    assert repr(flights) == "<Flights 0 rows for 0 of 0 blocks>"


def test_equal_rows_of_one_block_are_led_by_the_first_of_them() -> None:
    flights = Flights()
    block, flight = offer(flights, 5, 6, 5, 5)
    assert led(flight) == [5, 6]
    assert land(flights, flight, 0, 2, 3) == [(block, 0, 1, 3), (block, 2, 1, 3), (block, 3, 1, 3), (block, 1, 1, 4)]


def test_a_row_that_is_answered_is_followed_no_more() -> None:
    flights = Flights()
    _, flight = offer(flights, 1, 2)
    land(flights, flight, 0, 1)
    _, own = offer(flights, 1, 2)
    assert led(own) == [1]


def test_rows_of_a_part_leave_the_others_of_the_flight_open() -> None:
    flights = Flights()
    block, flight = offer(flights, 1, 2, 3)
    assert land(flights, flight, 1, 1, 7) == [(block, 1, 1, 7)]
    assert flight is not None
    assert flight.open_runs() == [(0, 1), (2, 1)]
    assert land(flights, flight, 1, 1, 7) == []


@pytest.mark.parametrize("is_sent", [False, True])
@pytest.mark.parametrize(
    ("leader", "follower", "follows_waiting"),
    [
        (("one", False), ("one", False), True),
        (("one", True), ("one", True), True),
        (("one", False), ("one", True), True),
        (("one", True), ("one", False), False),
        (("one", False), ("two", False), False),
        (("one", True), ("two", True), False),
    ],
)
def test_nobody_is_slowed_by_following(
    leader: tuple[str, bool], follower: tuple[str, bool], *, follows_waiting: bool, is_sent: bool
) -> None:
    flights = Flights()
    _, flight = offer(flights, 1, tenant=leader[0], is_batch_class=leader[1])
    assert flight is not None
    if is_sent:
        flights.depart(flight, 0, 1)
    _, own = offer(flights, 1, tenant=follower[0], is_batch_class=follower[1])
    assert (own is None) is (follows_waiting or is_sent)


def test_two_tenants_that_take_turns_with_one_row_lead_once_each() -> None:
    flights = Flights()
    owns = [offer(flights, 1, tenant=tenant)[1] for tenant in ("one", "two") * 5]
    assert [own is not None for own in owns] == [True, True] + [False] * 8


def test_of_two_equal_rows_that_were_sent_the_second_is_followed_once_the_first_is_answered() -> None:
    """The second was once forgotten when it was sent, so its own tenant's next row led again."""
    flights = Flights()
    _, first = offer(flights, 1, tenant="one")
    _, second = offer(flights, 1, tenant="two")
    assert first is not None
    assert second is not None
    flights.depart(first, 0, 1)
    flights.depart(second, 0, 1)
    land(flights, first, 0, 1)
    assert offer(flights, 1, tenant="two")[1] is None
    assert offer(flights, 1, tenant="one")[1] is None


def test_a_row_outlives_the_caller_who_led_it() -> None:
    flights = Flights()
    leader, flight = offer(flights, 1, 2, 3)
    follower, _ = offer(flights, 2)
    assert flight is not None
    assert flights.leave(leader) == [(flight.block, [(1, 1)])]
    assert land(flights, flight, 1, 1, 5) == [(follower, 0, 1, 5)]


def test_rows_that_nobody_wants_any_more_are_named_once_and_followed_no_more() -> None:
    flights = Flights()
    one, flight = offer(flights, 1, 2)
    two, _ = offer(flights, 2)
    assert flight is not None
    queued = flight.block
    assert flights.leave(two) == []
    assert flights.leave(one) == [(queued, [])]
    assert flights.leave(one) == []
    assert flight.block is None
    assert led(offer(flights, 2)[1]) == [2]


def test_the_deadline_of_a_flight_is_the_latest_and_each_block_keeps_its_own() -> None:
    flights = Flights()
    leader, flight = offer(flights, 1, deadline=10.0)
    early, _ = offer(flights, 1, deadline=5.0)
    assert flight is not None
    assert flight.block is not None
    assert flight.block.deadline == 10.0
    late, _ = offer(flights, 1, deadline=20.0)
    assert flight.block.deadline == 20.0
    assert flights.wake_at == 5.0
    assert flights.pop_expired(4.999) == []
    assert flights.pop_expired(5.0) == [early]
    flights.leave(early)
    assert flights.pop_expired(10.0) == [leader]
    flights.leave(leader)
    assert flights.wake_at == 20.0
    assert land(flights, flight, 0, 1) == [(late, 0, 1, 0)]
    assert flights.wake_at == math.inf


def test_a_callers_block_lets_go_of_its_bytes() -> None:
    flights = Flights()
    offer(flights, 1)
    follower, _ = offer(flights, 1)
    assert follower.inputs == ()


def test_nothing_is_left_for_the_garbage_collector() -> None:
    flights = Flights()
    gc.disable()
    try:
        blocks = []
        for number in range(200):
            block, flight = offer(flights, number, number + 1)
            assert flight is not None
            assert flight.block is not None
            blocks += [weakref.ref(block), weakref.ref(flight.block)]
            if number % 2:
                flights.depart(flight, 0, len(flight.seats))
                flights.land(flight, 0, len(flight.seats), 0)
            else:
                flights.leave(block)
        del block, flight
        assert [one() for one in blocks if one()] == []
        assert repr(flights) == "<Flights 0 rows for 0 of 0 blocks>"
    finally:
        gc.enable()
