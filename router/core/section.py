"""A section: the lanes whose rows may share batches, in two classes; and whose batch is next where there are several.

Interactive rows have the seats of a batch, batch rows those that are left. Batch rows that have waited too long are
due: they go before all others, but take an eighth of seats and bytes at most (one row at least) while interactive rows
wait, so they neither starve nor displace. Where one row is a whole batch the classes take turns.

Nearly always one section holds all lanes. A tenant that must not share batches has a section of its own, which gets
whole batches. Then batches are dealt out by smooth weighted round robin (as in nginx): each section is given its
share of a batch, and the one that has been given most pays one. So a tenant on its own has its share of the batches,
not of the rows, however small they are; and none waits for longer than its share demands.
"""

import math
from collections.abc import Sequence

from router.core.lane import Lane, Room
from router.core.turns import LaneMaker, Turns

# Part of seats and bytes that is for due batch rows while interactive rows wait.
DUE_SHARE = 8


class Section:
    """Lanes that share batches. `credit`: batches that it has been given and has not had."""

    __slots__ = ("_due_had_all", "batch", "credit", "interactive")

    def __init__(self, make_lane: LaneMaker) -> None:
        self.interactive = Turns(make_lane, is_batch_class=False)
        self.batch = Turns(make_lane, is_batch_class=True)
        self.credit = 0.0
        # State: whether due rows left nothing of the last batch to interactive ones that waited.
        self._due_had_all = False

    @property
    def lanes(self) -> list[Lane]:
        """Of both classes."""
        return [*self.interactive.lanes.values(), *self.batch.lanes.values()]

    @property
    def rows(self) -> int:
        """Rows that wait here."""
        return self.interactive.rows + self.batch.rows

    def turns(self, is_batch_class: bool) -> Turns:
        """The lanes of a class."""
        return self.batch if is_batch_class else self.interactive

    def fill(self, room: Room, due_by: float) -> None:
        """Move rows into the room, which is empty. Batch rows are due that arrived at `due_by` or before."""
        if self.batch.lanes and self.interactive.weight:
            self._fill_both(room, due_by)
        else:
            self.interactive.fill(room, room.rows)
        self.batch.fill(room, room.rows)

    def _fill_both(self, room: Room, due_by: float) -> None:
        """The share of due rows, then interactive ones; all seats are theirs, if they got none the last time."""
        if not self._due_had_all:
            rows, max_bytes = room.rows, room.max_bytes
            room.max_bytes = max_bytes / DUE_SHARE
            self.batch.fill(room, max(rows // DUE_SHARE, 1), due_by)
            room.rows, room.max_bytes = rows - room.taken_rows, max_bytes
        due_rows = room.taken_rows
        self.interactive.fill(room, room.rows)
        self._due_had_all = room.taken_rows == due_rows


def choose(sections: Sequence[Section], due_by: float) -> Section:
    """The section whose batch is next; the earlier one of equals. In one of them at least rows wait."""
    stakes = _stakes(sections, due_by)
    total = math.fsum(stakes)
    for section, stake in zip(sections, stakes, strict=True):
        section.credit = section.credit + stake / total if stake else 0.0
    entitled = [section for section, stake in zip(sections, stakes, strict=True) if stake]
    chosen = max(entitled, key=lambda section: section.credit)
    chosen.credit -= 1
    return chosen


def _stakes(sections: Sequence[Section], due_by: float) -> list[float]:
    """What batches are dealt out by: the weights of those who wait, of the interactive ones while there are any."""
    if any(section.interactive.weight for section in sections):
        return [section.interactive.weight or _due_stake(section, due_by) for section in sections]
    return [section.batch.weight for section in sections]


def _due_stake(section: Section, due_by: float) -> float:
    return section.batch.weight / DUE_SHARE if section.batch.has_due(due_by) else 0.0
