"""The choice of a replica."""

from router.core.balance import Load, choose


def test_nobody_is_chosen_where_nobody_can() -> None:
    assert choose([]) is None
    assert choose([Load(0, 0, can_take=False)]) is None


def test_the_least_loaded_replica_that_can_is_chosen() -> None:
    assert choose([Load(0, 0, can_take=False), Load(2, 2, can_take=True), Load(1, 9, can_take=True)]) == 2
    assert choose([Load(1, 5, can_take=True), Load(1, 4, can_take=True)]) == 1


def test_of_equally_loaded_ones_the_fastest_is_chosen_and_of_these_the_first() -> None:
    assert choose([Load(1, 4, can_take=True), Load(1, 4, can_take=True)]) == 0
    assert choose([Load(1, 4, True, 2.0), Load(1, 4, True, 1.9), Load(1, 4, True, 1.9)]) == 1


def test_load_counts_before_speed() -> None:
    assert choose([Load(1, 4, True, 0.1), Load(0, 9, True, 9.0)]) == 1
    assert choose([Load(1, 5, True, 0.1), Load(1, 4, True, 9.0)]) == 1
