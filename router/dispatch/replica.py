"""Replica: one address of a backend, its connection, and its streams or calls (`exchange.py`).

Each batch that is out has a stream, or a call, to itself. Between batches streams wait in a pool, whatever the model;
they are opened on demand and closed when idle. Whatever goes wrong on a stream ends that stream only.

This module speaks gRPC and translates its failures; it knows nothing of retries, policies or other replicas, and never
decides to try again.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc
from router.config import ProtocolName
from router.core.model_info import IndexEntry, ModelReport
from router.core.pulse import Sign
from router.core.types import Batch, BatchAnswer
from router.dispatch.certificates import Certificates
from router.dispatch.connection import Connection
from router.dispatch.exchange import Call, Exchange, Stream
from router.dispatch.questions import Questions
from router.dispatch.wire import to_answer, to_request
from router.errors import BatchTimeout, Blame, Refused, StreamLost

STREAM_IDLE_S = 60.0
# The time bound of a batch that is given up: long past.
ABANDONED_AT = 0.0


class Replica:
    """One replica; `start` it on the loop, `aclose` it at the end.

    max_in_flight: batches at a time, whatever their model; each has a stream or a call.
    """

    def __init__(
        self,
        address: str,
        *,
        batch_timeout_s: float,
        max_message_bytes: int,
        max_in_flight: int,
        protocol: ProtocolName = "stream",
        certificates: Certificates | None = None,
    ) -> None:
        self.address = address
        self._protocol = protocol
        self._certificates = certificates
        self._max_in_flight = max_in_flight
        self._batch_timeout_s = batch_timeout_s
        self._max_message_bytes = max_message_bytes
        # State: the connection; streams without a batch, the longest idle first, with the timer that closes them; the
        # time bounds of the batches that are out.
        self._connection: Connection | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._idle: deque[Exchange] = deque()
        self._out: set[asyncio.Timeout] = set()
        self._on_change: Callable[[], None] = lambda: None
        self.in_flight = 0

    def __repr__(self) -> str:
        state = "connected" if self.is_connected else "away"
        return f"<Replica {self.address} {state}, {self.in_flight} in flight, {len(self._idle)} idle streams>"

    @property
    def is_connected(self) -> bool:
        """See member.Backend."""
        return self._connection is not None and self._connection.is_connected

    @property
    def is_ready(self) -> bool:
        """See member.Backend."""
        return self.is_connected and self.in_flight < self._max_in_flight

    def start(self, on_change: Callable[[], None]) -> None:
        """Connect, stay connected, and call `on_change` when `is_ready` may have changed."""
        self._on_change = on_change
        self._connection = Connection(
            self.address,
            max_message_bytes=self._max_message_bytes,
            certificates=self._certificates,
            on_change=on_change,
        )
        self._sweep_timer = asyncio.get_running_loop().call_later(STREAM_IDLE_S, self._sweep)

    async def aclose(self) -> None:
        """Close idle streams and the connection; batches in flight are lost."""
        if self._sweep_timer:
            self._sweep_timer.cancel()
        self.close_idle()
        if self._connection:
            await self._connection.aclose()

    def _sweep(self) -> None:
        """Close what has been idle for long, and what the server has closed meanwhile."""
        loop = asyncio.get_running_loop()
        self._sweep_timer = loop.call_later(STREAM_IDLE_S / 4, self._sweep)
        while self._idle and (self._idle[0].is_over or self._idle[0].idle_since < loop.time() - STREAM_IDLE_S):
            self._idle.popleft().close()

    async def infer(self, batch: Batch) -> BatchAnswer:
        """Send one batch and wait for its answer, at most `batch_timeout_s`.

        Cancelling it ends the batch's stream or call. Raises BackendError.
        """
        loop = asyncio.get_running_loop()
        exchange = None
        bound = asyncio.timeout(self._batch_timeout_s)
        try:
            request = to_request(batch)
            self._check_size(request)
            exchange = self._take_exchange()
            dispatched_at = loop.time()
            self._out.add(bound)
            async with bound:
                response = await exchange.exchange(request)
            exchange.idle_since = answered_at = loop.time()
            answer = to_answer(batch, response, self.address, dispatched_at, answered_at)
            if exchange.lasts and not answer.fault:
                self._idle.append(exchange)
                exchange = None
        except TimeoutError as error:
            if bound.when() == ABANDONED_AT:
                raise StreamLost(f"{self.address} gave no sign of life") from error
            raise BatchTimeout(f"{self.address} did not answer within {self._batch_timeout_s:g} s") from error
        finally:
            self._out.discard(bound)
            if exchange:
                exchange.close()
        return answer

    def abandon(self) -> None:
        """See member.Backend. Their streams and calls end with them."""
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
        return Questions(self._stub, self.address)

    @property
    def _stub(self) -> "pb_grpc.GRPCInferenceServiceAsyncStub":
        assert self._connection is not None, "asked before start(): this is a bug"
        return self._connection.stub

    def reserve(self) -> None:
        """See member.Backend."""
        self.in_flight += 1

    def free(self) -> None:
        """See member.Backend."""
        self.in_flight -= 1
        if self.in_flight == self._max_in_flight - 1:
            self._on_change()

    def _take_exchange(self) -> Exchange:
        """The stream that was used last, so that the surplus ages and is closed; else a new one, or a call."""
        while self._idle:
            stream = self._idle.pop()
            if not stream.is_over:
                return stream
            stream.close()
        if self._protocol == "unary":
            return Call(self._stub.ModelInfer, self.address, self._batch_timeout_s)
        return Stream(self._stub.ModelStreamInfer(), self.address)

    def _check_size(self, request: pb.ModelInferRequest) -> None:
        size = request.ByteSize()
        if size > self._max_message_bytes:
            limit = f"the message limit of {self._max_message_bytes} bytes"
            raise Refused(f"a batch of {size} bytes is over {limit}", blame=Blame.ROWS)
