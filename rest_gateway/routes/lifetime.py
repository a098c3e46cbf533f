"""How long a request's work lives: until it is answered, its client leaves, or the drain's time is over.

FastAPI lets a handler run to its end when the client has left, so that a model would compute for nobody. Here the
handler's task is cancelled instead, by one of two callers: a watcher that waits for `http.disconnect`, or `end_all`.
The cancellation is turned into the reason at the edge of the `with` block, as `asyncio.timeout` does it; a
cancellation from anyone else passes through.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from starlette.types import Receive

from rest_gateway.errors import ClientGoneError, GatewayError, ShuttingDownError


class OpenRequests:
    """The requests that are being answered. `is_draining`: the gateway is about to leave."""

    def __init__(self) -> None:
        # Set by the server's drain, read by /readyz and the access layer; who else wants to know.
        self.is_draining = False
        self._when_draining: list[Callable[[], None]] = []
        # Every request inside its `with` block.
        self._open: set[Lifetime] = set()

    def __len__(self) -> int:
        return len(self._open)

    def open(self) -> "Lifetime":
        """A lifetime for the current task's work, to be used in a `with`."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a lifetime belongs to a task; this is a bug")
        return Lifetime(self._open, task)

    def when_draining(self, callback: Callable[[], None]) -> None:
        """Has `callback` called when the drain begins."""
        self._when_draining.append(callback)

    def start_drain(self) -> None:
        """The gateway is about to leave."""
        self.is_draining = True
        for callback in self._when_draining:
            callback()

    def end_all(self) -> None:
        """Ends every open request with ShuttingDownError."""
        for lifetime in list(self._open):
            lifetime.end(ShuttingDownError())


class Lifetime:
    """The body of one `with`. Raises what `end` was given: ClientGoneError or ShuttingDownError."""

    def __init__(self, registry: "set[Lifetime]", task: asyncio.Task[object]) -> None:
        self._registry = registry
        self._task = task
        # How many others want this task cancelled; their cancellations are not ours to take back.
        self._cancelling = task.cancelling()
        self._watcher: asyncio.Task[None] | None = None
        self._reason: GatewayError | None = None

    def __enter__(self) -> Self:
        self._registry.add(self)
        return self

    def watch(self, receive: Receive) -> None:
        """From here on the client's leaving ends the work. Nobody else may read from `receive` any more."""
        self._watcher = asyncio.create_task(self._wait_for_disconnect(receive), name="disconnect-watcher")

    def end(self, reason: GatewayError) -> None:
        """Cancels the work; the first reason stands."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._registry.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()
        reason, task = self._reason, self._task
        # An exception that its own traceback leads to would keep the whole request until the garbage is collected.
        self._reason = self._watcher = None
        del self._task
        if reason is None or task.uncancel() > self._cancelling or kind is not asyncio.CancelledError:
            return
        try:
            raise reason from exc
        finally:
            del reason, task, exc, traceback

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end(ClientGoneError())
