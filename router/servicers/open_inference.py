"""The Open Inference Protocol's front: what a server is asked about itself and its models, and both ways to infer.

The answers about models are their backends', under the router's terms: rows of a call are ours to decide, requests may
have any number of them, and of a model whose backend tells nothing only the name is known.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from protos.open_inference import open_inference_pb2 as pb
from router import __version__
from router.config import Settings
from router.core.model_info import ModelState
from router.errors import InternalError, InvalidArgument, RouterError, Unavailable
from router.models import Unlearned
from router.servicers import descriptions, infer_unary
from router.servicers.infer_request import Front
from router.servicers.infer_stream import Context as StreamContext
from router.servicers.infer_stream import InferStream
from router.servicers.status import to_proto
from router.servicers.stream import Surroundings
from router.servicers.unary import Readable, Rpcs, Unreadable, abort, reader

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
NAME = "inference-router"
# Triton's names for what a server can do beyond the protocol. Of `model_repository` there is the index, not loading.
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
)
# Until a model that is not ready is asked about again, about.
UNREADY_RETRY_AFTER_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]
Question = TypeVar("Question", bound=Readable)
Answer = TypeVar("Answer")


class OpenInferenceServicer:
    """GRPCInferenceService of the router."""

    def __init__(self, around: Surroundings, rpcs: Rpcs) -> None:
        self._around = around
        self._rpcs = rpcs
        self._front = Front(around)
        # State: the streams that are open; whether the router leaves; whether streams are to end.
        self._streams: set[InferStream] = set()
        self._is_draining = False
        self._is_ending = False

    def apply(self, settings: Settings) -> None:
        """Find models by other settings."""
        self._front.apply(settings)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register all methods; see InferenceServicer."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ServerLive": _answering(pb.ServerLiveRequest, self.server_live),
            "ServerReady": _answering(pb.ServerReadyRequest, self.server_ready),
            "ServerMetadata": _answering(pb.ServerMetadataRequest, self.server_metadata),
            "ModelReady": _answering(pb.ModelReadyRequest, self.model_ready),
            "ModelMetadata": _answering(pb.ModelMetadataRequest, self.model_metadata),
            "ModelConfig": _answering(pb.ModelConfigRequest, self.model_config),
            "RepositoryIndex": _answering(pb.RepositoryIndexRequest, self.repository_index),
            "ModelInfer": grpc.unary_unary_rpc_method_handler(
                self.ModelInfer,
                request_deserializer=reader(pb.ModelInferRequest),
                response_serializer=pb.ModelInferResponse.SerializeToString,
            ),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                self.ModelStreamInfer,
                request_deserializer=reader(pb.ModelInferRequest),
                response_serializer=pb.ModelStreamInferResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def announce_draining(self) -> None:
        """Be not ready from now on. Streams have no word for it."""
        self._is_draining = True

    def end_streams(self) -> None:
        """End every stream as soon as its requests are answered; new streams end at once."""
        self._is_ending = True
        for stream in self._streams:
            stream.end()

    # -- about the server and its models -----------------------------------------------------------------------------

    async def server_live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """The loop turns."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """Whatever the backends do: ModelReady tells of models."""
        return pb.ServerReadyResponse(ready=not self._is_draining)

    async def server_metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """See EXTENSIONS."""
        return pb.ServerMetadataResponse(name=NAME, version=__version__, extensions=EXTENSIONS)

    async def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """A model that nobody has is not ready, as at Triton."""
        report = await self._around.models.report(request.name, request.version)
        return pb.ModelReadyResponse(ready=report.state is ModelState.READY)

    async def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Raises RouterError."""
        report = await self._around.models.report(request.name, request.version)
        return descriptions.to_metadata(request.name, request.version, report)

    async def model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """Raises RouterError."""
        report = await self._around.models.report(request.name, request.version)
        descriptions.check_there(request.name, request.version, report)
        try:
            model = self._around.models.find(request.name, request.version, "")
        except Unlearned as error:  # no rows would be sent now, and what they would be sent as nobody knows
            raise Unavailable(f"model {request.name!r} is not ready", retry_after_s=UNREADY_RETRY_AFTER_S) from error
        return pb.ModelConfigResponse(config=descriptions.to_config(request.name, model))

    async def repository_index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """Raises RouterError."""
        if request.repository_name:
            raise InvalidArgument("repository_name: the router has no repositories by name")
        return descriptions.to_index(await self._around.models.index(), are_ready=request.ready)

    # -- inferring ---------------------------------------------------------------------------------------------------

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest | Unreadable, context: infer_unary.Context
    ) -> pb.ModelInferResponse:
        """See infer_unary."""
        self._rpcs.watch(context)
        return await infer_unary.infer(self._front, request, context)

    async def ModelStreamInfer(self, _: object, context: StreamContext) -> None:  # noqa: N802
        """See InferStream."""
        self._rpcs.watch(context)
        stream = InferStream(self._front, context)
        self._streams.add(stream)
        if self._is_ending:
            stream.end()
        try:
            await stream.run()
        finally:
            self._streams.discard(stream)


def _answering(
    message: type[Question], answer: Callable[[Question], Awaitable[Answer]]
) -> "grpc.RpcMethodHandler[Any, Any]":
    """A unary method that answers or raises RouterError."""

    async def handle(request: Question | Unreadable, context: Context) -> Answer:
        try:
            if isinstance(request, Unreadable):
                raise InvalidArgument(f"the request cannot be read as a {message.__name__}")
            return await answer(request)
        except RouterError as error:
            return await abort(context, to_proto(error))
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("a %s failed inside the router; this is a bug", message.__name__)
            return await abort(context, to_proto(InternalError()))

    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=reader(message), response_serializer=lambda told: told.SerializeToString()
    )
