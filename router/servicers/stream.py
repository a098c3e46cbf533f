"""StreamSession: one client's PredictStream.

It reads messages of calls and cancels, opens each call at the data plane, and writes "all that is ready" in one
message: a single writer drains the list of answers, and while it writes the next list fills. A call never fails the
stream.

A call is open until its last answer is handed to the wire; only then may its id come back.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import grpc.aio

from protos.inference_router.v1 import inference_router_pb2 as pb
from router.config import Settings
from router.core.types import BatchAnswer, Block, Part
from router.dataplane import Call, DataPlane
from router.errors import Cancelled, InternalError, InvalidArgument, ResourceExhausted, RouterError
from router.servicers import convert
from router.servicers.access import OK, PARTIAL, Access
from router.servicers.status import status_of, to_proto

Context = grpc.aio.ServicerContext[pb.PredictStreamRequest, pb.PredictStreamResponse]

logger = logging.getLogger(__name__)

METHOD = "PredictStream"
# Initial metadata, sent at once: a client that knows the limit does not end its stream with a message over it.
LIMIT_KEY = "inference-router-max-message-bytes"
# Answers share messages up to this size; one larger answer goes alone.
MAX_MESSAGE_BYTES = 1024 * 1024
# What a message costs beside its outputs, generously: an estimate is cheaper than asking protobuf for each answer.
ANSWER_OVERHEAD_BYTES = 64
ERROR_OVERHEAD_BYTES = 2048
# Answers a client may leave unread; past it new calls are refused. Refusals are answers too: past twice this, or twice
# `max_open_calls`, nothing is read until the client reads, so that a stalled one costs bounded memory.
MAX_UNREAD_BYTES = 64 * 1024 * 1024
UNREAD_RETRY_AFTER_S = 1.0
# Calls, blocks and cancels that are looked at before the others on the loop have their turn.
TURN = 256


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all sessions of a router share."""

    settings: Settings
    plane: DataPlane
    routes: convert.Routes
    access: Access


