"""Bounds on what waits: each with its own reason, both numbers in its text, and counts that come down again."""

import pytest

from router.core.budget import Budget
from router.core.queue import Bounds, KeyQueue
from router.core.turns import MAX_TENANTS
from router.core.types import Block
from router.errors import InvalidArgument, ResourceExhausted
from tests.builders import make_block


def make_queue(budget: Budget, max_rows: int = 1000, max_bytes: int | None = None) -> KeyQueue:
    return KeyQueue(Bounds(4, max_rows, max_bytes=max_bytes), row_bytes=4, budget=budget)


def of(tenant: str, *values: float) -> Block:
    block = make_block(*values)
    block.tenant = tenant
    return block


def refused(queue: KeyQueue, block: Block) -> tuple[str, str]:
    """The reason and the text with which a block is refused; nothing is taken of it."""
    before = repr(queue)
    with pytest.raises(ResourceExhausted) as error:
        queue.push(block)
    assert repr(queue) == before
    return error.value.reason, error.value.message


@pytest.mark.parametrize(
    ("budget", "key", "refusal"),
    [
        (Budget(1000), {"max_rows": 3}, ("queue_rows", "2 rows for one model wait already, 3 may")),
        (Budget(1000), {"max_bytes": 12}, ("key_bytes", "8 bytes for one model wait already, 12 may")),
        (Budget(12), {}, ("queue_bytes", "8 bytes in all wait already, 12 may")),
        (Budget(1000, max_rows=3), {}, ("process_rows", "2 rows in all wait already, 3 may")),
        (Budget(1000, max_tenant_rows=3), {}, ("tenant_rows", "2 rows of tenant 'a' wait already, 3 may")),
        (Budget(1000, max_tenant_bytes=12), {}, ("tenant_bytes", "8 bytes of tenant 'a' wait already, 12 may")),
    ],
)
def test_a_bound_holds_up_to_the_row_before_it(budget: Budget, key: dict[str, int], refusal: tuple[str, str]) -> None:
    queue = make_queue(budget, **key)
    queue.push(of("a", 1, 2))
    assert refused(queue, of("a", 3, 4)) == refusal
    queue.push(of("a", 3))
    assert refused(queue, of("a", 4))[0] == refusal[0]
    with pytest.raises(InvalidArgument, match="at once; at most"):
        queue.push(of("a", 1, 2, 3, 4))
    queue.pop_batch(0.0)
    queue.push(of("a", 1, 2, 3))
    assert (budget.rows, budget.used_bytes) == (3, 12)


def test_a_tenants_bound_counts_what_waits_under_all_keys_and_nobody_elses() -> None:
    budget = Budget(1000, max_tenant_rows=3)
    one, two = make_queue(budget), make_queue(budget)
    one.push(of("a", 1, 2))
    two.push(of("b", 1, 2, 3))
    two.push(of("a", 1))
    assert refused(two, of("a", 2))[0] == "tenant_rows"
    one.pop_batch(0.0)
    two.push(of("a", 2, 3))


@pytest.mark.parametrize("end", ["pop", "discard", "expire", "give up"])
def test_whoever_leaves_is_counted_back_to_its_tenant(end: str) -> None:
    budget = Budget(1000, max_tenant_rows=4)
    queue = make_queue(budget)
    block = of("a", 1, 2, 3, 4)
    queue.push(of("b", 1))
    queue.push(block)
    match end:
        case "pop":
            queue.pop_batch(0.0)
            queue.pop_batch(0.0)
        case "discard":
            queue.discard(block)
        case "expire":
            queue.pop_expired(60.0)
        case _:
            queue.pop_infeasible(59.0, 1.0)
    queue.push(of("a", 1, 2, 3, 4))
    assert refused(queue, of("a", 5))[0] == "tenant_rows"


def test_rows_that_come_back_count_again_though_no_bound_applies() -> None:
    budget = Budget(1000, max_tenant_rows=2)
    queue = make_queue(budget)
    queue.push(of("a", 1, 2))
    lost = queue.pop_batch(0.0)
    queue.push(of("a", 3, 4))
    queue.requeue(lost)
    assert refused(queue, of("a", 5)) == ("tenant_rows", "4 rows of tenant 'a' wait already, 2 may")


def test_what_waits_elsewhere_than_in_a_queue_counts_as_well() -> None:
    budget = Budget(1000, max_tenant_rows=4)
    queue = make_queue(budget)
    budget.count("a", 3, 12)
    assert refused(queue, of("a", 1, 2))[0] == "tenant_rows"
    budget.count("a", -3, -12)
    queue.push(of("a", 1, 2))
    assert repr(budget) == "<Budget 2 rows, 8 bytes>"


def test_tenants_of_the_shared_lane_have_their_own_bounds() -> None:
    budget = Budget(100_000, max_tenant_rows=2)
    queue = make_queue(budget)
    for number in range(MAX_TENANTS):
        queue.push(of(f"t{number}", 1))
    queue.push(of("x", 1, 2))
    queue.push(of("y", 1, 2))
    assert refused(queue, of("x", 3))[0] == "tenant_rows"
