"""The waiting rows of one key: first in, first out, with deadlines and bounds.

Theory of operation. Blocks wait in the order of arrival, each whole, or as the list of its parts that are still here
once a batch boundary has cut it or a lost batch has brought rows back. Requeued rows return to the head, since
they are older than everything behind them. Deadlines stand in a heap beside the line; entries of blocks that have left
stay in it until they surface or outnumber the living. Whoever is taken, discarded or expired is gone from the counts
at once.

The caller passes `now` (monotonic seconds) and asks `wake_at` for the next alarm; this module never looks at a clock.
"""

import heapq
import itertools
import math
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from router.core.types import Block, Part
from router.errors import InvalidArgument, ResourceExhausted

# The heap is rebuilt when it holds this many entries more than twice the waiting blocks.
STALE_ENTRIES = 64


class Budget:
    """Bytes that all queues of a process may hold together, and the rows that they hold."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.rows = 0


class KeyQueue:
    """The queue of one key.

    max_batch_rows: rows of the largest batch. max_rows: rows that may wait here; requeued ones may exceed it, since
    what was accepted is never refused later.
    """

    def __init__(self, *, max_batch_rows: int, max_rows: int, budget: Budget) -> None:
        self.max_batch_rows = max_batch_rows
        self._max_rows = max_rows
        self._budget = budget
        # Blocks by arrival, each with its waiting parts by row, never an empty list; None: all of it, never tried. A
        # block nearly always comes and goes so, and then its part is made once, when it goes.
        self._waiting: OrderedDict[Block, list[Part] | None] = OrderedDict()
        # (deadline, tie-breaker, block), possibly of blocks that have left: weak, or their bytes would stay with them.
        self._deadlines: list[tuple[float, int, weakref.ref[Block]]] = []
        self._ties = itertools.count()
        self.rows = 0

    def __repr__(self) -> str:
        return f"<KeyQueue {self.rows} rows in {self.blocks} blocks>"

    def set_bounds(self, *, max_batch_rows: int, max_rows: int) -> None:
        """Change what a batch takes and what may wait; what waits already stays."""
        self.max_batch_rows = max_batch_rows
        self._max_rows = max_rows

    @property
    def blocks(self) -> int:
        """Blocks that have rows waiting here."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether a whole batch waits."""
        return self.rows >= self.max_batch_rows

    @property
    def oldest_at(self) -> float:
        """When the row at the head arrived; only while rows wait."""
        return next(iter(self._waiting)).arrived_at

    def push(self, block: Block) -> None:
        """Append a block.

        Raises:
            InvalidArgument: it could not wait here even if the queue were empty.
            ResourceExhausted: a bound is reached; nothing was taken.
        """
        budget, rows, nbytes = self._budget, block.rows, block.rows * block.row_bytes
        if self.rows + rows > self._max_rows or budget.used_bytes + nbytes > budget.max_bytes:
            raise self._refusal(rows, nbytes)
        self._waiting[block] = None
        self.rows += rows
        budget.rows += rows
        budget.used_bytes += nbytes
        heapq.heappush(self._deadlines, (block.deadline, next(self._ties), weakref.ref(block)))

    def _refusal(self, rows: int, nbytes: int) -> InvalidArgument | ResourceExhausted:
        """Why so much cannot be taken."""
        budget = self._budget
        if rows > self._max_rows:
            return InvalidArgument(f"{rows} rows at once; at most {self._max_rows} may wait for one model")
        if self.rows + rows > self._max_rows:
            return ResourceExhausted(f"{self.rows} rows wait already, {self._max_rows} may", reason="queue_rows")
        if nbytes > budget.max_bytes:
            return InvalidArgument(f"{nbytes} bytes at once; at most {budget.max_bytes} may wait in all")
        message = f"{budget.used_bytes} bytes wait already, {budget.max_bytes} may"
        return ResourceExhausted(message, reason="queue_bytes")

    def requeue(self, parts: Iterable[Part]) -> None:
        """Put parts back at the head, in their order, before everything that waits; no bound applies."""
        for part in reversed(list(parts)):
            rest = self._waiting.get(part.block)
            if rest is None:  # nothing of it waits: what was sent is not here as a whole any more
                self._waiting[part.block] = rest = []
                self._watch(part.block)
            rest.append(part)
            rest.sort(key=lambda one: one.first)
            self._waiting.move_to_end(part.block, last=False)
            self._count(part.rows, part.nbytes)

    def discard(self, block: Block) -> int:
        """Forget what waits of a block; the number of its rows that did."""
        if block not in self._waiting:
            return 0
        parts = self._waiting.pop(block)
        rows = block.rows if parts is None else sum(part.rows for part in parts)
        self._count(-rows, -rows * block.row_bytes)
        self._drop_stale()
        return rows

    def keep(self, block: Block, runs: Sequence[tuple[int, int]]) -> None:
        """Forget what waits of a block but these rows (first row and rows of each run): nobody wants the rest."""
        if block not in self._waiting:
            return
        parts = self._waiting[block] or [block.whole()]
        kept = [piece for part in parts for run in runs if (piece := part.within(*run))]
        if not kept:
            self.discard(block)
            return
        self._waiting[block] = kept
        self._count(
            sum(part.rows for part in kept) - sum(part.rows for part in parts),
            sum(part.nbytes for part in kept) - sum(part.nbytes for part in parts),
        )

    def pop_batch(self) -> tuple[Part, ...]:
        """Take the rows of the next batch from the head, cutting the last block where the batch is full."""
        waiting = self._waiting
        taken: list[Part] = []
        room = self.max_batch_rows
        nbytes = 0
        while room and waiting:
            block, parts = next(iter(waiting.items()))
            if parts is None and block.rows <= room:
                del waiting[block]
                part = Part(block, 0, block.rows, 0)
            else:
                part = self._pop_part(block, parts or [block.whole()], room)
            room -= part.rows
            nbytes += part.rows * block.row_bytes
            taken.append(part)
        self._count(room - self.max_batch_rows, -nbytes)
        self._drop_stale()
        return tuple(taken)

    def _pop_part(self, block: Block, parts: list[Part], room: int) -> Part:
        """Take the first part of the block at the head, cut where the room ends."""
        part = parts.pop(0)
        if part.rows > room:
            part, rest = part.cut(room)
            parts.insert(0, rest)
        if parts:
            self._waiting[block] = parts
        else:
            del self._waiting[block]
        return part

    def pop_expired(self, now: float) -> list[Block]:
        """Take the blocks whose deadline has come, the earliest first; it may have become later since it was noted."""
        expired: list[Block] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            block = heapq.heappop(self._deadlines)[2]()
            if block is not None and block.deadline > now:
                self._watch(block)
            elif block is not None and self.discard(block):
                expired.append(block)
        return expired

    @property
    def wake_at(self) -> float:
        """The next deadline of a waiting block; infinity when none waits."""
        while self._deadlines and self._deadlines[0][2]() not in self._waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    def _watch(self, block: Block) -> None:
        heapq.heappush(self._deadlines, (block.deadline, next(self._ties), weakref.ref(block)))

    def _drop_stale(self) -> None:
        """Keep the heap in proportion to what waits."""
        if not self._waiting:
            self._deadlines.clear()
        elif len(self._deadlines) > 2 * len(self._waiting) + STALE_ENTRIES:
            self._deadlines = [entry for entry in self._deadlines if entry[2]() in self._waiting]
            heapq.heapify(self._deadlines)

    def _count(self, rows: int, nbytes: int) -> None:
        self.rows += rows
        self._budget.rows += rows
        self._budget.used_bytes += nbytes
