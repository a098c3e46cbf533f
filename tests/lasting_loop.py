"""The event loop of all tests that speak gRPC: one for the process, which is never closed.

gRPC keeps a single completion queue for the process. An event of a loop that is closed by then (the end of a cancelled
call, say) is handed to whichever loop is running, which fails with "Event loop is closed" in the middle of another
test. So packages of tests take the same loop one after the other, and what comes late for it waits until it runs again.
Unit tests have loops of their own, and no gRPC.
"""

import asyncio
import atexit
import functools
from typing import Any


class _LastingLoop(asyncio.SelectorEventLoop):
    """Stays open for the next runner."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 (the base's)
        """The next runner needs it."""

    async def shutdown_asyncgens(self) -> None:
        """End those that are left; asyncio warns of further ones from then on."""
        await super().shutdown_asyncgens()
        self._asyncgens_shutdown_called = False

    def close(self) -> None:
        """See the module's text."""

    def end(self) -> None:
        """At the end of the process."""
        super().close()


@functools.cache
def _loop() -> _LastingLoop:
    loop = _LastingLoop()
    atexit.register(loop.end)
    return loop


LASTING_LOOP: tuple[str, dict[str, Any]] = ("asyncio", {"loop_factory": _loop})
