"""DataPlane: hand a call's blocks to their batchers, and gather what becomes of them.

A `Call` counts the rows that are still open and tells its `Reply` of each part as it is answered, whatever the order. A
call closes once: when its last row is answered or failed, when its deadline passes, or when its caller gives up. Then
every row of it that still waits leaves its queue.

No batching rules, no replicas, no status codes here.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from router.config import Settings
from router.core.types import BatchAnswer, Block, Part
from router.dispatch.pool import ReplicaPool
from router.errors import DeadlineExceeded, InternalError, ResourceExhausted, RouterError, Unavailable
from router.lanes import Lanes
from router.metrics import Metrics
from router.models import Models

logger = logging.getLogger(__name__)

# What a caller is told to wait when the router leaves: time enough for another to be found.
LEAVING_RETRY_AFTER_S = 1.0


class Reply(Protocol):
    """Where a call's answers go. None of the methods may raise; after `is_last`, or `closed`, none is called again."""

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        """Rows of one block: rows offset .. offset + part.rows - 1 of the batch."""

    def failed(self, index: int, first_row: int, rows: int, error: RouterError, *, is_last: bool) -> None:
        """Rows first_row .. first_row + rows - 1 of block number `index` failed."""

    def closed(self, error: RouterError) -> None:
        """Every row of the call that was not answered or failed before has failed."""


class Place(Protocol):
    """Where rows wait: a lane, or the waiting room of a model."""

    def discard(self, block: Block) -> None:
        """Nobody waits for a block any more; one that is not here is none of ours."""


class Call:
    """One caller's request while it is open; the recipient of its blocks."""

    __slots__ = ("_on_close", "_open_rows", "_queued", "_reply", "_timeout_s", "is_closed")

    def __init__(self, reply: Reply, rows: int, timeout_s: float, on_close: Callable[["Call"], None]) -> None:
        self._reply = reply
        self._open_rows = rows
        self._timeout_s = timeout_s
        self._on_close = on_close
        # Where its rows may still wait.
        self._queued: list[tuple[Place, Block]] = []
        self.is_closed = False

    def __repr__(self) -> str:
        return f"<Call {'closed' if self.is_closed else f'{self._open_rows} rows open'}>"

    def answer(self, part: Part, answer: BatchAnswer, offset: int) -> None:
        """See Recipient."""
        assert not self.is_closed, "a row of a closed call was answered: this is a bug"
        rows_left = self._open_rows = self._open_rows - part.rows
        assert rows_left >= 0, "more rows answered than asked: this is a bug"
        is_last = not rows_left
        if is_last:
            self._close()
        try:
            self._reply.answered(part, answer, offset, is_last=is_last)
        except Exception:
            # One row's answer must not take its neighbours' with it.
            logger.exception("an answer could not be handed out; this is a bug")
            block = part.block
            self._reply.failed(block.index, block.first_row + part.first, part.rows, InternalError(), is_last=is_last)

    def fail(self, part: Part, error: RouterError) -> None:
        """See Recipient."""
        block = part.block
        self.fail_rows(block.index, block.first_row + part.first, part.rows, error)

    def fail_rows(self, index: int, first_row: int, rows: int, error: RouterError) -> None:
        """Rows that never made it to a queue, or came back without an answer."""
        assert not self.is_closed, "a row of a closed call has failed: this is a bug"
        assert rows <= self._open_rows, "more rows failed than asked: this is a bug"
        self._open_rows -= rows
        is_last = not self._open_rows
        if is_last:
            self._close()
        self._reply.failed(index, first_row, rows, error, is_last=is_last)

    def expire(self) -> None:
        """See Recipient."""
        self.abort(DeadlineExceeded(f"no answer within {self._timeout_s:g} s"))

    def abort(self, error: RouterError) -> None:
        """Fail every open row at once."""
        if not self.is_closed:
            self._close()
            self._reply.closed(error)

    def cancel(self) -> None:
        """The caller gave up: rows that wait leave their queues, and nobody is told."""
        if not self.is_closed:
            self._close()

    def expect(self, rows: int) -> None:
        """The call has so many rows; before any of them was queued, for a call opened while nobody could know."""
        self._open_rows = rows

    def wait_in(self, place: Place, block: Block) -> None:
        """Remember where to withdraw from."""
        self._queued.append((place, block))

    def _close(self) -> None:
        self.is_closed = True
        if self._open_rows:
            for place, block in self._queued:
                place.discard(block)
        self._queued.clear()
        self._on_close(self)


