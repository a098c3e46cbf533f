"""Deficit round robin: how the tenants of one class share the seats of a batch.

Theory of operation (Shreedhar and Varghese, 1995). The lanes stand in a ring. In its turn a lane is given a quantum
times its weight, takes as many rows as it has credit for, and goes to the end of the ring with what is left, a
fraction. A lane that runs empty loses its credit and its place. The quantum suits the batch: all seats by the sum of
the weights, so that one round fills a batch, but never less than one row for the heaviest lane, so that each round
moves something. For example, lanes of weights 3 and 1 share 8 seats as 6 and 2. A batch may end in the midst of a
round, and of a turn; the next one goes on from there, with the round's quantum and the credit that is left.

So two lanes that never run empty differ by a quantum and a fraction at most, in rows by weight, whatever they offer,
and a batch costs in proportion to lanes and blocks. A lane that is alone is taken from without any of it.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

from router.core.lane import Lane, Room

# Tenants of a class with a lane of their own; further ones share one.
MAX_TENANTS = 256
# Shares that are whole but for rounding are whole.
ROUNDING = 1e-9

LaneMaker: TypeAlias = Callable[[str | None, bool], Lane]
"""Makes an empty lane for a tenant (None: for several) and a class (True: batch)."""


class Turns:
    """The lanes of one class in the order of their turns; the one at the head is next. Empty ones are swept later."""

    __slots__ = ("_is_batch_class", "_make_lane", "_quantum", "_round", "lanes")

    def __init__(self, make_lane: LaneMaker, *, is_batch_class: bool) -> None:
        self._make_lane = make_lane
        self._is_batch_class = is_batch_class
        # State: the lanes; which round it is, and what each turn of it brings, by weight.
        self.lanes: OrderedDict[str | None, Lane] = OrderedDict()
        self._round = 0
        self._quantum = 0.0

    @property
    def rows(self) -> int:
        """Rows that wait in all lanes."""
        return sum(lane.rows for lane in self.lanes.values())

    @property
    def weight(self) -> float:
        """Of all lanes in which rows wait; 0: none does."""
        return math.fsum(lane.weight for lane in self.lanes.values() if lane.rows)

    def find(self, tenant: str) -> Lane | None:
        """The lane that the tenant's rows wait in, if any do."""
        lane = self.lanes.get(tenant)
        if lane is None:
            shared = self.lanes.get(None)
            return shared if shared is not None and tenant in shared.members else None
        return lane

    def find_place(self, tenant: str) -> Lane | None:
        """The lane that new rows of the tenant would wait in; None: one of their own."""
        lane = self.find(tenant)
        return self.lanes.get(None) if lane is None and self._is_full else lane

    def lane(self, tenant: str) -> Lane:
        """The lane for new rows of the tenant; a new one stands last."""
        lane = self.find_place(tenant)
        if lane is None:
            name = None if self._is_full else tenant
            lane = self.lanes[name] = self._make_lane(name, self._is_batch_class)
        return lane

    @property
    def _is_full(self) -> bool:
        return len(self.lanes) - (None in self.lanes) >= MAX_TENANTS

    def sweep(self) -> None:
        """Forget the lanes that are empty."""
        for lane in [lane for lane in self.lanes.values() if not lane.rows]:
            del self.lanes[lane.tenant]

    def has_due(self, due_by: float) -> bool:
        """Whether rows wait that arrived at `due_by` or before."""
        return any(lane.rows and lane.oldest_at <= due_by for lane in self.lanes.values())

    def fill(self, room: Room, seats: int, due_by: float = math.inf) -> None:
        """Move up to `seats` rows into the room; only such that arrived at `due_by` or before."""
        until = max(room.rows - seats, 0)
        while room.rows > until:
            lanes = [lane for lane in self.lanes.values() if lane.rows and lane.oldest_at <= due_by]
            if not lanes:
                return
            if self._has_had_turn(lanes[0]):
                self._begin_round(lanes, room.rows - until)
            self._go_round(lanes, room, until, due_by)

    def _begin_round(self, lanes: Sequence[Lane], seats: int) -> None:
        weights = [lane.weight for lane in lanes]
        self._quantum = max(seats / math.fsum(weights), 1 / max(weights))
        self._round += 1

    def _has_had_turn(self, lane: Lane) -> bool:
        return lane.round == self._round and not lane.has_turn

    def _go_round(self, lanes: Sequence[Lane], room: Room, until: int, due_by: float) -> None:
        """The turns that are left of this round, as far as the room goes."""
        for lane in lanes:
            if room.rows <= until or self._has_had_turn(lane):
                return
            if not lane.has_turn:
                lane.credit += self._quantum * lane.weight
                lane.round, lane.has_turn = self._round, True
            self._turn(lane, room, room.rows - until, due_by)

    def _turn(self, lane: Lane, room: Room, seats: int, due_by: float) -> None:
        """What the lane has credit for; its turn ends, unless the room does first."""
        share = int(lane.credit + ROUNDING)
        # One more than its share tells whether any are left: a lane with a fraction of a row of credit keeps it.
        waiting = lane.rows if due_by == math.inf else lane.count_until(due_by, share + 1)
        wanted = min(share, waiting)
        taken = lane.take(min(wanted, seats), room)
        lane.credit = 0.0 if taken == waiting else lane.credit - taken
        if taken == wanted:
            lane.has_turn = False
            self.lanes.move_to_end(lane.tenant)
