"""Single flight: which rows of a key are computed, which follow a row that is computed already, and who waits for what.

Theory of operation. Rows are told apart by a digest of their bytes. The rows of a block that nobody has asked for yet
lead: together they become one block of their own, a `Flight`, which is queued in place of its caller's. Further rows
with the same digest follow: they take a seat in the flight and are in no queue. A row of a flight belongs to all that
have a seat in it, whoever led: it is computed as long as one of them is left, and its deadline is the latest of theirs.
Each block has its own deadline beside that (`pop_expired`).

Nobody may be slowed by following. So a row follows

* any row that has been sent to a replica at least once, since that is ahead of whatever arrives now;
* a waiting row of its own tenant and class, since that stands before it in the same line;
* of class batch: a waiting interactive row of its own tenant.

In every other case it leads for itself, and counts for its own tenant. The callers' blocks and the flights' are never
mixed up: a seat is a row of a caller's block, a place is a row of a flight.
"""

import heapq
import itertools
import math
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from typing import TypeAlias

from router.core.elements import Offsets
from router.core.types import Block, Recipient
from router.core.variable import VariableBlock

# No two rows will ever be found to have the same; half as many bytes could be made to agree on purpose.
DIGEST_BYTES = 32
# The heap is rebuilt when it holds this many entries more than twice the blocks.
STALE_ENTRIES = 64

Lane: TypeAlias = tuple[str, bool]
"""Tenant, and whether the class is batch."""
Seat: TypeAlias = tuple[Block, int]
"""A row of a caller's block."""
Run: TypeAlias = tuple[int, int]
"""First row and rows."""


def digests_of(block: Block) -> list[bytes]:
    """What tells the rows of a block from all others of their key. Rows are self-delimiting, so a join is as good."""
    numbers = range(1, len(block.inputs))
    digests = []
    for row in range(block.rows):
        one = blake2b(block.slice(0, row, 1), digest_size=DIGEST_BYTES)
        for number in numbers:
            one.update(block.slice(number, row, 1))
        digests.append(one.digest())
    return digests


def runs_of(rows: Sequence[int]) -> list[Run]:
    """Rows in ascending order as runs: 1, 2, 3, 7 are three rows from 1 and one from 7."""
    runs: list[Run] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((row, 1))
    return runs


def gather(block: Block, rows: Sequence[int], recipient: Recipient, outputs: tuple[str, ...] = ()) -> Block:
    """Some rows of a block, in ascending order, as a block for another recipient; all of them are not copied.

    It wants every output: those who follow, or find the answer in the cache, may want others than this caller.
    `outputs`: their names, as far as they are told; who names none has what the backend likes.
    """
    if len(rows) == block.rows:
        return replace(block, recipient=recipient, outputs=outputs)
    runs = runs_of(rows)
    inputs = tuple(b"".join([block.slice(number, *run) for run in runs]) for number in range(len(block.inputs)))
    if not isinstance(block, VariableBlock):
        return replace(block, rows=len(rows), inputs=inputs, recipient=recipient, outputs=outputs)
    offsets = tuple(None if one is None else _gather_offsets(one, rows) for one in block.offsets)
    return replace(block, rows=len(rows), inputs=inputs, recipient=recipient, outputs=outputs, offsets=offsets)


def _gather_offsets(offsets: Offsets, rows: Sequence[int]) -> Offsets:
    return array("Q", accumulate((offsets[row + 1] - offsets[row] for row in rows), initial=0))


@dataclass(slots=True, eq=False)
class Flight:
    """The rows of one queued block, and who waits for each.

    `seats`: by row, none once it is answered or nobody wants it any more. `open_rows`: those with a seat. `block` is
    None before it is queued and when no row is open; else the two would know each other for ever.
    """

    lane: Lane
    digests: list[bytes]
    seats: list[list[Seat]]
    open_rows: int = 0
    block: Block | None = None

    def blocks(self) -> list[Block]:
        """The callers' blocks that wait for a row of it, each once."""
        return list(dict.fromkeys(block for seats in self.seats for block, _ in seats))

    def open_runs(self) -> list[Run]:
        """The rows that somebody wants."""
        return runs_of([row for row, seats in enumerate(self.seats) if seats])


