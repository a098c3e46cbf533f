"""Replica: one address of a backend, its channel and its streams.

A stream carries one batch at a time and belongs to one `infer` while it does, so no answer can be taken for another's
and no batch waits behind another. Between batches streams wait in a pool, whatever the model; they are opened on
demand and closed when idle. Whatever goes wrong on a stream ends that stream only.

This module speaks gRPC and translates its failures; it knows nothing of retries, policies or other replicas, and never
decides to try again.
"""

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable
from typing import NoReturn

import grpc
import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from router.core.answer import ROW_ERRORS, model_text, read_answer
from router.core.batch import merge
from router.core.model_info import IndexEntry, ModelReport
from router.core.pulse import Sign
from router.core.types import Batch, BatchAnswer, Outputs, ParameterValue, Tensor
from router.dispatch.questions import LOST, Questions
from router.errors import (
    BackendError,
    BackendExhausted,
    BatchTimeout,
    Blame,
    InvalidArgument,
    Malformed,
    ModelFailed,
    NotFound,
    Refused,
    RouterError,
    StreamLost,
)

logger = logging.getLogger(__name__)

STREAM_IDLE_S = 60.0
# Ids of the batches a stream carried last: an answer that repeats one of them is late or double and is passed over.
REMEMBERED_IDS = 16
# The time bound of a batch that is given up: long past.
ABANDONED_AT = 0.0
INT64_MAX = 2**63 - 1

# What the caller is told, and who is to blame; of every other refusal that is unclear, and the model has failed.
_REFUSALS: dict[grpc.StatusCode, tuple[type[RouterError], Blame]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (InvalidArgument, Blame.ROWS),
    grpc.StatusCode.NOT_FOUND: (NotFound, Blame.MODEL),
    grpc.StatusCode.UNIMPLEMENTED: (ModelFailed, Blame.MODEL),
    grpc.StatusCode.FAILED_PRECONDITION: (ModelFailed, Blame.MODEL),
    # The credential is ours, not the caller's.
    grpc.StatusCode.UNAUTHENTICATED: (ModelFailed, Blame.MODEL),
    grpc.StatusCode.PERMISSION_DENIED: (ModelFailed, Blame.MODEL),
}
_REQUEST_ID = re.compile(r"^\[request id: (?P<id>[^\]]*)\] ?")

