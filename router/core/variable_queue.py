"""The waiting rows of a key without a common width: a batch closes at its rows or at its bytes, whichever comes first.

Where all rows are equally wide, bytes are rows, and `KeyQueue` counts those only.
"""

from router.core.queue import Budget, KeyQueue
from router.core.types import BatchKey, Block, Part
from router.core.variable import VariablePart


class VariableQueue(KeyQueue):
    """A KeyQueue for the blocks of `variable`; `max_batch_bytes`: of the largest batch."""

    def __init__(self, *, max_batch_rows: int, max_batch_bytes: int, max_rows: int, budget: Budget) -> None:
        super().__init__(max_batch_rows=max_batch_rows, max_rows=max_rows, budget=budget)
        self.max_batch_bytes = max_batch_bytes
        self.nbytes = 0

    @property
    def is_full(self) -> bool:
        """Whether a whole batch waits: nothing that comes could still go with it."""
        return self.rows >= self.max_batch_rows or self.nbytes >= self.max_batch_bytes

    def push(self, block: Block) -> None:
        """See KeyQueue."""
        part, budget = block.whole(), self._budget
        if self.rows + part.rows > self._max_rows or budget.used_bytes + part.nbytes > budget.max_bytes:
            raise self._refusal(part.rows, part.nbytes)
        self._waiting[block] = [part]
        self._count(part.rows, part.nbytes)
        self._watch(block)

    def discard(self, block: Block) -> int:
        """See KeyQueue."""
        parts = self._waiting.pop(block, None) or ()
        rows = sum(part.rows for part in parts)
        self._count(-rows, -sum(part.nbytes for part in parts))
        self._drop_stale()
        return rows

    def pop_batch(self) -> tuple[Part, ...]:
        """See KeyQueue; the last block is cut before the row that does not fit. A row that never fits goes alone."""
        taken: list[Part] = []
        room, room_bytes = self.max_batch_rows, self.max_batch_bytes
        while room and self._waiting:
            block, parts = next(iter(self._waiting.items()))
            fitting = _first(parts).rows_within(room_bytes)
            if taken and not fitting:
                break
            part = self._pop_part(block, parts or [], min(room, max(fitting, 1)))
            room -= part.rows
            room_bytes -= part.nbytes
            taken.append(part)
        self._count(room - self.max_batch_rows, room_bytes - self.max_batch_bytes)
        self._drop_stale()
        return tuple(taken)

    def _count(self, rows: int, nbytes: int) -> None:
        super()._count(rows, nbytes)
        self.nbytes += nbytes


def _first(parts: list[Part] | None) -> VariablePart:
    part = parts[0] if parts else None
    assert isinstance(part, VariablePart), "a block of fixed width in a queue of others: this is a bug"
    return part


def make_queue(key: BatchKey, *, max_batch_rows: int, max_batch_bytes: int, max_rows: int, budget: Budget) -> KeyQueue:
    """The queue that fits a key's rows."""
    if key.is_variable:
        return VariableQueue(
            max_batch_rows=max_batch_rows, max_batch_bytes=max_batch_bytes, max_rows=max_rows, budget=budget
        )
    rows = _batch_rows(key, max_batch_rows, max_batch_bytes)
    return KeyQueue(max_batch_rows=rows, max_rows=max_rows, budget=budget)


def set_bounds(queue: KeyQueue, key: BatchKey, *, max_batch_rows: int, max_batch_bytes: int, max_rows: int) -> None:
    """Change the bounds that `make_queue` gave."""
    if isinstance(queue, VariableQueue):
        queue.max_batch_bytes = max_batch_bytes
        queue.set_bounds(max_batch_rows=max_batch_rows, max_rows=max_rows)
    else:
        queue.set_bounds(max_batch_rows=_batch_rows(key, max_batch_rows, max_batch_bytes), max_rows=max_rows)


def _batch_rows(key: BatchKey, max_batch_rows: int, max_batch_bytes: int) -> int:
    """Rows of the largest batch where all are equally wide."""
    return max(1, min(max_batch_rows, max_batch_bytes // key.row_bytes))
