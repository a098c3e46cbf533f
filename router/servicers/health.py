"""grpc.health.v1 and reflection, so that probes, grpcurl, buf curl and ghz work without our protos."""

import asyncio
from typing import TypeAlias

import grpc.aio
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos.inference_router.v1 import inference_router_pb2 as native
from protos.open_inference import open_inference_pb2 as open_inference
from router.core.model_info import ModelState
from router.errors import NotFound, RouterError
from router.models import Models
from router.servicers.status import to_proto
from router.servicers.unary import abort

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((native, "InferenceRouterService"), (open_inference, "GRPCInferenceService"))
)
Context: TypeAlias = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]

Status: TypeAlias = health_pb2.HealthCheckResponse
# How often a model is asked about whose status is watched.
WATCH_S = 1.0

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class PoolWithMethods:
    """The files of all services in one pool, for reflection takes one, and the Open Inference Protocol's is private.

    It knows the file of a method, too: ghz asks for that, and Python's pools know files of messages only.
    """

    def __init__(self) -> None:
        self._pool = DescriptorPool()
        for module in (native, open_inference, health_pb2, reflection_pb2):
            self._pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)

    def __getattr__(self, name: str) -> object:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802 (the pool's name)
        """Raises KeyError for what is neither a message, an enum, a service nor a method."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


class _Servicer(health_aio.HealthServicer):
    """Knows the services, and asks for models."""

    def __init__(self, models: Models) -> None:
        super().__init__()
        self._models = models
        self.is_leaving = False

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """NOT_FOUND, as the protocol has it, for what is neither a service nor a model."""
        if request.service in ("", *SERVICES):
            return await super().Check(request, context)
        try:
            status = await self._status_of(request.service)
        except RouterError as error:
            return await abort(context, to_proto(error))
        if status == Status.SERVICE_UNKNOWN:
            return await abort(context, to_proto(NotFound(f"neither a service nor a model: {request.service!r}")))
        return Status(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802
        """Tell the status, and each other one; SERVICE_UNKNOWN for what is neither a service nor a model."""
        if request.service in ("", *SERVICES):
            await super().Watch(request, context)
            return
        told = None
        while True:
            try:
                status = await self._status_of(request.service)
            except RouterError as error:
                await abort(context, to_proto(error))
            if status != told:
                await context.write(Status(status=status))
                told = status
            await asyncio.sleep(WATCH_S)

    async def _status_of(self, model_name: str) -> int:
        report = await self._models.report(model_name)
        if report.state is ModelState.ABSENT:
            return Status.SERVICE_UNKNOWN
        is_serving = report.state is ModelState.READY and not self.is_leaving
        return Status.SERVING if is_serving else Status.NOT_SERVING


class Health:
    """SERVING unless the router is leaving, whatever its backends do; of a model what its backend tells now."""

    def __init__(self, models: Models) -> None:
        self._servicer = _Servicer(models)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register health and reflection."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        names = (*SERVICES, HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server, PoolWithMethods())  # type: ignore[arg-type]  # asked by name

    async def serve(self) -> None:
        """Say SERVING, for the server as a whole and for its services."""
        for service in ("", *SERVICES):
            await self._servicer.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def leave(self) -> None:
        """Say NOT_SERVING from now on."""
        self._servicer.is_leaving = True
        await self._servicer.enter_graceful_shutdown()
