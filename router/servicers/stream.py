"""StreamSession: one client's PredictStream.

It reads messages of calls and cancels, opens each call at the data plane, and writes "all that is ready" in one
message: a single writer sends the message that is ready, and while it writes the next one fills. A call never fails the
stream.

This is the router's hottest code: with one row a call, what is done once per call is done for every row. So what can be
done for all calls of a message is (the look for NaN, the time), and an answer is made where it will be sent from.

A call is open until its last answer is handed to the wire; only then may its id come back.
"""

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from protos.inference_router.v1 import inference_router_pb2 as pb
from router.config import Settings
from router.core.types import DEFAULT_TENANT, BatchAnswer, Block, Part
from router.dataplane import Call, DataPlane
from router.errors import Cancelled, InternalError, InvalidArgument, ResourceExhausted, RouterError
from router.models import Models, Unlearned
from router.servicers import convert
from router.servicers.access import OK, PARTIAL, Access
from router.servicers.status import status_of, to_proto
from router.servicers.tenants import Tenants
from router.waiting_room import Resume

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


@dataclass(slots=True)
class Surroundings:
    """What all sessions of a router share, and the settings that hold now: keep neither `settings` nor `routes`."""

    settings: Settings
    plane: DataPlane
    models: Models
    routes: convert.Routes
    access: Access
    outputs: convert.VectorOutputs
    tenants: Tenants

    def apply(self, settings: Settings) -> None:
        """Read new requests by other settings."""
        self.settings = settings
        self.refit()
        self.tenants = Tenants(settings)
        self.access.set_log_requests(settings.log_requests)

    def refit(self) -> None:
        """Read new requests by what is known of the models now."""
        self.routes = convert.Routes(self.settings, self.models)

    def hold(self, call: Call, waiting: Block, resume: Resume) -> None:
        """Let a call's block wait until its model is known; its rows fail where they may not."""
        try:
            call.wait_in(self.models.hold(waiting, resume), waiting)
        except RouterError as error:
            self.plane.count_refusal(error, waiting.rows)
            call.fail_rows(waiting.index, 0, waiting.rows, error)


