"""InferStream: one client's ModelStreamInfer, Triton's stream of requests and answers.

Many requests may be open at once. Each is answered when its rows are, whatever the order: an answer carries the id of
its request, also in front of an error's text (`[request id: 7] …`). Two requests may have the same id, or none; then
each has its answer, and the client knows what to do with it. A request never fails the stream. tritonclient can wait
for an answer that says that no other follows (`triton_final_response`): every answer says so.

The protocol has no word for a router that is about to leave. So a stream is served for as long as the router takes
calls, and once its requests are answered it ends with UNAVAILABLE: what the client has sent meanwhile was not begun.
"""

import asyncio
import logging
import uuid
from collections import deque

import grpc
import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from router.config import Settings
from router.errors import InternalError, ResourceExhausted
from router.servicers.infer_request import Arrival, Front, InferRequest, record
from router.servicers.parameters import IS_FINAL
from router.servicers.stream import MAX_UNREAD_BYTES, UNREAD_RETRY_AFTER_S
from router.servicers.unary import Unreadable, seconds_left

Context = grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelStreamInferResponse]

logger = logging.getLogger(__name__)

METHOD = "ModelStreamInfer"
# What stands for the id of a request without one, in Triton's words.
NO_ID = "<id_unknown>"
ANSWER_OVERHEAD_BYTES = 256


class InferStream:
    """One stream; `run` it to its end."""

    def __init__(self, front: Front, context: Context) -> None:
        self._front = front
        self._around = front.around
        self._context = context
        self._loop = asyncio.get_running_loop()
        left_s = seconds_left(context)
        self._deadline = None if left_s is None else self._loop.time() + left_s
        # State: the settings at the last message, and by them the tenant of the stream's requests; those that are not
        # answered; the answers to write and their bytes; what wakes the writer, and a reader that waits for it; whether
        # the client will send nothing more, or has sent what cannot be read, and whether either wants to end.
        self._settings: Settings | None = None
        self._tenant = ""
        self._open: set[InferRequest] = set()
        self._outbox: deque[tuple[pb.ModelStreamInferResponse, int]] = deque()
        self._unread_bytes = 0
        self._something_to_do = asyncio.Event()
        self._has_written = asyncio.Event()
        self._is_read = False
        self._is_unreadable = False
        self._is_ending = False

    def __repr__(self) -> str:
        return f"<InferStream {len(self._open)} open requests, {len(self._outbox)} answers ready>"

    async def run(self) -> None:
        """Serve until the client has closed its side and has every answer, or until `end`.

        Cancellation, the client's or ours, drops the open requests. A message that cannot be read ends the stream with
        INVALID_ARGUMENT once the requests before it are answered.
        """
        reader = asyncio.create_task(self._read_all(), name="infer stream reader")
        try:
            await self._write_all()
        finally:
            reader.cancel()
            self._drop_open()
            await asyncio.wait([reader])
        if not reader.cancelled() and (error := reader.exception()) is not None:
            logger.error("a stream of requests cannot be read on", exc_info=error)
            await self._context.abort(grpc.StatusCode.INTERNAL, "internal error")
        if self._is_unreadable:
            await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a message of the stream cannot be read")
        if not self._is_read:
            await self._context.abort(grpc.StatusCode.UNAVAILABLE, "the router is shutting down")

    def end(self) -> None:
        """End the stream once its open requests are answered."""
        self._is_ending = True
        self._something_to_do.set()

    def _drop_open(self) -> None:
        """The client is gone: one line for all of its requests."""
        for request in self._open:
            request.cancel()
        self._around.access.record_dropped(METHOD, len(self._open))
        self._open.clear()

    # -- reading -----------------------------------------------------------------------------------------------------

    async def _read_all(self) -> None:
        try:
            while isinstance(message := await self._context.read(), pb.ModelInferRequest):
                while self._is_overfull:
                    self._has_written.clear()
                    await self._has_written.wait()
                self._take(message)
            self._is_read, self._is_unreadable = True, isinstance(message, Unreadable)
        finally:
            self.end()

    def _take(self, message: pb.ModelInferRequest) -> None:
        if self._settings is not self._around.settings:
            self._settings = self._around.settings
            self._tenant = self._around.tenants.of_rpc(self._context)
        refusal = self._refusal(self._settings.limits.max_open_calls)
        request = InferRequest(self._front, message, self._ended)
        self._open.add(request)
        if refusal is not None:
            self._around.plane.count_refusal(refusal, 1)
            request.refuse(refusal)
            return
        now = self._loop.time()
        request.begin(Arrival(now, None if self._deadline is None else self._deadline - now, self._tenant))

    def _refusal(self, max_open: int) -> ResourceExhausted | None:
        """Why this stream takes no further request; None: it does."""
        if len(self._open) + len(self._outbox) >= max_open:
            message = f"{max_open} requests of this stream are open"
            return ResourceExhausted(message, reason="open_calls", retry_after_s=1.0)
        if self._unread_bytes > MAX_UNREAD_BYTES:
            message = "the answers of this stream are not being read"
            return ResourceExhausted(message, reason="unread", retry_after_s=UNREAD_RETRY_AFTER_S)
        return None

    @property
    def _is_overfull(self) -> bool:
        """Whether the client leaves too much unread, of which refusals are a part; see MAX_UNREAD_BYTES."""
        most = 2 * self._around.settings.limits.max_open_calls
        return len(self._open) + len(self._outbox) >= most or self._unread_bytes > 2 * MAX_UNREAD_BYTES

    # -- writing -----------------------------------------------------------------------------------------------------

    def _ended(self, request: InferRequest) -> None:
        """A request has its answer; see InferRequest."""
        self._open.discard(request)
        record(self._around, METHOD, request, lambda: request.id or uuid.uuid4().hex)
        message = _to_message(request)
        size = message.ByteSize() + ANSWER_OVERHEAD_BYTES
        self._outbox.append((message, size))
        self._unread_bytes += size
        self._something_to_do.set()

    async def _write_all(self) -> None:
        while True:
            self._something_to_do.clear()
            while self._outbox:
                message, size = self._outbox.popleft()
                await self._context.write(message)
                self._unread_bytes -= size
                self._has_written.set()
            if self._is_ending and not self._open:
                return
            await self._something_to_do.wait()


def _to_message(request: InferRequest) -> pb.ModelStreamInferResponse:
    """As Triton tells it: an answer is the last to its request, and an error has the request's id twice."""
    message = pb.ModelStreamInferResponse()
    if request.response is not None:
        message.infer_response.CopyFrom(request.response)
        message.infer_response.parameters[IS_FINAL].bool_param = True
        return message
    error = request.error or InternalError()
    message.error_message = f"[request id: {request.id or NO_ID}] {error.message}"
    message.infer_response.id = request.id
    return message
