"""Member: one replica's standing in its pool, and the replica as the pool sees it.

Batches go to the members with the best standing that any member has:

    FIT       connected, and nothing speaks against it
    UNREADY   connected, but it says itself that it is not ready
    EJECTED   its breaker is not closed
    AWAY      not connected, leaving, or without a sign of life: gets no batch, even if it is the only one

Beside these an ejected one is on trial when its time is over: it gets one small batch, before all others.
"""

import asyncio
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol, TypeAlias

from router.core.breaker import TRIAL_ROWS, Breaker, State
from router.core.model_info import IndexEntry, ModelReport
from router.core.pulse import Pulse, Sign
from router.core.service_time import ServiceTimes
from router.core.types import Batch, BatchAnswer

# A batch that is out: when it was sent, its rows, its key's service times.
Sent: TypeAlias = tuple[float, int, ServiceTimes]


class Backend(Protocol):
    """A replica as the pool sees it: replica.Replica, or a fake."""

    address: str
    in_flight: int

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection."""

    @property
    def is_ready(self) -> bool:
        """Whether a batch may be sent: connected, with room for one."""

    def reserve(self) -> None:
        """Count a batch that will be sent; at once, so that no two find the last room."""

    def free(self) -> None:
        """Count a reserved batch as gone."""

    def start(self, on_change: Callable[[], None]) -> None:
        """Connect; call back when `is_ready` may have changed."""

    async def infer(self, batch: Batch) -> BatchAnswer:
        """Send one batch. Raises BackendError."""

    def abandon(self) -> None:
        """Let every batch that is out fail as lost; its answer is never read."""

    def close_idle(self) -> None:
        """Let go of what it holds between batches."""

    async def probe(self) -> Sign:
        """Ask whether it lives and is ready, however long that takes."""

    async def describe(self, model: tuple[str, str]) -> ModelReport:
        """Ask about a model, by name and version. Raises StreamLost when nobody answers."""

    async def index(self) -> tuple[IndexEntry, ...]:
        """Ask for the models of its repository; none where it does not tell. Raises StreamLost when nobody answers."""

    async def aclose(self) -> None:
        """Let go of everything."""


class Standing(IntEnum):
    """How well a replica is thought of; the lowest is the best."""

    FIT = 0
    UNREADY = 1
    EJECTED = 2
    AWAY = 3


class Member:
    """A replica in its pool."""

    def __init__(self, replica: Backend, ejection_s: float, batch_timeout_s: float) -> None:
        self.replica = replica
        self.breaker = Breaker(ejection_s)
        self.pulse = Pulse()
        self._batch_timeout_s = batch_timeout_s
        # State: whether it was taken out of the pool and only ends what it holds; what the pool has decided: whether it
        # gets batches, whether only small ones, one at a time; the slot of the one that is out. `preference`: the
        # lowest gets the next batch, whatever is in flight.
        self.is_leaving = False
        self.is_admitted = False
        self.is_on_trial = False
        self.trial: object | None = None
        self.preference = 0
        # Whether a batch of it came back since one was given up.
        self.has_answered = True
        # Its batches, the oldest first.
        self.out: dict[object, Sent] = {}
        # Rings when its ejection is over.
        self.wake_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Member {self.replica!r} {self.standing.name.lower()}, {self.breaker!r}, {self.pulse!r}>"

    @property
    def address(self) -> str:
        """Where the replica is."""
        return self.replica.address

    @property
    def standing(self) -> Standing:
        """See the module's text."""
        if self.is_leaving or not self.replica.is_connected or self.pulse.is_suspect:
            return Standing.AWAY
        if not self.breaker.is_closed:
            return Standing.EJECTED
        return Standing.FIT if self.pulse.is_ready else Standing.UNREADY

    @property
    def is_sound(self) -> bool:
        """Whether nothing at all speaks against it."""
        return self.standing is Standing.FIT and not self.pulse.is_doubtful

    @property
    def is_healthy(self) -> bool:
        """Whether batches go there, and not for a trial."""
        return self.is_admitted and not self.is_on_trial

    @property
    def can_take(self) -> bool:
        """Whether it may get a batch now, slots aside."""
        return self.is_admitted and self.replica.is_ready and not (self.is_on_trial and self.trial)

    @property
    def max_rows(self) -> int | None:
        """The most rows of its next batch; None: as many as the key allows."""
        return TRIAL_ROWS if self.is_on_trial else None

    def admit(self, best: Standing) -> None:
        """Decide what it gets while `best` is the best standing of any member.

        A trial comes first, or it would wait for ever while others are idle.
        """
        standing = self.standing
        self.is_on_trial = best < standing is Standing.EJECTED and self.breaker.state is State.HALF_OPEN
        self.is_admitted = self.is_on_trial or standing == best < Standing.AWAY
        self.preference = -1 if self.is_on_trial else int(self.pulse.is_doubtful)

    def oldest_due_at(self) -> float | None:
        """When its oldest batch should be back, but for one in a hundred; None when it holds none.

        Of keys that are not known well yet nobody can say; they may take as long as any batch.
        """
        if self.oldest is None:
            return None
        sent_at, rows, times = self.oldest
        return sent_at + (times.of(self.address).predict_p99(rows) if times.is_settled else self._batch_timeout_s)

    @property
    def oldest(self) -> Sent | None:
        """The oldest of its batches; None when it holds none."""
        return next(iter(self.out.values()), None)

    def was_alive(self, given_up: Sent, now: float) -> None:
        """It only was busy with a batch that was given up, the second one in turn: so long may its calls take.

        What is given up is never measured. Were nothing learned by it, a replica whose calls take longer from now on
        would be given up with each of them, for ever.
        """
        sent_at, rows, times = given_up
        times.observe(self.address, rows, min(now - sent_at, self._batch_timeout_s))

    async def aclose(self) -> None:
        """Let go of the replica."""
        if self.wake_timer:
            self.wake_timer.cancel()
        await self.replica.aclose()
