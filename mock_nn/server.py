"""The mock as a gRPC server: OIP on the wire, health and reflection, readiness and drain.

It must not know what a batch goes through (`runner.py`), nor signals and exit codes (`__main__.py`). Streams run side
by side; on one stream a batch is read only after the one before it is answered, as with Triton.
"""
# ruff: noqa: N802 -- the protocol names its methods

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeAlias

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from mock_nn.config import MockConfig, split_address
from mock_nn.faults import Message
from mock_nn.runner import Batch, BatchError, Crash, DroppedError, Runner, Sleep
from protos.open_inference import open_inference_pb2 as pb
from protos.open_inference import open_inference_pb2_grpc as pb_grpc

log = logging.getLogger("mock_nn")

SERVICE = "inference.GRPCInferenceService"
MAX_MESSAGE_BYTES = 64 * 2**20

# A handler that returned still has its last bytes to send. Only a health watcher ever uses the whole second.
_FLUSH_GRACE_S = 1.0

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Otherwise a second process binds the same port and takes half the connections, silently.
    ("grpc.so_reuseport", 0),
    # The default, 300 s, answers keepalive with GOAWAY "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
)

_UnaryContext: TypeAlias = grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelInferResponse]
_StreamContext: TypeAlias = grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelStreamInferResponse]
_ConfigContext: TypeAlias = grpc.aio.ServicerContext[pb.ModelConfigRequest, pb.ModelConfigResponse]
_MetadataContext: TypeAlias = grpc.aio.ServicerContext[pb.ModelMetadataRequest, pb.ModelMetadataResponse]


class ListenError(Exception):
    """The address cannot be had; the text says which and why."""