StreamCall = grpc.aio.StreamStreamCall[pb.ModelInferRequest, pb.ModelStreamInferResponse]


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """No keepalive: foreign servers answer pings with GOAWAY. Reconnects after 0.1 s at first, every 2 s at most."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


class Replica:
    """One replica; `start` it on the loop, `aclose` it at the end.

    max_in_flight: batches at a time, whatever their model; each has a stream.
    """

    def __init__(self, address: str, *, batch_timeout_s: float, max_message_bytes: int, max_in_flight: int) -> None:
        self.address = address
        self._max_in_flight = max_in_flight
        self._batch_timeout_s = batch_timeout_s
        self._max_message_bytes = max_message_bytes
        # State: the channel and the task that watches it; streams without a batch, the longest idle first; the time
        # bounds of the batches that are out.
        self._channel: grpc.aio.Channel | None = None
        self._stub: pb_grpc.GRPCInferenceServiceAsyncStub | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._idle: deque[_Stream] = deque()
        self._out: set[asyncio.Timeout] = set()
        self._is_connected = False
        self._on_change: Callable[[], None] = lambda: None
        self.in_flight = 0

    def __repr__(self) -> str:
        state = "connected" if self._is_connected else "away"
        return f"<Replica {self.address} {state}, {self.in_flight} in flight, {len(self._idle)} idle streams>"

    @property
    def is_connected(self) -> bool:
        """See member.Backend."""
        return self._is_connected

    @property
    def is_ready(self) -> bool:
        """See member.Backend."""
        return self._is_connected and self.in_flight < self._max_in_flight

    def start(self, on_change: Callable[[], None]) -> None:
        """Connect, stay connected, and call `on_change` when `is_ready` may have changed."""
        self._channel = grpc.aio.insecure_channel(self.address, options=channel_options(self._max_message_bytes))
        self._stub = pb_grpc.GRPCInferenceServiceStub(self._channel)
        self._on_change = on_change
        self._watch_task = asyncio.create_task(self._watch(self._channel), name=f"watch {self.address}")
        self._sweep_timer = asyncio.get_running_loop().call_later(STREAM_IDLE_S, self._sweep)

    async def aclose(self) -> None:
        """Close idle streams and the connection; batches in flight are lost."""
        if self._sweep_timer:
            self._sweep_timer.cancel()
        if self._watch_task:
            self._watch_task.cancel()
            await asyncio.wait([self._watch_task])
        self.close_idle()
        if self._channel:
            await self._channel.close()

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        """Follow the channel's state; asking for it with try_to_connect is what makes gRPC reconnect."""
        is_told = False
        while True:
            state = channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and not is_told:
                logger.warning("backend %s cannot be reached, trying on", self.address)
                is_told = True
            elif state is grpc.ChannelConnectivity.READY and not self._is_connected:
                logger.info("backend %s connected", self.address)
                self._is_connected = is_told = True
                self._on_change()
            elif state is not grpc.ChannelConnectivity.READY and self._is_connected:
                logger.warning("backend %s lost, reconnecting", self.address)
                self._is_connected = False
                self._on_change()
            await channel.wait_for_state_change(state)

    def _sweep(self) -> None:
        """Close what has been idle for long, and what the server has closed meanwhile."""
        loop = asyncio.get_running_loop()
        self._sweep_timer = loop.call_later(STREAM_IDLE_S / 4, self._sweep)
        while self._idle and (self._idle[0].is_over or self._idle[0].idle_since < loop.time() - STREAM_IDLE_S):
            self._idle.popleft().close()

    async def infer(self, batch: Batch) -> BatchAnswer:
        """Send one batch and wait for its answer, at most `batch_timeout_s`.

        Cancelling it ends the batch's stream. Raises BackendError.
        """
        loop = asyncio.get_running_loop()
        stream = None
        bound = asyncio.timeout(self._batch_timeout_s)
        try:
            request = to_request(batch)
            self._check_size(request)
            stream = self._take_stream()
            dispatched_at = loop.time()
            self._out.add(bound)
            async with bound:
                response = await stream.exchange(request)
            stream.idle_since = answered_at = loop.time()
            answer = to_answer(batch, response, self.address, dispatched_at, answered_at)
            if not answer.fault:
                self._idle.append(stream)
                stream = None
        except TimeoutError as error:
            if bound.when() == ABANDONED_AT:
                raise StreamLost(f"{self.address} gave no sign of life") from error
            raise BatchTimeout(f"{self.address} did not answer within {self._batch_timeout_s:g} s") from error
        finally:
            self._out.discard(bound)
            if stream:
                stream.close()
        return answer

    def abandon(self) -> None:
        """See member.Backend. Their streams end with them."""
        for bound in self._out:
            if not bound.expired():
                bound.reschedule(ABANDONED_AT)

    def close_idle(self) -> None:
        """See member.Backend."""
        while self._idle:
            self._idle.popleft().close()

    async def probe(self) -> Sign:
        """See member.Backend."""
        return await self._ask().probe()

    async def describe(self, model: tuple[str, str]) -> ModelReport:
        """See member.Backend."""
        return await self._ask().describe(model)

    async def index(self) -> tuple[IndexEntry, ...]:
        """See member.Backend."""
        return await self._ask().index()

    def _ask(self) -> Questions:
        assert self._stub is not None, "a question before start(): this is a bug"
        return Questions(self._stub, self.address)

    def reserve(self) -> None:
        """See member.Backend."""
        self.in_flight += 1

    def free(self) -> None:
        """See member.Backend."""
        self.in_flight -= 1
        if self.in_flight == self._max_in_flight - 1:
            self._on_change()

    def _take_stream(self) -> "_Stream":
        """The stream that was used last, so that the surplus ages and is closed; else a new one."""
        while self._idle:
            stream = self._idle.pop()
            if not stream.is_over:
                return stream
            stream.close()
        assert self._stub is not None, "infer() before start(): this is a bug"
        return _Stream(self._stub.ModelStreamInfer(), self.address)

    def _check_size(self, request: pb.ModelInferRequest) -> None:
        size = request.ByteSize()
        if size > self._max_message_bytes:
            limit = f"the message limit of {self._max_message_bytes} bytes"
            raise Refused(f"a batch of {size} bytes is over {limit}", blame=Blame.ROWS)