class DataPlane:
    """The live keys and the open calls of the router. `models` None: settings alone tell of them."""

    def __init__(
        self, settings: Settings, pools: Mapping[str, ReplicaPool], metrics: Metrics, models: Models | None = None
    ) -> None:
        self._metrics = metrics
        # State: the lanes, and by key; the open calls; whether new ones are refused.
        self._lanes = Lanes(settings, pools, metrics, models or Models(settings))
        self._lane_by_key = self._lanes.by_key
        self._open: set[Call] = set()
        self._is_refusing = False
        self._all_closed = asyncio.Event()
        metrics.queued_rows.set_function(lambda: self._lanes.budget.rows)
        metrics.open_calls.set_function(lambda: len(self._open))
        metrics.keys.set_function(lambda: len(self._lanes))

    def __repr__(self) -> str:
        return (
            f"<DataPlane {len(self._open)} open calls, {len(self._lanes)} keys, {self._lanes.budget.rows} rows queued>"
        )

    def open(self, reply: Reply, rows: int, timeout_s: float) -> Call:
        """Begin a call of `rows` rows in all; its blocks follow with `infer`.

        Raises:
            Unavailable: the router is leaving and takes no more calls.
        """
        if self._is_refusing:
            message = "the router is shutting down and takes no more calls"
            raise Unavailable(message, retry_after_s=LEAVING_RETRY_AFTER_S)
        call = Call(reply, rows, timeout_s, self._closed)
        self._open.add(call)
        return call

    def infer(self, call: Call, blocks: Sequence[Block]) -> None:
        """Queue a call's blocks. Each is refused or taken by itself; the call's reply hears of it either way."""
        for block in blocks:
            try:
                lane = self._lane_by_key.get(block.key) or self._lanes.open(block.key)
                call.wait_in(lane, block)  # before: where answers are known, they come at once, and may close the call
                lane.infer(block)
            except RouterError as error:
                self.count_refusal(error, block.rows)
                call.fail_rows(block.index, block.first_row, block.rows, error)

    def count_refusal(self, error: RouterError, rows: int) -> None:
        """Count rows that were not taken, if that was for want of room or time."""
        if isinstance(error, ResourceExhausted):
            self._metrics.refusals.labels(error.reason).inc(rows)
        elif isinstance(error, DeadlineExceeded):
            self._metrics.refusals.labels("deadline").inc(rows)

    def apply(self, settings: Settings) -> None:
        """Go on by other settings: rows that wait or fly are served, new ones go where these say."""
        self._lanes.apply(settings)

    def refit(self, model: tuple[str, str]) -> None:
        """Go on by what is known of a model now."""
        self._lanes.refit(model)

    def uses(self, pool: ReplicaPool) -> bool:
        """Whether rows may still go there, or are there."""
        return self._lanes.uses(pool)

    def refuse_new(self) -> None:
        """From now on `open` refuses; what is open goes on."""
        self._is_refusing = True

    async def wait_until_idle(self) -> None:
        """Return when no call is open."""
        while self._open:
            self._all_closed.clear()
            await self._all_closed.wait()

    async def aclose(self) -> None:
        """Fail what is still open, end what is in flight."""
        self.refuse_new()
        message = "the router shut down before the call was answered"
        for call in list(self._open):
            call.abort(Unavailable(message, retry_after_s=LEAVING_RETRY_AFTER_S))
        await self._lanes.aclose()

    def _closed(self, call: Call) -> None:
        self._open.discard(call)
        if not self._open:
            self._all_closed.set()