class MockServer:
    """The mock in this process: `async with MockServer(config) as mock`, then `mock.address`, `mock.batches`.

    `sleep` is how a latency passes (a test may hold batches at will), `crash` what the crash fault does with its exit
    code.
    """

    def __init__(self, config: MockConfig, *, sleep: Sleep = asyncio.sleep, crash: Crash = os._exit) -> None:
        # State: the runner's (record, instances, faults), the calls in progress, readiness, the gRPC server.
        self._config = config
        self._runner = Runner(config, sleep, crash)
        self._calls = _Calls()
        self._servicer = _Servicer(config, self._runner, self._calls)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """HOST:PORT as a client writes it, with the real port."""
        return f"{split_address(self._config.listen)[0]}:{self.port}"

    @property
    def batches(self) -> Sequence[Batch]:
        """The finished batches, oldest first; the last 10,000 of them."""
        return tuple(self._runner.record)

    @property
    def arrived(self) -> int:
        """Valid batches that arrived so far, finished or not."""
        return self._runner.arrived

    @property
    def open_calls(self) -> int:
        """Streams that are open and unary calls in progress."""
        return self._calls.open

    async def wait_for_arrivals(self, count: int) -> None:
        """Return once `count` valid batches have arrived since the start (waiting, stalled and finished ones)."""
        await self._runner.wait_for_arrivals(count)

    async def wait_until_idle(self) -> None:
        """Return once no stream is open and no unary call in progress."""
        await self._calls.wait_until_none()

    async def start(self) -> int:
        """Listen; return the port. Raises ListenError when the address cannot be had."""
        self._server = grpc.aio.server(options=_OPTIONS)
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(self._servicer, self._server)
        await _add_side_services(self._server, self._health)
        self.port = _bind(self._server, self._config.listen)
        await self._server.start()
        return self.port

    async def drain(self) -> None:
        """Say "not ready", go on for `drain_delay_s` and until no call is open, at most `drain_timeout_s`, and stop.

        A client that keeps an idle stream open keeps the server: only it knows whether more batches come. A server
        without a stream knows nothing: a router that is stopped at the same moment takes calls for a while, and may
        just not have needed one. Hence the delay. Streams that are still open after the time get UNAVAILABLE.
        """
        self._servicer.is_draining = True
        await self._health.enter_graceful_shutdown()
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await asyncio.sleep(self._config.drain_delay_s)
                await self.wait_until_idle()
        except TimeoutError:
            log.warning("drain timeout", extra={"fields": {"open_calls": self.open_calls}})
            await self.stop()
        else:
            await self.stop(_FLUSH_GRACE_S)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stop listening and, after the grace, cut what is still open (UNAVAILABLE). Harmless when not started."""
        if self._server is not None:
            await self._server.stop(grace_s)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class _Calls:
    """The infer calls in progress: `with calls:` around each one."""

    def __init__(self) -> None:
        self.open = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self.open += 1
        self._none.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open -= 1
        if not self.open:
            self._none.set()

    async def wait_until_none(self) -> None:
        await self._none.wait()


class _Servicer(pb_grpc.GRPCInferenceServiceServicer):
    """OIP on the wire: the only place that turns a failure into a status or an error message."""

    def __init__(self, config: MockConfig, runner: Runner, calls: _Calls) -> None:
        self.is_draining = False
        self._config = config
        self._runner = runner
        self._calls = calls

    async def ModelInfer(self, request: pb.ModelInferRequest, context: _UnaryContext) -> pb.ModelInferResponse:
        with self._calls:
            try:
                messages = await self._runner.infer(request)
            except BatchError as error:
                await context.abort(grpc.StatusCode[error.code], str(error))
            except DroppedError:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped (a fault on demand)")
            # Where a fault makes two messages, the second is the right one.
            return messages[-1].infer_response

    # A coroutine with read() and write() instead of the stub's generator: gRPC does not close a generator that is
    # cancelled while its message is being sent, so the call would count as open until the collector comes.
    async def ModelStreamInfer(  # type: ignore[override]
        self, _requests: object, context: _StreamContext
    ) -> None:
        with self._calls, contextlib.suppress(DroppedError):
            previous: Message | None = None
            # The stubs do not tell that read() ends with EOF.
            while isinstance(request := await context.read(), pb.ModelInferRequest):
                for message in await self._answer_on_stream(request, previous, context):
                    await context.write(message)
                    previous = message

    async def _answer_on_stream(
        self, request: pb.ModelInferRequest, previous: Message | None, context: _StreamContext
    ) -> list[Message]:
        try:
            return await self._runner.infer(request, previous)
        except BatchError as error:
            if error.ends_stream:
                await context.abort(grpc.StatusCode[error.code], str(error))
            # Triton's form, and the only place where a stream's error can tell its request.
            return [Message(error_message=f"[request id: {request.id or '<id_unknown>'}] {error}")]

    async def ServerLive(self, _request: object, _context: object) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _request: object, _context: object) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=not self.is_draining)

    async def ModelReady(self, request: pb.ModelReadyRequest, _context: object) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self._runner.has_model(request.name) and not self.is_draining)

    async def ServerMetadata(self, _request: object, _context: object) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="mock_nn", version="1")

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: _MetadataContext
    ) -> pb.ModelMetadataResponse:
        try:
            return self._runner.metadata(request.name)
        except BatchError as error:
            await context.abort(grpc.StatusCode[error.code], str(error))

    async def ModelConfig(self, _request: object, context: _ConfigContext) -> pb.ModelConfigResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "model configurations are Triton's")

    async def RepositoryIndex(self, _request: object, _context: object) -> pb.RepositoryIndexResponse:
        """The models that it was told to serve; one that serves any name has nothing to list."""
        entry = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[entry(name=name, version="1", state="READY") for name in sorted(self._config.models)]
        )


async def _add_side_services(server: grpc.aio.Server, health_servicer: health.aio.HealthServicer) -> None:
    await health_servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    # Our generated OIP module has a pool of its own and reflection takes one pool: build one of all files.
    pool = DescriptorPool()
    for module in (pb, health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server, pool)


def _bind(server: grpc.aio.Server, listen: str) -> int:
    _try_address(listen)
    try:
        return server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {listen}: gRPC could not bind it") from error


def _try_address(listen: str) -> None:
    """Ask the operating system first: gRPC keeps its reason to itself, in a line of its own on stderr."""
    host, port = split_address(listen)
    try:
        with socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET) as probe:
            # As gRPC does it: connections of the last process that still fade out are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
    except OSError as error:
        raise ListenError(f"cannot listen on {listen}: {error.strerror or error}") from error
