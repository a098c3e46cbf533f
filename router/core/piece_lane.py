"""The order in which the pieces of one model go (`isolation.py`), whatever key they are of.

Batches that wait for another replica go first, then splits: the oldest batch's first, so that each gets done, and of
these the largest, for they hold the most rows that are not to blame. Batches that wait for another replica are few,
because the retry budget pays for them; each may wait for a different one.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, TypeVar

from router.core.isolation import Piece

Owner = TypeVar("Owner")
# When a split's batch was formed, minus its rows, who came first.
Turn = tuple[float, int, int]


class PieceLane(Generic[Owner]):
    """The pieces that wait, each with whom it belongs to."""

    def __init__(self) -> None:
        # State: batches for another replica by arrival; splits with their turn, and the same in order of turns.
        self._elsewhere: dict[Piece, Owner] = {}
        self._splits: dict[Piece, tuple[Turn, Owner]] = {}
        self._turns: list[tuple[Turn, Piece]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._elsewhere) + len(self._splits)

    def enter(self, piece: Piece, owner: Owner) -> None:
        """A piece waits from now on."""
        if piece.avoid is not None:
            self._elsewhere[piece] = owner
            return
        turn = (piece.born_at, -piece.rows, next(self._numbers))
        self._splits[piece] = turn, owner
        insort(self._turns, (turn, piece))

    def leave(self, piece: Piece) -> None:
        """A piece waits no more."""
        if piece in self._splits:
            turn, _ = self._splits.pop(piece)
            del self._turns[bisect_left(self._turns, turn, key=_turn)]
        else:
            del self._elsewhere[piece]

    def next(self, *, may_split: bool) -> Iterator[tuple[Piece, Owner]]:
        """Those of which the first that finds a slot goes."""
        for piece, owner in self._elsewhere.items():
            if may_split or not piece.is_split:
                yield piece, owner
        if self._turns and may_split:
            piece = self._turns[0][1]
            yield piece, self._splits[piece][1]


def _turn(entry: tuple[Turn, Piece]) -> Turn:
    return entry[0]
