"""Pulse: what the probes of a replica say about it, and when its silence makes it suspect.

Theory of operation. A frozen process keeps its connection, answers pings from the kernel's buffers and takes batches;
only a question that its own loop must answer finds it. But many healthy model servers block their loop while they
compute, and answer nobody for a whole service time. So silence grows in three steps:

* a probe that is out for long makes it doubtful: others are preferred, and no more;
* the second miss in a row makes it suspect when it holds no batch: then nothing it computes could block its loop;
* with batches, it is suspect only when the oldest of them is older than S_p99, and so should be back.

From two misses on that is a point in time, `suspect_at`. Any answer of its own, to a probe or to a batch, is a sign of
life and begins it all anew; only an answered probe clears a suspect, which holds no batch any more.
"""

import math
from enum import Enum, auto

MISSES = 2


class Sign(Enum):
    """What a probe has found."""

    READY = auto()
    UNREADY = auto()  # it lives, and says that it is not ready
    NONE = auto()


class Pulse:
    """One replica's. Times in monotonic seconds."""

    __slots__ = ("is_doubtful", "is_ready", "is_suspect", "misses")

    def __init__(self) -> None:
        # State: probes in vain since the last sign of life; whether others are preferred; whether it gets nothing at
        # all; what it last said itself, innocent until it says otherwise.
        self.misses = 0
        self.is_doubtful = False
        self.is_suspect = False
        self.is_ready = True

    def __repr__(self) -> str:
        state = "suspect" if self.is_suspect else "doubtful" if self.is_doubtful else "alive"
        return f"<Pulse {state}, {self.misses} misses{'' if self.is_ready else ', not ready'}>"

    def answered(self, sign: Sign) -> None:
        """A probe came back with an answer."""
        self.heard()
        self.is_suspect = False
        self.is_ready = sign is Sign.READY

    def heard(self) -> None:
        """It gave a sign of life, or there is a new connection and what was says nothing about that."""
        self.misses = 0
        self.is_doubtful = False

    def waited(self) -> None:
        """A probe is out for longer than answers usually take."""
        self.is_doubtful = True

    def missed(self) -> None:
        """A probe was in vain."""
        self.is_doubtful = True
        self.misses += 1

    def suspect_at(self, oldest_due_at: float | None) -> float:
        """From when on it is suspect unless a sign of life comes first: infinity for never, minus infinity for already.

        oldest_due_at: when its oldest batch is older than S_p99; None when it holds none.
        """
        if self.is_suspect or self.misses < MISSES:
            return math.inf
        return -math.inf if oldest_due_at is None else oldest_due_at
