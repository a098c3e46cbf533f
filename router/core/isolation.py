"""Find the bad rows of a refused batch: which of its rows travel by themselves, until only the bad ones are left.

Theory of operation. A refused batch is cut into pieces of consecutive rows, each of which is sent; those that are
refused are cut again, down to single rows, and a single row that is refused is bad. Pieces of one cut are a group.
While pieces may use few slots at once they are halves: about two calls for each halving, in turn. With four slots or
more they are eighths, which are sent at the same time: two rounds for 64 rows instead of six. In both ways one bad row
among 64 costs at most 16 calls more, among 8 at most 8.

What is known saves calls: when all pieces of a group but one were good, the last holds the bad row. If it still waits
it is cut at once, without being sent; a single row is sent nevertheless, for a model may refuse without a reason that
comes again, and no row fails untried. Nothing is known once a bad piece was found (others may be bad, too), or rows
left before they were sent (they may have been it).

Pieces wait in a lane, where deadlines and cancels reach them. Their rows are in the books of the queue's budget.

Whoever runs this sends pieces when slots allow, and tells how they come back. It knows no slots, no time but `now`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from router.core.budget import Budget
from router.core.retry import Verdict, count_rows
from router.core.types import Block, Part

# From so many slots on pieces are eighths.
SLOTS_FOR_EIGHTHS = 4


@dataclass(slots=True, eq=False)
class Group:
    """The pieces of one cut. `open`: those that have not come back; `is_explained`: nothing follows from the others."""

    open: "list[Piece]" = field(default_factory=list)
    is_explained: bool = False

    @property
    def culprit(self) -> "Piece | None":
        """The piece that must hold the bad row."""
        return self.open[0] if len(self.open) == 1 and not self.is_explained else None


@dataclass(slots=True, eq=False)
class Piece:
    """Rows that travel by themselves, exactly these.

    `born_at`: when the batch was formed that they came from. `is_split`: they are fewer than that batch, and take only
    a share of the slots. `avoid`: the replica that had them before, where another one shall judge.
    """

    parts: tuple[Part, ...]
    born_at: float
    is_split: bool
    group: Group | None = None
    avoid: str | None = None

    @property
    def rows(self) -> int:
        """How many they are."""
        return count_rows(self.parts)


@dataclass(slots=True)
class Ruling:
    """What is to be done. requeue: parts for the head of the queue. enter, leave: pieces that wait from now on, or not
    any more."""

    requeue: tuple[Part, ...] = ()
    enter: list[Piece] = field(default_factory=list)
    leave: list[Piece] = field(default_factory=list)
    splits: int = 0


class Isolation:
    """The pieces of one key."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        # State: the pieces that wait, by block; the rows and bytes in them; no deadline of theirs is earlier than
        # `wake_at`.
        self._waiting: dict[Block, dict[Piece, None]] = {}
        self.rows = self.nbytes = 0
        self.wake_at = math.inf

    def __repr__(self) -> str:
        return f"<Isolation {self.rows} rows wait>"

    # -- how batches and pieces come back ----------------------------------------------------------------------------

    def failed(
        self, piece: Piece | None, verdict: Verdict, *, formed_at: float, sent_rows: int, replica: str, slots: int
    ) -> Ruling:
        """Follow a verdict on a batch of `sent_rows`; `piece`: what it was, None for a batch of the queue.

        slots: that pieces may use at once.
        """
        born_at = piece.born_at if piece else formed_at
        ruling = Ruling()
        if verdict.elsewhere:
            ruling.enter.append(_elsewhere(piece, verdict.elsewhere, born_at, replica))
        elif verdict.again and piece and piece.is_split:
            ruling.enter.append(_changed(piece, verdict.again))
        else:
            ruling.requeue = verdict.again
            _close(piece)
        if verdict.split:
            is_whole = count_rows(verdict.split) == sent_rows
            self._cut(ruling, verdict.split, born_at, slots, is_explained=not is_whole)
        ruling.enter += [Piece(row, born_at, is_split=True) for row in _cut_evenly(verdict.alone, math.inf)]
        self._enter(ruling.enter)
        return ruling

    def answered(self, piece: Piece, slots: int) -> Ruling:
        """A piece was good; the last of its group may be known to be bad by that."""
        ruling = Ruling()
        group = piece.group
        if group is None:
            return ruling
        group.open.remove(piece)
        culprit = group.culprit
        if culprit and culprit.rows > 1 and self._is_waiting(culprit):
            group.open.clear()
            ruling.leave.append(culprit)
            self._cut(ruling, self.take(culprit), culprit.born_at, slots, is_explained=False)
            self._enter(ruling.enter)
        return ruling

    def _cut(self, ruling: Ruling, parts: tuple[Part, ...], born_at: float, slots: int, *, is_explained: bool) -> None:
        ruling.splits += 1
        group = Group(is_explained=is_explained)
        pieces = 8 if slots >= SLOTS_FOR_EIGHTHS else 2
        group.open = [Piece(cut, born_at, is_split=True, group=group) for cut in _cut_evenly(parts, pieces)]
        ruling.enter += group.open

    # -- waiting -----------------------------------------------------------------------------------------------------

    def take(self, piece: Piece) -> tuple[Part, ...]:
        """A waiting piece's rows: they are sent, or cut."""
        for part in piece.parts:
            self._forget(part.block, piece)
        self._count(piece.parts, -1)
        return piece.parts

    def discard(self, block: Block) -> list[Piece]:
        """Forget what waits of a block; the pieces that are empty by that."""
        emptied: list[Piece] = []
        held = self._waiting.pop(block, {})
        if not self._waiting:
            self.wake_at = math.inf
        for piece in held:
            self._count([part for part in piece.parts if part.block is block], -1)
            _changed(piece, tuple(part for part in piece.parts if part.block is not block))
            if not piece.parts:
                _close(piece)
                emptied.append(piece)
        return emptied

    def expired(self, now: float) -> list[Block]:
        """The blocks whose deadline has come; they wait on until they are discarded."""
        if now < self.wake_at:
            return []
        self.wake_at = min((block.deadline for block in self._waiting if block.deadline > now), default=math.inf)
        return [block for block in self._waiting if block.deadline <= now]

    def recount(self) -> None:
        """Tell the budget what waits of each tenant, after its bounds have changed."""
        for block, held in self._waiting.items():
            for part in [part for piece in held for part in piece.parts if part.block is block]:
                self._budget.count_tenant(block.tenant, part.rows, part.nbytes)

    def _enter(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self._count(piece.parts, 1)
            for part in piece.parts:
                self._waiting.setdefault(part.block, {})[piece] = None
                self.wake_at = min(self.wake_at, part.block.deadline)

    def _is_waiting(self, piece: Piece) -> bool:
        return piece in self._waiting.get(piece.parts[0].block, ())

    def _forget(self, block: Block, piece: Piece) -> None:
        held = self._waiting.get(block, {})
        held.pop(piece, None)
        if not held:
            self._waiting.pop(block, None)
            if not self._waiting:
                self.wake_at = math.inf

    def _count(self, parts: Iterable[Part], sign: int) -> None:
        for part in parts:
            rows, nbytes = sign * part.rows, sign * part.nbytes
            self.rows += rows
            self.nbytes += nbytes
            self._budget.count(part.block.tenant, rows, nbytes)


def _elsewhere(piece: Piece | None, parts: tuple[Part, ...], born_at: float, replica: str) -> Piece:
    """The same rows for another replica; a piece keeps its place."""
    if piece is None:
        return Piece(parts, born_at, is_split=False, avoid=replica)
    piece.avoid = replica
    return _changed(piece, parts)


def _changed(piece: Piece, parts: tuple[Part, ...]) -> Piece:
    """The piece with other parts. Rows that are missing now may have been the bad ones."""
    if piece.group and count_rows(parts) != piece.rows:
        piece.group.is_explained = True
    piece.parts = parts
    return piece


def _close(piece: Piece | None) -> None:
    """It comes back no more, and not because it was good: it was bad itself, or its rows went other ways."""
    if piece and piece.group:
        piece.group.open.remove(piece)
        piece.group.is_explained = True


def _cut_evenly(parts: Iterable[Part], pieces: float) -> Iterator[tuple[Part, ...]]:
    """Consecutive runs of parts, at most `pieces`, whose rows differ by one at most: 10 in 4 pieces are 3, 3, 2, 2."""
    rest = list(parts)
    rows = count_rows(rest)
    count = int(min(pieces, rows))
    for number in range(count):
        yield tuple(_take_rows(rest, rows // count + (number < rows % count)))


def _take_rows(rest: list[Part], rows: int) -> Iterator[Part]:
    """Remove so many rows from the front."""
    while rows:
        part = rest.pop(0)
        if part.rows > rows:
            part, tail = part.cut(rows)
            rest.insert(0, tail)
        rows -= part.rows
        yield part
