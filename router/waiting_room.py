"""WaitingRoom: blocks for a model of which nobody knows yet what it takes, or that is being loaded.

They wait here as others do in queues: counted in the one budget, bounded, until their deadline. What they will be sent
as is decided when they leave, so their key has a model and no inputs yet.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import TypeAlias

from router.core.budget import Budget, exceeded
from router.core.types import Block
from router.errors import InternalError, ResourceExhausted, RouterError

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
# Blocks that go on before the others on the loop have their turn.
TURN = 256

Resume: TypeAlias = Callable[[Block], None]
"""What goes on with a block once its model is known."""


class WaitingRoom:
    """The blocks of one model; `max_rows` of them."""

    def __init__(self, budget: Budget, max_rows: int) -> None:
        self.max_rows = max_rows
        self._budget = budget
        self._loop = asyncio.get_running_loop()
        # State: what becomes of each block, and the alarm of its deadline; their rows.
        self._held: dict[Block, tuple[Resume, asyncio.TimerHandle]] = {}
        self.rows = 0

    def __repr__(self) -> str:
        return f"<WaitingRoom {self.rows} rows in {len(self._held)} blocks>"

    def hold(self, block: Block, resume: Resume) -> None:
        """Keep a block until `release`; at its deadline its recipient is told. Raises RouterError if it is refused."""
        nbytes = block.whole().nbytes
        refusal = exceeded(
            block.rows, self.rows, self.max_rows, "rows", " for one model", "queue_rows"
        ) or self._budget.refusal(block.tenant, block.rows, nbytes)
        if isinstance(refusal, ResourceExhausted):
            refusal.retry_after_s = RETRY_AFTER_S
        if refusal:
            raise refusal
        self._held[block] = resume, self._loop.call_at(block.deadline, self._expire, block)
        self.rows += block.rows
        self._budget.count(block.tenant, block.rows, nbytes)

    def discard(self, block: Block) -> None:
        """Nobody waits for a block any more; one that is not here is none of ours."""
        self._leave(block)

    def release(self, may_go: Callable[[Block], bool] = lambda _: True) -> None:
        """Let all go on that may, in the order in which they came; TURN of them now, the others soon."""
        self._release_some(iter([block for block in self._held if may_go(block)]))

    def _release_some(self, blocks: Iterator[Block]) -> None:
        for count, block in enumerate(blocks, 1):
            resume = self._leave(block)
            if resume:  # none: its call is closed, perhaps by what became of another one
                _go_on(block, resume)
            if count == TURN:
                self._loop.call_soon(self._release_some, blocks)
                return

    def fail(self, error: RouterError) -> None:
        """Answer all."""
        for block in list(self._held):
            if self._leave(block) and not block.recipient.is_closed:
                block.recipient.fail(block.whole(), error)

    def recount(self) -> None:
        """Tell the budget what waits of each tenant, after its bounds have changed."""
        for block in self._held:
            self._budget.count_tenant(block.tenant, block.rows, block.whole().nbytes)

    def _leave(self, block: Block) -> Resume | None:
        resume, alarm = self._held.pop(block, (None, None))
        if alarm:
            alarm.cancel()
            self.rows -= block.rows
            self._budget.count(block.tenant, -block.rows, -block.whole().nbytes)
        return resume

    def _expire(self, block: Block) -> None:
        self._leave(block)
        block.recipient.expire()


def _go_on(block: Block, resume: Resume) -> None:
    """One block must not take the others with it."""
    try:
        resume(block)
    except Exception:
        logger.exception("a block of model %r could not go on; this is a bug", block.key.model_name)
        if not block.recipient.is_closed:
            block.recipient.fail(block.whole(), InternalError())
