"""One `PredictStream`: one writer, one reader, the calls that are open on it; and the `Link` that it runs over.

Must not know what becomes of a call: it carries calls out and messages in, and its owner (`StreamOwner`) decides. It
never tries again.

    opening ──► accepting ──► refusing ──► closed
                   │   (draining or not)     ▲
                   └─────── lost ────────────┘

Traps of grpc.aio that shape this file (1.85): one `write()` at a time, so one writer task; cancelling a pending read or
write ends the call, so they are only cancelled with the stream; a write racing the peer's end raises INTERNAL or
InvalidStateError, and the reader then finds out why; a call that is dropped is not collected, so it is always
cancelled.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from math import inf
from typing import Protocol, TypeAlias, TypeVar

from google.protobuf.message import Message
from grpc import aio

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc
from protos.open_inference import open_inference_pb2_grpc
from router_client.calls import Call
from router_client.errors import ConnectError

MAX_OPEN_CALLS = 16_384
"""Open calls of one stream, the router's own limit."""

MAX_MESSAGE_BYTES = 1024 * 1024
"""One message of coalesced calls; a call that alone is larger travels alone."""

MAX_CALL_BYTES = 16 * 1024 * 1024
"""A router with default settings reads messages of 16 MiB and ends the stream, with everybody's calls, for more."""

LIMIT_KEY = "inference-router-max-message-bytes"
"""The initial metadata in which a router tells the limit that it really has."""

CANCEL_BYTES = 10
"""The longest varint."""

CONNECT_TIMEOUT_S = 5.0
RETIRE_TIMEOUT_S = 5.0
WRITE_END_TIMEOUT_S = 1.0

MAX_PICKS = 4
"""Streams on one link before another is tried: the routers of a small fleet that may all be draining but one."""

MIN_TIMEOUT_S = 0.001
"""A call whose time ran out on its way to the wire says so politely: 0 might be read as no timeout."""

CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),  # the router allows 5 s
    ("grpc.http2.ping_timeout_ms", 3_000),  # grpc.keepalive_timeout_ms is ignored by grpc.aio
    ("grpc.http2.max_pings_without_data", 0),  # the stream is idle for hours
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # the client sends again itself; saves a copy of what is written
    ("grpc.use_local_subchannel_pool", 1),  # each link has connections of its own
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # how long one connection attempt may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
]

logger = logging.getLogger(__name__)

Metadata: TypeAlias = tuple[tuple[str, str], ...]
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class Method(Protocol[Request, Response]):
    """Chooses a method of the Open Inference Protocol, as ``operator.attrgetter("ModelInfer")`` does."""

    def __call__(
        self, stub: open_inference_pb2_grpc.GRPCInferenceServiceStub, /
    ) -> "aio.UnaryUnaryMultiCallable[Request, Response]":
        """Return the method."""


class StreamOwner(Protocol):
    """Who decides about the calls of a stream. Both methods return at once."""

    def on_message(self, stream: "Stream", message: pb.PredictStreamResponse) -> None:
        """Take what the router sent."""

    def on_end(self, stream: "Stream", reason: str) -> None:
        """Take back the calls that are still open on ``stream``; nothing comes from it any more."""


class Link:
    """A channel, shared by its opener, the streams that were opened on it and unary requests; the last one to leave
    closes it.

    Where the target has several addresses, the next stream on the same link meets the next router (round robin). Where
    it has one that stands for several routers, such as a Kubernetes service, only another link does, which connects
    anew.
    """

    def __init__(self, target: str) -> None:
        self._channel = aio.insecure_channel(target, CHANNEL_OPTIONS)
        self._stub = inference_router_pb2_grpc.InferenceRouterServiceStub(self._channel)
        self._unary_stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._users = 1  # the opener
        self._picks = 0  # streams opened so far
        self.is_broken = False

    @property
    def is_spent(self) -> bool:
        """True when the next stream had better be opened on another link."""
        return self.is_broken or self._picks >= MAX_PICKS

    def join(self) -> "aio.StreamStreamCall[pb.PredictStreamRequest, pb.PredictStreamResponse]":
        """Begin a stream."""
        self._users += 1
        self._picks += 1
        return self._stub.PredictStream()

    def begin_unary(
        self, method: Method[Request, Response], request: Request, timeout_s: float | None, metadata: Metadata
    ) -> "aio.UnaryUnaryCall[Request, Response]":
        """Begin a unary request; leave when it has ended."""
        call = method(self._unary_stub)(request, timeout=timeout_s, metadata=metadata)
        self._users += 1
        return call

    async def leave(self) -> None:
        """Take note that the opener, a stream or a request has no more use for it."""
        self._users -= 1
        if not self._users:
            await self._channel.close()