class StreamSession:
    """One stream; `run` it to its end."""

    def __init__(self, around: Surroundings, context: Context, *, is_draining: bool) -> None:
        self._around = around
        self._context = context
        self._loop = asyncio.get_running_loop()
        # State: the settings at the last message, and by them how many calls may be open, and the tenant of calls that
        # tell none; calls by id until their last answer is handed to the wire; the messages to write, the last of which
        # still fills, their bytes, and how many of them may hold answers that nobody wants any more; calls that were
        # answered and not counted yet; what wakes the writer; whether client or router wants to end the stream.
        self._settings: Settings | None = None
        self._max_open = 0
        self.tenant = ""
        self._calls: dict[int, _StreamReply] = {}
        self._outbox: deque[_Message] = deque()
        self._unread_bytes = 0
        self._messages_to_sift = 0
        self._uncounted = 0
        self._wants_to_say_draining = is_draining
        self._something_to_do = asyncio.Event()
        self._has_written = asyncio.Event()
        self._is_ending = False

    def __repr__(self) -> str:
        return f"<StreamSession {len(self._calls)} open calls, {len(self._outbox)} messages ready>"

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
        self._count_answered()
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
        if self._settings is not self._around.settings:
            self._follow(self._around.settings)
        late_cancels = await self._cancel_all(request.cancels)
        is_first = True
        for some in convert.read_calls(request.calls, TURN, self._around.settings.limits.max_agents):
            are_finite = convert.are_finite([block.vectors for call in some for block in call.blocks])
            # One message may hold a million calls: let the others go on. A call with a thousand bad rows is as much.
            for turn in (some,) if are_finite else [[call] for call in some]:
                if not is_first:
                    await asyncio.sleep(0)
                is_first = False
                if self._is_overfull:
                    await self._wait_for_reader()
                self._begin_all(turn, are_finite=are_finite)
        await self._cancel_all(late_cancels)
        self._something_to_do.set()

    def _follow(self, settings: Settings) -> None:
        """They may be others than at the last message."""
        self._settings = settings
        self._max_open = settings.limits.max_open_calls
        self.tenant = self._around.tenants.of_rpc(self._context)

    async def _cancel_all(self, call_ids: Iterable[int]) -> list[int]:
        """Those that name no call of the stream come back; a message has room for millions of them."""
        unknown = []
        for count, call_id in enumerate(call_ids, 1):
            if not self._cancel(call_id):
                unknown.append(call_id)
            if count % TURN == 0:
                await asyncio.sleep(0)
        return unknown

    @property
    def _is_overfull(self) -> bool:
        """Whether the client leaves too much unread; see MAX_UNREAD_BYTES."""
        return len(self._calls) > 2 * self._max_open or self._unread_bytes > 2 * MAX_UNREAD_BYTES

    async def _wait_for_reader(self) -> None:
        while self._is_overfull:
            self._has_written.clear()
            await self._has_written.wait()

    def _cancel(self, call_id: int) -> bool:
        reply = self._calls.pop(call_id, None)
        if reply is not None:
            self._withdraw(reply)
        return reply is not None

    def _withdraw(self, reply: "_StreamReply") -> None:
        """The client wants no further answer of a call, and `_calls` does not know it any more."""
        reply.cancelled()
        self._messages_to_sift = len(self._outbox)

    def _begin_all(self, calls: Sequence[convert.RawCall], *, are_finite: bool) -> None:
        now = self._loop.time()
        for call in calls:
            self._begin(call, now, are_finite=are_finite)

    def _begin(self, raw: convert.RawCall, now: float, *, are_finite: bool) -> None:
        message = raw.message
        call_id = message.call_id
        predecessor = self._calls.get(call_id)
        reply = self._calls[call_id] = _StreamReply(self, self._around, message, call_id)
        try:
            if predecessor is not None:
                self._withdraw(predecessor)
                raise InvalidArgument(f"call_id {call_id} is still open; both calls were dropped")
            self._check_room(raw)
            reply.begin(self._around, raw, now, are_finite=are_finite)
        except RouterError as error:
            reply.closed(error)
        except Exception:
            logger.exception("call %d (request id %s) failed inside the router", call_id, message.request_id)
            reply.abort(InternalError())

    def _check_room(self, raw: convert.RawCall) -> None:
        refusal = self._refusal()
        if refusal:
            # A call that was not looked at may say that it has any number of rows.
            rows = sum(min(block.rows, len(block.vectors) // 4) for block in raw.blocks)
            self._around.plane.count_refusal(refusal, rows)
            raise refusal

    def _refusal(self) -> ResourceExhausted | None:
        """Why this stream takes no further call; None: it does."""
        if len(self._calls) > self._max_open:
            message = f"{self._max_open} calls of this stream are open"
            return ResourceExhausted(message, reason="open_calls", retry_after_s=1.0)
        if self._unread_bytes > MAX_UNREAD_BYTES:
            message = "the answers of this stream are not being read"
            return ResourceExhausted(message, reason="unread", retry_after_s=UNREAD_RETRY_AFTER_S)
        return None

    # -- writing -----------------------------------------------------------------------------------------------------

    def new_answer(self, reply: "_StreamReply", size: int, *, is_last: bool) -> pb.Answer:
        """An answer to fill in at once, in the next message that has room for it; `size`: about its bytes."""
        self._unread_bytes += size
        outbox = self._outbox
        if not outbox or outbox[-1].size + size > MAX_MESSAGE_BYTES:
            outbox.append(_Message())
            self._something_to_do.set()
        return outbox[-1].add(reply, size, is_last=is_last)

    def count_answered(self) -> None:
        """Count a call without errors, with the others of its message."""
        self._uncounted += 1

    def _count_answered(self) -> None:
        self._around.access.record_answered(METHOD, self._uncounted)
        self._uncounted = 0

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
        """What is ready, up to 1 MiB; None when nothing is. A call whose last answer is in it is closed."""
        self._count_answered()
        while self._outbox:
            message = self._pop_message()
            if message.answers or self._wants_to_say_draining:
                return self._with_draining(message)
        return self._with_draining(pb.PredictStreamResponse()) if self._wants_to_say_draining else None

    def _with_draining(self, message: pb.PredictStreamResponse) -> pb.PredictStreamResponse:
        if self._wants_to_say_draining:
            self._wants_to_say_draining = False
            message.draining = True
        return message

    def _pop_message(self) -> pb.PredictStreamResponse:
        message = self._outbox.popleft()
        self._unread_bytes -= message.size
        if self._messages_to_sift:
            self._messages_to_sift -= 1
            message.sift(lambda reply: self._calls.get(reply.call_id) is reply)
        for call_id in message.ended:
            del self._calls[call_id]
        return message.content


class _Message:
    """A message that fills until it is written."""

    __slots__ = ("_replies", "content", "ended", "size")

    def __init__(self) -> None:
        self.content = pb.PredictStreamResponse()
        self.size = 0
        # Whose each of the answers is, and the ids of the calls whose last answer is among them.
        self._replies: list[_StreamReply] = []
        self.ended: list[int] = []

    def add(self, reply: "_StreamReply", size: int, *, is_last: bool) -> pb.Answer:
        """One more answer, empty but for its call's id and end."""
        self.size += size
        self._replies.append(reply)
        answer = self.content.answers.add()
        answer.call_id = reply.call_id
        if is_last:
            answer.done = True
            self.ended.append(reply.call_id)
        return answer

    def sift(self, is_wanted: Callable[["_StreamReply"], bool]) -> None:
        """Leave out the answers of calls that are not wanted any more; their ids may be another call's by now."""
        answers = [
            answer for answer, reply in zip(self.content.answers, self._replies, strict=True) if is_wanted(reply)
        ]
        self.ended = [answer.call_id for answer in answers if answer.done]
        self.content = pb.PredictStreamResponse(answers=answers)


class _StreamReply:
    """Turns what becomes of a call into answers on its stream."""

    __slots__ = (
        "_access",
        "_call",
        "_error",
        "_explain",
        "_failed_rows",
        "_is_recorded",
        "_outputs",
        "_request_id",
        "_routes",
        "_rows",
        "_session",
        "_started",
        "call_id",
    )

    def __init__(self, session: StreamSession, around: Surroundings, message: pb.Call, call_id: int) -> None:
        self._session = session
        self._access = around.access
        self._outputs = around.outputs
        self._explain = message.explain
        self._request_id = message.request_id
        self._started = time.monotonic()
        self.call_id = call_id
        # State: the call once it is open; a route per block; rows in all and failed ones; the first error.
        self._call: Call | None = None
        self._routes: list[convert.Route | None] = []
        self._rows = 0
        self._failed_rows = 0
        self._error: RouterError | None = None
        self._is_recorded = False

    def begin(self, around: Surroundings, raw: convert.RawCall, now: float, *, are_finite: bool) -> None:
        """Check the call and queue its rows. Raises RouterError for a fault of the whole call.

        `are_finite`: whether it is known that no vector holds a NaN or an infinity.
        """
        message = raw.message
        self._rows = convert.check_call(raw, around.settings.limits)
        asked_s = message.timeout_s if message.HasField("timeout_s") else None
        tenants = around.tenants
        terms = convert.Terms(
            now,
            convert.timeout_s(asked_s, None, around.settings),
            tenants.of_call(message.tenant, self._session.tenant) if tenants.are_trusted else DEFAULT_TENANT,
            message.priority_class == pb.PRIORITY_CLASS_BATCH,
        )
        deadline, tenant, is_batch = terms.deadline, terms.tenant, terms.is_batch_class
        call = self._call = around.plane.open(self, self._rows, terms.timeout_s)
        blocks: list[Block] = []
        bad_rows = 0
        for index, block in enumerate(raw.blocks):
            agent_type, model_name, rows, dim, vectors = block
            self._routes.append(None)
            try:
                route = self._routes[index] = around.routes.find(agent_type, model_name, dim)
                width = route.row_bytes
                if are_finite and len(vectors) == rows * width:
                    key, wanted = route.key, route.wanted
                    blocks.append(
                        Block(key, index, 0, rows, (vectors,), width, now, deadline, call, tenant, is_batch, wanted)
                    )
                else:
                    good = self._good_blocks(call, route, index, block, terms, convert.MAX_BAD_ROWS - bad_rows)
                    bad_rows += rows - sum(one.rows for one in good)
                    blocks += good
            except RouterError as error:
                call.fail_rows(index, 0, block.rows, error)
            except Unlearned:
                self._wait(around, call, index, block, terms)
        around.plane.infer(call, blocks)

    def _wait(
        self, around: Surroundings, call: Call, index: int, block: convert.RawBlock, terms: convert.Terms
    ) -> None:
        """Let a block of a model that is not known wait until it is; the other blocks of its call go on."""
        try:
            waiting = convert.to_waiting(block, index, terms, call)
        except RouterError as error:
            call.fail_rows(index, 0, block.rows, error)
            return
        around.hold(call, waiting, functools.partial(self._resume, around, call, index, block, terms))

    def _resume(
        self,
        around: Surroundings,
        call: Call,
        index: int,
        block: convert.RawBlock,
        terms: convert.Terms,
        _waiting: Block,
    ) -> None:
        """The model is known: the block goes on as if it had come now, with its old deadline."""
        try:
            route = self._routes[index] = around.routes.find(block.agent_type, block.model_name, block.dim)
            most_bad = max(convert.MAX_BAD_ROWS - self._failed_rows, 0)
            around.plane.infer(call, self._good_blocks(call, route, index, block, terms, most_bad))
        except RouterError as error:
            call.fail_rows(index, 0, block.rows, error)
        except Unlearned:
            self._wait(around, call, index, block, terms)

    def _good_blocks(
        self,
        call: Call,
        route: convert.Route,
        index: int,
        block: convert.RawBlock,
        terms: convert.Terms,
        most_bad: int,
    ) -> Sequence[Block]:
        """The block's good rows; its bad ones fail at once. Raises RouterError for a fault of the whole block."""
        vectors, runs = convert.read_rows(route, block.vectors, block.rows, block.dim, most_bad)
        for run in runs:
            if run.error is not None:
                call.fail_rows(index, run.first, run.rows, run.error)
        return list(convert.to_blocks(route, index, vectors, runs, terms, call))

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
            outputs = self._outputs.rows(answer, route.output, offset, part.rows)
        except RouterError as error:
            self.failed(block.index, first_row, part.rows, error, is_last=is_last)
            return
        explanation = convert.explain(part, answer) if self._explain else None
        message = self._session.new_answer(self, len(outputs) + ANSWER_OVERHEAD_BYTES, is_last=is_last)
        # Field by field, and only what is not its default: by keyword it costs half as much again.
        message.rows = part.rows
        message.outputs = outputs
        if block.index:
            message.block = block.index
        if first_row:
            message.first_row = first_row
        if explanation is not None:
            message.explanation.CopyFrom(explanation)
        if is_last:
            self._record(self._error)

    def failed(self, index: int, first_row: int, rows: int, error: RouterError, *, is_last: bool) -> None:
        """See Reply."""
        self._failed_rows += rows
        self._error = self._error or error
        told = to_proto(error)  # before an answer is begun, which goes out whatever happens then
        message = self._session.new_answer(self, ERROR_OVERHEAD_BYTES, is_last=is_last)
        message.block, message.first_row, message.rows = index, first_row, rows
        message.error.CopyFrom(told)
        if is_last:
            self._record(self._error)

    def closed(self, error: RouterError) -> None:
        """See Reply."""
        self._failed_rows = self._rows
        told = to_proto(error)
        message = self._session.new_answer(self, ERROR_OVERHEAD_BYTES, is_last=True)
        message.error.CopyFrom(told)
        self._record(error)

    def _record(self, error: RouterError | None) -> None:
        """Once for each call: one that is answered may be cancelled before its answer is written."""
        if self._is_recorded:
            return
        self._is_recorded = True
        self._call = None  # which knows us: together they would stay until the garbage is collected
        access = self._access
        if error is None and not access.logs_answered:
            self._session.count_answered()
            return
        code = OK if error is None else status_of(error).name
        if error is not None and self._failed_rows < self._rows:
            code = PARTIAL
        access.record(
            METHOD,
            code,
            request_id=self._request_id,
            rows=self._rows,
            started=self._started,
            detail=error.message if error else "",
        )