class StreamSession:
    """One stream; `run` it to its end."""

    def __init__(self, around: Surroundings, context: Context, *, is_draining: bool) -> None:
        self._around = around
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._max_open = around.settings.limits.max_open_calls
        self._max_known = 2 * self._max_open
        # State: calls by id until their last answer is handed to the wire; what the next message will hold; what wakes
        # the writer; whether the client, or the router, wants to end the stream.
        self._calls: dict[int, _StreamReply] = {}
        self._outbox: deque[tuple[_StreamReply, pb.Answer, int]] = deque()
        self._unread_bytes = 0
        self._wants_to_say_draining = is_draining
        self._something_to_do = asyncio.Event()
        self._has_written = asyncio.Event()
        self._turn = 0
        self._is_ending = False

    def __repr__(self) -> str:
        return f"<StreamSession {len(self._calls)} open calls, {len(self._outbox)} answers ready>"

    async def run(self) -> None:
        """Serve until the client has closed its side and has every answer, or until `end`.

        Cancellation, the client's or ours, drops the open calls. A message that cannot be read ends the stream with
        INVALID_ARGUMENT once the calls before it are answered.
        """
        limit = self._around.settings.limits.max_message_bytes
        await self._context.send_initial_metadata(((LIMIT_KEY, str(limit)),))
        reader = asyncio.create_task(self._read_all(), name="predict stream reader")
        try:
            await self._write_all()
        finally:
            reader.cancel()
            self._drop_open_calls()
            await asyncio.wait([reader])
        if not reader.cancelled() and (error := reader.exception()) is not None:
            logger.warning("a stream ends at a message that cannot be read: %r", error)
            await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a message of the stream cannot be read")

    def _drop_open_calls(self) -> None:
        """The client is gone: one line for all of its calls, of which there may be thousands."""
        dropped = sum(reply.drop() for reply in self._calls.values())
        self._around.access.record_dropped(METHOD, dropped)

    def say_draining(self) -> None:
        """Tell the client to open another stream."""
        self._wants_to_say_draining = True
        self._something_to_do.set()

    def end(self) -> None:
        """End the stream once its open calls are answered."""
        self._is_ending = True
        self._something_to_do.set()

    # -- reading -----------------------------------------------------------------------------------------------------

    async def _read_all(self) -> None:
        try:
            while isinstance(request := await self._context.read(), pb.PredictStreamRequest):
                await self._take(request)
        finally:
            self.end()

    async def _take(self, request: pb.PredictStreamRequest) -> None:
        """First the cancels of calls that were open before this message, so that their ids may come back in it."""
        late_cancels = []
        for call_id in request.cancels:
            self._turn += 1
            if self._turn >= TURN:
                await self._take_turn()
            if not self._cancel(call_id):
                late_cancels.append(call_id)
        for call in request.calls:
            self._turn += 1 + len(call.blocks)
            if self._turn >= TURN:
                await self._take_turn()
            if self._is_overfull:
                await self._wait_for_reader()
            self._begin(call, self._loop.time())
        for call_id in late_cancels:
            self._cancel(call_id)
        self._something_to_do.set()

    async def _take_turn(self) -> None:
        """Let the others go on: one message may hold a million calls."""
        self._turn = 0
        await asyncio.sleep(0)

    @property
    def _is_overfull(self) -> bool:
        """Whether the client leaves too much unread; see MAX_UNREAD_BYTES."""
        return len(self._calls) > self._max_known or self._unread_bytes > 2 * MAX_UNREAD_BYTES

    async def _wait_for_reader(self) -> None:
        while self._is_overfull:
            self._has_written.clear()
            await self._has_written.wait()

    def _cancel(self, call_id: int) -> bool:
        reply = self._calls.pop(call_id, None)
        if reply is not None:
            reply.cancelled()
        return reply is not None

    def _begin(self, message: pb.Call, now: float) -> None:
        predecessor = self._calls.get(message.call_id)
        reply = self._calls[message.call_id] = _StreamReply(self, message, self._around.access)
        try:
            if predecessor is not None:
                predecessor.cancelled()
                raise InvalidArgument(f"call_id {message.call_id} is still open; both calls were dropped")
            self._check_room()
            reply.begin(self._around, message, now)
        except RouterError as error:
            reply.closed(error)
        except Exception:
            logger.exception("call %d (request id %s) failed inside the router", message.call_id, message.request_id)
            reply.abort(InternalError())

    def _check_room(self) -> None:
        if len(self._calls) > self._max_open:
            raise ResourceExhausted(
                f"{self._max_open} calls of this stream are open", reason="open_calls", retry_after_s=1.0
            )
        if self._unread_bytes > MAX_UNREAD_BYTES:
            message = "the answers of this stream are not being read"
            raise ResourceExhausted(message, reason="unread", retry_after_s=UNREAD_RETRY_AFTER_S)

    # -- writing -----------------------------------------------------------------------------------------------------

    def send(self, reply: "_StreamReply", answer: pb.Answer, size: int) -> None:
        """Put an answer into the next message; `size`: about its bytes."""
        self._outbox.append((reply, answer, size))
        self._unread_bytes += size
        self._something_to_do.set()

    async def _write_all(self) -> None:
        while True:
            self._something_to_do.clear()
            while message := self._next_message():
                await self._context.write(message)
                self._has_written.set()
            if self._is_ending and not self._calls:
                return
            await self._something_to_do.wait()

    def _next_message(self) -> pb.PredictStreamResponse | None:
        """All that is ready, up to 1 MiB; None when nothing is. A call whose last answer is in it is closed."""
        answers: list[pb.Answer] = []
        size = 0
        while self._outbox and (not answers or size + self._outbox[0][2] <= MAX_MESSAGE_BYTES):
            reply, answer, answer_size = self._outbox.popleft()
            self._unread_bytes -= answer_size
            if self._calls.get(reply.call_id) is reply:  # else cancelled, or dropped for its id
                answers.append(answer)
                size += answer_size
                if answer.done:
                    del self._calls[reply.call_id]
        if not answers and not self._wants_to_say_draining:
            return None
        message = pb.PredictStreamResponse(answers=answers, draining=self._wants_to_say_draining)
        self._wants_to_say_draining = False
        return message


