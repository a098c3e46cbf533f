"""Recovery: what becomes of the rows of one key's failed batches.

The table (`core/retry.py`) says where they go; here they are taken there: back to the head of the queue, as pieces to
the lane of the model's slots, or to their callers with an error. Tenants full of bad rows are set apart.

It knows nothing of protobuf, gRPC, other keys or how a replica is chosen.
"""

import asyncio
import functools
import logging
from collections.abc import Iterable

from router.core.budget import Budget
from router.core.isolation import Isolation, Piece, Ruling
from router.core.quarantine import Quarantine
from router.core.queue import KeyQueue
from router.core.retry import Chances, Failure, Verdict, count_rows, judge
from router.core.retry_budget import RetryBudget
from router.core.types import Batch, Block, Part
from router.dispatch.slots import ModelSlots, Taker
from router.errors import BackendError, Malformed, RouterError
from router.metrics import Metrics

logger = logging.getLogger(__name__)


class Recovery:
    """One key's rows that came back without an answer; its pieces are sent for `taker`."""

    def __init__(
        self,
        taker: Taker,
        *,
        model_name: str,
        queue: KeyQueue,
        slots: ModelSlots,
        budget: Budget,
        backend: str,
        retries: int,
        metrics: Metrics,
    ) -> None:
        self._taker = taker
        self._model_name = model_name
        self._queue = queue
        self._slots = slots
        self.retries = retries
        self._batches = functools.partial(metrics.batches.labels, backend)
        self._requeued_rows = metrics.requeued_rows.labels(backend)
        self._splits = metrics.splits.labels(backend)
        self._poison_rows = metrics.poison_rows.labels(backend)
        self._budget_refusals = metrics.retry_budget_refusals.labels(backend)
        self._failed_rows = functools.partial(metrics.failed_rows.labels, backend)
        self._loop = asyncio.get_running_loop()
        # State: pieces that wait, and those in flight; tenants that are set apart; what may be retried.
        self._isolation = Isolation(budget)
        self._in_flight: dict[Batch, Piece] = {}
        self._quarantine = Quarantine()
        self.retry_budget = RetryBudget()

    @property
    def is_idle(self) -> bool:
        """Whether no piece waits and no tenant is set apart."""
        return not self._isolation.rows and not self._quarantine.is_on

    @property
    def wake_at(self) -> float:
        """When to call `expire` next; infinity while there is nothing to do."""
        return min(self._isolation.wake_at, self._quarantine.wake_at)

    def discard(self, block: Block) -> None:
        """Forget what waits of a block in pieces."""
        if self._isolation.rows:
            for piece in self._isolation.discard(block):
                self._slots.leave(piece)
            self._tell_queue()

    def _tell_queue(self) -> None:
        """The key's bounds are for its pieces, too."""
        self._queue.set_others(self._isolation.rows, self._isolation.nbytes)

    def recount(self) -> None:
        """Tell the budget what waits of each tenant in pieces, after its bounds have changed."""
        self._isolation.recount()

    def expire(self, now: float) -> None:
        """End the calls whose deadline has come while their rows wait in pieces, and quarantines whose time is over."""
        for block in self._isolation.expired(now):
            self.discard(block)
            block.recipient.expire()
        for tenant in self._quarantine.released(now):
            logger.info("tenant %r of model %r shares batches again", tenant, self._model_name)
            self._queue.rejoin(tenant)

    def take(self, piece: Piece) -> tuple[Part, ...]:
        """The rows of a piece that is to be sent; none if all of them have left."""
        parts = self._isolation.take(piece) if piece.parts else ()
        self._tell_queue()
        return parts

    def sent(self, piece: Piece, batch: Batch) -> None:
        """A piece is in flight as this batch, until `landed`."""
        self._in_flight[batch] = piece

    def landed(self, batch: Batch) -> None:
        """A batch is not in flight any more."""
        self._in_flight.pop(batch, None)

    # -- how batches come back ---------------------------------------------------------------------------------------

    def answered(self, batch: Batch) -> None:
        """A batch was good; if it was a piece, others may be known to be bad by that."""
        if batch in self._in_flight:
            self._carry_out(self._isolation.answered(self._in_flight[batch], self._slots.split_limit))
        if self._quarantine.is_watching:
            self._quarantine.served(batch.parts)

    def asks_another(self, batch: Batch, fault: Malformed, replica: str) -> bool:
        """Whether another replica is asked before an answer is believed that may not be true; if so, it will be."""
        verdict = self._judge(batch, fault, replica)
        if not verdict.elsewhere or verdict.failed:
            return False
        self._follow(verdict, batch, fault, replica)
        return True

    def failed(self, batch: Batch, error: BackendError, replica: str) -> None:
        """A batch came back from a replica without an answer."""
        self._follow(self._judge(batch, error, replica), batch, error, replica)

    def _judge(self, batch: Batch, error: BackendError, replica: str) -> Verdict:
        piece = self._in_flight.get(batch)
        is_split = piece is not None and piece.is_split
        had_second = piece is not None and piece.avoid is not None
        chances = Chances(self.retries, self._slots.has_other(replica), self._spend)
        return judge(Failure(batch.parts, error, is_split, had_second), chances)

    def _spend(self, rows: int) -> bool:
        return self.may_spend(rows, self._loop.time())

    def may_spend(self, rows: int, now: float) -> bool:
        """Charge the retry budget with so many rows, if it lasts."""
        may_spend = self.retry_budget.may_spend(rows, now)
        if not may_spend:
            self._budget_refusals.inc()
        return may_spend

    def _follow(self, verdict: Verdict, batch: Batch, error: BackendError, replica: str) -> None:
        whose = (batch.id, batch.rows, self._model_name, replica)
        logger.warning("batch %s, %d rows of model %r at %s: %s; rows: %s", *whose, error.message, verdict)
        self._batches(type(error).__name__).inc()
        ruling = self._isolation.failed(
            self._in_flight.get(batch),
            verdict,
            formed_at=batch.formed_at,
            sent_rows=batch.rows,
            replica=replica,
            slots=self._slots.split_limit,
        )
        self._carry_out(ruling)
        if verdict.failed:
            self._fail_rows(verdict, error)

    def _carry_out(self, ruling: Ruling) -> None:
        self._splits.inc(ruling.splits)
        self._requeued_rows.inc(count_rows(ruling.requeue))
        self._queue.requeue(ruling.requeue)
        for piece in ruling.leave:
            self._slots.leave(piece)
        for piece in ruling.enter:
            self._slots.enter(self._taker, piece)
        self._tell_queue()

    def _fail_rows(self, verdict: Verdict, error: BackendError) -> None:
        self._failed_rows("poison" if verdict.is_poison else error.reason).inc(count_rows(verdict.failed))
        if verdict.is_poison:
            self._poison_rows.inc()
            self._blame(verdict.failed[0].block.tenant)
        fail(verdict.failed, error.for_caller())

    def _blame(self, tenant: str) -> None:
        if self._quarantine.poisoned(tenant, self._loop.time()):
            logger.warning("tenant %r of model %r gets batches of its own: bad rows", tenant, self._model_name)
            self._queue.separate(tenant)


def fail(parts: Iterable[Part], error: RouterError) -> None:
    """Tell the callers of some parts, as far as they still wait."""
    for part in parts:
        if not part.block.recipient.is_closed:
            part.block.recipient.fail(part, error)
