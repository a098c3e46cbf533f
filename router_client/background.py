"""One event loop in a thread of its own, for those who have none. Knows nothing of clients.

All synchronous clients of a process share it, and it is never closed: grpc.aio hands an event of a loop that is closed
to whichever loop is running, and breaks that one. The thread is a daemon; it ends with the process. (fsspec does the
same for the same reason.)

A process that forks takes the loop along, but not its thread: what belongs to it says so in the child, instead of
waiting for ever. (gRPC, once used, does not survive a fork either.)
"""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """A running loop. Any thread but its own may use it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._loop.run_forever, name="router_client loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the loop and return what it returns; what interrupts the caller (Ctrl-C) cancels it.

        Raises:
            RuntimeError: this is the loop's own thread, which would wait for itself, or another process.
        """
        try:
            self._check_caller()
        except RuntimeError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """Yield what ``source`` yields. It is closed when the caller closes this, or stops in the middle."""
        steps = asyncio.Lock()
        try:
            while (item := self.run(_next(source, steps))) is not None:
                yield item
        finally:
            self.run(_close(source, steps))

    def _check_caller(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError("a client does not survive a fork: make the first one in the child, or spawn it")
        if threading.current_thread() is self._thread:
            raise RuntimeError("a call from the client's own thread would wait for itself; use AsyncClient there")


async def _next(source: AsyncGenerator[T, None], steps: asyncio.Lock) -> T | None:
    async with steps:
        return await anext(source, None)


async def _close(source: AsyncGenerator[T, None], steps: asyncio.Lock) -> None:
    """After a Ctrl-C the step that it cancelled is still cleaning up, and a generator takes one step at a time."""
    async with steps:
        await source.aclose()


class _Shared:
    """The loop of this process, once somebody has asked for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: BackgroundLoop | None = None

    def get(self) -> BackgroundLoop:
        with self._lock:
            if self._loop is None:
                self._loop = BackgroundLoop()
            return self._loop

    def forget(self) -> None:
        """In a forked child: neither the thread nor who may hold the lock came along."""
        self.__init__()  # type: ignore[misc]


_shared = _Shared()
shared_loop = _shared.get
os.register_at_fork(after_in_child=_shared.forget)