class _Stream:
    """One ModelStreamInfer call; one exchange at a time."""

    def __init__(self, call: StreamCall, address: str) -> None:
        self._call = call
        self._address = address
        self._carried: deque[str] = deque(maxlen=REMEMBERED_IDS)
        self.idle_since = 0.0

    @property
    def is_over(self) -> bool:
        return self._call.done()

    def close(self) -> None:
        """A dropped call is never collected (grpc/grpc#43462), a cancelled one is."""
        self._call.cancel()

    async def exchange(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Write a batch, read its answer. After an error the stream is of no more use."""
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            await self._raise_lost_write(error)
        try:
            response = await self._read_own(request.id)
        except grpc.aio.AioRpcError as error:
            raise translate(error, self._address) from error
        self._carried.append(request.id)
        return response

    async def _raise_lost_write(self, error: Exception) -> NoReturn:
        """The server ended the stream before or while we wrote: its status tells why, if it gave one.

        A write that races with the peer's death fails with INTERNAL, which is a loss too.
        """
        code = await self._call.code()
        if code in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL):
            raise StreamLost(f"stream to {self._address} lost while writing") from error
        raise translate_status(code, await self._call.details(), self._address) from error

    async def _read_own(self, batch_id: str) -> pb.ModelInferResponse:
        while True:
            message = await self._call.read()
            if not isinstance(message, pb.ModelStreamInferResponse):
                raise await self._ended()
            answered = _answered_id(message)
            if answered in self._carried:
                logger.warning("backend %s repeated its answer to batch %s; passed over", self._address, answered)
            elif message.error_message and answered in ("", batch_id):
                raise Refused(model_text(_REQUEST_ID.sub("", message.error_message)))
            elif answered != batch_id:
                raise Malformed(f"{self._address} answered batch {answered!r} when asked for {batch_id!r}")
            else:
                return message.infer_response

    async def _ended(self) -> BackendError:
        """The server closed the stream without an answer; OK is no answer either."""
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return StreamLost(f"{self._address} closed the stream without an answer")
        return translate_status(code, await self._call.details(), self._address)


def _answered_id(message: pb.ModelStreamInferResponse) -> str:
    match = _REQUEST_ID.match(message.error_message)
    return match["id"] if match else message.infer_response.id


def to_request(batch: Batch) -> pb.ModelInferRequest:
    """The batch as one OIP request with raw contents."""
    key = batch.key
    request = pb.ModelInferRequest(
        model_name=key.model_name, model_version=key.model_version, id=batch.id, raw_input_contents=merge(batch)
    )
    for spec in key.inputs:
        request.inputs.add(name=spec.name, datatype=spec.datatype, shape=(batch.rows, *spec.row_shape))
    for name, value in key.parameters:
        _set_parameter(request.parameters[name], value)
    return request


def _set_parameter(parameter: pb.InferParameter, value: ParameterValue) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int) and value > INT64_MAX:
        parameter.uint64_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def to_answer(
    batch: Batch, response: pb.ModelInferResponse, address: str, dispatched_at: float, answered_at: float
) -> BatchAnswer:
    """The checked answer. Raises Malformed."""
    return read_answer(
        batch,
        to_outputs(response),
        row_errors=response.parameters[ROW_ERRORS].string_param if ROW_ERRORS in response.parameters else None,
        replica=address,
        dispatched_at=dispatched_at,
        answered_at=answered_at,
    )


def to_outputs(response: pb.ModelInferResponse) -> Outputs:
    """The answer's tensors. Raises Malformed when there is not one raw entry for each."""
    if len(response.raw_output_contents) != len(response.outputs):
        count = f"{len(response.outputs)} outputs and {len(response.raw_output_contents)} raw contents"
        raise Malformed(f"the backend answered with {count}")
    return tuple(
        Tensor(output.name, output.datatype, tuple(output.shape), data)
        for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
    )


def translate(error: grpc.aio.AioRpcError, address: str) -> BackendError:
    """A failed read as the pool understands it."""
    return translate_status(error.code(), error.details(), address)


def translate_status(code: grpc.StatusCode, details: str | None, address: str) -> BackendError:
    """A stream's end by status. A message over a limit comes as RESOURCE_EXHAUSTED, but is less with fewer rows.

    A batch that the server does not read has too many rows. An answer that we do not read may be the replica's fault.
    """
    text = details or code.name
    if code in LOST:
        return StreamLost(f"{address}: {model_text(text)}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        blame = Blame.UNCLEAR if "CLIENT: Received" in text else Blame.ROWS
        return Refused(f"{address}: {model_text(text)}", blame=blame)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return BackendExhausted(f"{address}: {model_text(text)}")
    return Refused(model_text(text), *_REFUSALS.get(code, (ModelFailed, Blame.UNCLEAR)))