Place: TypeAlias = tuple[Flight, int]
"""A row of a flight."""


@dataclass(slots=True)
class Boarding:
    """What is to become of a block's rows: `joins` follow a row of a flight, `leads` by digest need a flight."""

    joins: list[tuple[int, Place]] = field(default_factory=list)
    leads: dict[bytes, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class Share:
    """Rows first .. first + rows - 1 of a caller's block: rows from `offset` of the batch."""

    block: Block
    first: int
    rows: int
    offset: int


@dataclass(slots=True)
class _Passenger:
    """A caller's block: its rows that are open, and the flights they are in."""

    open_rows: int
    flights: dict[Flight, None]


class Flights:
    """The flights of one key."""

    def __init__(self) -> None:
        # State: places of rows that wait, one for each lane and digest, and of rows that were sent; callers' blocks;
        # the taken seats of all flights and their open rows; (deadline, tie-breaker, block), possibly of blocks that
        # have left.
        self._waiting: dict[Lane, dict[bytes, Place]] = {}
        self._departed: dict[bytes, list[Place]] = {}
        self._passengers: dict[Block, _Passenger] = {}
        self._seats = self._open_rows = 0
        self._deadlines: list[tuple[float, int, weakref.ref[Block]]] = []
        self._ties = itertools.count()

    def __repr__(self) -> str:
        return f"<Flights {self._open_rows} rows for {self._seats} of {len(self._passengers)} blocks>"

    @property
    def following(self) -> int:
        """Rows of callers that wait for another row."""
        return self._seats - self._open_rows

    @property
    def wake_at(self) -> float:
        """The next deadline of a block; infinity when none waits."""
        while self._deadlines and self._deadlines[0][2]() not in self._passengers:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    def board(self, block: Block, rows: Sequence[tuple[int, bytes]]) -> Boarding:
        """Look for a place for these rows, by number and digest; nothing is changed."""
        boarding = Boarding()
        departed, lanes = self._departed, list(self._lanes_before(block))
        for row, digest in rows:
            places = departed.get(digest) or [lane[digest] for lane in lanes if digest in lane]
            if not places:
                boarding.leads.setdefault(digest, []).append(row)
            else:
                boarding.joins.append((row, places[0]))
        return boarding

    def _lanes_before(self, block: Block) -> Iterator[dict[bytes, Place]]:
        for is_batch_class in (False, True) if block.is_batch_class else (False,):
            yield self._waiting.get((block.tenant, is_batch_class), {})

    def seat(self, block: Block, boarding: Boarding, flight: Flight | None) -> None:
        """Carry out what `board` found. `flight`: of `begin`, where rows lead, once its block is queued.

        The caller's block lets go of its bytes: what of them is still needed is in a flight's block.
        """
        passenger = self._passengers[block] = _Passenger(0, {})
        for row, place in boarding.joins:
            self._take_seat(passenger, place, (block, row))
        if flight is not None:
            waiting = self._waiting.setdefault(flight.lane, {})
            for number, (digest, rows) in enumerate(boarding.leads.items()):
                waiting[digest] = flight, number
                for row in rows:
                    self._take_seat(passenger, (flight, number), (block, row))
        heapq.heappush(self._deadlines, (block.deadline, next(self._ties), weakref.ref(block)))
        block.inputs = ()
        if isinstance(block, VariableBlock):
            block.offsets = ()

    def _take_seat(self, passenger: _Passenger, place: Place, seat: Seat) -> None:
        flight, row = place
        assert flight.block is not None, "a row follows one that nobody waits for: this is a bug"
        if not flight.seats[row]:
            flight.open_rows += 1
            self._open_rows += 1
        flight.seats[row].append(seat)
        flight.block.deadline = max(flight.block.deadline, seat[0].deadline)
        passenger.flights[flight] = None
        passenger.open_rows += 1
        self._seats += 1

    def depart(self, flight: Flight, first: int, rows: int) -> None:
        """So many rows of a flight are sent; from now on everybody may follow them."""
        for row in range(first, first + rows):
            if flight.seats[row]:
                self._unlist(flight, row)
                self._departed.setdefault(flight.digests[row], []).append((flight, row))

    def land(self, flight: Flight, first: int, rows: int, offset: int) -> list[Share]:
        """So many rows of a flight are answered, or have failed; who is to be told, in runs as long as can be."""
        shares: dict[Block, list[Share]] = {}
        for row in range(first, first + rows):
            for seat in self._vacate(flight, row):
                _extend(shares.setdefault(seat[0], []), seat, offset + row - first)
        for block, its in shares.items():
            self._let_go(block, sum(share.rows for share in its))
        return [share for its in shares.values() for share in its]

    def leave(self, block: Block) -> list[tuple[Block, list[Run]]]:
        """A caller's block wants nothing more. What is queued and wanted less now, with the runs that still are."""
        passenger = self._passengers.get(block)
        if passenger is None:
            return []
        self._let_go(block, passenger.open_rows)
        return [left for flight in passenger.flights if (left := self._leave_flight(flight, block))]

    def pop_expired(self, now: float) -> list[Block]:
        """The blocks whose deadline has come, the earliest first; they stay until they `leave`."""
        expired: list[Block] = []
        while self.wake_at <= now:
            block = heapq.heappop(self._deadlines)[2]()
            assert block is not None, "a block that waits is gone: this is a bug"
            expired.append(block)
        return expired

    def _leave_flight(self, flight: Flight, block: Block) -> tuple[Block, list[Run]] | None:
        queued, before = flight.block, flight.open_rows
        for row, seats in enumerate(flight.seats):
            rest = [seat for seat in seats if seat[0] is not block]
            if len(rest) < len(seats):
                flight.seats[row] = rest
                if not rest:
                    self._close(flight, row)
        return (queued, flight.open_runs()) if queued is not None and flight.open_rows < before else None

    def _vacate(self, flight: Flight, row: int) -> list[Seat]:
        seats, flight.seats[row] = flight.seats[row], []
        if seats:
            self._close(flight, row)
        return seats

    def _close(self, flight: Flight, row: int) -> None:
        """A row has lost its last seat: nobody may follow it any more."""
        self._unlist(flight, row)
        flight.open_rows -= 1
        self._open_rows -= 1
        if not flight.open_rows:
            flight.block = None

    def _unlist(self, flight: Flight, row: int) -> None:
        digest, place = flight.digests[row], (flight, row)
        departed = self._departed.get(digest, [])
        if place in departed:
            departed.remove(place)
            if not departed:
                del self._departed[digest]
        waiting = self._waiting.get(flight.lane, {})
        if waiting.get(digest) == place:
            del waiting[digest]
            if not waiting:
                del self._waiting[flight.lane]

    def _let_go(self, block: Block, rows: int) -> None:
        passenger = self._passengers[block]
        passenger.open_rows -= rows
        self._seats -= rows
        if not passenger.open_rows:
            del self._passengers[block]
            self._drop_stale()

    def _drop_stale(self) -> None:
        """Keep the heap in proportion to what waits."""
        if not self._passengers:
            self._deadlines.clear()
        elif len(self._deadlines) > 2 * len(self._passengers) + STALE_ENTRIES:
            self._deadlines = [entry for entry in self._deadlines if entry[2]() in self._passengers]
            heapq.heapify(self._deadlines)


def begin(block: Block, boarding: Boarding) -> Flight:
    """A flight for the rows of a block that lead, without seats; its block is still to be queued."""
    return Flight((block.tenant, block.is_batch_class), list(boarding.leads), [[] for _ in boarding.leads])


def _extend(shares: list[Share], seat: Seat, offset: int) -> None:
    block, row = seat
    last = shares[-1] if shares else None
    if last and row == last.first + last.rows and offset == last.offset + last.rows:
        last.rows += 1
    else:
        shares.append(Share(block, row, 1, offset))
