"""ModelSlots: the slots that one model's batches take on the replicas of a pool.

A slot is a permit for one batch at a time of one model on one replica. The permits are handed out to the keys that want
one, in turn; the key forms its batch at that moment, so a batch is as large as it can be and goes where there is room
now. A replica that lost, refused or timed out a batch pauses for that model, a little longer each time, so that what it
lost goes elsewhere first.

Before the keys stands a lane of pieces, rows of failed batches that travel by themselves (`core/isolation.py`). Their
splits take at most a quarter of the slots, and of a single slot every second batch while a key waits. No policy holds a
piece; a batch that is for another replica than the one that had it waits until that has room.

It moves whole batches: no gRPC, no callers, no rows. Every decision is a plain call.
"""

import asyncio
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from router.core.admission import Returns
from router.core.balance import Load, choose
from router.core.isolation import Piece
from router.core.piece_lane import PieceLane
from router.core.retry import pause_s
from router.core.types import Batch
from router.dispatch.member import Member
from router.errors import BackendError

# Timers of uvloop have ticks of a millisecond and ring up to half of one early. Without this an alarm that rings early
# finds nothing due, and rings on until the tick is over.
CLOCK_SLACK_S = 0.0006
# Of a model's slots splits take one in four, and so many where there is no limit.
SLOTS_PER_SPLIT = 4
UNLIMITED_SPLITS = 16


class Taker(Protocol):
    """Who wants slots: a key's batcher."""

    def take(self, slots: "ModelSlots", now: float, max_rows: int | None) -> Batch | None:
        """Form a batch for a slot that is at hand, or None: nothing waits, or the policy holds it.

        `max_rows`: the most that the slot's replica is trusted with; None: as many as the key allows.
        """

    def take_piece(self, piece: Piece, now: float) -> Batch | None:
        """Form a batch of the piece whose turn it is, or None: its rows' time was up, and it has left the lane."""

    def dispatch(self, batch: Batch, slot: "Slot") -> None:
        """Send the batch; the slot is the taker's until `pool.infer` has ended."""

    @property
    def wants_slot(self) -> bool:
        """Whether rows still wait that are not held."""

    @property
    def rows_to_take(self) -> int:
        """Rows of the batch that `take` would form now."""

    def expect_s(self, rows: int, replica: str) -> float:
        """How long a replica will take for so many rows; 0 while unknown."""


@dataclass(slots=True, eq=False)
class Seat:
    """One model's place at one replica."""

    member: Member
    in_flight: int = 0
    failures: int = 0
    resume_at: float = 0.0


@dataclass(slots=True, eq=False)
class Slot:
    """The permit for one batch, taken at `taken_at`; expected to be free again at `back_at`. `is_split`: it is counted
    as a split's."""

    slots: "ModelSlots"
    seat: Seat
    taken_at: float
    back_at: float
    is_split: bool = False


@dataclass(frozen=True, slots=True)
class _Returns:
    """See admission.Returns: `free` slots, then those that are expected back at `back_at`."""

    free: int
    back_at: Sequence[float]
    now: float

    def __len__(self) -> int:
        return self.free + len(self.back_at)

    def __getitem__(self, slot: int, /) -> float:
        return max(self.back_at[slot - self.free] - self.now, 0.0) if slot >= self.free else 0.0


