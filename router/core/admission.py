"""Refuse on arrival what cannot be answered in time, instead of letting it wait, run and be late.

Theory of operation. Past its capacity a router can only choose whom to disappoint. One that takes everything and drops
what has expired spends its slots on rows that are late by the time they are answered: of a model that is asked for ten
times of what it can do, 2-6 % come in time. One that refuses on arrival whoever would not make it keeps the queue as
short as its callers' patience, and nearly every answer counts.

A row that arrives goes with batch number k = rows_ahead // B, not counting from one, and batches take the slots as
these come back: t1 <= t2 <= ... from now, 0 for a free one, and each again after S(B). Keys of one model take turns, a
batch a turn, so with K keys that wait it is the model's batch number k K. Of R slots that is

    wait = t[k K mod R] + (k K div R) * S(B)

For example, 130 rows ahead, 64 in a batch, four slots that come back after 1, 2, 3 and 4 s: with the third batch,
after 3 s. (The mean drain rate, R B / S(B), would say 2.5 s at S = 5 s; slots that come back together make it wrong by
up to S, and a twentieth of all rows would be taken in vain.) Then its own call takes up to S_p90. So with the time
that is left until its deadline:

* less than S_min, the shortest call of late: nobody can do it; DEADLINE_EXCEEDED at once. But if all that is asked of a
  model is refused so, its time is never measured again, and after a slow hour it would be refused for ever. So of
  `REFUSED_PER_TRIAL` such rows, without an answer of the model in between, the last is tried.
* nothing ahead: taken. To serve it costs nobody a seat.
* wait + S_p90 is more: RESOURCE_EXHAUSTED, with the time after which so much of the queue will be gone that the same
  row would be taken. Nobody who comes meanwhile is foreseen, so it is the earliest time, not a promise.

Nothing of this before `service_time.MIN_CALLS` calls. Without a limit of slots nothing ever waits, and without a
replica nothing is known: then only the bounds in rows and bytes hold, which the queue keeps.
"""

import math
from typing import Protocol

from router.core.service_time import ServiceTimes
from router.errors import DeadlineExceeded, ResourceExhausted

# What a refused caller is told to wait while nothing was measured.
DEFAULT_RETRY_AFTER_S = 1.0
REFUSED_PER_TRIAL = 20
# Sooner is not worth saying, and nobody knows what will be later.
MIN_RETRY_AFTER_S = 0.01
MAX_RETRY_AFTER_S = 60.0


class Returns(Protocol):
    """When each slot of a model will be free: seconds from now, ascending, 0 for those that are. A list, say."""

    def __len__(self) -> int:
        """How many slots."""

    def __getitem__(self, slot: int, /) -> float:
        """When slot number `slot` will be free."""


class Admission:
    """What one key knows of the time that a row spends here."""

    __slots__ = ("_batch_rows", "_least_s", "_refused", "_service_s", "give_up_s", "own_s", "p90_s", "row_s")

    def __init__(self) -> None:
        # State: rows and S of a full batch; seconds that a row ahead costs on the average (0: unknown), and that a row
        # spends at most with none ahead, so that who has as much time need not be looked at; S_min, before which no
        # answer is there, and S_p90 of a full batch, when most are (0 while too little was measured); rows that had
        # less than S_min since the last call; how long before its deadline a row that waits should be given up: S_min,
        # but nothing while a trial is on its way.
        self._batch_rows = 1
        self._service_s = self.row_s = self.own_s = 0.0
        self._least_s = self.p90_s = 0.0
        self._refused = 0
        self.give_up_s = 0.0

    def __repr__(self) -> str:
        return f"<Admission {self.row_s:.4g} s per row ahead, then {self.p90_s:.4g} s>"

    def update(self, times: ServiceTimes, *, batch_rows: int, slots: int, keys: int) -> None:
        """A call has come back: what is known now.

        batch_rows: of a full batch. slots: of the model on replicas that are there, 0: none, or no limit; `keys` wait
        for them.
        """
        line, rows = times.overall, batch_rows
        self._batch_rows = batch_rows
        self._refused = 0
        self._service_s = line.predict(rows)
        self.row_s = max(keys, 1) * self._service_s / (slots * rows) if slots else 0.0
        self.p90_s = times.likely_s(rows)
        self.own_s = self._service_s + self.p90_s
        self._least_s = self.give_up_s = times.least_s

    def check(self, rows_ahead: int, left_s: float, returns_s: Returns, keys: int) -> None:
        """Take or refuse rows behind `rows_ahead` others that have `left_s` until their deadline.

        returns_s: of the model's slots; `keys` wait for them.

        Raises:
            DeadlineExceeded: no call of late was as short as that.
            ResourceExhausted: by now too many wait.
        """
        if left_s < self._least_s:
            self._refuse_hopeless(left_s)
        if not rows_ahead or not self.p90_s or not returns_s:
            return
        wait_s = self._wait_s(rows_ahead, returns_s, keys)
        late_s = wait_s + self.p90_s - left_s
        if late_s > 0:
            message = f"{rows_ahead} rows wait ahead: about {wait_s + self.p90_s:.3g} s, {left_s:.3g} s are left"
            raise ResourceExhausted(message, reason="estimated_wait", retry_after_s=_clamp(min(late_s, wait_s)))

    def _refuse_hopeless(self, left_s: float) -> None:
        """But for a trial now and then."""
        self._refused += 1
        if self._refused % REFUSED_PER_TRIAL or left_s <= 0:
            left = f"{max(left_s, 0.0):.3g} s are left to the deadline"
            raise DeadlineExceeded(f"{left}, and a call takes at least {self._least_s:.3g} s")
        self.give_up_s = 0.0

    def _wait_s(self, rows_ahead: int, returns_s: Returns, keys: int) -> float:
        rounds, slot = divmod(rows_ahead // self._batch_rows * max(keys, 1), len(returns_s))
        return returns_s[slot] + rounds * self._service_s

    def retry_after_s(self, rows: int) -> float:
        """When so many rows will have left the queue."""
        return _clamp(rows * self.row_s) if self.row_s else DEFAULT_RETRY_AFTER_S


def _clamp(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else MAX_RETRY_AFTER_S
