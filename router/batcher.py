"""Batcher: one key's queue on the loop.

It pushes arriving blocks into the pure queue, asks for a slot while rows wait, forms a batch when a slot is at hand and
the policy agrees, and hands every part of the answer to its caller. All pushes of one turn of the loop are looked at
once, so a message with a hundred blocks makes one decision. One timer serves deadlines, holds and rows in flight.

It knows nothing of protobuf, gRPC, other keys or how a replica is chosen.
"""

import asyncio
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from router.core.admission import Admission
from router.core.batch import cut, split, split_around
from router.core.budget import Budget
from router.core.hedge import Hedging
from router.core.isolation import Piece
from router.core.policy import Hold, Policy, View, change_policy
from router.core.queue import Bounds, KeyQueue
from router.core.retry import count_rows
from router.core.service_time import FAST_S
from router.core.types import Batch, BatchAnswer, BatchKey, Block, Contract, Part
from router.dispatch.pool import ReplicaPool
from router.dispatch.slots import CLOCK_SLACK_S, ModelSlots, Slot
from router.errors import (
    BackendError,
    DeadlineExceeded,
    InternalError,
    ModelFailed,
    ResourceExhausted,
    Unavailable,
)
from router.metrics import Metrics
from router.recovery import Recovery, fail

logger = logging.getLogger(__name__)


