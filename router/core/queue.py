"""The waiting rows of one key: their lanes, deadlines and bounds.

Theory of operation. Each tenant's rows of each class wait in a lane (`lane.py`), first in, first out. A batch takes its
seats from the lanes in turn (`turns.py`), interactive rows before batch rows; a tenant may be batched only with itself
(`section.py`). While one lane is all there is, it is filled and emptied without asking whose turn it is; it stays when
it is empty, until another one is needed.

Deadlines stand in a heap beside the lanes; entries of blocks that have left stay in it until they surface or outnumber
the living. Whoever is taken, discarded or expired is gone from the counts at once.

The caller passes `now` (monotonic seconds) and asks `wake_at` for the next alarm; this module never looks at a clock.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from weakref import ref

from router.core.budget import Budget, exceeded
from router.core.lane import Lane, Room
from router.core.section import Section, choose
from router.core.types import Block, Part
from router.errors import RouterError

# The heap is rebuilt when it holds this many entries more than twice the waiting blocks.
STALE_ENTRIES = 64
DEFAULT_WEIGHT = 1.0
DEFAULT_PATIENCE_S = 30.0
NO_WEIGHTS: Mapping[str, float] = {}
NO_BOUND = 2**63


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a batch of a key takes, of whom, and what of the key may wait.

    max_batch_rows, max_batch_bytes: of the largest batch, whichever is less. max_rows, max_bytes (None: no bound): what
    may wait; requeued rows may exceed it, since what was accepted is never refused later. weights: of tenants, 1 where
    nothing is said. patience_s: when waiting batch rows become due.
    """

    max_batch_rows: int
    max_rows: int
    max_batch_bytes: int = NO_BOUND
    max_bytes: int | None = None
    weights: Mapping[str, float] = field(default_factory=lambda: NO_WEIGHTS)
    patience_s: float = DEFAULT_PATIENCE_S


