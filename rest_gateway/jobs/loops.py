"""What is done again and again for jobs: steps that never end and never spin, and what they know of the database.

Must not know what the steps do. A step returns after how many seconds the next one is due, counted from its own begin,
so that a step's own time delays none; who has an event may be woken earlier. A step that finds the database away, or a
bug, is tried again after `AWAY_S`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

from rest_gateway.jobs.records import StoreUnavailable

logger = logging.getLogger(__name__)

AWAY_S = 0.5

Step: TypeAlias = Callable[[], Awaitable[float]]
Answer = TypeVar("Answer")


class Loops:
    """The loops of one process that use one store."""

    def __init__(self) -> None:
        # The database as the last question found it; None: nobody has asked yet.
        self.is_database_away: bool | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, step: Step, wake: asyncio.Event | None = None) -> None:
        """Runs `step` again and again, at once when `wake` is set."""
        loop = self._forever(name, step, wake or asyncio.Event())
        self._tasks.append(asyncio.create_task(loop, name=f"jobs-{name}"))

    async def ask(self, answer: Awaitable[Answer]) -> Answer:
        """What the store answers; says in the log, once, that the database is away, and once that it is back."""
        try:
            result = await answer
        except StoreUnavailable as exc:
            if not self.is_database_away:
                logger.error("the database is away, jobs wait: %s", exc)  # noqa: TRY400 -- the line says all
            self.is_database_away = True
            raise
        if self.is_database_away:
            logger.warning("the database is back")
        self.is_database_away = False
        return result

    async def aclose(self) -> None:
        """Ends them all, in the midst of a step, too."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _forever(self, name: str, step: Step, wake: asyncio.Event) -> None:
        while True:
            started_s = _now_s()
            wake.clear()
            try:
                due_s = await step()
                await _wait(wake, started_s + due_s - _now_s())
            except StoreUnavailable:
                await asyncio.sleep(AWAY_S)
            except Exception:
                logger.exception("unexpected error in the loop %s", name)
                await asyncio.sleep(AWAY_S)


async def _wait(wake: asyncio.Event, seconds: float) -> None:
    """Until woken or until time is over; at least one turn of the loop."""
    if seconds <= 0:
        await asyncio.sleep(0)
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await wake.wait()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
