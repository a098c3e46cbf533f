"""Many writes, one commit.

A durable commit costs one flush of the disk, however much it holds. So a write never goes alone while others wait:
whatever gathers during one commit goes with the next. There is no timer and no added delay; a lone write goes at once.

A group stands or falls together, so a fault of one member would be everybody's. A failed group is therefore repeated
one by one, and only the culprit fails. When the database is away, one by one would only take longer: then all fail,
with those that have gathered meanwhile.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, Generic, TypeVar

from rest_gateway.jobs.records import StoreError, StoreUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
# SQLite commits 500 texts in some 5 ms, so more in a group gains little; bytes bound what a group holds in memory.
MAX_GROUP: Final = 500
MAX_BYTES: Final = 4 * 2**20
# The answer to each item, in order; an exception is raised to the one who waits for it.
Write = Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]]
Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class GroupCommit(Generic[T, R]):
    """Calls of one kind that share transactions, at most MAX_GROUP and about MAX_BYTES in each."""

    def __init__(
        self,
        write: Write[T, R],
        spawn: Spawn,
        size: Callable[[T], int],
        orphaned: Callable[[R], Awaitable[None]] | None = None,
    ) -> None:
        self._write = write
        self._spawn = spawn
        self._size = size  # bytes of an item
        # Is told the result of an item whose caller was cancelled after its transaction had begun.
        self._orphaned = orphaned
        # What waits for the next transaction, and the task that runs one after the other.
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: T) -> R:
        """Writes the item; returns when it is durable. Cancelled before its transaction began, it is not written."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = self._spawn(self._run(), "group commit")
        try:
            return await future
        except asyncio.CancelledError:
            # Between the answer and the caller's turn.
            if future.done() and not future.cancelled() and future.exception() is None:
                self._abandon(future.result())
            raise

    async def _run(self) -> None:
        try:
            while group := self._take():
                await self._commit(group)
        finally:
            self._task = None

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        self._waiting = [entry for entry in self._waiting if not entry[1].cancelled()]
        count, size = 0, 0
        for item, _ in self._waiting[:MAX_GROUP]:
            size += self._size(item)
            if count and size > MAX_BYTES:
                break
            count += 1
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        return group

    async def _commit(self, group: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            answers = await self._write([item for item, _ in group])
        except StoreUnavailable as exc:
            gathered, self._waiting = self._waiting, []
            for _, future in (*group, *gathered):
                _fail(future, exc)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the callers must hear of it
            if len(group) == 1:
                _fail(group[0][1], exc)
                return
            logger.warning("a group of %d writes failed and is repeated one by one: %r", len(group), exc)
            for entry in group:
                await self._commit([entry])
        else:
            for (_, future), answer in zip(group, answers, strict=True):
                self._answer(future, answer)

    def _answer(self, future: "asyncio.Future[R]", answer: R | Exception) -> None:
        if isinstance(answer, Exception):
            _fail(future, answer)
        elif future.cancelled():
            self._abandon(answer)
        else:
            future.set_result(answer)

    def _abandon(self, answer: R) -> None:
        """In a task of its own: the next group must not wait for it, nor fail with it."""
        if self._orphaned is not None:
            self._spawn(self._tell_orphan(self._orphaned(answer)), "group commit orphan")

    async def _tell_orphan(self, told: Awaitable[None]) -> None:
        try:
            await told
        except StoreError as exc:
            logger.info("could not give back what nobody waits for: %s", exc)


def _fail(future: "asyncio.Future[R]", exc: Exception) -> None:
    """Every caller gets an exception of its own: raising one adds to its traceback."""
    if not future.done():
        own = StoreUnavailable(*exc.args) if type(exc) is StoreUnavailable else exc
        own.__cause__ = exc.__cause__
        future.set_exception(own)
