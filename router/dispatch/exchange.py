"""Exchanges: the two ways of a batch to a server and of its answer back, Triton's stream and the protocol's own call.

A stream carries one batch at a time, so no answer can be taken for another's and no batch waits behind another; it is
used again. An answer on it must bear its batch's id, as late and double ones of the batch before may come. Whatever
goes wrong on a stream ends that stream only.

A call is there for one batch, and gRPC itself knows what it answers: so the id in its answer may be any. MLServer and
KServe leave it empty or make their own.
"""

import asyncio
import logging
import re
from collections import deque
from typing import ClassVar, NoReturn, Protocol

import grpc
import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from router.dispatch.wire import translate, translate_message, translate_status
from router.errors import BackendError, Malformed, StreamLost

logger = logging.getLogger(__name__)

# Ids of the batches a stream carried last: an answer that repeats one of them is late or double and is passed over.
REMEMBERED_IDS = 16

_REQUEST_ID = re.compile(r"^\[request id: (?P<id>[^\]]*)\] ?")

# How much later than ours the deadline is that a server is told: so ours always comes first, and has its own error.
SERVERS_BOUND_LATER_S = 1.0
# gRPC counts in int64 nanoseconds; a year is for ever.
LONGEST_S = 365 * 24 * 3600.0

# For who meets a server without Triton's ModelStreamInfer.
USE_UNARY = "if it has none, set protocol: unary"

StreamCall = grpc.aio.StreamStreamCall[pb.ModelInferRequest, pb.ModelStreamInferResponse]
UnaryMethod = grpc.aio.UnaryUnaryMultiCallable[pb.ModelInferRequest, pb.ModelInferResponse]


class Exchange(Protocol):
    """One way to the server: carries a batch there and its answer back. `lasts`: and may be used for the next one."""

    lasts: ClassVar[bool]
    idle_since: float

    @property
    def is_over(self) -> bool:
        """Whether it is of no more use."""

    async def exchange(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Send a batch, wait for its answer. After an error it is of no more use. Raises BackendError."""

    def close(self) -> None:
        """Let go of it, and of what is under way on it. A dropped call is never collected (grpc/grpc#43462)."""


class Call:
    """One ModelInfer call.

    `timeout_s`: after so long nobody waits for it any more, and the server may know that.
    """

    lasts: ClassVar[bool] = False

    def __init__(self, method: UnaryMethod, address: str, timeout_s: float) -> None:
        self._method = method
        self._address = address
        self._timeout_s = min(timeout_s + SERVERS_BOUND_LATER_S, LONGEST_S)
        self._call: grpc.aio.UnaryUnaryCall[pb.ModelInferRequest, pb.ModelInferResponse] | None = None
        self.idle_since = 0.0

    @property
    def is_over(self) -> bool:
        """See Exchange."""
        return self._call is not None

    async def exchange(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """See Exchange."""
        self._call = self._method(request, timeout=self._timeout_s)
        try:
            response = await self._call
        except grpc.aio.AioRpcError as error:
            raise translate(error, self._address) from error
        if not isinstance(response, pb.ModelInferResponse):  # gRPC has logged it
            raise Malformed(f"{self._address} answered with bytes that are no ModelInferResponse")
        return response

    def close(self) -> None:
        """See Exchange."""
        if self._call:
            self._call.cancel()


class Stream:
    """One ModelStreamInfer call; one exchange at a time."""

    lasts: ClassVar[bool] = True

    def __init__(self, call: StreamCall, address: str) -> None:
        self._call = call
        self._address = address
        self._carried: deque[str] = deque(maxlen=REMEMBERED_IDS)
        self.idle_since = 0.0

    @property
    def is_over(self) -> bool:
        """See Exchange."""
        return self._call.done()

    def close(self) -> None:
        """See Exchange."""
        self._call.cancel()

    async def exchange(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """See Exchange."""
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            await self._raise_lost_write(error)
        try:
            response = await self._read_own(request)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error.code(), error.details()) from error
        self._carried.append(request.id)
        return response

    async def _raise_lost_write(self, error: Exception) -> NoReturn:
        """The server ended the stream before or while we wrote: its status tells why, if it gave one.

        A write that races with the peer's death fails with INTERNAL, which is a loss too.
        """
        code = await self._call.code()
        if code in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL):
            raise StreamLost(f"stream to {self._address} lost while writing") from error
        raise self._failure(code, await self._call.details()) from error

    async def _read_own(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        while True:
            message = await self._call.read()
            if not isinstance(message, pb.ModelStreamInferResponse):
                raise await self._ended() if message is grpc.aio.EOF else self._foreign()
            answered = _answered_id(message)
            if answered in self._carried:
                logger.warning("backend %s repeated its answer to batch %s; passed over", self._address, answered)
            elif message.error_message and answered in ("", request.id):
                raise self._foreign() if message.error_message == request.model_name else self._refused(message)
            elif answered != request.id:
                raise Malformed(f"{self._address} answered batch {answered!r} when asked for {request.id!r}")
            else:
                return message.infer_response

    def _foreign(self) -> Malformed:
        """MLServer has a form of its own, a bare ModelInferResponse, of which the model's name reads as an error, or
        the whole cannot be read (of which gRPC tells by None, and in the log)."""
        return Malformed(f"{self._address} answered with no ModelStreamInferResponse of Triton's; {USE_UNARY}")

    def _refused(self, message: pb.ModelStreamInferResponse) -> BackendError:
        return translate_message(_REQUEST_ID.sub("", message.error_message), self._address)

    async def _ended(self) -> BackendError:
        """The server closed the stream without an answer; OK is no answer either."""
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return StreamLost(f"{self._address} closed the stream without an answer")
        return self._failure(code, await self._call.details())

    def _failure(self, code: grpc.StatusCode, details: str | None) -> BackendError:
        """The way out is told where the method may be missing."""
        if code is grpc.StatusCode.UNIMPLEMENTED:
            details = f"{details}; {USE_UNARY}"
        return translate_status(code, details, self._address)


def _answered_id(message: pb.ModelStreamInferResponse) -> str:
    match = _REQUEST_ID.match(message.error_message)
    return match["id"] if match else message.infer_response.id
