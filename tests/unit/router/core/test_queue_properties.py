"""The queue with tenants, classes and bounds: any sequence of events, against lists of rows and the rules in words."""

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from router.core.budget import Budget
from router.core.queue import Bounds, KeyQueue
from router.core.types import Block, Part
from router.errors import ResourceExhausted
from tests.builders import make_block

TENANTS = "abcd"
PATIENCE_S = 5.0
MAX_ROWS = 40
MAX_TENANT_ROWS = 25

Row = tuple[Block, int]


def rows_of(parts: tuple[Part, ...] | list[Part]) -> list[Row]:
    return [(part.block, row) for part in parts for row in range(part.first, part.first + part.rows)]


class QueueAgainstRules(RuleBasedStateMachine):
    """The model: a list of (block, row) for each tenant and class, in the order in which they must leave."""

    batches: Bundle[tuple[Part, ...]] = Bundle("batches")

    @initialize(max_batch_rows=st.integers(1, 20), weight=st.sampled_from([0.25, 1.0, 3.0]))
    def start(self, max_batch_rows: int, weight: float) -> None:
        self.max_batch_rows = max_batch_rows
        self.budget = Budget(100_000, max_tenant_rows=MAX_TENANT_ROWS)
        bounds = Bounds(max_batch_rows, MAX_ROWS, weights={"a": weight}, patience_s=PATIENCE_S)
        self.queue = KeyQueue(bounds, row_bytes=4, budget=self.budget)
        self.lanes: dict[tuple[str, bool], list[Row]] = {(t, c): [] for t in TENANTS for c in (False, True)}
        self.apart: set[str] = set()
        self.now = 0.0

    def waiting(self) -> list[Row]:
        return [row for lane in self.lanes.values() for row in lane]

    def of_tenant(self, tenant: str) -> int:
        return len(self.lanes[tenant, False]) + len(self.lanes[tenant, True])

    @rule(
        rows=st.integers(1, 12),
        tenant=st.sampled_from(TENANTS),
        is_batch_class=st.booleans(),
        patience=st.integers(1, 30),
    )
    def push(self, rows: int, tenant: str, is_batch_class: bool, patience: int) -> None:
        block = make_block(*range(rows), at=self.now, deadline=self.now + patience)
        block.tenant, block.is_batch_class = tenant, is_batch_class
        is_full = len(self.waiting()) + rows > MAX_ROWS
        if is_full or self.of_tenant(tenant) + rows > MAX_TENANT_ROWS:
            with pytest.raises(ResourceExhausted) as refused:
                self.queue.push(block)
            assert refused.value.reason == ("queue_rows" if is_full else "tenant_rows")
        else:
            self.queue.push(block)
            self.lanes[tenant, is_batch_class] += [(block, row) for row in range(rows)]

    @rule(target=batches)
    def pop(self) -> tuple[Part, ...]:
        before = {lane: list(rows) for lane, rows in self.lanes.items()}
        parts = self.queue.pop_batch(self.now)
        tenants = {part.block.tenant for part in parts}
        section = tenants if tenants & self.apart else set(TENANTS) - self.apart
        assert len(section) == 1 or not tenants & self.apart
        for lane, rows in before.items():
            taken = [row for row in rows_of(parts) if (row[0].tenant, row[0].is_batch_class) == lane]
            assert taken == rows[: len(taken)]
            del self.lanes[lane][: len(taken)]
        seats = sum(len(rows) for (tenant, _), rows in before.items() if tenant in section)
        assert sum(part.rows for part in parts) == min(seats, self.max_batch_rows)
        self.check_classes(parts, before, section)
        return parts

    def check_classes(
        self, parts: tuple[Part, ...], before: dict[tuple[str, bool], list[Row]], section: set[str]
    ) -> None:
        """Of the section: batch rows beside waiting interactive ones are due, an eighth at most, and no fewer."""
        interactive = sum(len(before[tenant, False]) for tenant in section)
        due_by = self.now - PATIENCE_S
        due = sum(row[0].arrived_at <= due_by for tenant in section for row in before[tenant, True])
        taken = [row for row in rows_of(parts) if row[0].is_batch_class]
        cap = min(due, max(self.max_batch_rows // 8, 1))
        if interactive + cap > self.max_batch_rows:
            # Of a single seat the classes take turns.
            assert len(taken) == cap or (self.max_batch_rows == 1 and not taken)
            assert all(row[0].arrived_at <= due_by for row in taken)
        else:
            assert len(rows_of(parts)) - len(taken) == interactive

    @rule(parts=consumes(batches))
    def requeue(self, parts: tuple[Part, ...]) -> None:
        self.queue.requeue([part.tried() for part in parts])
        for block, row in rows_of(parts):
            self.lanes[block.tenant, block.is_batch_class].append((block, row))
        for lane, rows in self.lanes.items():
            back = list(dict.fromkeys(part.block for part in parts))
            order = back + [block for block in dict.fromkeys(row[0] for row in rows) if block not in back]
            self.lanes[lane] = sorted(rows, key=lambda row: (row[0].arrived_at, order.index(row[0]), row[1]))

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        blocks = list(dict.fromkeys(row[0] for row in self.waiting()))
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            assert self.queue.discard(block) == sum(row[0] is block for row in self.waiting())
            self.keep(lambda row: row[0] is not block)

    def keep(self, is_kept: Callable[[Row], bool]) -> None:
        self.lanes = {lane: [row for row in rows if is_kept(row)] for lane, rows in self.lanes.items()}

    @rule(seconds=st.integers(0, 8))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        expired = self.queue.pop_expired(self.now)
        assert set(expired) == {block for block, _ in self.waiting() if block.deadline <= self.now}
        self.keep(lambda row: row[0].deadline > self.now)

    @rule(service_s=st.integers(1, 10), most=st.integers(0, 10))
    def give_up(self, service_s: int, most: int) -> None:
        late = [row for row in self.waiting() if row[0].deadline - service_s <= self.now]
        given_up = rows_of(self.queue.pop_infeasible(self.now, service_s, most))
        assert len(given_up) == len(set(given_up)) == min(most, len(late))
        assert set(given_up) <= set(late)
        left = [row[0].deadline for row in late if row not in given_up]
        assert all(row[0].deadline <= min(left, default=math.inf) for row in given_up)
        self.keep(lambda row: row not in given_up)

    @rule(tenant=st.sampled_from(TENANTS))
    def separate(self, tenant: str) -> None:
        self.queue.separate(tenant)
        self.apart.add(tenant)

    @rule(tenant=st.sampled_from(TENANTS))
    def rejoin(self, tenant: str) -> None:
        self.queue.rejoin(tenant)
        self.apart.discard(tenant)

    @rule(tenant=st.sampled_from(TENANTS), is_batch_class=st.booleans(), rows=st.integers(1, 5))
    def ask(self, tenant: str, is_batch_class: bool, rows: int) -> None:
        ahead = self.queue.rows_ahead(tenant, is_batch_class, rows)
        assert len(self.lanes[tenant, is_batch_class]) <= ahead
        if not self.apart:
            of_class = sum(len(lane) for (_, is_batch), lane in self.lanes.items() if is_batch is is_batch_class)
            assert ahead <= (len(self.waiting()) if is_batch_class else of_class)

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "queue"):
            waiting = self.waiting()
            assert self.queue.rows == self.budget.rows == len(waiting)
            assert self.budget.used_bytes == self.queue.nbytes == 4 * len(waiting)
            assert self.queue.blocks == len({row[0] for row in waiting})
            assert self.queue.wake_at == min((block.deadline for block, _ in waiting), default=math.inf)
            if waiting:
                assert self.queue.oldest_at == min(block.arrived_at for block, _ in waiting)


TestQueueAgainstRules = QueueAgainstRules.TestCase
TestQueueAgainstRules.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0]), min_size=2, max_size=6),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    max_batch_rows=st.integers(1, 64),
    batches=st.integers(1, 40),
)
def test_tenants_that_never_run_out_are_served_by_their_weights_at_every_moment(
    weights: list[float], sizes: list[int], max_batch_rows: int, batches: int
) -> None:
    """Two of them differ by a turn at most, in rows per weight, whatever the sizes of their blocks."""
    names = [f"t{number}" for number in range(len(weights))]
    by_name = dict(zip(names, weights, strict=True))
    queue = KeyQueue(Bounds(max_batch_rows, 10**6, weights=by_name), row_bytes=4, budget=Budget(10**9))
    for number, name in enumerate(names):
        for _ in range(max_batch_rows * batches // sizes[number % len(sizes)] + 1):
            block = make_block(*range(sizes[number % len(sizes)]))
            block.tenant = name
            queue.push(block)
    turn = max(max_batch_rows / sum(weights), 1 / max(weights))
    served: Counter[str] = Counter()
    for _ in range(batches):
        for part in queue.pop_batch(0.0):
            served[part.block.tenant] += part.rows
        per_weight = [served[name] / by_name[name] for name in names]
        assert max(per_weight) - min(per_weight) <= turn + 2 / min(weights)
    assert served.total() == batches * max_batch_rows


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    rows_of_lone=st.integers(1, 8),
    batches=st.integers(1, 60),
)
def test_separated_tenants_have_their_share_of_the_batches_however_small_those_are(
    weights: list[int], rows_of_lone: int, batches: int
) -> None:
    names = [f"t{number}" for number in range(len(weights))]
    by_name = dict(zip(names, weights, strict=True))
    queue = KeyQueue(Bounds(8, 10**6, weights=by_name), row_bytes=4, budget=Budget(10**9))
    for name in names[1:]:
        queue.separate(name)
    waiting: Counter[str] = Counter()
    served: Counter[str] = Counter()
    for _ in range(batches):
        for name in names:
            while not waiting[name]:
                block = make_block(*range(rows_of_lone))
                block.tenant = name
                queue.push(block)
                queue.push(make_other(name, rows_of_lone))
                waiting[name] += 2 * rows_of_lone
        parts = queue.pop_batch(0.0)
        (name,) = {part.block.tenant for part in parts}
        waiting[name] -= sum(part.rows for part in parts)
        served[name] += 1
    for name in names:
        share = Fraction(by_name[name], sum(weights)) * batches
        assert abs(served[name] - share) <= len(names)


def make_other(tenant: str, rows: int) -> Block:
    block = make_block(*range(rows))
    block.tenant = tenant
    return block