class Batcher:
    """One key's queue, its timer and its batches in flight."""

    def __init__(
        self,
        key: BatchKey,
        *,
        queue: KeyQueue,
        budget: Budget,
        policy: Policy,
        pool: ReplicaPool,
        backend: str,
        retries: int,
        contract: Contract,
        next_batch_id: Callable[[], str],
        on_failure: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        self._key = key
        self._policy = policy
        self._pool = pool
        self._contract = contract
        self._hedging = Hedging(policy.service_times, self._may_hedge, is_allowed=retries > 0)
        self._next_batch_id = next_batch_id
        # Told when a batch has failed: the model may be another than was known.
        self._on_failure = on_failure
        self._accepted_rows = metrics.rows
        self._batch_rows = metrics.batch_rows.labels(backend)
        self._batch_seconds = metrics.batch_seconds.labels(backend)
        self._hedged_batches = metrics.hedged_batches.labels(backend)
        self._failed_rows = functools.partial(metrics.failed_rows.labels, backend)
        self._batches = functools.partial(metrics.batches.labels, backend)
        # Told of every batch that is sent.
        self.on_dispatch: Callable[[Batch], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._slots: ModelSlots = pool.slots(key.model)
        # State: what waits; what a row may expect that arrives; what failed; why rows wait although a slot was at hand;
        # what is in flight, with its tasks; the timer and when it rings; whether `_pump` is about to run; what came
        # since it last ran; when the last row came or went.
        self._queue = queue
        self._admission = Admission()
        self._recovery = Recovery(
            self,
            model_name=key.model_name,
            queue=queue,
            slots=self._slots,
            budget=budget,
            backend=backend,
            retries=retries,
            metrics=metrics,
        )
        self._hold: Hold | None = None
        self._in_flight: dict[Batch, asyncio.Task[None]] = {}
        self._blocks_in_flight = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._is_pump_due = False
        self._new_blocks = self._new_rows = 0
        self._last_used = self._loop.time()

    def __repr__(self) -> str:
        return f"<Batcher {self._key.model_name!r} {self._queue!r}, {len(self._in_flight)} batches in flight>"

    def infer(self, block: Block) -> None:
        """Queue a block; its recipient hears of every row. Raises RouterError when it is refused."""
        admission, queue = self._admission, self._queue
        try:
            # Who has as much time is in time however the slots come back. This is done for every block.
            if (queue.rows + block.rows) * admission.row_s + admission.own_s > block.deadline - block.arrived_at:
                self._admit(block)
            queue.push(block)
        except ResourceExhausted as error:
            error.retry_after_s = error.retry_after_s or self._admission.retry_after_s(block.rows)
            raise
        self._new_blocks += 1
        self._new_rows += block.rows
        if not self._is_pump_due:
            self._pump_soon()

    def _admit(self, block: Block) -> None:
        """Refuse what cannot be in time. Raises RouterError."""
        queue, left_s = self._queue, block.deadline - block.arrived_at
        keys, returns_s = self._slots.waiting_keys, self._slots.returns_s(block.arrived_at)
        ahead = queue.rows_ahead(block.tenant, block.is_batch_class, block.rows) if queue.rows else 0
        self._admission.check(ahead + block.rows - 1 if ahead else 0, left_s, returns_s, keys)

    def _update_admission(self) -> None:
        slots = self._slots
        times = self._policy.service_times
        self._admission.update(times, batch_rows=self._queue.seats, slots=slots.usable, keys=slots.waiting_keys)

    def discard(self, block: Block) -> None:
        """Forget what waits of a block; rows in flight go on for their neighbours."""
        if self._queue.discard(block) and not self._queue.rows:
            self._slots.withdraw(self)
        self._recovery.discard(block)

    def apply(
        self, bounds: Bounds, *, max_in_flight: int, max_queue_delay_s: float, retries: int, contract: Contract
    ) -> None:
        """Go on by other settings, with what waits, what flies and what was learned."""
        self._queue.set_bounds(bounds)
        self._policy = change_policy(self._policy, max_in_flight, max_queue_delay_s)
        self.set_retries(retries)
        self._contract = contract
        self._update_admission()
        if self._queue.rows:
            self._pump_soon()

    def set_retries(self, retries: int) -> None:
        """Try rows again so often from now on; 0: send nothing twice, copies of what stalls included."""
        self._recovery.retries = retries
        self._hedging.is_allowed = retries > 0

    def recount(self) -> None:
        """Tell the budget what waits of each tenant, after its bounds have changed."""
        self._queue.recount()
        self._recovery.recount()

    def keep(self, block: Block, runs: Sequence[tuple[int, int]]) -> None:
        """Forget what waits of a block but these runs of rows; of none: all of it, wherever it is."""
        if runs:
            self._queue.keep(block, runs)
        else:
            self.discard(block)

    def is_idle_since(self, then: float) -> bool:
        """Whether no row waited or flew since `then`."""
        is_idle = not self._queue.rows and not self._in_flight and self._recovery.is_idle
        return is_idle and self._last_used < then

    def stop(self) -> None:
        """Ring no more; nothing waits here, or nobody waits for it."""
        self._slots.withdraw(self)
        if self._timer:
            self._timer.cancel()

    async def aclose(self) -> None:
        """End what is in flight, without answers."""
        self.stop()
        tasks = list(self._in_flight.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- waiting -----------------------------------------------------------------------------------------------------

    def _pump_soon(self) -> None:
        if not self._is_pump_due:
            self._is_pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Expire what is late, want a slot while rows wait, and set the alarm.

        A hold is forgotten here and found again by `take` where it still applies. Kept, it would outlive the rows that
        it was for, or the slot, and set an alarm in the past over and over.
        """
        self._is_pump_due = False
        self._last_used = self._loop.time()
        self._hold = None
        self._count_arrivals(self._last_used)
        self._expire(self._last_used)
        if self._queue.rows:
            self._slots.request(self)
        else:
            self._slots.withdraw(self)
        self._set_alarm()

    def _count_arrivals(self, now: float) -> None:
        if self._new_blocks:
            self._policy.arrived(self._new_blocks, self._new_rows, now)
            self._accepted_rows.inc(self._new_rows)
            self._new_blocks = self._new_rows = 0

    def _expire(self, now: float) -> None:
        """Answer the rows that cannot make it any more.

        A call has one deadline, so the first of its rows that is found late ends all of it, here and elsewhere. Rows
        that no call of the key was ever fast enough for fail alone: others of their call may be faster.
        """
        due, least_s = now + CLOCK_SLACK_S, self._admission.give_up_s
        if self._queue.earliest_deadline - least_s <= due:
            for block in self._queue.pop_expired(due):
                block.recipient.expire()
            if least_s:
                self._give_up(self._queue.pop_infeasible(due, least_s), "at least", least_s, now)
        if self._recovery.wake_at <= due:
            self._recovery.expire(due)

    def _yield_seats(self, slots: ModelSlots, now: float) -> None:
        """With more rows than seats those that will probably be late leave theirs to others, as far as there are any.

        Slots without limit have a seat for everybody, and count none that is free.
        """
        queue = self._queue
        likely_s = self._policy.service_times.likely_s(queue.seats) if queue.rows > queue.seats else 0.0
        if likely_s and queue.wake_at - likely_s <= now + CLOCK_SLACK_S and (free := slots.count_free(now)) > 0:
            parts = queue.pop_infeasible(now + CLOCK_SLACK_S, likely_s, queue.rows - free * queue.seats)
            self._give_up(parts, "nine times out of ten up to", likely_s, now)

    def _give_up(self, parts: Iterable[Part], how: str, service_s: float, now: float) -> None:
        for part in parts:
            left_s = max(part.block.deadline - now, 0.0)
            message = f"{left_s:.3g} s are left to the deadline, and a call takes {how} {service_s:.3g} s"
            fail((part,), DeadlineExceeded(message))

    def _set_alarm(self) -> None:
        """Ring when a row becomes infeasible, a hold or a quarantine ends; an alarm that is early enough stays."""
        infeasible_at = self._queue.wake_at - self._admission.give_up_s
        hold_until = self._hold.until if self._hold else math.inf
        at = min(infeasible_at, self._recovery.wake_at, hold_until)
        if at < self._timer_at:
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._ring)
            self._timer_at = at

    def _ring(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        self._pump()

    # -- the slots' side ---------------------------------------------------------------------------------------------

    @property
    def wants_slot(self) -> bool:
        """See slots.Taker."""
        return self._queue.rows > 0 and self._hold is None

    def take(self, slots: ModelSlots, now: float, max_rows: int | None) -> Batch | None:
        """See slots.Taker. Late rows are answered first, so none is dispatched."""
        self._expire(now)
        self._yield_seats(slots, now)
        self._hold = None
        if not self._queue.rows:
            return None
        self._hold = self._policy.hold(self._view(slots), now + CLOCK_SLACK_S)
        if self._hold:
            self._set_alarm()
            slots.hold(self, lapses=self._hold.lapses_with_slots)
            return None
        parts = self._queue.pop_batch(now)
        if max_rows is not None:
            parts, rest = cut(parts, max_rows)
            self._queue.requeue(rest)
        batch = self._form(parts, now)
        self._recovery.retry_budget.sent(batch.rows, now)
        return batch

    def take_piece(self, piece: Piece, now: float) -> Batch | None:
        """See slots.Taker. Late rows are answered first, so none is dispatched."""
        self._expire(now)
        parts = self._recovery.take(piece)
        if not parts:
            return None
        batch = self._form(parts, now)
        self._recovery.sent(piece, batch)
        return batch

    def _form(self, parts: tuple[Part, ...], now: float) -> Batch:
        return Batch(self._next_batch_id(), self._key, parts, count_rows(parts), now, self._contract)

    def _view(self, slots: ModelSlots) -> View:
        queue = self._queue
        return View(
            blocks=queue.blocks,
            rows=queue.rows,
            oldest_at=queue.oldest_at,
            deadline=queue.wake_at,
            is_full=queue.is_full,
            blocks_in_flight=self._blocks_in_flight,
            slots=slots,
        )

    @property
    def rows_to_take(self) -> int:
        """See slots.Taker."""
        return min(self._queue.rows, self._queue.seats)

    def expect_s(self, rows: int, replica: str) -> float:
        """See slots.Taker."""
        return self._policy.service_times.of(replica).predict(rows)

    def dispatch(self, batch: Batch, slot: Slot) -> None:
        """See slots.Taker."""
        self._batch_rows.observe(batch.rows)
        self._blocks_in_flight += len(batch.parts)
        if self.on_dispatch:
            self.on_dispatch(batch)
        self._in_flight[batch] = self._loop.create_task(self._infer(batch, slot), name=f"batch {batch.id}")

    # -- in flight ---------------------------------------------------------------------------------------------------

    async def _infer(self, batch: Batch, slot: Slot) -> None:
        alarm = _DeadlineAlarm(batch.parts, self._loop)
        try:
            answer = await self._pool.infer(batch, slot, self._hedging)
        except BackendError as error:
            self._on_failure()
            self._recovery.failed(batch, error, slot.seat.member.address)
        except asyncio.CancelledError:
            fail(batch.parts, Unavailable("the router shut down before the call was answered"))
            raise
        except Exception:
            logger.exception("batch %s failed inside the router; this is a bug", batch.id)
            fail(batch.parts, InternalError())
        else:
            await self._answered(batch, answer)
        finally:
            alarm.cancel()
            del self._in_flight[batch]
            self._recovery.landed(batch)
            self._blocks_in_flight -= len(batch.parts)
            self._pump_soon()

    def _may_hedge(self, rows: int, now: float) -> bool:
        """A batch is about to be sent a second time, within the share that `Hedging` allows."""
        may_hedge = self._recovery.may_spend(rows, now)
        self._hedged_batches.inc(may_hedge)
        return may_hedge

    async def _answered(self, batch: Batch, answer: BatchAnswer) -> None:
        """Learn from an answer, and hand it out.

        With rows waiting the slot's next batch goes first: it is formed on the loop's next turn and sent on the one
        after. Handing out takes a millisecond or so, in which the model would have nothing to do. With the fastest
        models it is the router that has too much to do, and two more turns of the loop are no help.
        """
        service_s = answer.answered_at - answer.dispatched_at
        self._policy.completed(answer.replica, batch.rows, service_s, answer.answered_at)
        self._update_admission()
        if answer.fault and self._recovery.asks_another(batch, answer.fault, answer.replica):
            return
        self._batches("answered").inc()
        self._batch_seconds.observe(service_s)
        self._recovery.answered(batch)
        if self._slots.waiting_keys and service_s >= FAST_S:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if answer.row_errors:
            self._hand_out_rows(batch, answer, answer.row_errors)
            return
        for part, offset in split(batch):
            if not part.block.recipient.is_closed:
                part.block.recipient.answer(part, answer, offset)

    def _hand_out_rows(self, batch: Batch, answer: BatchAnswer, row_errors: Mapping[int, str]) -> None:
        """Fail the rows that have errors of their own, and answer the others."""
        whose = (batch.id, batch.rows, self._key.model_name, answer.replica)
        logger.warning("batch %s, %d rows of model %r at %s: %d have errors of their own", *whose, len(row_errors))
        self._failed_rows("not_finite" if answer.fault else "row_errors").inc(len(row_errors))
        for part, offset in split_around(batch, row_errors):
            if part.block.recipient.is_closed:
                continue
            if offset in row_errors:
                part.block.recipient.fail(part, ModelFailed(row_errors[offset]))
            else:
                part.block.recipient.answer(part, answer, offset)


class _DeadlineAlarm:
    """Ends the calls whose deadline passes while their rows are in flight; the batch goes on for its other rows."""

    def __init__(self, parts: Sequence[Part], loop: asyncio.AbstractEventLoop) -> None:
        self._parts = parts
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._set()

    def cancel(self) -> None:
        """Ring no more."""
        if self._timer:
            self._timer.cancel()

    def _set(self) -> None:
        deadlines = [part.block.deadline for part in self._parts if not part.block.recipient.is_closed]
        self._timer = self._loop.call_at(min(deadlines), self._ring) if deadlines else None

    def _ring(self) -> None:
        now = self._loop.time() + CLOCK_SLACK_S
        for part in self._parts:
            if part.block.deadline <= now and not part.block.recipient.is_closed:
                part.block.recipient.expire()
        self._set()
