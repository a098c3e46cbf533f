"""A lane: the waiting blocks of one tenant and class, first in, first out; and the room of the batch that takes them.

Blocks wait in the order of arrival, each whole, or as the list of its parts that are still here once the end of a share
or of a batch has cut it, or a lost batch has brought rows back. Requeued rows go to the head by their age. A lane of
each class may be shared, by tenants for whom there is none of their own.

A lane counts its rows, and what waits of its tenants; what that adds up to, its queue counts.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile

from router.core.budget import Budget
from router.core.types import Block, Part


class Room:
    """What a batch has room for, and what it has taken. No `rows` of room: it is closed."""

    __slots__ = ("max_bytes", "parts", "rows", "taken_bytes", "taken_rows")

    def __init__(self, rows: int, max_bytes: float = math.inf) -> None:
        self.rows = rows
        self.max_bytes = max_bytes
        self.parts: list[Part] = []
        self.taken_rows = 0
        self.taken_bytes = 0


class Lane:
    """The rows of one tenant and class; of several tenants where `tenant` is None.

    `credit`: rows that may still go; `round`: in which it had its last turn; `has_turn`: whether that still goes on.
    They belong to `turns.Turns`, as does the `weight`.
    """

    __slots__ = (
        "_budget",
        "credit",
        "has_turn",
        "is_batch_class",
        "members",
        "round",
        "rows",
        "tenant",
        "waiting",
        "weight",
    )

    def __init__(self, tenant: str | None, *, is_batch_class: bool, weight: float, budget: Budget) -> None:
        self.tenant = tenant
        self.is_batch_class = is_batch_class
        self.weight = weight
        self._budget = budget
        # State: blocks by arrival, each with its waiting parts by row, never an empty list; None: all of it, never
        # tried. A block nearly always comes and goes so, and then its part is made once, when it goes. Rows of all of
        # them; of a shared lane, by tenant; its standing in the round.
        self.waiting: OrderedDict[Block, list[Part] | None] = OrderedDict()
        self.rows = 0
        self.members: Counter[str] = Counter()
        self.credit = 0.0
        self.has_turn = False
        self.round = 0

    def __repr__(self) -> str:
        return f"<Lane {self.tenant!r}: {self.rows} rows in {len(self.waiting)} blocks>"

    @property
    def oldest_at(self) -> float:
        """When the row at the head arrived; only while rows wait."""
        return next(iter(self.waiting)).arrived_at

    def count_until(self, latest: float, most: int) -> int:
        """Rows at the head that arrived at `latest` or before, not counted on from `most`."""
        rows = 0
        for block, parts in self.waiting.items():
            if block.arrived_at > latest or rows >= most:
                break
            rows += measure(block, parts)[0]
        return rows

    # -- coming ------------------------------------------------------------------------------------------------------

    def add(self, block: Block) -> None:
        """Append a block."""
        self.waiting[block] = None
        self.count(block.tenant, block.rows, block.rows * block.row_bytes)

    def put_back(self, parts: Sequence[Part]) -> list[Block]:
        """Rows return to the head, by age; the blocks of which nothing waited."""
        returned = []
        for part in parts:
            rest = self.waiting.get(part.block)
            if rest is None:  # nothing of it waits: what was sent is not here as a whole any more
                self.waiting[part.block] = rest = []
                returned.append(part.block)
            rest.append(part)
            rest.sort(key=lambda one: one.first)
            self.count(part.block.tenant, part.rows, part.nbytes)
        self.lead(dict.fromkeys(part.block for part in parts))
        return returned

    def move(self, blocks: Collection[Block], other: "Lane") -> None:
        """Blocks that wait here go to another lane, to their place there by age."""
        for block in blocks:
            parts = self.waiting.pop(block)
            rows, nbytes = measure(block, parts)
            self.count(block.tenant, -rows, -nbytes)
            other.waiting[block] = parts
            other.count(block.tenant, rows, nbytes)
        other.lead(blocks)

    def lead(self, blocks: Collection[Block]) -> None:
        """Move blocks to the head, behind those only that are older."""
        newest_at = max((block.arrived_at for block in blocks), default=-math.inf)
        older = list(takewhile(lambda block: block.arrived_at < newest_at, self.waiting))
        in_order = sorted(dict.fromkeys([*blocks, *older]), key=lambda block: block.arrived_at)
        for block in reversed(in_order):
            self.waiting.move_to_end(block, last=False)

    # -- going -------------------------------------------------------------------------------------------------------

    def take(self, most: int, room: Room) -> int:
        """Move up to `most` rows from the head into the room, cutting the last block; how many it were."""
        begin = len(room.parts)
        rows = self.move_rows(most, room.parts)
        nbytes = sum(part.nbytes for part in room.parts[begin:])
        room.rows -= rows
        room.taken_rows += rows
        room.taken_bytes += nbytes
        self.took(room.parts[begin:])
        return rows

    def move_rows(self, most: int, taken: list[Part]) -> int:
        """The same, uncounted."""
        waiting, left = self.waiting, most
        while left and waiting:
            block, parts = waiting.popitem(last=False)
            if parts is None and (rows := block.rows) <= left:
                left -= rows
                taken.append(Part(block, 0, rows, 0))
            else:
                part = self._take_part(block, parts or [block.whole()], left)
                left -= part.rows
                taken.append(part)
        return most - left

    def _take_part(self, block: Block, parts: list[Part], most: int) -> Part:
        """The first part of the block that was at the head, cut to `most` rows; the rest is the head again."""
        part = parts.pop(0)
        if part.rows > most:
            part, rest = part.cut(most)
            parts.insert(0, rest)
        if parts:
            self.waiting[block] = parts
            self.waiting.move_to_end(block, last=False)
        return part

    def take_last(self, block: Block, most: float) -> list[Part]:
        """Take the last rows of a waiting block, up to `most`, in their order."""
        parts = self.waiting[block] or [block.whole()]
        taken: list[Part] = []
        while most and parts:
            part = parts.pop()
            if part.rows > most:
                rest, part = part.cut(part.rows - int(most))
                parts.append(rest)
            most -= part.rows
            taken.insert(0, part)
            self.count(block.tenant, -part.rows, -part.nbytes)
        if parts:
            self.waiting[block] = parts
        else:
            del self.waiting[block]
        return taken

    def discard(self, block: Block) -> tuple[int, int]:
        """Forget what waits of a block; rows and bytes."""
        rows, nbytes = measure(block, self.waiting.pop(block))
        self.count(block.tenant, -rows, -nbytes)
        return rows, nbytes

    def keep(self, block: Block, runs: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """Forget what waits of a block but these rows (first row and rows of each run); rows and bytes that went."""
        parts = self.waiting[block] or [block.whole()]
        kept = [piece for part in parts for run in runs if (piece := part.within(*run))]
        (rows, nbytes), (kept_rows, kept_bytes) = measure(block, parts), measure(block, kept)
        self.count(block.tenant, kept_rows - rows, kept_bytes - nbytes)
        if kept:
            self.waiting[block] = kept
        else:
            del self.waiting[block]
        return rows - kept_rows, nbytes - kept_bytes

    # -- counting ----------------------------------------------------------------------------------------------------

    def count(self, tenant: str, rows: int, nbytes: int) -> None:
        """So much of a tenant's has come, or gone if negative."""
        self.rows += rows
        if self.tenant is None:
            self.members[tenant] += rows
            if not self.members[tenant]:
                del self.members[tenant]
        self._budget.count_tenant(tenant, rows, nbytes)

    def recount(self) -> None:
        """Tell the budget what waits of each tenant."""
        for block, parts in self.waiting.items():
            self._budget.count_tenant(block.tenant, *measure(block, parts))

    def took(self, parts: Iterable[Part]) -> None:
        """These parts have gone."""
        for part in parts:
            self.count(part.block.tenant, -part.rows, -part.nbytes)


def measure(block: Block, parts: Iterable[Part] | None) -> tuple[int, int]:
    """Rows and bytes of what waits of a block; None: all of it."""
    if parts is None:
        return block.rows, block.rows * block.row_bytes
    rows = nbytes = 0
    for part in parts:
        rows += part.rows
        nbytes += part.nbytes
    return rows, nbytes
