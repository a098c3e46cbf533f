"""DataPlane: hand a call's blocks to their batchers, and gather what becomes of them.

A `Call` counts the rows that are still open and tells its `Reply` of each part as it is answered, whatever the order. A
call closes once: when its last row is answered or failed, when its deadline passes, or when its caller gives up. Then
every row of it that still waits leaves its queue.

No batching rules, no replicas, no status codes here.
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from router.batcher import Batcher
from router.config import ModelSettings, Settings
from router.core.budget import Budget
from router.core.isolation import Isolation
from router.core.policy import choose_policy
from router.core.types import BatchAnswer, BatchKey, Block, Contract, Part
from router.core.variable_queue import make_queue
from router.dispatch.pool import ReplicaPool
from router.errors import DeadlineExceeded, InternalError, NotFound, ResourceExhausted, RouterError, Unavailable
from router.metrics import Metrics

logger = logging.getLogger(__name__)

# What a caller is told to wait when the router leaves: time enough for another to be found.
LEAVING_RETRY_AFTER_S = 1.0
KEYS_RETRY_AFTER_S = 60.0
# Idle keys are not looked for more often.
MIN_SWEEP_S = 1.0


class Reply(Protocol):
    """Where a call's answers go. None of the methods may raise; after `is_last`, or `closed`, none is called again."""

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        """Rows of one block: rows offset .. offset + part.rows - 1 of the batch."""

    def failed(self, index: int, first_row: int, rows: int, error: RouterError, *, is_last: bool) -> None:
        """Rows first_row .. first_row + rows - 1 of block number `index` failed."""

    def closed(self, error: RouterError) -> None:
        """Every row of the call that was not answered or failed before has failed."""


class Call:
    """One caller's request while it is open; the recipient of its blocks."""

    __slots__ = ("_on_close", "_open_rows", "_queued", "_reply", "_timeout_s", "is_closed")

    def __init__(self, reply: Reply, rows: int, timeout_s: float, on_close: Callable[["Call"], None]) -> None:
        self._reply = reply
        self._open_rows = rows
        self._timeout_s = timeout_s
        self._on_close = on_close
        # Where its rows may still wait.
        self._queued: list[tuple[Batcher, Block]] = []
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

    def wait_in(self, batcher: Batcher, block: Block) -> None:
        """Remember where to withdraw from."""
        self._queued.append((batcher, block))

    def _close(self) -> None:
        self.is_closed = True
        if self._open_rows:
            for batcher, block in self._queued:
                batcher.discard(block)
        self._queued.clear()
        self._on_close(self)


class DataPlane:
    """The live keys and the open calls of the router."""

    def __init__(self, settings: Settings, pools: Mapping[str, ReplicaPool], metrics: Metrics) -> None:
        self._settings = settings
        self._pools = pools
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        ids, prefix = itertools.count(1), secrets.token_hex(4)
        self._next_batch_id = lambda: f"{prefix}-{next(ids)}"
        # State: a batcher per live key; what all queues hold; the open calls; whether new ones are refused.
        self._batchers: dict[BatchKey, Batcher] = {}
        limits = settings.limits
        self._budget = Budget(
            limits.max_queued_bytes,
            max_rows=limits.max_process_rows,
            max_tenant_rows=limits.max_tenant_rows,
            max_tenant_bytes=limits.max_tenant_bytes,
        )
        self._open: set[Call] = set()
        self._is_refusing = False
        self._all_closed = asyncio.Event()
        metrics.queued_rows.set_function(lambda: self._budget.rows)
        metrics.open_calls.set_function(lambda: len(self._open))
        metrics.keys.set_function(lambda: len(self._batchers))
        self._sweep_timer = self._loop.call_later(settings.limits.key_idle_s, self._sweep)

    def __repr__(self) -> str:
        return f"<DataPlane {len(self._open)} open calls, {len(self._batchers)} keys, {self._budget.rows} rows queued>"

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
                batcher = self._batchers.get(block.key) or self._new_batcher(block.key)
                batcher.infer(block)
            except RouterError as error:
                self._count_refusal(error, block.rows)
                call.fail_rows(block.index, block.first_row, block.rows, error)
            else:
                call.wait_in(batcher, block)

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
        self._sweep_timer.cancel()
        self.refuse_new()
        message = "the router shut down before the call was answered"
        for call in list(self._open):
            call.abort(Unavailable(message, retry_after_s=LEAVING_RETRY_AFTER_S))
        await asyncio.gather(*(batcher.aclose() for batcher in self._batchers.values()))

    def _closed(self, call: Call) -> None:
        self._open.discard(call)
        if not self._open:
            self._all_closed.set()

    def _count_refusal(self, error: RouterError, rows: int) -> None:
        if isinstance(error, ResourceExhausted):
            self._metrics.refusals.labels(error.reason).inc(rows)

    def _new_batcher(self, key: BatchKey) -> Batcher:
        limits = self._settings.limits
        if len(self._batchers) >= limits.max_keys:
            message = f"{limits.max_keys} kinds of rows (model, agent type, vector length) are in use, no more may be"
            raise ResourceExhausted(message, reason="keys", retry_after_s=KEYS_RETRY_AFTER_S)
        model = self._settings.route(key.model_name, key.agent_type)
        if model is None:
            raise NotFound(f"no model {key.model_name!r} for agent type {key.agent_type!r}")
        backend = self._settings.backends[model.backend]
        batcher = self._batchers[key] = Batcher(
            key,
            queue=make_queue(
                key,
                max_batch_rows=model.max_batch_size,
                max_batch_bytes=model.max_batch_bytes,
                max_rows=limits.max_queued_rows,
                budget=self._budget,
                max_bytes=limits.max_key_bytes,
                weights=self._settings.tenant_weights,
                patience_s=model.batch_class_patience_s,
            ),
            isolation=Isolation(self._budget),
            policy=choose_policy(backend.max_in_flight, model.max_queue_delay_s),
            pool=self._pools[model.backend],
            backend=model.backend,
            retries=model.retries,
            contract=_contract(key, model),
            next_batch_id=self._next_batch_id,
            metrics=self._metrics,
        )
        return batcher

    def _sweep(self) -> None:
        """Forget the keys that nobody has used for `key_idle_s`."""
        idle_s = self._settings.limits.key_idle_s
        then = self._loop.time() - idle_s
        for key in [key for key, batcher in self._batchers.items() if batcher.is_idle_since(then)]:
            del self._batchers[key]
        self._sweep_timer = self._loop.call_later(max(idle_s / 10, MIN_SWEEP_S), self._sweep)


def _contract(key: BatchKey, model: ModelSettings) -> Contract:
    """What answers must hold. `vector_output` is asked of keys that native rows have, not of a model's other inputs."""
    is_native = len(key.inputs) == 1 and (key.inputs[0].name, key.inputs[0].datatype) == (model.vector_input, "FP32")
    return Contract(model.vector_output if is_native else None, model.allow_nan)
