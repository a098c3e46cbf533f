"""The waiting rows of a key without a common width: a batch closes at its rows or at its bytes, whichever comes first.

Where all rows are equally wide, bytes are rows, and `KeyQueue` counts those only.
"""

from collections.abc import Mapping

from router.core.budget import Budget
from router.core.lane import Lane, Room
from router.core.queue import DEFAULT_PATIENCE_S, NO_WEIGHTS, KeyQueue
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
    """A KeyQueue for the blocks of `variable`; `max_batch_bytes`: of the largest batch."""

    lane_type = VariableLane

    def __init__(
        self,
        *,
        max_batch_rows: int,
        max_batch_bytes: int,
        max_rows: int,
        budget: Budget,
        max_bytes: int | None = None,
        weights: Mapping[str, float] = NO_WEIGHTS,
        patience_s: float = DEFAULT_PATIENCE_S,
    ) -> None:
        super().__init__(
            max_batch_rows=max_batch_rows,
            max_rows=max_rows,
            row_bytes=0,
            budget=budget,
            max_bytes=max_bytes,
            weights=weights,
            patience_s=patience_s,
        )
        self.max_batch_bytes = max_batch_bytes
        self._nbytes = 0

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


def make_queue(
    key: BatchKey,
    *,
    max_batch_rows: int,
    max_batch_bytes: int,
    max_rows: int,
    budget: Budget,
    max_bytes: int | None = None,
    weights: Mapping[str, float] = NO_WEIGHTS,
    patience_s: float = DEFAULT_PATIENCE_S,
) -> KeyQueue:
    """The queue that fits a key's rows."""
    if key.is_variable:
        return VariableQueue(
            max_batch_rows=max_batch_rows,
            max_batch_bytes=max_batch_bytes,
            max_rows=max_rows,
            budget=budget,
            max_bytes=max_bytes,
            weights=weights,
            patience_s=patience_s,
        )
    return KeyQueue(
        max_batch_rows=_batch_rows(key, max_batch_rows, max_batch_bytes),
        max_rows=max_rows,
        budget=budget,
        max_bytes=max_bytes,
        row_bytes=key.row_bytes,
        weights=weights,
        patience_s=patience_s,
    )


def set_bounds(
    queue: KeyQueue,
    key: BatchKey,
    *,
    max_batch_rows: int,
    max_batch_bytes: int,
    max_rows: int,
    max_bytes: int | None,
    weights: Mapping[str, float],
    patience_s: float,
) -> None:
    """Change the bounds that `make_queue` gave."""
    if isinstance(queue, VariableQueue):
        queue.max_batch_bytes = max_batch_bytes
    else:
        max_batch_rows = _batch_rows(key, max_batch_rows, max_batch_bytes)
    queue.set_bounds(
        max_batch_rows=max_batch_rows, max_rows=max_rows, max_bytes=max_bytes, weights=weights, patience_s=patience_s
    )


def _batch_rows(key: BatchKey, max_batch_rows: int, max_batch_bytes: int) -> int:
    """Rows of the largest batch where all are equally wide."""
    return max(1, min(max_batch_rows, max_batch_bytes // key.row_bytes))
