"""Fakes that speak the real wire and do what a test tells them, at one exact point. No timers, no sleeps.

FakeRouter is a grpc.aio server on 127.0.0.1 with the native API and health. A test waits for a `FakeStream`, for the
messages, calls and cancels on it, and answers, drains, refuses or cuts it; or it gives the router a script that answers
every call at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos.inference_router.v1 import inference_router_pb2 as pb
from protos.inference_router.v1 import inference_router_pb2_grpc
from protos.open_inference import open_inference_pb2
from tests.open_inference_server import OpenInferenceServer

Script: TypeAlias = Callable[[pb.Call], Iterable[pb.Answer]]
Context: TypeAlias = "aio.ServicerContext[pb.PredictStreamRequest, pb.PredictStreamResponse]"
InferContext: TypeAlias = (
    "aio.ServicerContext[open_inference_pb2.ModelInferRequest, open_inference_pb2.ModelInferResponse]"
)
Infer: TypeAlias = Callable[
    [open_inference_pb2.ModelInferRequest, InferContext], Awaitable[open_inference_pb2.ModelInferResponse]
]

SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.http2.bdp_probe", 0),  # or the window grows while it is busy, and a write that should block may fit
]


def echo(call: pb.Call) -> list[pb.Answer]:
    """Answer each row with its own vector, each block at once."""
    answers = [
        pb.Answer(call_id=call.call_id, block=at, rows=block.rows, outputs=block.vectors)
        for at, block in enumerate(call.blocks)
    ]
    answers[-1].done = True
    return answers


def refusal(call: pb.Call, code: str = "UNAVAILABLE") -> pb.Answer:
    """Refuse a whole call."""
    return pb.Answer(call_id=call.call_id, error=pb.Error(code=code, message=f"refused: {code}"), done=True)


class FakeStream:
    """One stream that a client has opened, from the router's side."""

    def __init__(self, context: Context, *, is_held: bool) -> None:
        self._context = context
        self._may_read = asyncio.Event()
        if not is_held:
            self._may_read.set()
        self._verdict: asyncio.Future[grpc.StatusCode] = asyncio.get_running_loop().create_future()
        self._calls: asyncio.Queue[pb.Call] = asyncio.Queue()
        self._cancels: asyncio.Queue[int] = asyncio.Queue()
        self.messages: list[pb.PredictStreamRequest] = []  # as they were read
        self.is_half_closed = asyncio.Event()  # the client will send nothing more
        self.is_over = asyncio.Event()

    def go_on(self) -> None:
        """Begin to read a stream that was opened held."""
        self._may_read.set()

    async def next_call(self) -> pb.Call:
        """Wait for a call not yet seen."""
        return await self._calls.get()

    async def next_cancel(self) -> int:
        """Wait for the id of a cancelled call."""
        return await self._cancels.get()

    async def answer(self, *answers: pb.Answer, draining: bool = False) -> None:
        """Send ``answers`` in one message."""
        await self._context.write(pb.PredictStreamResponse(answers=answers, draining=draining))

    async def drain(self) -> None:
        """Say that the router is about to stop."""
        await self.answer(draining=True)

    async def end(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        """End the stream with ``code``; OK ends it in good manners."""
        self._verdict.set_result(code)
        await self.is_over.wait()

    async def serve(self, script: Callable[[], Script | None]) -> None:
        """Read and answer until the client or the test ends the stream."""
        reader = asyncio.create_task(self._read(script))
        ends: list[asyncio.Future[Any]] = [reader, self._verdict]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            await asyncio.wait([reader])
            self.is_over.set()  # before the client hears of it
        if self._verdict.done() and self._verdict.result() is not grpc.StatusCode.OK:
            await self._context.abort(self._verdict.result(), "cut by the test")

    async def _read(self, script: Callable[[], Script | None]) -> None:
        while True:
            await self._may_read.wait()
            message = await self._context.read()
            if not isinstance(message, pb.PredictStreamRequest):  # aio.EOF
                break
            self.messages.append(message)
            for call in message.calls:
                self._calls.put_nowait(call)
            for call_id in message.cancels:
                self._cancels.put_nowait(call_id)
            if message.calls and (play := script()) is not None:
                await self.answer(*[answer for call in message.calls for answer in play(call)])
        self.is_half_closed.set()


class FakeRouter:
    """A router without batches or backends. Its port stays the same when it is stopped and started again.

    ``script`` answers every call from the moment it is set; without one, nothing is answered but by the test.
    ``is_draining`` says so first thing on every new stream. ``holds``: nothing is read from new streams until they
    `go_on`, so that a write of more than the transport's window blocks. Streams are accepted while ``accepts`` is set.
    ``open_inference`` answers the Open Inference Protocol's methods; without it only `ModelInfer` is there (``infer``).
    """

    def __init__(self, script: Script | None = None, *, open_inference: OpenInferenceServer | None = None) -> None:
        self.script = script
        self._open_inference = open_inference
        self.is_draining = False
        self.holds = False
        self.accepts = asyncio.Event()
        self.accepts.set()
        self.streams: list[FakeStream] = []  # all that were ever accepted
        self.health = health.aio.HealthServicer()
        # Answers unary requests; `requests` are those that arrived, and what came with them.
        self.infer: Infer = _echo_tensors
        self.requests: list[tuple[open_inference_pb2.ModelInferRequest, InferContext]] = []
        self._requested = asyncio.Condition()
        self._opened: asyncio.Queue[FakeStream] = asyncio.Queue()
        self._server: aio.Server | None = None
        self._port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def target(self) -> str:
        """The address, known after the first start."""
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Listen; again on the same port, if there was one."""
        self._server = aio.server(options=SERVER_OPTIONS)
        inference_router_pb2_grpc.add_InferenceRouterServiceServicer_to_server(_Servicer(self), self._server)
        if self._open_inference is None:
            self._server.add_generic_rpc_handlers((_infer_handler(self.serve_unary),))
        else:
            self._open_inference.add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self._port = self._server.add_insecure_port(self.target)
        await self._server.start()
        await self.set_serving(True)

    async def stop(self) -> None:
        """Disappear at once, as killed."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def set_serving(self, is_serving: bool) -> None:
        """Change what health answers."""
        status = health_pb2.HealthCheckResponse
        await self.health.set("", status.SERVING if is_serving else status.NOT_SERVING)

    async def next_stream(self) -> FakeStream:
        """Wait for a stream not yet seen."""
        return await self._opened.get()

    async def wait_for_requests(self, count: int) -> None:
        """Wait until so many unary requests have arrived since the beginning."""
        async with self._requested:
            await self._requested.wait_for(lambda: len(self.requests) >= count)

    async def serve_unary(
        self, request: open_inference_pb2.ModelInferRequest, context: "InferContext"
    ) -> open_inference_pb2.ModelInferResponse:
        """Serve one unary request as the test has scripted it."""
        async with self._requested:
            self.requests.append((request, context))
            self._requested.notify_all()
        return await self.infer(request, context)

    async def serve(self, context: Context) -> None:
        """Serve one stream as the test has scripted it."""
        await self.accepts.wait()
        await context.send_initial_metadata(())
        stream = FakeStream(context, is_held=self.holds)
        if self.is_draining:
            await stream.drain()
        self.streams.append(stream)
        self._opened.put_nowait(stream)
        await stream.serve(lambda: self.script)


async def _echo_tensors(
    request: open_inference_pb2.ModelInferRequest, _: "InferContext"
) -> open_inference_pb2.ModelInferResponse:
    """Answer the inputs."""
    response = open_inference_pb2.ModelInferResponse(raw_output_contents=request.raw_input_contents)
    for tensor in request.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return response


def _infer_handler(infer: "Infer") -> grpc.GenericRpcHandler:
    """Serve the one method of the Open Inference Protocol that a client of the router needs."""
    method = grpc.unary_unary_rpc_method_handler(
        infer,
        request_deserializer=open_inference_pb2.ModelInferRequest.FromString,
        response_serializer=open_inference_pb2.ModelInferResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})


class _Servicer(inference_router_pb2_grpc.InferenceRouterServiceServicer):
    """The router's methods as the wire has them."""

    def __init__(self, router: FakeRouter) -> None:
        self._router = router

    async def PredictStream(self, request_iterator: object, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        await self._router.serve(context)

    async def Predict(self, request: pb.PredictRequest, context: object) -> pb.PredictResponse:  # noqa: N802
        raise NotImplementedError  # no test asks for it yet