class KeyQueue:
    """The queue of one key. row_bytes: of each row; 0: nobody counts them."""

    lane_type = Lane

    def __init__(self, bounds: Bounds, *, row_bytes: int, budget: Budget) -> None:
        self._row_bytes = row_bytes
        self._budget = budget
        # State: the lanes that share batches, and those of tenants that do not; the only lane, while there is but one;
        # (deadline, tie-breaker, block), possibly of blocks that have left: weak, or their bytes would stay with them.
        self._common = Section(self._make_lane)
        self._apart: dict[str, Section] = {}
        self._sole: Lane | None = None
        self._deadlines: list[tuple[float, int, ref[Block]]] = []
        self._next_tie = itertools.count().__next__
        self.rows = 0
        # Rows and bytes of the key that wait elsewhere: they are in its bounds, too.
        self._other_rows = self._other_bytes = 0
        self.set_bounds(bounds)

    def __repr__(self) -> str:
        return f"<KeyQueue {self.rows} rows in {self.blocks} blocks>"

    def set_bounds(self, bounds: Bounds) -> None:
        """Change what a batch takes, from whom and what may wait; what waits already stays."""
        by_bytes = bounds.max_batch_bytes // self._row_bytes if self._row_bytes else bounds.max_batch_rows
        self.max_batch_rows = max(1, min(bounds.max_batch_rows, by_bytes))
        self._max_rows = bounds.max_rows
        self._max_bytes = math.inf if bounds.max_bytes is None else bounds.max_bytes
        self._set_most_rows()
        self._weights = bounds.weights
        self._patience_s = bounds.patience_s
        for lane in self._lanes():
            if lane.tenant is not None:
                lane.weight = self._weight(lane.tenant)

    def set_others(self, rows: int, nbytes: int) -> None:
        """So much of the key waits elsewhere from now on, in other books than these; its bounds are for all of it."""
        self._other_rows, self._other_bytes = rows, nbytes
        self._set_most_rows()

    def _set_most_rows(self) -> None:
        """Both bounds in rows, less what waits elsewhere."""
        left_bytes = self._max_bytes - self._other_bytes
        left_rows = self._max_rows - self._other_rows
        self._most_rows = min(left_rows, left_bytes // self._row_bytes) if self._row_bytes else left_rows

    def recount(self) -> None:
        """Tell the budget what waits of each tenant, after its bounds have changed."""
        for lane in self._lanes():
            lane.recount()

    @property
    def nbytes(self) -> int:
        """Bytes that wait here."""
        return self.rows * self._row_bytes

    @property
    def blocks(self) -> int:
        """Blocks that have rows waiting here."""
        lane = self._sole
        return len(lane.waiting) if lane is not None else sum(len(lane.waiting) for lane in self._lanes())

    @property
    def seats(self) -> int:
        """Rows that a batch holds."""
        return self.max_batch_rows

    @property
    def is_full(self) -> bool:
        """Whether a whole batch waits."""
        if self._apart:
            return any(section.rows >= self.max_batch_rows for section in self._sections())
        return self.rows >= self.max_batch_rows

    @property
    def oldest_at(self) -> float:
        """When the oldest row arrived; only while rows wait."""
        lane = self._sole
        return lane.oldest_at if lane is not None else min(lane.oldest_at for lane in self._lanes())

    def rows_ahead(self, tenant: str, is_batch_class: bool, rows: int) -> int:
        """How many rows go before the last of so many new ones of a tenant and class, as the lanes take turns.

        While it has its share of n rows, a lane of equal weight has n, too, or all that it holds. All interactive rows
        go before a batch row. A tenant's batches of its own count as full.
        """
        sole = self._sole
        if sole is not None and sole.tenant == tenant and sole.is_batch_class is is_batch_class:
            return sole.rows
        own = self._section(tenant)
        lane = own.turns(is_batch_class).find_place(tenant)
        ahead: float = lane.rows if lane is not None else 0
        weight = lane.weight if lane is not None else self._weight(tenant)
        share = self._whole(own, int(ahead) + rows) / weight
        for section in self._sections():
            for other in section.lanes:
                if other.is_batch_class is is_batch_class and other is not lane:
                    ahead += min(self._whole(section, other.rows), share * other.weight)
                elif is_batch_class and not other.is_batch_class:
                    ahead += self._whole(section, other.rows)
        return math.ceil(ahead)

    def _whole(self, section: Section, rows: int) -> int:
        """The seats that so many rows take of all batches: of a section apart those of whole batches."""
        return rows if section is self._common else -(-rows // self.seats) * self.seats

    # -- coming ------------------------------------------------------------------------------------------------------

    def push(self, block: Block) -> None:
        """Append a block.

        Raises:
            InvalidArgument: it could not wait here even if the queue were empty.
            ResourceExhausted: a bound is reached; nothing was taken.
        """
        rows = block.rows
        nbytes = rows * self._row_bytes
        lane, budget = self._sole, self._budget
        if (
            lane is None
            or lane.tenant != block.tenant
            or lane.is_batch_class is not block.is_batch_class
            or self.rows + rows > self._most_rows
            or budget.rows + rows > budget.max_rows
            or budget.used_bytes + nbytes > budget.max_bytes
            or budget.bounds_tenants
        ):
            self._enter(block, rows, nbytes)
            return
        # The rest is what `_enter` does, without a call: this is done for every block.
        lane.waiting[block] = None
        lane.rows += rows
        self.rows += rows
        budget.rows += rows
        budget.used_bytes += nbytes
        heappush(self._deadlines, (block.deadline, self._next_tie(), ref(block)))

    def _enter(self, block: Block, rows: int, nbytes: int) -> None:
        """Append a block to whatever lane it belongs in. Raises RouterError when it is refused."""
        refusal = self._refusal(block.tenant, rows, nbytes)
        if refusal is not None:
            raise refusal
        self._lane(block).add(block)
        self._count(rows, nbytes)
        self._watch(block)

    def _refusal(self, tenant: str, rows: int, nbytes: int) -> RouterError | None:
        """Why so much more cannot be taken; None: it can."""
        return (
            exceeded(rows, self.rows + self._other_rows, self._max_rows, "rows", " for one model", "queue_rows")
            or exceeded(
                nbytes, self.nbytes + self._other_bytes, self._max_bytes, "bytes", " for one model", "key_bytes"
            )
            or self._budget.refusal(tenant, rows, nbytes)
        )

    def requeue(self, parts: Iterable[Part]) -> None:
        """Put parts back at the heads of their lanes, before everything that is younger; no bound applies."""
        lanes: dict[tuple[str, bool], list[Part]] = {}
        for part in parts:
            lanes.setdefault((part.block.tenant, part.block.is_batch_class), []).append(part)
        for some in lanes.values():
            for block in self._lane(some[0].block).put_back(some):
                self._watch(block)
            self._count(sum(part.rows for part in some), sum(part.nbytes for part in some))

    # -- going -------------------------------------------------------------------------------------------------------

    def discard(self, block: Block) -> int:
        """Forget what waits of a block; the number of its rows that did."""
        lane = self._find(block)
        if lane is None:
            return 0
        rows, nbytes = lane.discard(block)
        self._count(-rows, -nbytes)
        self._settle(lane)
        return rows

    def keep(self, block: Block, runs: Sequence[tuple[int, int]]) -> None:
        """Forget what waits of a block but these rows (first row and rows of each run): nobody wants the rest."""
        lane = self._find(block)
        if lane is not None:
            rows, nbytes = lane.keep(block, runs)
            self._count(-rows, -nbytes)
            self._settle(lane)

    def pop_batch(self, now: float) -> tuple[Part, ...]:
        """Take the rows of the next batch, cutting blocks where a share or the batch ends."""
        lane, budget = self._sole, self._budget
        if lane is None or lane.tenant is None or budget.bounds_tenants:
            return self._pop_shared(now)
        taken: list[Part] = []
        rows = lane.move_rows(self.max_batch_rows, taken)
        lane.rows -= rows
        self.rows -= rows
        budget.rows -= rows
        budget.used_bytes -= rows * self._row_bytes
        if self.rows:
            self._drop_stale()
        else:
            self._deadlines.clear()
        return tuple(taken)

    def _pop_shared(self, now: float) -> tuple[Part, ...]:
        """The same where several lanes share the batch."""
        room = self._room()
        if self.rows:
            due_by = now - self._patience_s
            section = choose(self._sections(), due_by) if self._apart else self._common
            section.fill(room, due_by)
            self._sweep()
        self._count(-room.taken_rows, -room.taken_bytes)
        self._drop_stale()
        return tuple(room.parts)

    def _room(self) -> Room:
        return Room(self.max_batch_rows)

    def pop_expired(self, now: float) -> list[Block]:
        """Take the blocks whose deadline has come, the earliest first."""
        expired: list[Block] = []
        while self.wake_at <= now:
            block = heappop(self._deadlines)[2]()
            if block is not None and self.discard(block):
                expired.append(block)
        return expired

    def pop_infeasible(self, now: float, service_s: float, most: float = math.inf) -> list[Part]:
        """Take rows that a call of `service_s` would answer at their deadline or later, the earliest deadline first.

        most: rows, in all. Of a block that has more its last ones go.
        """
        infeasible: list[Part] = []
        while most > 0 and self.wake_at - service_s <= now:
            block = self._deadlines[0][2]()
            lane = None if block is None else self._find(block)
            assert block is not None, "the next deadline is of no block: this is a bug"
            assert lane is not None, "the next deadline is of no waiting row: this is a bug"
            parts = lane.take_last(block, most)
            rows = sum(part.rows for part in parts)
            self._count(-rows, -sum(part.nbytes for part in parts))
            self._settle(lane)
            infeasible += parts
            most -= rows
        return infeasible

    # -- deadlines ---------------------------------------------------------------------------------------------------

    @property
    def earliest_deadline(self) -> float:
        """No waiting block has an earlier one; infinity when none waits. At hand, where `wake_at` has to look."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    @property
    def wake_at(self) -> float:
        """The next deadline of a waiting block, which may be later than was noted; infinity when none waits."""
        while self._deadlines:
            deadline, _, its = self._deadlines[0]
            block = its()
            if block is not None and self._find(block) is not None:
                if block.deadline <= deadline:
                    return deadline
                self._watch(block)
            heappop(self._deadlines)
        return math.inf

    def _watch(self, block: Block) -> None:
        heappush(self._deadlines, (block.deadline, self._next_tie(), ref(block)))

    def _drop_stale(self) -> None:
        """Keep the heap in proportion to what waits."""
        if not self.rows:
            self._deadlines.clear()
        elif len(self._deadlines) > 2 * self.blocks + STALE_ENTRIES:
            self._deadlines = [entry for entry in self._deadlines if self._waits(entry[2]())]
            heapify(self._deadlines)

    def _waits(self, block: Block | None) -> bool:
        return block is not None and self._find(block) is not None

    # -- lanes -------------------------------------------------------------------------------------------------------

    def separate(self, tenant: str) -> None:
        """From now on the tenant's rows share no batch with others'; it gets its share of the batches, not of each."""
        if tenant not in self._apart:
            self._apart[tenant] = Section(self._make_lane)
            self._move(tenant, self._common, self._apart[tenant])

    def rejoin(self, tenant: str) -> None:
        """Take `separate` back."""
        section = self._apart.pop(tenant, None)
        if section is not None:
            self._move(tenant, section, self._common)

    def _move(self, tenant: str, section: Section, other: Section) -> None:
        for is_batch_class in (False, True):
            lane = section.turns(is_batch_class).find(tenant)
            if lane is not None and lane.rows:
                blocks = [block for block in lane.waiting if block.tenant == tenant]
                lane.move(blocks, other.turns(is_batch_class).lane(tenant))
            section.turns(is_batch_class).sweep()
        self._find_sole()

    def _sections(self) -> list[Section]:
        return [self._common, *self._apart.values()]

    def _section(self, tenant: str) -> Section:
        return self._apart.get(tenant, self._common) if self._apart else self._common

    def _lanes(self) -> Iterator[Lane]:
        return itertools.chain.from_iterable(section.lanes for section in self._sections())

    def _make_lane(self, tenant: str | None, is_batch_class: bool) -> Lane:
        weight = DEFAULT_WEIGHT if tenant is None else self._weight(tenant)
        return self.lane_type(tenant, is_batch_class=is_batch_class, weight=weight, budget=self._budget)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, DEFAULT_WEIGHT)

    def _lane(self, block: Block) -> Lane:
        """The lane that the block's rows must wait in; about to hold some."""
        if not self.rows:
            self._sweep()  # the one that may have stayed
        lane = self._section(block.tenant).turns(block.is_batch_class).lane(block.tenant)
        if not self.rows:
            self._sole = lane
        elif lane is not self._sole:
            self._sole = None
        return lane

    def _find(self, block: Block) -> Lane | None:
        """The lane that the block waits in; None: it does not."""
        lane = self._sole
        if lane is None:
            lane = self._section(block.tenant).turns(block.is_batch_class).find(block.tenant)
        return lane if lane is not None and block in lane.waiting else None

    def _settle(self, lane: Lane) -> None:
        """After rows have left a lane otherwise than in a batch."""
        if not lane.rows and lane is not self._sole:
            self._sweep()
        self._drop_stale()

    def _sweep(self) -> None:
        """Forget the lanes that are empty."""
        for section in self._sections():
            section.interactive.sweep()
            section.batch.sweep()
        self._find_sole()

    def _find_sole(self) -> None:
        lanes = list(self._lanes())
        self._sole = lanes[0] if len(lanes) == 1 else None
        if self._sole is not None:
            self._sole.credit, self._sole.has_turn = 0.0, False

    def _count(self, rows: int, nbytes: int) -> None:
        self.rows += rows
        self._budget.rows += rows
        self._budget.used_bytes += nbytes
