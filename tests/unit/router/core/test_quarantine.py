"""Which tenants are batched with themselves only."""

import math

from router.core.quarantine import MAX_TENANTS, QUARANTINE_S, WINDOW_ROWS, Quarantine
from router.core.types import Block, Part
from tests.builders import Listener, make_block


def rows_of(tenant: str, rows: int) -> Part:
    plain = make_block(0)
    block = Block(plain.key, 0, 0, rows, (bytes(4 * rows),), 4, 0.0, 60.0, Listener(), tenant)
    return block.whole()


def test_nothing_is_counted_before_the_first_bad_row() -> None:
    quarantine = Quarantine()
    assert not quarantine.is_watching
    assert not quarantine.poisoned("a", 0.0)
    assert quarantine.is_watching


def test_the_fifth_bad_row_is_one_too_many_and_the_tenant_is_released_after_its_time() -> None:
    quarantine = Quarantine()
    assert [quarantine.poisoned("a", 1.0) for _ in range(5)] == [False] * 4 + [True]
    assert not quarantine.poisoned("a", 1.0)
    assert quarantine.wake_at == 1.0 + QUARANTINE_S
    assert quarantine.released(quarantine.wake_at - 0.001) == []
    assert quarantine.released(quarantine.wake_at) == ["a"]
    assert quarantine.wake_at == math.inf


def test_bad_rows_must_be_more_than_a_share_of_the_last_rows() -> None:
    for good, is_apart in ((991, True), (992, False)):  # five of 999 rows, and of 1,000
        quarantine = Quarantine()
        for _ in range(4):
            quarantine.poisoned("a", 0.0)
        quarantine.served([rows_of("a", 990), rows_of("other", 5000)])
        quarantine.served([rows_of("a", good - 990 + 3)])
        assert quarantine.poisoned("a", 0.0) is is_apart


def test_bad_rows_leave_the_window_and_with_the_last_the_tenant_is_forgotten() -> None:
    quarantine = Quarantine()
    quarantine.poisoned("a", 0.0)
    quarantine.served([rows_of("a", WINDOW_ROWS - 1)])
    assert quarantine.is_watching
    quarantine.served([rows_of("a", 1)])
    assert not quarantine.is_watching


def test_tenants_are_judged_by_their_own_rows() -> None:
    quarantine = Quarantine()
    for _ in range(4):
        assert not quarantine.poisoned("a", 0.0)
        assert not quarantine.poisoned("b", 0.0)
    assert quarantine.poisoned("b", 0.0)
    assert quarantine.poisoned("a", 1.0)
    assert quarantine.released(QUARANTINE_S) == ["b"]
    assert quarantine.released(QUARANTINE_S + 1) == ["a"]


def test_an_offender_comes_back_at_the_next_bad_row() -> None:
    quarantine = Quarantine()
    for _ in range(5):
        quarantine.poisoned("a", 0.0)
    quarantine.released(QUARANTINE_S)
    assert quarantine.poisoned("a", QUARANTINE_S + 1)


def test_names_without_end_are_forgotten_the_first_found_first() -> None:
    quarantine = Quarantine()
    for number in range(MAX_TENANTS):
        for _ in range(4):
            quarantine.poisoned(f"t-{number}", 0.0)
    quarantine.poisoned("new", 0.0)
    assert not quarantine.poisoned("t-0", 0.0)
    assert quarantine.poisoned("t-2", 0.0)
