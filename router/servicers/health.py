"""grpc.health.v1 and reflection, so that probes, grpcurl, buf curl and ghz work without our protos."""

import grpc.aio
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos.inference_router.v1 import inference_router_pb2 as native
from protos.open_inference import open_inference_pb2 as open_inference

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((native, "InferenceRouterService"), (open_inference, "GRPCInferenceService"))
)
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


class Health:
    """SERVING unless the router is leaving, whatever its backends do."""

    def __init__(self) -> None:
        self._servicer = health_aio.HealthServicer()

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
        await self._servicer.enter_graceful_shutdown()
