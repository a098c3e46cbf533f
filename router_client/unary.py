"""One request as an RPC of its own, over the connection of a stream. Must not know what it asks for.

Theory of operation. The stream tells whether a router is there, whether it is leaving, and how large a message may be;
a unary request goes over the link of a stream that takes calls, and waits for one at most ``router_wait_s``. What
becomes of a request that comes back:

    refused by a leaving router    sent again, but no later than ``router_wait_s`` after the first refusal
    lost with its connection       sent again, once: it may have been executed
    the same for the second time   UNAVAILABLE
    everything else                the caller's, as the router said it

A leaving router tells in trailing metadata that it has not begun a request. Every other UNAVAILABLE of a router names a
time to wait; one without is gRPC's own, the end of a connection.
"""

import asyncio
from math import inf
from typing import Generic, Protocol

import grpc
from grpc import aio

from router_client.errors import RETRY_PUSHBACK_MS
from router_client.stream import Metadata, Method, Request, Response, Stream, is_cancelled
from router_client.tensors import InferError

REFUSED_KEY = "inference-router-refused"
PUSHBACK_KEY = "grpc-retry-pushback-ms"

TIMEOUT_BYTES = 32
"""What the time that is left adds to a message, generously."""

MAX_TIMEOUT_S = 365 * 86_400.0
"""gRPC cannot count for ever."""

RETRY_GAP_S = 0.1
"""Between two sendings: by then the stream knows what the request has met."""

MAX_LOSSES = 2
"""Connections that a request may be lost with, so that it is executed twice at most."""


class StreamFinder(Protocol):
    """Who knows the streams. Both raise InferError once the client is closed."""

    def accepting_stream(self) -> Stream | None:
        """Return a stream whose router takes calls, better one that is not draining."""

    async def wait_accepting(self) -> None:
        """Return when there may be one."""

    def note_refusal(self, stream: Stream) -> None:
        """Take note that a router takes no calls any more, perhaps that of ``stream``."""


class UnaryRequest(Generic[Request, Response]):
    """One request of one caller; `send` it once. Cancelling that cancels the RPC."""

    def __init__(
        self,
        finder: StreamFinder,
        method: Method[Request, Response],
        request: Request,
        *,
        metadata: Metadata = (),
        deadline: float,
        router_wait_s: float,
    ) -> None:
        self._finder = finder
        self._method = method
        self._request = request
        self._size = request.ByteSize() + TIMEOUT_BYTES
        self._metadata = metadata
        self._deadline = deadline  # loop time in seconds
        self._router_wait_s = router_wait_s
        self._loop = asyncio.get_running_loop()
        # The RPC under way; until when a router is waited for; what has come back so far:
        self._call: aio.UnaryUnaryCall[Request, Response] | None = None
        self._waits_until = self._loop.time() + router_wait_s
        self._is_refused = False
        self._losses = 0

    async def send(self) -> Response:
        """Return the router's answer.

        Raises:
            InferError: there is none.
        """
        while True:
            stream = await self._find_stream()
            try:
                return await self._try(stream)
            except aio.AioRpcError as exc:
                self._judge(exc, stream)
            await asyncio.sleep(min(RETRY_GAP_S, max(self._deadline - self._loop.time(), 0.0)))

    def abandon(self) -> None:
        """Fail it: the client is being closed."""
        if self._call is not None:
            self._call.cancel()

    async def _find_stream(self) -> Stream:
        """Wait for a router that takes calls, as long as this request may."""
        if (stream := self._finder.accepting_stream()) is not None:  # as usual; the timer below costs 10 µs
            return stream
        try:
            async with asyncio.timeout_at(min(self._waits_until, self._deadline)):
                while (stream := self._finder.accepting_stream()) is None:
                    await self._finder.wait_accepting()
        except TimeoutError as exc:
            if self._deadline <= self._waits_until:
                raise InferError("DEADLINE_EXCEEDED", "no router took the request within the timeout") from exc
            raise _unavailable(f"no router took the request in {self._router_wait_s:g} s") from exc
        return stream

    async def _try(self, stream: Stream) -> Response:
        if self._size > stream.max_message_bytes:
            text = f"a request of {self._size} bytes is over the limit of {stream.max_message_bytes}"
            raise InferError("INVALID_ARGUMENT", text)
        link = stream.link
        call = self._call = link.begin_unary(self._method, self._request, self._time_left_s(), self._metadata)
        try:
            return await call
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise _unavailable("the client was closed") from None
        finally:
            self._call = None
            call.cancel()  # nothing to do when it has ended; a call that is dropped is not collected
            await link.leave()

    def _time_left_s(self) -> float | None:
        """Return the seconds that are left, None for no end, and write them into the request if it holds them."""
        if self._deadline == inf:
            return None
        left_s = min(self._deadline - self._loop.time(), MAX_TIMEOUT_S)
        if left_s <= 0:
            raise InferError("DEADLINE_EXCEEDED", "the timeout was over before the request was sent")
        self._stamp(left_s)
        return left_s

    def _stamp(self, left_s: float) -> None:
        """Write the time that is left into the request, where it has a place for it beside gRPC's own."""

    def _judge(self, error: aio.AioRpcError, stream: Stream) -> None:
        """Return when the request may be sent again, else raise InferError."""
        now = self._loop.time()
        if _is_refusal(error):
            self._finder.note_refusal(stream)
            if self._is_refused and now >= self._waits_until:
                raise _translated(error) from error
            if not self._is_refused:
                self._is_refused, self._waits_until = True, now + self._router_wait_s
            return
        if not _is_loss(error):
            raise _translated(error) from error
        self._losses += 1
        if self._losses == MAX_LOSSES:
            text = "the connection to the router was lost, and again when the request was sent once more"
            raise _unavailable(text) from error
        self._waits_until = now + self._router_wait_s


def _unavailable(message: str) -> InferError:
    return InferError("UNAVAILABLE", message, RETRY_PUSHBACK_MS)


def _translated(error: aio.AioRpcError) -> InferError:
    return InferError(error.code().name, error.details() or "", _pushback_ms(error))


def _is_refusal(error: aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.UNAVAILABLE and REFUSED_KEY in error.trailing_metadata()


def _is_loss(error: aio.AioRpcError) -> bool:
    """True when the connection ended; a server that stops answers CANCELLED to what it had not looked at yet."""
    if error.code() is grpc.StatusCode.CANCELLED:
        return True
    return error.code() is grpc.StatusCode.UNAVAILABLE and _pushback_ms(error) is None


def _pushback_ms(error: aio.AioRpcError) -> int | None:
    told = error.trailing_metadata().get(PUSHBACK_KEY)
    return int(told) if isinstance(told, str) and told.isdecimal() else None
