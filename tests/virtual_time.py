"""An event loop in virtual time for unit tests: timers fire at once, in order; nothing sleeps.

The selector never blocks: when no socket is ready it jumps to the next timer. It plugs into pytest through AnyIO's
plugin: a conftest whose `anyio_backend` fixture returns `VIRTUAL_TIME`. It suits pure asyncio code only: gRPC needs a
real loop.
"""

import asyncio
import selectors
from typing import Any


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("deadlock: every task waits and no timer is set")
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and moves only from timer to timer."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumping.now

    def stall(self, stalled_s: float) -> None:
        """Let time pass without running anything, as a call that blocks the loop does."""
        self._jumping.now += stalled_s


VIRTUAL_TIME: tuple[str, dict[str, Any]] = ("asyncio", {"loop_factory": VirtualTimeLoop})