class Stream:
    """A stream to one router. Open it, `run` it as a task, `send` calls until it refuses them."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._call = link.join()
        # What the router has said:
        self.max_message_bytes = MAX_CALL_BYTES
        self.is_draining = False
        self.is_refusing = False
        # What is under way; `_ready` holds ids, and those of calls forgotten meanwhile are skipped:
        self._open: dict[int, Call] = {}
        self._ready: deque[int] = deque()
        self._writing: list[Call] = []  # in the message that is being written
        self._cancels: list[int] = []
        # The writer sleeps on `_work` when nothing is ready:
        self._work = asyncio.Event()
        self._retirement: asyncio.TimerHandle | None = None  # set: wanted no more, and its time to end by itself
        self._has_ended = False
        self._is_closed = False

    def __repr__(self) -> str:
        states = {"draining": self.is_draining, "refusing": self.is_refusing, "ended": self._has_ended}
        words = [word for word, is_so in states.items() if is_so] or ["accepting"]
        return f"<Stream {', '.join(words)}, {len(self._open)} open, {len(self._ready)} ready>"

    @property
    def is_accepting(self) -> bool:
        """True while the router takes new calls on it, or has not said otherwise."""
        return not (self.is_refusing or self._has_ended or self._retirement is not None)

    @property
    def is_full(self) -> bool:
        """True at the router's limit. A cancelled call counts until its cancel is written: the router may read a
        message's calls before its cancels.
        """
        return len(self._open) + len(self._cancels) >= MAX_OPEN_CALLS

    @property
    def is_retiring(self) -> bool:
        """True once its client has no more use for it."""
        return self._retirement is not None

    @property
    def is_idle(self) -> bool:
        """True when no call is open on it."""
        return not self._open

    async def open(self) -> None:
        """Wait until a router accepts the stream: it sends its initial metadata at once.

        Raises:
            ConnectError: none did within CONNECT_TIMEOUT_S. The stream is closed then, also when cancelled.
        """
        is_accepted = False
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                self.max_message_bytes = _limit_in(await self._call.initial_metadata())
                is_accepted = not self._call.done()
                if not is_accepted:
                    raise ConnectError(f"{(await self._call.code()).name}: {await self._call.details()}")
        except TimeoutError as exc:
            raise ConnectError(f"no stream within {CONNECT_TIMEOUT_S:g} s") from exc
        finally:
            if not is_accepted:
                await self.close()

    async def run(self, owner: StreamOwner) -> None:
        """Write what is ready and hand on what comes, until the stream ends; then tell ``owner`` and clean up."""
        writer = asyncio.create_task(self._write_all(), name="router_client writer")
        reason = "closed"
        try:
            reason = await self._read_all(owner)
            await self._end_writing(writer)
        finally:
            self._has_ended = True
            owner.on_end(self, reason)
            writer.cancel()
            await asyncio.wait([writer])
            await self.close()

    async def close(self) -> None:
        """End the stream and leave its link, whatever is under way."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._retirement is not None:
            self._retirement.cancel()
        self._call.cancel()
        await self.link.leave()

    def send(self, call: Call, call_id: int) -> None:
        """Have ``call`` written with the next message, under an id that this stream has never seen."""
        call.renew(self, call_id)
        self._open[call_id] = call
        self._ready.append(call_id)
        self._work.set()

    def find(self, call_id: int) -> Call | None:
        """Return the open call of that id; none when it was answered or forgotten."""
        return self._open.get(call_id)

    def release(self, call: Call) -> None:
        """Let go of a call that the router has answered."""
        del self._open[call.call_id]

    def forget(self, call: Call) -> None:
        """Let go of a call that nobody waits for, and tell the router if it can know of it."""
        self.release(call)
        if call.is_written:
            self._cancels.append(call.call_id)
            self._work.set()

    def take_back(self) -> list[Call]:
        """Return the open calls, in the order they were sent, and let go of them."""
        calls = list(self._open.values())
        self._open.clear()
        return calls

    def retire(self) -> None:
        """Half-close when what is ready is written, and read to the end. Nothing may be open on it any more."""
        if self._retirement is None:
            self._retirement = asyncio.get_running_loop().call_later(RETIRE_TIMEOUT_S, self._call.cancel)
            self._work.set()

    async def _read_all(self, owner: StreamOwner) -> str:
        """Hand messages on until the stream ends, and return why it did."""
        try:
            while isinstance(message := await self._call.read(), pb.PredictStreamResponse):
                owner.on_message(self, message)
        except aio.AioRpcError as exc:
            return f"{exc.code().name}: {exc.details()}"
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            return "CANCELLED"  # the writer's doing, or retire()'s
        except Exception:  # the task's root: callers are waiting for this stream
            logger.exception("reading from the router failed; this is a bug")
            return "INTERNAL"
        return "OK"

    async def _end_writing(self, writer: "asyncio.Task[None]") -> None:
        """Let a write that was under way at the stream's end fail by itself: that tells that its calls never left."""
        self._has_ended = True
        self._work.set()
        await asyncio.wait([writer], timeout=WRITE_END_TIMEOUT_S)

    async def _write_all(self) -> None:
        """Write until there is nothing left to write and the stream retires. A failed write ends the stream."""
        try:
            while await self._has_work():
                if self._call.done():
                    return  # before anything is counted as written
                await self._call.write(self._next_message())
                self._writing = []
            await self._call.done_writing()
        except (aio.AioRpcError, aio.BaseError, asyncio.InvalidStateError) as exc:
            logger.debug("writing to the router failed: %r", exc)
            for call in self._writing:
                call.is_written = False
            self._call.cancel()  # the reader learns of it
        except Exception:  # the task's root: a stream without its writer would hang
            logger.exception("writing to the router failed; this is a bug")
            self._call.cancel()

    async def _has_work(self) -> bool:
        """Wait for something to write; False when there will be nothing more."""
        while self._has_ended or not (self._ready or self._cancels):
            if self.is_retiring or self._has_ended:
                return False
            self._work.clear()
            await self._work.wait()
        return True

    def _next_message(self) -> pb.PredictStreamRequest:
        """Return all that is ready, up to MAX_MESSAGE_BYTES: the cancels, which are small, and calls in their order."""
        cancels, self._cancels = self._cancels, []
        room = min(MAX_MESSAGE_BYTES, self.max_message_bytes) - CANCEL_BYTES * (len(cancels) + 1)
        return pb.PredictStreamRequest(cancels=cancels, calls=self._pop_ready(room, is_alone=not cancels))

    def _pop_ready(self, room: int, *, is_alone: bool) -> Iterator[pb.Call]:
        now = asyncio.get_running_loop().time()
        while self._ready:
            call = self._open.get(self._ready[0])
            if call is not None:
                if call.size > room and not is_alone:
                    return
                room -= call.size
                is_alone = False
                call.is_written = True
                self._writing.append(call)
                yield _stamped(call, now)
            self._ready.popleft()


def _limit_in(metadata: aio.Metadata) -> int:
    """Return the router's limit for a message, or the default where it names none."""
    told = metadata.get(LIMIT_KEY)
    return int(told) if isinstance(told, str) and told.isdecimal() else MAX_CALL_BYTES


def _stamped(call: Call, now: float) -> pb.Call:
    """Return the call's message with the id of this sending and the time that is left of its deadline."""
    message = call.message
    message.call_id = call.call_id
    if call.deadline != inf:
        message.timeout_s = max(call.deadline - now, MIN_TIMEOUT_S)
    return message


def is_cancelled() -> bool:
    """True when the running task itself is being cancelled, not only a gRPC call it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
