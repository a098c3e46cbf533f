"""The waiting rows of a key without a common width: a batch closes at its rows or at its bytes, whichever comes first.

Where all rows are equally wide, bytes are rows, and `KeyQueue` counts those only.
"""

from router.core.budget import Budget
from router.core.lane import Lane, Room
from router.core.queue import Bounds, KeyQueue
from router.core.types import BatchKey, Block, Part
from router.core.variable import VariablePart


class VariableLane(Lane):
    """A Lane for the blocks of `variable`. What waits of a block is a list from the beginning: its bytes are in it."""

    __slots__ = ()

    def add(self, block: Block) -> None:
        """See Lane."""
        part = block.whole()
        self.waiting[block] = [part]
        self.count(block.tenant, part.rows, part.nbytes)

    def take(self, most: int, room: Room) -> int:
        """See Lane; the last block is cut before the row that does not fit. A row that never fits goes alone."""
        begin, left = len(room.parts), most
        is_closed = False
        while left and self.waiting and not is_closed:
            fitting = self._count_fitting(room)
            is_closed = not fitting and bool(room.parts)
            if not is_closed:
                block, parts = self.waiting.popitem(last=False)
                part = self._take_part(block, parts or [], min(left, max(fitting, 1)))
                left -= part.rows
                room.taken_bytes += part.nbytes
                room.parts.append(part)
        rows = most - left
        room.taken_rows += rows
        room.rows = 0 if is_closed else room.rows - rows
        self.took(room.parts[begin:])
        return rows

    def _count_fitting(self, room: Room) -> int:
        """How many rows of the part at the head fit."""
        parts = next(iter(self.waiting.values()))
        part = parts[0] if parts else None
        assert isinstance(part, VariablePart), "a block of fixed width in a queue of others: this is a bug"
        return part.rows_within(int(room.max_bytes) - room.taken_bytes)


class VariableQueue(KeyQueue):
    """A KeyQueue for the blocks of `variable`."""

    lane_type = VariableLane

    def __init__(self, bounds: Bounds, *, budget: Budget) -> None:
        super().__init__(bounds, row_bytes=0, budget=budget)
        self._nbytes = 0

    def set_bounds(self, bounds: Bounds) -> None:
        """See KeyQueue."""
        super().set_bounds(bounds)
        self.max_batch_bytes = bounds.max_batch_bytes

    @property
    def nbytes(self) -> int:
        """See KeyQueue."""
        return self._nbytes

    @property
    def seats(self) -> int:
        """See KeyQueue; as wide as the waiting rows are on the average."""
        by_bytes = self.rows * self.max_batch_bytes // self._nbytes if self._nbytes else self.max_batch_rows
        return min(self.max_batch_rows, max(by_bytes, 1))

    @property
    def is_full(self) -> bool:
        """Whether a whole batch waits: nothing that comes could still go with it."""
        return super().is_full or self._nbytes >= self.max_batch_bytes

    def push(self, block: Block) -> None:
        """See KeyQueue."""
        part = block.whole()
        self._enter(block, part.rows, part.nbytes)

    def pop_batch(self, now: float) -> tuple[Part, ...]:
        """See KeyQueue."""
        return self._pop_shared(now)

    def _room(self) -> Room:
        return Room(self.max_batch_rows, self.max_batch_bytes)

    def _count(self, rows: int, nbytes: int) -> None:
        super()._count(rows, nbytes)
        self._nbytes += nbytes


def make_queue(key: BatchKey, bounds: Bounds, budget: Budget) -> KeyQueue:
    """The queue that fits a key's rows."""
    if key.is_variable:
        return VariableQueue(bounds, budget=budget)
    return KeyQueue(bounds, row_bytes=key.row_bytes, budget=budget)