class _StreamReply:
    """Turns what becomes of a call into answers on its stream."""

    __slots__ = (
        "_access",
        "_call",
        "_error",
        "_explain",
        "_failed_rows",
        "_is_recorded",
        "_request_id",
        "_routes",
        "_rows",
        "_session",
        "_started",
        "call_id",
    )

    def __init__(self, session: StreamSession, message: pb.Call, access: Access) -> None:
        self._session = session
        self._access = access
        self._explain = message.explain
        self._request_id = message.request_id
        self._started = time.monotonic()
        self.call_id = message.call_id
        # State: the call once it is open; a route per block; rows in all and failed ones; the first error.
        self._call: Call | None = None
        self._routes: list[convert.Route | None] = []
        self._rows = 0
        self._failed_rows = 0
        self._error: RouterError | None = None
        self._is_recorded = False

    def begin(self, around: Surroundings, message: pb.Call, now: float) -> None:
        """Check the call and queue its rows. Raises RouterError for a fault of the whole call."""
        self._rows = convert.check_call(message, around.settings.limits)
        asked_s = message.timeout_s if message.HasField("timeout_s") else None
        terms = convert.Terms(now, convert.timeout_s(asked_s, None, around.settings))
        call = self._call = around.plane.open(self, self._rows, terms.timeout_s)
        blocks: list[Block] = []
        for index, block in enumerate(message.blocks):
            blocks.extend(self._to_blocks(call, around.routes, index, block, terms))
        around.plane.infer(call, blocks)

    def _to_blocks(
        self, call: Call, routes: convert.Routes, index: int, block: pb.Block, terms: convert.Terms
    ) -> Iterator[Block]:
        """The block's good rows; its bad ones fail at once."""
        vectors = block.vectors
        self._routes.append(None)
        try:
            route = self._routes[index] = routes.find(block.agent_type, block.model_name, block.dim)
            convert.check_size(vectors, block.rows, block.dim)
            runs = convert.finite_runs(vectors, block.rows, block.dim)
        except RouterError as error:
            call.fail_rows(index, 0, block.rows, error)
            return
        for run in runs:
            if run.error is not None:
                call.fail_rows(index, run.first, run.rows, run.error)
        yield from convert.to_blocks(route, index, vectors, runs, terms, call)

    def abort(self, error: RouterError) -> None:
        """Fail whatever of the call is still open."""
        if self._call is None:
            self.closed(error)
        else:
            self._call.abort(error)

    def cancelled(self) -> None:
        """The client wants no further answer."""
        if self._call is not None:
            self._call.cancel()
        self._failed_rows = self._rows
        self._record(Cancelled("cancelled by the client"))

    def drop(self) -> bool:
        """The client is gone; whether this call had not been recorded yet."""
        if self._call is not None:
            self._call.cancel()
        return not self._is_recorded

    # -- dataplane.Reply ---------------------------------------------------------------------------------------------

    def answered(self, part: Part, answer: BatchAnswer, offset: int, *, is_last: bool) -> None:
        """See Reply."""
        block = part.block
        route = self._routes[block.index]
        assert route is not None, "an answer for a block that was refused: this is a bug"
        first_row = block.first_row + part.first
        try:
            outputs = convert.vector_rows(answer, route.output, offset, part.rows)
        except RouterError as error:
            self.failed(block.index, first_row, part.rows, error, is_last=is_last)
            return
        message = pb.Answer()  # set field by field: by keyword it costs half as much again
        message.call_id = self.call_id
        message.block = block.index
        message.first_row = first_row
        message.rows = part.rows
        message.outputs = outputs
        message.done = is_last
        if self._explain:
            message.explanation.CopyFrom(convert.explain(part, answer))
        self._session.send(self, message, len(outputs) + ANSWER_OVERHEAD_BYTES)
        if is_last:
            self._record(self._error)

    def failed(self, index: int, first_row: int, rows: int, error: RouterError, *, is_last: bool) -> None:
        """See Reply."""
        self._failed_rows += rows
        self._error = self._error or error
        message = pb.Answer(
            call_id=self.call_id, block=index, first_row=first_row, rows=rows, error=to_proto(error), done=is_last
        )
        self._session.send(self, message, ERROR_OVERHEAD_BYTES)
        if is_last:
            self._record(self._error)

    def closed(self, error: RouterError) -> None:
        """See Reply."""
        self._failed_rows = self._rows
        message = pb.Answer(call_id=self.call_id, error=to_proto(error), done=True)
        self._session.send(self, message, ERROR_OVERHEAD_BYTES)
        self._record(error)

    def _record(self, error: RouterError | None) -> None:
        """Once for each call: one that is answered may be cancelled before its answer is written."""
        if self._is_recorded:
            return
        self._is_recorded = True
        code = OK if error is None else status_of(error).name
        if error is not None and self._failed_rows < self._rows:
            code = PARTIAL
        self._access.record(
            METHOD,
            code,
            request_id=self._request_id,
            rows=self._rows,
            started=self._started,
            detail=error.message if error else "",
        )
