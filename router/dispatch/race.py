"""Race: one batch that may be out twice; the first answer wins (`core/hedge.py` tells why and when).

Each copy has a slot of its own while it is out. The loser is cancelled, which ends its stream, so no late answer of it
can be read. If one copy fails the other goes on; a failure is one only when both have failed.

A batch that may be hedged costs one timer. What is asked and sent comes in as two calls; this knows no replica.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from router.core.types import BatchAnswer
from router.dispatch.slots import Slot
from router.errors import BackendError

# A timer that rings later than this tells that our own loop stood still: the answer may be there, unread.
LATE_S = 0.1


class Race:
    """One batch.

    send: send it with a slot, which is given back at the end in any case. spare: a slot for the second copy, or None
    where there should be none now.
    """

    def __init__(
        self, send: Callable[[Slot], Coroutine[Any, Any, BatchAnswer]], spare: Callable[[], Slot | None]
    ) -> None:
        self._send = send
        self._spare = spare
        self._loop = asyncio.get_running_loop()
        # State: the bound that ends the first copy, while it is out; the second copy; the alarm for the time at which
        # the first has stalled.
        self._bound = asyncio.timeout(None)
        self._is_first_out = False
        self._second: asyncio.Task[BatchAnswer] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    async def run(self, slot: Slot, stalled_s: float) -> BatchAnswer:
        """Send the batch; if nothing has come back after `stalled_s`, send it twice. Raises BackendError."""
        self._set_alarm(stalled_s, stalled_s)
        try:
            answer = await self._first(slot)
            return await self._better(answer, self._second) if answer.fault and self._second else answer
        except TimeoutError:
            assert self._second, "the first copy was ended without a second one: this is a bug"
            return self._second.result()
        except BackendError as error:
            if self._second is None:
                raise
            return await self._outlive(self._second, error)
        finally:
            await self._end()

    async def _first(self, slot: Slot) -> BatchAnswer:
        self._is_first_out = True
        try:
            async with self._bound:
                return await self._send(slot)
        finally:
            self._is_first_out = False

    async def _better(self, answer: BatchAnswer, second: asyncio.Task[BatchAnswer]) -> BatchAnswer:
        """The first copy's answer cannot be believed: the second's counts, unless it fails."""
        try:
            return await second
        except BackendError:
            return answer

    async def _outlive(self, second: asyncio.Task[BatchAnswer], error: BackendError) -> BatchAnswer:
        """The first copy has failed: what becomes of the second decides."""
        try:
            return await second
        except BackendError:
            raise error from None

    async def _end(self) -> None:
        if self._alarm:
            self._alarm.cancel()
        if self._second and not self._second.done():
            # On the next turn: a task that is cancelled before its first step takes none, and its slot is never freed.
            self._loop.call_soon(self._second.cancel)
            await asyncio.wait([self._second])

    def _set_alarm(self, after_s: float, stalled_s: float) -> None:
        at = self._loop.time() + after_s
        self._alarm = self._loop.call_at(at, self._stalled, at, stalled_s)

    def _stalled(self, at: float, stalled_s: float) -> None:
        """Send the second copy, or look again later."""
        if not self._is_first_out:
            return
        is_late = self._loop.time() > at + LATE_S
        slot = None if is_late else self._spare()
        if slot is None:
            self._set_alarm(LATE_S if is_late else stalled_s, stalled_s)
            return
        self._second = self._loop.create_task(self._send(slot), name="hedge")
        self._second.add_done_callback(self._second_ended)

    def _second_ended(self, second: asyncio.Task[BatchAnswer]) -> None:
        has_won = not second.cancelled() and second.exception() is None and not second.result().fault
        if has_won and self._is_first_out and not self._bound.expired():
            self._bound.reschedule(self._loop.time())