class ModelSlots:
    """The slots of one model over all replicas of its pool: `max_in_flight` on each, 0: no limit.

    `max_in_flight_total`: for how many batches a replica has room, whatever their models.
    """

    def __init__(self, members: Iterable[Member], max_in_flight: int, max_in_flight_total: int = sys.maxsize) -> None:
        self._max_in_flight_total = max_in_flight_total
        self._max_in_flight = min(max_in_flight, max_in_flight_total)
        # State: a seat per member; the slots that are taken, when they are expected back in order (None: not known
        # yet), how many of them by splits, and whether the latest batch
        # was one; keys in turn for a slot, keys whose hold ends when a slot is taken or freed, and keys whose hold does
        # not: each key in one of the three at most; pieces that wait; one timer for the end of a pause; whether
        # `assign` is about to run.
        self._seats = [Seat(member) for member in members]
        self._taken: set[Slot] = set()
        self._back_at: Sequence[float] | None = None
        self._splits_in_flight = 0
        self._was_split = False
        self._waiting: OrderedDict[Taker, None] = OrderedDict()
        self._held: OrderedDict[Taker, None] = OrderedDict()
        self._resting: dict[Taker, None] = {}
        self._lane: PieceLane[Taker] = PieceLane()
        self._resume_timer: asyncio.TimerHandle | None = None
        self._is_assign_due = False

    def __repr__(self) -> str:
        held = len(self._held) + len(self._resting)
        return f"<ModelSlots {self.busy} busy, {len(self._waiting)} waiting, {held} held, {len(self._lane)} pieces>"

    @property
    def busy(self) -> int:
        """See policy.Slots."""
        return len(self._taken)

    @property
    def others_wait(self) -> bool:
        """See policy.Slots; the one that asks is in none of the three."""
        return bool(self._waiting or self._held or self._resting)

    def count_free(self, now: float) -> int:
        """See policy.Slots; of slots without limit none is counted."""
        if not self._max_in_flight:
            return 0
        return sum(self._count_room(seat) for seat in self._seats if self._load(seat, now).can_take)

    def expected_back(self) -> list[float]:
        """See policy.Slots."""
        return [slot.back_at for slot in self._taken]

    @property
    def usable(self) -> int:
        """Slots, free or not, on replicas that are there; 0 without a limit."""
        return self._max_in_flight * sum(
            seat.member.is_admitted and seat.member.replica.is_connected for seat in self._seats
        )

    @property
    def waiting_keys(self) -> int:
        """Keys of the model that have rows waiting."""
        return len(self._waiting) + len(self._held) + len(self._resting)

    def returns_s(self, now: float) -> Returns:
        """Seconds until each usable slot should be free, 0 for those that are, ascending; empty without a limit.

        Asked for with each block that is not surely in time, and one of the numbers looked at: so they are put in order
        once for all blocks between two batches, and none is computed that nobody looks at.
        """
        if not self._max_in_flight:
            return ()
        if self._back_at is None:
            self._back_at = sorted(slot.back_at for slot in self._taken)
        return _Returns(max(self.usable - len(self._back_at), 0), self._back_at, now)

    def join(self, member: Member) -> None:
        """A member has come; it takes batches from the next `assign` on."""
        self._seats.append(Seat(member))

    def part(self, member: Member) -> None:
        """A member without batches is gone."""
        self._seats = [seat for seat in self._seats if seat.member is not member]

    def set_max_in_flight(self, max_in_flight: int) -> None:
        """Change the slots per replica; what is in flight beyond them ends in its own time."""
        self._max_in_flight = min(max_in_flight, self._max_in_flight_total)
        self.assign()

    def request(self, taker: Taker) -> None:
        """Queue for a slot, behind the other keys of the model; it may be had at once."""
        self._held.pop(taker, None)
        self._resting.pop(taker, None)
        self._waiting[taker] = None
        self.assign()

    def hold(self, taker: Taker, *, lapses: bool) -> None:
        """Its rows wait although a slot is at hand. `lapses`: ask it again as soon as a slot is taken or freed."""
        (self._held if lapses else self._resting)[taker] = None

    def withdraw(self, taker: Taker) -> None:
        """Want no slot any more."""
        self._waiting.pop(taker, None)
        self._held.pop(taker, None)
        self._resting.pop(taker, None)

    def assign(self) -> None:
        """Give free slots to the pieces in the lane and to the waiting keys, in turn, until either runs out."""
        self._is_assign_due = False
        now = asyncio.get_running_loop().time()
        if self._lane:
            self._assign_lane(now)
        if self._waiting:
            self._assign_keys(now)
            if self._lane:
                self._assign_lane(now)  # splits whose turn no key has taken

    def _assign_keys(self, now: float) -> None:
        while self._waiting:
            taker = next(iter(self._waiting))
            seat = self._choose(now, taker, taker.rows_to_take)
            if seat is None:
                self._wait_for_pause(now)
                return
            del self._waiting[taker]
            batch = taker.take(self, now, seat.member.max_rows)
            if batch is not None:
                self._dispatch(taker, batch, seat, now)
            if taker.wants_slot:
                self._waiting[taker] = None

    def _dispatch(self, taker: Taker, batch: Batch, seat: Seat, now: float, *, is_split: bool = False) -> None:
        self._was_split = is_split
        back_at = now + taker.expect_s(batch.rows, seat.member.address)
        taker.dispatch(batch, self._occupy(seat, now, back_at, is_split=is_split))

    def take_spare(
        self, besides: Slot, now: float, may_take: Callable[[], bool], expect_s: Callable[[str], float]
    ) -> Slot | None:
        """A second slot for a batch that has stalled: idle, on another replica that nothing speaks against.

        None while a key of the model waits, as its rows come first. `may_take` is asked when there is one; `expect_s`:
        how long a replica will take.
        """
        if self.others_wait or self._lane:
            return None
        others = [seat for seat in self._seats if seat.member is not besides.seat.member and seat.member.is_sound]
        number = choose([self._load(seat, now) for seat in others])
        if number is None or not may_take():
            return None
        return self._occupy(others[number], now, now + expect_s(others[number].member.address))

    # -- the lane ----------------------------------------------------------------------------------------------------

    @property
    def split_limit(self) -> int:
        """How many splits may be in flight at once."""
        return max(1, self.usable // SLOTS_PER_SPLIT) if self._max_in_flight else UNLIMITED_SPLITS

    @property
    def _may_split(self) -> bool:
        """Whether a split may go; where one takes all the slots there are, keys that wait have every second turn."""
        limit = self.split_limit
        is_keys_turn = self._was_split and self._waiting and 0 < self.usable <= limit
        return self._splits_in_flight < limit and not is_keys_turn

    def has_other(self, replica: str) -> bool:
        """Whether a healthy replica beside this one is there."""
        return any(seat.member.is_healthy and seat.member.address != replica for seat in self._seats)

    def enter(self, taker: Taker, piece: Piece) -> None:
        """A piece waits from now on; it goes on the loop's next turn at the earliest."""
        self._lane.enter(piece, taker)
        self._assign_soon()

    def leave(self, piece: Piece) -> None:
        """A piece waits no more."""
        self._lane.leave(piece)

    def _assign_lane(self, now: float) -> None:
        while (errand := self._next_errand(now)) is not None:
            piece, taker, seat = errand
            batch = taker.take_piece(piece, now)
            if batch is not None:
                self._lane.leave(piece)
                self._dispatch(taker, batch, seat, now, is_split=piece.is_split)
        if self._lane:
            self._wait_for_pause(now)

    def _next_errand(self, now: float) -> tuple[Piece, Taker, Seat] | None:
        """The first piece that may go, and where to."""
        for piece, taker in self._lane.next(may_split=self._may_split):
            seat = self._choose(now, taker, piece.rows, piece)
            if seat is not None:
                return piece, taker, seat
        return None

    # -- seats -------------------------------------------------------------------------------------------------------

    def release(self, slot: Slot, error: BackendError | None) -> None:
        """Return a slot; after a failure that may be retried the replica pauses for this model.

        The slot is given away on the loop's next turn: by then a lost batch's rows are back at the head of their queue.
        """
        self._taken.remove(slot)
        self._back_at = None
        self._splits_in_flight -= slot.is_split
        slot.seat.in_flight -= 1
        if error is None or not error.may_requeue:
            slot.seat.failures = 0
        else:
            self._pause(slot.seat)
        self._ask_held_again()
        self._assign_soon()
        slot.seat.member.replica.free()  # at last: one that had no room left gives it to the models at once

    def _assign_soon(self) -> None:
        if not self._is_assign_due:
            self._is_assign_due = True
            asyncio.get_running_loop().call_soon(self.assign)

    def _pause(self, seat: Seat) -> None:
        """Batches that were lost together are one failure, or the pause would grow with their number."""
        now = asyncio.get_running_loop().time()
        if seat.resume_at <= now:
            seat.failures += 1
            seat.resume_at = now + pause_s(seat.failures, random.random())  # noqa: S311 (spreads, guards nothing)

    def _occupy(self, seat: Seat, now: float, back_at: float, *, is_split: bool = False) -> Slot:
        slot = Slot(self, seat, now, back_at, is_split)
        self._taken.add(slot)
        self._back_at = None
        self._splits_in_flight += is_split
        seat.in_flight += 1
        seat.member.replica.reserve()
        if seat.member.is_on_trial:
            seat.member.trial = slot
        self._ask_held_again()
        return slot

    def _ask_held_again(self) -> None:
        self._waiting.update(self._held)
        self._held.clear()

    def _choose(self, now: float, taker: Taker, rows: int, piece: Piece | None = None) -> Seat | None:
        """Where a batch of so many rows goes.

        Rows of a queue can be cut to what a replica on trial gets, a piece cannot. A piece does not go to the replica
        that it avoids while another healthy one is there, busy or not.
        """
        seats = self._seats
        if piece is not None:
            seats = [seat for seat in seats if seat.member.max_rows is None or rows <= seat.member.max_rows]
            if piece.avoid is not None and self.has_other(piece.avoid):
                seats = [seat for seat in seats if seat.member.address != piece.avoid]
        if len(seats) > 1:
            loads = [self._load(seat, now, taker.expect_s(rows, seat.member.address)) for seat in seats]
        else:
            loads = [self._load(seat, now) for seat in seats]
        number = choose(loads)
        return None if number is None else seats[number]

    def _load(self, seat: Seat, now: float, predicted_s: float = 0.0) -> Load:
        has_slot = not self._max_in_flight or seat.in_flight < self._max_in_flight
        can_take = has_slot and seat.member.can_take and seat.resume_at <= now + CLOCK_SLACK_S
        return Load(seat.in_flight, seat.member.replica.in_flight, can_take, predicted_s, seat.member.preference)

    def _count_room(self, seat: Seat) -> int:
        """Free slots there; other models may have taken the room."""
        if seat.member.is_on_trial:
            return 1
        return min(self._max_in_flight - seat.in_flight, self._max_in_flight_total - seat.member.replica.in_flight)

    def _wait_for_pause(self, now: float) -> None:
        resumes = [seat.resume_at for seat in self._seats if seat.resume_at > now + CLOCK_SLACK_S]
        if self._resume_timer:
            self._resume_timer.cancel()
            self._resume_timer = None
        if resumes:
            self._resume_timer = asyncio.get_running_loop().call_at(min(resumes), self.assign)
