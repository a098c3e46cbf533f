"""SingleFlight: equal rows of one key are computed once. Stands before the key's batcher where `deterministic` is set.

Rows that lead are queued as a block of their own, whose recipient hands each row's answer, or error, to all who wait
for it. Answers may be kept for a while and then answer at once; errors never are. Who leads and who follows is decided
in `core/single_flight.py`.

It knows nothing of protobuf, gRPC, other keys, batches that form or replicas.
"""

import asyncio
import functools
import math
from collections.abc import Sequence

from router.batcher import Batcher
from router.core.answer_cache import AnswerCache
from router.core.single_flight import Boarding, Flight, Flights, begin, digests_of, gather
from router.core.types import Batch, BatchAnswer, Block, Contract, Part
from router.dispatch.slots import CLOCK_SLACK_S
from router.errors import InvalidArgument, ResourceExhausted, RouterError
from router.metrics import Metrics

# What a follower is told to wait when too many follow already.
RETRY_AFTER_S = 1.0
# `Part.attempts` of rows that come from the cache: an explanation counts one more, and tells none.
NO_ATTEMPT = -1

Digested = Sequence[tuple[int, bytes]]
"""Rows by number, with what tells them apart."""


class SingleFlight:
    """One key's flights and kept answers; `apply` its settings before anything else."""

    def __init__(self, batcher: Batcher, *, backend: str, metrics: Metrics) -> None:
        self._batcher = batcher
        self._shared_rows = metrics.shared_rows.labels(backend)
        self._cached_rows = metrics.cached_rows.labels(backend)
        self._loop = asyncio.get_running_loop()
        # State: rows that may follow at a time; who waits for what; what is known, where answers are kept, and by which
        # settings; the outputs that all rows ask for; the timer of deadlines and of the cache, and when it rings; when
        # the last block came.
        self._max_rows = 0
        self._flights = Flights()
        self._cache: AnswerCache | None = None
        self._keeping: tuple[float, int, Contract, tuple[str, ...]] | None = None
        self._outputs: tuple[str, ...] = ()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._last_used = self._loop.time()
        batcher.on_dispatch = functools.partial(_depart, self._flights)

    def __repr__(self) -> str:
        return f"<SingleFlight {self._flights!r}, {self._cache!r}, {self._batcher!r}>"

    def infer(self, block: Block) -> None:
        """Answer what is known, follow what is under way, queue the rest. Raises RouterError when it is refused."""
        now = self._last_used = self._loop.time()
        rows = list(enumerate(digests_of(block)))
        known = self._known(rows, now)
        boarding = self._flights.board(block, [row for row in rows if row[0] not in known] if known else rows)
        following = block.rows - len(known) - len(boarding.leads)
        self._check_room(following)
        flight = self._queue(block, boarding)
        if len(known) < block.rows:
            self._flights.seat(block, boarding, flight)
            self._set_alarm()
        self._shared_rows.inc(following)
        self._answer_known(block, known)

    def discard(self, block: Block) -> None:
        """Forget a caller's block; rows that nobody else waits for leave the queue."""
        for queued, runs in self._flights.leave(block):
            self._batcher.keep(queued, runs)

    def is_idle_since(self, then: float) -> bool:
        """Whether nothing came, waited or flew since `then`."""
        return self._last_used < then and self._batcher.is_idle_since(then)

    def apply(
        self,
        *,
        cache_ttl_s: float,
        cache_max_bytes: int,
        max_rows: int,
        contract: Contract,
        outputs: tuple[str, ...],
    ) -> None:
        """Keep answers that hold `contract` for so long, in so many bytes (0 s: none), and let so many rows follow.

        `outputs`: the names of all that anybody may want, as far as they are known.
        """
        self._max_rows, self._outputs = max_rows, outputs
        keeping = cache_ttl_s, cache_max_bytes, contract, outputs
        if keeping != self._keeping:
            self._keeping = keeping
            self._cache = AnswerCache(cache_ttl_s, cache_max_bytes) if cache_ttl_s else None

    def put_aside(self) -> None:
        """New blocks go past it, to the batcher; it tells those who wait here, and is gone with the last of them."""
        self._cache = None
        self._batcher.on_dispatch = None
        self._cancel_alarm()
        self._set_alarm()

    def stop(self) -> None:
        """Ring no more; what is kept is of no more use."""
        self._cache = None
        self._cancel_alarm()
        self._batcher.stop()

    async def aclose(self) -> None:
        """End what is in flight, without answers."""
        self.stop()
        await self._batcher.aclose()

    # -- arrival -----------------------------------------------------------------------------------------------------

    def _known(self, rows: Digested, now: float) -> dict[int, tuple[BatchAnswer, int]]:
        cache = self._cache
        if cache is None:
            return {}
        return {row: place for row, digest in rows if (place := cache.find(digest, now))}

    def _check_room(self, following: int) -> None:
        if following > self._max_rows:
            raise InvalidArgument(f"{following} equal rows at once; at most {self._max_rows} may wait for one model")
        if following + self._flights.following > self._max_rows:
            message = f"{self._flights.following} rows wait for equal ones already, {self._max_rows} may"
            raise ResourceExhausted(message, reason="queue_rows", retry_after_s=RETRY_AFTER_S)

    def _queue(self, block: Block, boarding: Boarding) -> Flight | None:
        """Queue the rows that lead as one block. Nothing was changed before, so a refusal leaves nothing behind."""
        if not boarding.leads:
            return None
        flight = begin(block, boarding)
        lead = _Lead(self, self._flights, flight)
        queued = gather(block, [rows[0] for rows in boarding.leads.values()], lead, self._outputs)
        self._batcher.infer(queued)
        flight.block = queued
        return flight

    def _answer_known(self, block: Block, known: dict[int, tuple[BatchAnswer, int]]) -> None:
        self._cached_rows.inc(len(known))
        for first, rows, answer, offset in _known_runs(known):
            if not block.recipient.is_closed:  # the caller may give up at the first answer
                block.recipient.answer(Part(block, first, rows, NO_ATTEMPT), answer, offset)

    # -- the queued blocks' side -------------------------------------------------------------------------------------

    def answered(self, flight: Flight, part: Part, answer: BatchAnswer, offset: int) -> None:
        """Rows of a flight have their answer: for whoever waits, and for those who will ask."""
        if self._cache is not None:
            digests = flight.digests[part.first : part.first + part.rows]
            self._cache.put(digests, answer, offset, answer.answered_at)
            self._set_alarm()
        for share in self._flights.land(flight, part.first, part.rows, offset):
            recipient = share.block.recipient
            if not recipient.is_closed:  # one of its other rows may just have closed its call
                recipient.answer(Part(share.block, share.first, share.rows, part.attempts), answer, share.offset)

    def failed(self, flight: Flight, part: Part, error: RouterError) -> None:
        """Rows of a flight have failed, for all who wait."""
        for share in self._flights.land(flight, part.first, part.rows, 0):
            recipient = share.block.recipient
            if not recipient.is_closed:
                recipient.fail(Part(share.block, share.first, share.rows, part.attempts), error)

    # -- time --------------------------------------------------------------------------------------------------------

    def _set_alarm(self) -> None:
        """Ring at the next deadline, or when an answer is too old; an alarm that is early enough already stays."""
        at = min(self._flights.wake_at, self._cache.wake_at if self._cache else math.inf)
        if at < self._timer_at:
            self._cancel_alarm()
            self._timer = self._loop.call_at(at, self._ring)
            self._timer_at = at

    def _cancel_alarm(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None
        self._timer_at = math.inf

    def _ring(self) -> None:
        self._cancel_alarm()
        now = self._loop.time() + CLOCK_SLACK_S
        if self._cache:
            self._cache.expire(now)
        for block in self._flights.pop_expired(now):
            block.recipient.expire()
        self._set_alarm()


class _Lead:
    """The recipient of a queued block: stands for all who wait for a row of its flight."""

    __slots__ = ("_single_flight", "flight", "flights")

    def __init__(self, single_flight: SingleFlight, flights: Flights, flight: Flight) -> None:
        self._single_flight = single_flight
        self.flights = flights
        self.flight = flight

    @property
    def is_closed(self) -> bool:
        """See Recipient."""
        return not self.flight.open_rows

    def answer(self, part: Part, answer: BatchAnswer, offset: int) -> None:
        """See Recipient."""
        self._single_flight.answered(self.flight, part, answer, offset)

    def fail(self, part: Part, error: RouterError) -> None:
        """See Recipient."""
        self._single_flight.failed(self.flight, part, error)

    def expire(self) -> None:
        """See Recipient; the deadline of a flight's block is the latest of all that wait."""
        for block in self.flight.blocks():
            block.recipient.expire()


def _depart(flights: Flights, batch: Batch) -> None:
    """Nobody follows rows of a `SingleFlight` that was put aside, and some may still be among them."""
    for part in batch.parts:
        recipient = part.block.recipient
        if isinstance(recipient, _Lead) and recipient.flights is flights:
            flights.depart(recipient.flight, part.first, part.rows)


def _known_runs(known: dict[int, tuple[BatchAnswer, int]]) -> list[tuple[int, int, BatchAnswer, int]]:
    """First row, rows, answer and its first row, of rows that stand together here and there."""
    runs: list[tuple[int, int, BatchAnswer, int]] = []
    for row, (answer, offset) in known.items():
        if runs:
            first, rows, last, at = runs[-1]
            if answer is last and row == first + rows and offset == at + rows:
                runs[-1] = first, rows + 1, answer, at
                continue
        runs.append((row, 1, answer, offset))
    return runs
